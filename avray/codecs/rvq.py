"""Residual vector quantisation with learnt centroids: each stage codes what the stages before it left over.

The stages are fitted one after another by Lloyd's algorithm (1982) on the residual, distances by one matrix product,
as in the quantiser of SoundStream (Zeghidour et al. 2021) but without a network around it. Rows are quantised in
blocks of a fixed size counted from the start of their sequence: a matrix product differs in its last bit with the
number of its rows, and so a frame half-way between two centroids would depend on what it was batched with.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from avray.family import Fitted

BLOCK_ROWS = 128
_FIT_ROWS = 1024
"""Distances to 1024 centroids: 4 MB, half of what two cores' caches hold."""
_SMALLEST = 16


@dataclass(frozen=True)
class ResidualKMeans:
    """How codebooks are learnt. ``cardinality`` is the most there will be: the largest power of two for which each
    centroid has ``frames_per_centroid`` frames (but 16 centroids, or one a frame, on the smallest data)."""

    num_codebooks: int
    cardinality: int
    frames_per_centroid: int
    num_rounds: int = 10

    def fit(self, latents: Float[np.ndarray, "time width"], seed: int) -> Fitted:
        """Array ``codebooks`` ``[num_codebooks, cardinality, width]`` float32, the same for the same latents, seed
        and machine. From more frames than the centroids ask for, a sample is drawn."""
        if len(latents) == 0:
            raise ValueError("No frames to learn codes from: the data set is empty or its recordings are too short.")
        generator = torch.Generator().manual_seed(seed)
        most = self.cardinality * self.frames_per_centroid
        chosen = torch.randperm(len(latents), generator=generator)[:most].sort().values
        residual = torch.tensor(np.asarray(latents)[chosen.numpy()], dtype=torch.float32)
        size = self.size_for(len(residual))
        codebooks = []
        for _ in range(self.num_codebooks):
            codebook = _lloyd(residual, size, self.num_rounds, generator)
            residual = residual - codebook[_nearest_and_distance(residual, codebook)[0]]
            codebooks.append(codebook)
        return Fitted({"codebooks": torch.stack(codebooks).numpy()}, {"frames": len(residual)})

    def size_for(self, num_frames: int) -> int:
        carried = 2 ** max(0, (num_frames // self.frames_per_centroid).bit_length() - 1)
        return min(self.cardinality, num_frames, max(_SMALLEST, carried))


class ResidualQuantizer:
    """Codebooks ``[num_codebooks, cardinality, width]`` at work; none of them where nothing was fitted."""

    def __init__(self, codebooks: Float[Tensor, "codebooks cardinality width"]) -> None:
        self.codebooks = codebooks
        self.num_codebooks, self.cardinality = codebooks.shape[:2]

    @classmethod
    def of(cls, fitted: Fitted | None, device: torch.device) -> ResidualQuantizer:
        codebooks = fitted.arrays["codebooks"] if fitted is not None else np.zeros((0, 0, 0), np.float32)
        return cls(torch.tensor(codebooks, dtype=torch.float32, device=device))

    def encode(self, latents: Float[Tensor, "batch width time"],
               num_codebooks: int | None = None) -> Int[Tensor, "batch codebooks time"]:
        """ValueError naming both numbers when more codebooks are asked for than there are."""
        num_codebooks = check_codebooks(num_codebooks, self.num_codebooks)
        latents = latents.to(self.codebooks.device)
        batch, width, time = latents.shape
        codes = torch.empty(batch, num_codebooks, time, dtype=torch.int64, device=latents.device)
        for row in range(batch):
            for start in range(0, time, BLOCK_ROWS):
                piece = latents[row, :, start : start + BLOCK_ROWS].T
                residual = latents.new_zeros(BLOCK_ROWS, width)
                residual[: len(piece)] = piece
                for stage in range(num_codebooks):
                    index = _nearest(residual, self.codebooks[stage])
                    codes[row, stage, start : start + BLOCK_ROWS] = index[: len(piece)]
                    residual = residual - self.codebooks[stage][index]
        return codes

    def decode(self, codes: Int[Tensor, "batch codebooks time"]) -> Float[Tensor, "batch width time"]:
        """The sum of the first ``codes.shape[1]`` codebooks' centroids."""
        check_codebooks(codes.shape[1], self.num_codebooks)
        codes = codes.to(self.codebooks.device)
        chosen = [self.codebooks[stage][codes[:, stage]] for stage in range(codes.shape[1])]
        return torch.stack(chosen).sum(0).transpose(1, 2)


def check_codebooks(asked: int | None, available: int) -> int:
    """``asked``, or all of them for None."""
    if available == 0:
        raise ValueError("This codec has no codes before it is fitted: load it with what its fit gave.")
    if asked is not None and not 1 <= asked <= available:
        raise ValueError(f"{asked} codebooks asked for, but the codec has {available}: ask for 1 to {available}.")
    return available if asked is None else asked


def _nearest(rows: Tensor, codebook: Tensor) -> Tensor:
    return torch.addmm(codebook.square().sum(1), rows, codebook.T, alpha=-2).argmin(1)


def _nearest_and_distance(rows: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor]:
    """Index ``[rows]`` and squared distance ``[rows]`` (but for the row's own square), in pieces that fit the cache."""
    square = codebook.square().sum(1)
    found = [torch.addmm(square, piece, codebook.T, alpha=-2).min(1) for piece in rows.split(_FIT_ROWS)]
    return torch.cat([f.indices for f in found]), torch.cat([f.values for f in found])


def _lloyd(rows: Tensor, size: int, num_rounds: int, generator: torch.Generator) -> Tensor:
    """Centroids ``[size, width]``. One that loses all its rows takes the row that is farthest from its own."""
    codebook = rows[torch.randperm(len(rows), generator=generator)[:size]].clone()
    square = rows.square().sum(1)
    for _ in range(num_rounds):
        index, distance = _nearest_and_distance(rows, codebook)
        counts = torch.bincount(index, minlength=size)
        sums = torch.zeros_like(codebook).index_add_(0, index, rows)
        codebook = torch.where(counts[:, None] > 0, sums / counts[:, None].clamp_min(1), codebook)
        dead = (counts == 0).nonzero()[:, 0]
        if len(dead):
            codebook[dead] = rows[(distance + square).topk(len(dead)).indices]
    return codebook
