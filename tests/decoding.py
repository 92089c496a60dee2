"""Streams pushed in pieces, alone and beside others."""

import numpy as np

from avray.codecs.together import ToDecode, decode


def in_pieces(stream, whole: np.ndarray, sizes: list[int]) -> np.ndarray:
    out, start = [], 0
    while start < len(whole):
        size = sizes[len(out) % len(sizes)]
        out.append(stream.push(whole[start : start + size]))
        start += size
    return np.concatenate([*out, stream.finish()])


def side_by_side(codec, latents: list[np.ndarray], pace: int = 7) -> list[np.ndarray]:
    """Latents ``[time, width]`` of several requests, each begun a step after the one before and ``pace`` frames a step,
    decoded as the engine does it."""
    decoders = [codec.decoder() for _ in latents]
    made, step = [[] for _ in latents], 0
    while step <= len(latents) + max(map(len, latents)) // pace:
        asked = []
        for index, one in enumerate(latents):
            start = (step - index) * pace
            if start >= 0 and (start < len(one) or start == 0):
                asked.append((index, ToDecode(decoders[index], one[start : start + pace], start + pace >= len(one))))
        for (index, _), samples in zip(asked, decode([one for _, one in asked]), strict=True):
            made[index].append(samples)
        step += 1
    return [np.concatenate(pieces) for pieces in made]
