"""Train a model on recordings: ``python pipelines/train.py [key=value …]``; ``--help`` says what there is."""

from avray.cli import TRAIN, run_command
from avray.config import TrainSettings


def main(settings: TrainSettings) -> str:
    """Train, and say where the run is."""
    from avray.registry import family_from_settings
    from avray.train.trainer import train

    summary = train(settings, family_from_settings(settings.family))
    loss = summary["best_validation_loss"]
    said = "" if loss is None else f" · validation loss {loss:.4g}" + "".join(
        f", {name} {value:.4g}" for name, value in summary["baselines"].items())
    return f"The run is in {settings.run.dir}{said}"


if __name__ == "__main__":
    run_command(main, TRAIN)
