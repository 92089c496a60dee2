"""Say whether what a run needs works on this machine: ``python pipelines/check.py [train.py's own words …]``."""

from avray.cli import CHECK, run_command
from avray.config import CheckSettings


def main(settings: CheckSettings) -> str:
    """Check everything, then say it."""
    from avray.errors import SetupFailed
    from avray.setup import as_json, as_text, check_all

    findings = check_all(settings)
    said = as_json(findings) if settings.json else as_text(findings)
    if failed := [finding.name for finding in findings if finding.state == "failed"]:
        print(said, flush=True)
        raise SetupFailed(f"{len(failed)} of {len(findings)} checks failed: {', '.join(failed)}.")
    return said


if __name__ == "__main__":
    run_command(main, CHECK)
