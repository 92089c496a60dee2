"""``data.*``: where rows come from, how they are split, and how they reach the trainers."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from avray.settings.convert import check_above_zero, check_at_least, check_fraction, make_absolute


def default_cache() -> str:
    """AVRAY_CACHE, or ~/.cache/avray."""
    return os.environ.get("AVRAY_CACHE") or "~/.cache/avray"


@dataclass(frozen=True)
class SetSettings:
    """``data.mix[…]``: one of several sets."""

    path: str = ""
    """As ``data.path``."""
    texts: str | None = None
    """As ``data.texts``."""
    format: str = "auto"
    """As ``data.format``."""
    weight: float = 1.0
    """How often its rows come, beside the other sets': with 2 beside 1, twice an epoch."""
    max_samples: int | None = None
    """As ``data.max_samples``, of this set."""
    task: str | None = None
    """The task of rows that name none."""

    def __post_init__(self) -> None:
        if not self.path:
            raise ValueError("data.mix: each set needs a path.")
        if not 0 < self.weight <= 1000:
            raise ValueError(f"data.mix: the weight of {self.path} must be above 0 and at most 1000, got "
                             f"{self.weight}.")
        check_at_least("data.mix[]", self, 1, "max_samples")
        make_absolute(self, "path", "texts")


@dataclass(frozen=True)
class DataSettings:
    """One data set. Local paths are made absolute; URLs (any fsspec scheme) stay as they are."""

    path: str | None = None
    """A folder, a JSONL, CSV or Parquet file, or a URL; null is the synthetic demo set."""
    mix: tuple[SetSettings, ...] = ()
    """Several sets in place of ``path``: [{path: /a, weight: 2, task: singing}, {path: /b, max_samples: 100}]."""
    batches: Literal["mixed", "by_task"] = "mixed"
    """``by_task``: every batch holds rows of one task alone; best with ``mode=prepared``, as each step is a round of
    its own."""
    texts: str | None = None
    """A second folder whose ``.txt`` files or transcripts with times carry the same stems as the recordings, or one
    transcript that names them; null: beside them."""
    format: str = "auto"
    """How to read ``path``; ``auto`` looks at it. The names are those of avray.data.manifest."""
    group_by: Literal["talk", "speaker"] = "talk"
    """What utterances of transcripts with times are split by: whole recordings, or their speakers."""
    mode: Literal["stream", "prepared"] = "stream"
    """``stream`` encodes what the cache lacks while training; ``prepared`` refuses to, and reads the cache alone."""
    cache: str = field(default_factory=default_cache)
    """Encoded columns, shared by all runs and families: a local folder or a URL."""

    demo: Literal["sound", "tasks"] = "sound"
    """Which demo set: recordings with captions, or rows of the five-task model."""
    demo_minutes: float = 4.0
    """Minutes of sound in the demo set."""
    demo_songs: float = 0.8
    """Songs' share of it; the rest are short sounds with captions."""
    demo_dir: str | None = None
    """Where demo sets are made; null: ``demo`` in AVRAY_CACHE, or in ~/.cache/avray."""

    validation_fraction: float = 0.1
    """Share of groups (or of each long recording's time) held out."""
    split_seed: int = 0
    """Chooses what is held out. Apart from ``seed``, so that runs with other seeds validate on the same rows."""
    split_by: Literal["auto", "group", "span"] = "auto"
    """``group``: whole songs or speakers; ``span``: several spans of each recording; ``auto``: group from five
    groups on, span below where recordings are long and carry no text."""
    guard_s: float = 2.0
    """Seconds left unused on each side of a held-out span. At least a column's ``context_s`` (2 s), or a validation
    row is encoded with training sound as its context."""
    holdout_groups: tuple[str, ...] = ()
    """Groups (names, or patterns with *) kept out of training and validation; their loss is reported beside."""

    allowed_roots: tuple[str, ...] = ()
    """Folders outside ``path`` that a manifest may point into; none by default."""
    max_reject_fraction: float = 0.01
    """The run stops (exit 3) when more than this share of rows cannot be used."""
    max_samples: int | None = None
    """Rows to take, the first in the manifest's order; null: all."""
    limits: Mapping[str, Any] = field(default_factory=dict)
    """Bounds on one media file, the fields of avray.media.Limits (``max_seconds`` …); empty: its defaults."""

    window_rows: int = 1024
    """Rows held for shuffling, over all lanes together."""
    shard_examples: int = 64
    """Examples a cache shard, the unit that is committed or lost."""
    shard_seconds: float = 600.0
    """Seconds of media a cache shard, if that is reached first."""
    fit_rows: int = 512
    """Training rows that ``family.fit`` sees (k-means codes, mean and scale)."""

    embed_workers: int = 1
    """Actors for each frozen network."""
    embed_num_cpus: float = 1.0
    """Logical CPUs of each such actor; a fraction is one torch thread."""
    embed_num_gpus: float = 0.0
    """Share of a GPU of each such actor; 0 encodes on the CPU."""
    prefetch_steps: int = 2
    """Batches made ready ahead of the trainer."""
    no_progress_timeout_s: float = 600.0
    """Seconds without one finished block after which Ray Data gives up, instead of its own half hour."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "demo_dir", self.demo_dir or os.path.join(default_cache(), "demo"))
        make_absolute(self, "path", "texts", "cache", "demo_dir")
        check_above_zero("data", self, "demo_minutes", "shard_seconds", "no_progress_timeout_s")
        check_fraction("data", self, "validation_fraction", below_one=True)
        check_fraction("data", self, "max_reject_fraction")
        check_fraction("data", self, "demo_songs")
        check_at_least("data", self, 0, "guard_s", "split_seed", "embed_num_cpus", "embed_num_gpus")
        check_at_least("data", self, 1, "max_samples", "window_rows", "shard_examples", "fit_rows", "embed_workers",
                       "prefetch_steps")
        if self.mix and self.path is not None:
            raise ValueError("data.mix names several sets and data.path one: give one of them.")
        if self.texts is not None and self.path is None:
            raise ValueError("data.texts needs data.path: the demo set carries its own captions.")
