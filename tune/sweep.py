"""Search settings with many trials of train.py: ``python tune/sweep.py [key=value …]``; ``--help`` lists them."""

from avray.cli import SWEEP, run_command
from avray.config import SweepSettings


def main(settings: SweepSettings) -> str:
    """Sweep, and say where the best is."""
    from avray.tuning.sweep import sweep

    return sweep(settings)


if __name__ == "__main__":
    run_command(main, SWEEP)
