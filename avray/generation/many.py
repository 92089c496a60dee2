"""``pipelines/generate.py data.path=…``: one request a row, on Ray Data, resumable.

Each row's file is written whole and then noted in ``results-…jsonl``, so a run that was killed goes on with what is
missing. The seed of a row is that of the command plus a hash of its id: the same whatever the order or the company.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray.data

from avray.config import GenerateSettings
from avray.data.cluster import Needs, start_ray
from avray.data.dataset import read_limits
from avray.data.manifest import load_manifest
from avray.devices import device_of
from avray.engine import Generated, Generator
from avray.errors import DataError
from avray.family import Options, Request, Row
from avray.generation.one import options_of, write
from avray.media import read_audio, read_video
from avray.progress import counter
from avray.store import Store


class GenerateRows:
    """An actor that holds the model; rows in, one result a row out."""

    def __init__(self, checkpoint: str, device: str, slots: int, options: Options, seed: int, folder: str,
                 include_prompt: bool, family: str | None) -> None:
        self.generator = Generator.open(checkpoint, device=device, slots=slots, family=family)
        self.options, self.seed, self.folder, self.include_prompt = options, seed, folder, include_prompt

    def __call__(self, table: pa.Table) -> pa.Table:
        rows: list[Row] = [json.loads(text) for text in table["row"].to_pylist()]
        results = []
        good: list[tuple[Row, Request]] = []
        for row in rows:
            try:
                good.append((row, self._request(row)))
            except (DataError, ValueError) as error:
                results.append({"id": row["id"], "error": str(error)})
        generated = self.generator.generate_many([request for _, request in good])
        results += [self._written(row, request, result) for (row, request), result in zip(good, generated, strict=True)]
        return pa.table({"result": pa.array([json.dumps(result) for result in results])})

    def _request(self, row: Row) -> Request:
        audio = None
        if row.get("audio"):
            audio = read_audio(row["audio"], start_s=row.get("start_s") or 0.0, duration_s=row.get("duration_s"))
        video = None
        if row.get("video"):
            video = read_video(row["video"], row.get("start_s") or 0.0, row.get("duration_s"))
        request = Request(text=row.get("text") or row.get("instruction"), audio=audio, video=video,
                          task=row.get("task"), fields=row,
                          options=self.options, seed=row_seed(self.seed, row["id"]))
        self.generator.check(request)
        return request

    def _written(self, row: Row, request: Request, result: Generated) -> dict[str, Any]:
        path = write(result, f"{self.folder}/{file_stem(row['id'])}", self.include_prompt)
        return {"id": row["id"], "file": path.name, "seed": request.seed, "text": request.text}


def generate_many(settings: GenerateSettings) -> str:
    """Generate for every row that has no result yet; returns the line that says where they are."""
    data = settings.data
    assert data.path is not None and settings.checkpoint is not None
    folder = Path(settings.output or "generated").absolute()
    folder.mkdir(parents=True, exist_ok=True)
    manifest = load_manifest(data.path, texts=data.texts, format=data.format, allowed_roots=data.allowed_roots,
                             limits=read_limits(data), max_samples=data.max_samples)
    manifest.write_rejects(folder / "rejects.jsonl")
    manifest.enforce(data.max_reject_fraction, folder / "rejects.jsonl")
    done = finished(folder)
    rows = [row for row in manifest.rows if row["id"] not in done]
    if rows:
        run(settings, rows, folder)
    failed = [result for result in read_results(folder).values() if "error" in result]
    said = f" · {len(failed)} failed: {failed[0]['error']}" if failed else ""
    return f"{len(finished(folder))} of {len(manifest.rows)} results are in {folder} ({len(rows)} made now){said}"


def run(settings: GenerateSettings, rows: list[Row], folder: Path) -> None:
    device = device_of(settings.device)
    gpus = 1.0 if device == "cuda" else 0.0
    start_ray(Needs(1, settings.num_workers, 1.0, gpus), settings.cluster, settings.data.no_progress_timeout_s,
              shared={"checkpoint": settings.checkpoint, "data.path": settings.data.path, "output": str(folder)})
    batches = [rows[i : i + settings.slots] for i in range(0, len(rows), settings.slots)]
    dataset = ray.data.from_arrow([pa.table({"row": [json.dumps(row) for row in batch]}) for batch in batches])
    arguments = (settings.checkpoint, device, settings.slots, options_of(settings), settings.seed, str(folder),
                 settings.include_prompt, settings.family.get("_target_"))
    dataset = dataset.map_batches(GenerateRows, fn_constructor_args=arguments, batch_size=None, batch_format="pyarrow",
                                  num_cpus=1.0, num_gpus=gpus,
                                  compute=ray.data.ActorPoolStrategy(size=min(settings.num_workers, len(batches))))
    progress = counter(settings.logging.progress, "Generating", "requests")
    made = 0
    with open(folder / "results.jsonl", "a", encoding="utf-8") as file:
        for batch in dataset.iter_batches(batch_size=None, batch_format="pyarrow"):
            for text in batch["result"].to_pylist():
                file.write(text + "\n")
            file.flush()
            made += batch.num_rows
            if progress:
                progress(made, len(rows))


def read_results(folder: Path) -> dict[str, dict[str, Any]]:
    """The last result of each id; a line cut short by a kill is left out."""
    path = folder / "results.jsonl"
    results = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            result = json.loads(line)
        except json.JSONDecodeError:
            continue
        results[result["id"]] = result
    return results


def finished(folder: Path) -> set[str]:
    """Ids whose file is there. What failed is tried again."""
    store = Store(str(folder))
    return {name for name, result in read_results(folder).items() if "file" in result and store.exists(result["file"])}


def row_seed(seed: int, name: str) -> int:
    return (seed + int.from_bytes(hashlib.blake2b(name.encode(), digest_size=7).digest(), "big")) % 2**63


def file_stem(name: str) -> str:
    """A file name that is the id where it can be, and never leaves the folder."""
    safe = "".join(c if c.isalnum() or c in "-_" else "_" for c in name)[:80]
    return safe if safe == name else f"{safe}-{hashlib.blake2b(name.encode(), digest_size=4).hexdigest()}"
