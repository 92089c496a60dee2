"""Report on a checkpoint, or on a codec's round trip: ``python pipelines/evaluate.py checkpoint=runs/x/best``."""

from avray.cli import EVALUATE, run_command
from avray.config import EvaluateSettings


def main(settings: EvaluateSettings) -> str:
    """Write the report, and say where it is."""
    if settings.checkpoint is None:
        from avray.evaluation.round_trips import round_trips

        return f"The round trips are in {round_trips(settings)}"
    from avray.evaluation.evaluate import evaluate

    summary = evaluate(settings)
    beside = "".join(f", {name} {value:.4g}" for name, value in summary["baselines"].items())
    return f"The report is {settings.run.dir}/report.html · loss {summary['validation_loss']:.4g}{beside}"


if __name__ == "__main__":
    run_command(main, EVALUATE)
