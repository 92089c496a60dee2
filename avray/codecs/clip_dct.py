"""Two seconds of moving pictures as 256 numbers, and back: the default embedding of video, which needs no weights.

The numbers are the lowest coefficients of an orthonormal spatio-temporal DCT of luma and of the two colour differences
(BT.601): enough to see what moves where, and few enough for a small model to predict. The first of each block is the
mean, so a number is of the size of a pixel (0 to 1) whatever the clip's.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, UInt8

FRAME_RATE_HZ, NUM_FRAMES, SIZE = 10.0, 20, 64
CLIP_S = NUM_FRAMES / FRAME_RATE_HZ
BLOCKS = ((3, 8, 8), (2, 4, 4), (2, 4, 4))
"""Coefficients kept of luma, blue and red difference, as (time, height, width): 192 + 32 + 32 = 256."""
WIDTH = sum(int(np.prod(block)) for block in BLOCKS)


def encode_clip(frames: UInt8[np.ndarray, "time height width 3"]) -> Float[np.ndarray, " 256"]:
    """Frames -> float32 numbers: the blocks of ``BLOCKS`` one after another, row-major."""
    red, green, blue = np.moveaxis(frames.astype(np.float64) / 255, -1, 0)
    luma = 0.299 * red + 0.587 * green + 0.114 * blue
    planes = (luma, (blue - luma) / 1.772, (red - luma) / 1.402)
    kept = [_analyse(plane, block).ravel() for plane, block in zip(planes, BLOCKS, strict=True)]
    return np.concatenate(kept).astype(np.float32)


def decode_clip(numbers: Float[np.ndarray, " 256"], num_frames: int = NUM_FRAMES,
                size: int = SIZE) -> UInt8[np.ndarray, "time size size 3"]:
    """The smoothest clip that has these numbers, clipped to what a pixel can be."""
    starts = np.cumsum([0, *(int(np.prod(block)) for block in BLOCKS)])
    luma, blue_difference, red_difference = (
        _synthesise(numbers[start:stop].reshape(block).astype(np.float64), (num_frames, size, size))
        for start, stop, block in zip(starts, starts[1:], BLOCKS, strict=False))
    red, blue = luma + 1.402 * red_difference, luma + 1.772 * blue_difference
    green = (luma - 0.299 * red - 0.114 * blue) / 0.587
    pixels = np.stack([red, green, blue], -1)
    return np.round(255 * np.clip(pixels, 0, 1)).astype(np.uint8)


def _analyse(plane: np.ndarray, block: tuple[int, int, int]) -> np.ndarray:
    bases = [_basis(kept, size) for kept, size in zip(block, plane.shape, strict=True)]
    return np.einsum("thw,it,jh,kw->ijk", plane, *bases, optimize=True) / np.sqrt(plane.size)


def _synthesise(coefficients: np.ndarray, shape: tuple[int, int, int]) -> np.ndarray:
    bases = [_basis(kept, size) for kept, size in zip(coefficients.shape, shape, strict=True)]
    return np.einsum("ijk,it,jh,kw->thw", coefficients, *bases, optimize=True) * np.sqrt(np.prod(shape))


def _basis(kept: int, size: int) -> np.ndarray:
    """The first ``kept`` rows of the orthonormal DCT-II; rows beyond ``size`` are zero (a clip of one frame)."""
    basis = np.sqrt(2 / size) * np.cos(np.pi / size * np.outer(np.arange(kept), np.arange(size) + 0.5))
    basis[0] /= np.sqrt(2)
    basis[size:] = 0
    return basis
