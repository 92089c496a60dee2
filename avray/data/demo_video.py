"""Two-second clips of a shape that moves."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from avray.codecs.clip_dct import NUM_FRAMES, SIZE

SHAPES = ("circle", "square", "triangle")
DIRECTIONS = ("left", "right", "up", "down")
COLOURS = {"red": (220, 50, 40), "green": (40, 170, 70), "blue": (50, 90, 220), "orange": (240, 150, 30),
           "purple": (150, 60, 190)}
BACKGROUNDS = {"dark": (20, 20, 28), "bright": (235, 235, 230)}


@dataclass(frozen=True)
class Clip:
    """What a clip shows. The shape's centre goes from ``start`` to ``stop``, both (x, y) in pixels."""

    shape: str
    colour: str
    direction: str
    background: str
    radius: float
    start: tuple[float, float]
    stop: tuple[float, float]

    @property
    def label(self) -> str:
        return f"{self.colour} {self.shape}, {self.direction}, {self.background}"

    def caption(self) -> str:
        article = "An" if self.colour[0] in "aeiou" else "A"
        return f"{article} {self.colour} {self.shape} moves {self.direction} on a {self.background} background."

    def fields(self) -> dict[str, object]:
        return {"shape": self.shape, "colour": self.colour, "direction": self.direction, "background": self.background}


def plan_clip(index: int, rng: np.random.Generator) -> Clip:
    """The ``index``-th clip: shapes and directions take turns, the rest is drawn."""
    direction = DIRECTIONS[index // len(SHAPES) % len(DIRECTIONS)]
    radius = float(rng.uniform(7, 12))
    margin = radius + 2
    across, near, far = rng.uniform(margin, SIZE - margin), margin, SIZE - margin - rng.uniform(0, 8)
    first, last = (far, near) if direction in ("left", "up") else (near, far)
    horizontal = direction in ("left", "right")
    start, stop = [(float(along), float(across)) if horizontal else (float(across), float(along))
                   for along in (first, last)]
    return Clip(SHAPES[index % len(SHAPES)], list(COLOURS)[rng.integers(len(COLOURS))], direction,
                list(BACKGROUNDS)[rng.integers(len(BACKGROUNDS))], radius, start, stop)


def draw_clip(clip: Clip) -> np.ndarray:
    """Frames ``[20, 64, 64, 3]`` uint8, edges smoothed over a pixel."""
    centres = np.linspace(clip.start, clip.stop, NUM_FRAMES)
    pixels = np.arange(SIZE) + 0.5
    x = pixels[None, None, :] - centres[:, 0, None, None]
    y = pixels[None, :, None] - centres[:, 1, None, None]
    if clip.shape == "circle":
        outside = np.hypot(x, y) - clip.radius
    elif clip.shape == "square":
        outside = np.maximum(abs(x), abs(y)) - 0.85 * clip.radius
    else:
        outside = np.maximum(y - clip.radius / 2, np.sqrt(0.75) * abs(x) - (y + clip.radius) / 2)
    cover = np.clip(0.5 - outside, 0.0, 1.0)[..., None]
    colour, background = np.array(COLOURS[clip.colour]), np.array(BACKGROUNDS[clip.background])
    return np.round(background + cover * (colour - background)).astype(np.uint8)
