"""Sequences of many small items as bytes in one buffer: an item is made when it is read, and lives no longer.

A manifest row as a dict takes about a kilobyte, as bytes 130; and a buffer is one NumPy array, which Ray's object store
hands to every process of a node as the same memory, where objects were unpickled by each.
"""

from __future__ import annotations

import json
from abc import abstractmethod
from array import array
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Generic, Self, TypeVar, overload

import numpy as np

from avray.family import Row

T = TypeVar("T")

_ENCODER = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), default=str)
_SCAN = json.JSONDecoder().scan_once  # type: ignore[attr-defined]  # what json.loads comes to, at half its cost


def to_bytes(value: Any) -> bytes:
    """JSON; half a surrogate, as in the name of a file that is no UTF-8, is kept. What JSON has no word for becomes a
    string."""
    return _ENCODER.encode(value).encode("utf-8", "surrogatepass")


def from_bytes(content: bytes) -> Any:
    return _SCAN(content.decode("utf-8", "surrogatepass"), 0)[0]


class Packed(Sequence[T], Generic[T]):
    """Grows by ``append``, until it is picked from or sent elsewhere."""

    def __init__(self, items: Iterable[T] = ()) -> None:
        self._buffer: Any = bytearray()
        self._starts: Any = array("q")
        self._sizes: Any = array("I")
        for item in items:
            self.append(item)

    @abstractmethod
    def _encode(self, item: T) -> bytes: ...

    @abstractmethod
    def _decode(self, content: bytes) -> T: ...

    def append(self, item: T) -> None:
        content = self._encode(item)
        self._starts.append(len(self._buffer))
        self._sizes.append(len(content))
        self._buffer += content

    def pick(self, indices: Iterable[int]) -> Self:
        """The items at these places, in this order, in the same buffer."""
        chosen = np.asarray(indices if isinstance(indices, np.ndarray | array) else list(indices), np.int64)
        picked = type(self)()
        picked.__dict__.update(self._shared())
        picked._buffer = self._buffer
        picked._starts, picked._sizes = np.asarray(self._starts)[chosen], np.asarray(self._sizes)[chosen]
        return picked

    def _shared(self) -> dict[str, Any]:
        """What reading an item needs besides its bytes."""
        return {}

    def __len__(self) -> int:
        return len(self._starts)

    def __iter__(self) -> Iterator[T]:
        for start, size in zip(self._starts, self._sizes, strict=True):
            yield self._decode(bytes(memoryview(self._buffer)[start : start + size]))

    @overload
    def __getitem__(self, index: int) -> T: ...

    @overload
    def __getitem__(self, index: slice) -> list[T]: ...

    def __getitem__(self, index: int | slice) -> T | list[T]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        start = self._starts[index]
        return self._decode(bytes(memoryview(self._buffer)[start : start + self._sizes[index]]))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and len(self) == len(other) and all(
            mine == theirs for mine, theirs in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]

    def __reduce__(self) -> tuple[Any, ...]:
        """As three arrays, which pickle leaves where they are; of a small pick its own bytes only."""
        buffer, starts = np.frombuffer(self._buffer, np.uint8), np.asarray(self._starts, np.int64)
        sizes = np.asarray(self._sizes, np.uint32)
        if int(sizes.sum()) < len(buffer):
            buffer = np.concatenate([np.zeros(0, np.uint8), *(
                buffer[start : start + size] for start, size in zip(starts.tolist(), sizes.tolist(), strict=True))])
            starts = np.cumsum(sizes, dtype=np.int64) - sizes
        return _restored, (type(self), buffer, starts, sizes, self._shared())


def _restored(kind: type[Packed[Any]], buffer: np.ndarray, starts: np.ndarray, sizes: np.ndarray,
              shared: dict[str, Any]) -> Packed[Any]:
    packed = kind()
    packed.__dict__.update(shared)
    packed._buffer, packed._starts, packed._sizes = buffer, starts, sizes
    return packed


class Rows(Packed[Row]):
    """Manifest rows. Each reading gives a new dict: to change rows, make new ones."""

    def __init__(self, items: Iterable[Row] = ()) -> None:
        self._names: dict[tuple[str, ...], int] = {}
        self._fields: list[tuple[str, ...]] = []
        super().__init__(items)

    def _encode(self, item: Row) -> bytes:
        names = tuple(item)
        kind = self._names.setdefault(names, len(self._names))
        if kind == len(self._fields):
            self._fields.append(names)
        return to_bytes([kind, *item.values()])

    def _decode(self, content: bytes) -> Row:
        kind, *values = from_bytes(content)
        return dict(zip(self._fields[kind], values, strict=True))

    def _shared(self) -> dict[str, Any]:
        return {"_names": self._names, "_fields": self._fields}
