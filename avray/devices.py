"""Which device a command runs on: the one asked for, or an error."""

from __future__ import annotations

from collections.abc import Callable

from avray.errors import MissingDependency


def device_of(name: str) -> str:
    """``auto`` is cuda where there is one, else cpu. MissingDependency for a device by name that is not here."""
    import torch

    here: dict[str, Callable[[], bool]] = {
        "cuda": torch.cuda.is_available, "mps": torch.backends.mps.is_available, "cpu": lambda: True}
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if not here[name]():
        raise MissingDependency(f"The device {name} was asked for and this machine has none: take cpu, or a machine "
                                "with one.")
    return name
