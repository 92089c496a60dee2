"""The original audio model's ``.pt``: a dictionary of names and vectors, read with tensors only and written as it was.

A name's text is the ``.txt`` of that name. Windows of one recording stand together in a split: their names are the
recording's with a number or a span behind.
"""

from __future__ import annotations

import io
import re
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from avray.data.cache import Cache
from avray.data.fields import Unusable
from avray.data.folders import Texts
from avray.data.plan import Plan
from avray.data.rows import example_row
from avray.data.sources import RawRow, Source
from avray.errors import DataError
from avray.family import Column, Unit
from avray.media import read_audio, write_audio
from avray.store import Store

_WINDOW = re.compile(r"(@[\d.]+-[\d.]+|[_-]?(chunk|part|segment|window)?[_-]?\d+)$", re.IGNORECASE)


def read_embeddings(source: Source) -> Iterator[RawRow]:
    """Rows with ``embedding`` (a list of numbers, or of frames of them) and ``text``. What is not finite numbers, or as
    many as the first has, is rejected by name; a file that holds more than tensors as a whole."""
    texts = Texts.of(Source(source.store, texts=source.texts))
    width = None
    for file in source.names:
        try:
            content = load_tensors(source.store.read(file))
        except Unusable as error:
            yield RawRow(file, reason=str(error))
            continue
        stems = {name: re.sub(r"\.(wav|flac|mp3|ogg|pt)$", "", name) for name in content}
        groups = {name: _WINDOW.sub("", stem) or stem for name, stem in stems.items()}
        if len(set(groups.values())) == 1:
            groups = stems
        for name, value in content.items():
            stem = stems[name]
            text = texts.find(stem)
            fields: dict[str, Any] = {"id": stem, "group": groups[name]}
            reason = ""
            try:
                fields["embedding"] = numbers_of(value, width)
                fields["text"] = texts.read(text) if text else None
                width = np.shape(fields["embedding"])[-1]
            except Unusable as error:
                reason = str(error)
            yield RawRow(f"{file}:{name}", 0, fields, reason)
    for name in sorted(texts.unused) if source.texts else ():
        yield RawRow(name, reason="no vector has the name of this text")


def load_tensors(content: bytes) -> Mapping[str, Any]:
    """What a ``.pt`` holds, without running any of it. Unusable for one that is no dictionary by name, that would need
    more than tensors and plain values to be read, or that is compressed (torch never writes that)."""
    import torch

    try:
        if zipfile.is_zipfile(io.BytesIO(content)):
            with zipfile.ZipFile(io.BytesIO(content)) as archive:
                if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                    raise Unusable("it is compressed, which torch.save never does")
        loaded = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Unusable:
        raise
    except Exception as error:  # torch raises whatever its unpickler met
        found = re.search(r"GLOBAL\s+([\w.]+)", str(error))
        what = f", {found[1]} for one" if found else ""
        if "eights only" in str(error):
            raise Unusable(f"it holds more than tensors{what}, which could run code when opened") from error
        raise Unusable(f"it cannot be read as a .pt file ({(str(error) or type(error).__name__).splitlines()[0][:80]})"
                       ) from error
    if not isinstance(loaded, dict) or not all(isinstance(name, str) for name in loaded):
        raise Unusable("it is not a dictionary of names and vectors")
    return loaded


def numbers_of(value: Any, width: int | None) -> list[Any]:
    """A vector ``[width]`` or frames ``[time, width]`` as lists. Unusable for anything else."""
    import torch

    if not isinstance(value, torch.Tensor):
        raise Unusable(f"it is a {type(value).__name__}, not a tensor")
    if value.is_sparse or value.is_quantized or value.ndim not in (1, 2) or not value.numel() or value.is_complex():
        raise Unusable(f"its shape {list(value.shape)} is that of no vector or frames")
    if not torch.isfinite(value.float()).all():
        raise Unusable("it holds numbers that are not finite")
    if width not in (None, value.shape[-1]):
        raise Unusable(f"it has {value.shape[-1]} numbers, and the first vector {width}")
    values: list[Any] = value.float().tolist()
    return values


def write_embeddings(path: str, plans: Sequence[Plan], cache: Cache, columns: Sequence[Column]) -> int:
    """The mean of each window's frames as the original's ``{name: vector}``; how many there are. A window without
    features is left out by name. DataError for a family without frames of sound."""
    import torch

    column = next((column for column in columns if column.modality == "audio"), None)
    if column is None:
        raise DataError("output_file: this family has no frames of sound to write.")
    vectors = {}
    for name, shard, example in _examples(plans):
        row = example_row(shard, example, cache, [column])
        frames = next((value for key, value in row.items() if key.endswith(f".{column.name}")), None)
        if frames is not None:
            vectors[name] = torch.from_numpy(np.asarray(frames, np.float32).mean(0))
    buffer = io.BytesIO()
    torch.save(vectors, buffer)
    folder, _, file = path.rpartition("/")
    Store(folder).write(file, buffer.getvalue())
    return len(vectors)


def write_chunks(folder: str, plans: Sequence[Plan]) -> int:
    """``<name>.wav`` and ``<name>.txt`` of every window, under the names that ``write_embeddings`` gives; how many. One
    whose sound cannot be read is left out by name."""
    from pathlib import Path

    Path(folder).mkdir(parents=True, exist_ok=True)
    made = 0
    for name, shard, example in _examples(plans):
        units: list[Unit] = [shard.units[index] for index in example.units.values()]
        sound = next((unit for unit in units if unit.modality == "audio"), None)
        if sound is None:
            continue
        try:
            audio = read_audio(sound.source, start_s=sound.start_s, duration_s=sound.duration_s)
        except DataError:
            continue
        write_audio(f"{folder}/{name}.wav", audio)
        Path(f"{folder}/{name}.txt").write_text(str(example.fields.get("text") or ""), encoding="utf-8")
        made += 1
    return made


def _examples(plans: Sequence[Plan]) -> Iterator[tuple[str, Any, Any]]:
    """Each example with a name that is a file's, its own whatever the others do."""
    taken: dict[str, int] = {}
    for plan in plans:
        for shard in plan.shards:
            for example in shard.examples:
                name = re.sub(r"[^\w.@#-]+", "_", example.id)
                taken[name] = taken.get(name, 0) + 1
                yield (name if taken[name] == 1 else f"{name}_{taken[name]}"), shard, example
