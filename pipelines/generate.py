"""Generate from a checkpoint: ``python pipelines/generate.py checkpoint=runs/x/best audio=in.wav output=out.wav``."""

from avray.cli import GENERATE, run_command
from avray.config import GenerateSettings


def main(settings: GenerateSettings) -> str:
    """One request, or one for each row of ``data.path``."""
    if settings.data.path is not None:
        from avray.generation.many import generate_many

        return generate_many(settings)
    from avray.generation.one import generate

    return generate(settings)


if __name__ == "__main__":
    run_command(main, GENERATE)
