"""Encode a data set into the cache, or report what it holds:
``python pipelines/prepare.py [dry_run=true] [key=value …]``."""

from avray.cli import PREPARE, run_command
from avray.config import PrepareSettings


def main(settings: PrepareSettings) -> str:
    """Check the data set, and encode what the cache lacks of it."""
    from avray.data.prepare import check, prepare_all
    from avray.registry import family_from_settings

    family = family_from_settings(settings.family)
    return check(settings, family) if settings.dry_run else prepare_all(settings, family)


if __name__ == "__main__":
    run_command(main, PREPARE)
