"""``summary.json``: what a run came to, for scripts and for the sweep."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from avray import __version__
from avray.data.cache import Cache
from avray.data.prepare import enforce, write_lost
from avray.store import Store
from avray.train.job import Job

VERSIONS = ("torch", "ray", "numpy", "pyarrow", "transformers")


def write_summary(job: Job, outcome: Mapping[str, Any], rows: Mapping[str, int], num_parameters: int, seconds: float,
                  extra: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Write it, and return what was written. ``outcome`` is the loop's, as a mapping."""
    run_dir = job.settings.run.dir
    best = outcome["best_validation_loss"]
    summary: dict[str, Any] = {
        "family": job.family_record.get("name", type(job.family).__name__),
        "parameters": num_parameters,
        "steps": outcome["step"],
        "epochs": outcome["step"] / job.train_order.steps_per_epoch,
        "seconds": round(seconds, 1),
        "best_validation_loss": best,
        "baselines": outcome["baselines"],
        "checkpoint": f"{run_dir}/{'best' if best is not None else 'last'}",
        "rows": dict(rows),
        "throughput": {"value": outcome["rows_per_s"], "unit": "rows/s"},
        "waiting_for_data": outcome["waiting"],
        "stopped_early": outcome["stopped_early"],
        "device": job.settings.trainer.device_name,
        "versions": {"python": platform.python_version(), "avray": __version__,
                     **{name: version(name) for name in VERSIONS}},
        **(extra or {}),
    }
    Store(run_dir).write("summary.json", json.dumps(summary, indent=2).encode())
    return summary


def rejected_rows(job: Job, cache: Cache, rejects_path: Path) -> dict[str, int]:
    """Every row counted: those of the manifest, less the examples whose media could not be decoded after all."""
    lost = {**cache.rejects(job.train, job.columns), **cache.rejects(job.validation, job.columns)}
    write_lost(lost, rejects_path)
    total = job.train.num_examples + job.validation.num_examples
    enforce(len(lost), total, job.settings.data.max_reject_fraction, rejects_path)
    return {**job.rows, "examples": total - len(lost), "examples_rejected": len(lost)}
