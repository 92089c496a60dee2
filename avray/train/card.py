"""The model card that every checkpoint carries: what it is, what it saw, what it reached."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from avray.train.job import Job


def model_card(job: Job, step: int, figures: Mapping[str, Any]) -> str:
    """Markdown."""
    data, trainer = job.settings.data, job.settings.trainer
    loss = figures.get("validation_loss")
    lines = [
        f"# {job.family_record.get('name', type(job.family).__name__)} at step {step}",
        "",
        "Trained by avray. `python pipelines/generate.py checkpoint=<this folder>` generates with it.",
        "",
        "## Data",
        f"- source: {data.path or ', '.join(one.path for one in data.mix) or 'the synthetic demo set'}",
        f"- training examples: {job.train.num_examples}; validation examples: {job.validation.num_examples}",
        f"- rows used: {job.rows.get('used', 0)}, rejected: {job.rows.get('rejected', 0)}",
        "- licence: that of the data set; nobody has stated one here" if data.path or data.mix else
        "- licence: none needed, the recordings are made by avray",
        "",
        "## Figures",
        f"- validation loss: {'not measured' if loss is None else f'{loss:.6g}'}",
        *(f"- baseline {name}: {value:.6g}" for name, value in figures.get("baselines", {}).items()),
        "",
        "## Settings",
        f"- seed {job.settings.seed}, batch {trainer.batch_size}, precision {trainer.precision}",
        "- the rest is in settings.json and family.json",
        "",
    ]
    return "\n".join(lines)
