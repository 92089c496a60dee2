"""avray turns recordings into served generators, on Ray. ``avray.load("runs/x/best").generate(…)`` is the door."""

__version__ = "0.1.0"

__all__ = ["load"]


def load(checkpoint: str, device: str = "cpu", slots: int = 1, family: str | None = None):
    """Open a run, a link or a checkpoint folder, or the URL of one, for generation; see
    :class:`avray.engine.Generator`. ``family`` is the dotted path of a family of one's own."""
    from avray.engine import Generator

    return Generator.open(checkpoint, device=device, slots=slots, family=family)
