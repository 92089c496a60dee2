"""Text to ids and back: bytes by default, the characters of the training texts, or any tokeniser of transformers, kept
whole in the checkpoint."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from avray.errors import MissingDependency

BYTES, CHARACTERS = "bytes", "characters"


class Tokens(Protocol):
    """Ids below ``size``. ``end`` closes a text, and stands in front of it as its start."""

    @property
    def size(self) -> int: ...

    @property
    def end(self) -> int: ...

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: list[int]) -> str:
        """Bytes that are no UTF-8 become U+FFFD."""


@dataclass(frozen=True)
class Bytes:
    """UTF-8, and one id more."""

    size: int = 257
    end: int = 256

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, ids: list[int]) -> str:
        return bytes(i for i in ids if i < 256).decode(errors="replace")


@dataclass(frozen=True)
class Characters:
    """One id for each of ``known``, then ``end``, then one for every character that is not."""

    known: str

    @property
    def size(self) -> int:
        return len(self.known) + 2

    @property
    def end(self) -> int:
        return len(self.known)

    @property
    def unknown(self) -> int:
        return len(self.known) + 1

    def encode(self, text: str) -> list[int]:
        return [found if (found := self.known.find(character)) >= 0 else self.unknown for character in text]

    def decode(self, ids: list[int]) -> str:
        return "".join(self.known[i] for i in ids if i < self.end)


class Learnt:
    """A ``tokenizer.json``."""

    def __init__(self, content: str, end: int, size: int) -> None:
        from tokenizers import Tokenizer

        self.tokenizer = Tokenizer.from_str(content)
        self.end, self.size = end, size

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids)


def read_tokens(source: str, download: bool = False) -> dict[str, Any]:
    """What a checkpoint keeps of ``bytes`` or of a folder's or hub repository's tokeniser: plain data, for
    ``open_tokens``. MissingDependency, naming the cure, where it is not at hand; ValueError where no id ends a text."""
    if source == BYTES:
        return {"kind": BYTES}
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(source, local_files_only=not download)
        content = tokenizer.backend_tokenizer.to_str()
    except (OSError, ValueError, AttributeError) as error:
        here = "cannot be read" if Path(source).exists() else "is not on this machine"
        raise MissingDependency(f"family.tokenizer = {source} {here}: give a folder with a tokenizer.json, the word "
                                f"{BYTES}, or family.download=true to fetch it once.") from error
    if tokenizer.eos_token_id is None:
        raise ValueError(f"family.tokenizer = {source} has no end-of-text token, so nothing could learn to stop: give "
                         "another.")
    return {"kind": "tokenizer.json", "content": content, "end": tokenizer.eos_token_id, "size": len(tokenizer)}


def read_characters(texts: Iterable[str]) -> dict[str, Any]:
    """The characters of these texts, in order of their code points, for ``open_tokens``."""
    return {"kind": CHARACTERS, "known": "".join(sorted(set().union(*texts)))}


def open_tokens(kept: dict[str, Any]) -> Tokens:
    """The inverse of ``read_tokens``."""
    if kept["kind"] == CHARACTERS:
        return Characters(kept["known"])
    return Bytes() if kept["kind"] == BYTES else _learnt(kept["content"], kept["end"], kept["size"])


@functools.lru_cache(maxsize=4)
def _learnt(content: str, end: int, size: int) -> Learnt:
    return Learnt(content, end, size)
