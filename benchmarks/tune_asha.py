"""ASHA beside the full random search of the same 16 configurations: the loss it finds, and the training steps it takes.

Fixed seeds, the demo set. The random search is run to its end; ASHA then takes the same trials in the same order (a
trial's values follow from its number alone).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def sweep(tune: str, folder: Path, arguments: list[str]) -> dict[str, Any]:
    subprocess.run([sys.executable, str(ROOT / "tune" / "sweep.py"), f"tune={tune}", f"run.dir={folder}",
                    "tune.max_concurrent=2", "logging.progress=off", *arguments], check=True)
    summary: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    return summary


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", default=f"/tmp/avray-tune-asha-{time.time_ns()}")
    parser.add_argument("arguments", nargs="*", help="key=value for both")
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ["PYTHONPATH"] = str(ROOT)
    base = Path(options.base)
    found = {name: sweep(name, base / name, options.arguments) for name in ("random", "asha")}
    print("| search | best validation loss | training steps | share | seconds |\n|---|---|---|---|---|")
    for name, summary in found.items():
        print(f"| {name} | {summary['best']['values']['validation_loss']:.4f} (trial {summary['best']['trial']}) | "
              f"{summary['steps']:,} | {summary['steps'] / found['random']['steps']:.2f} | {summary['seconds']:.0f} |")


if __name__ == "__main__":
    main()
