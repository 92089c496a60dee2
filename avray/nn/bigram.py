"""The baseline a codec language model has to beat: a smoothed bigram over codes.

Each codebook is predicted from one earlier token: its own a frame before, or the codebook before it in the same frame
where the pattern lets the model see that one too. Which of the two, and how much smoothing, is chosen for each
codebook on the last tenth of every recording, which the counts have not seen; then everything is counted. Smoothing
interpolates with the unigram (itself add-one-half): p(b | a) = (c(a, b) + s p(b)) / (c(a) + s).

Counts are kept sparse: 4 codebooks of 1024 would be 16 MB dense, and 100,000 tokens fill at most 2 % of that.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

SMOOTHINGS = (1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0, 3000.0)
TIME, DEPTH = 0, 1


@dataclass(frozen=True)
class Bigram:
    """Counts of one data set. ``ids`` is per codebook; a code of -1 is nothing."""

    ids: int
    unigram: np.ndarray
    """Counts ``[codebooks, ids]`` int64."""
    pairs: np.ndarray
    """Sorted ``(codebook * ids + before) * ids + code`` int64 of the pairs that occurred."""
    pair_counts: np.ndarray
    contexts: np.ndarray
    """Of each codebook: 0 its own token a frame before, 1 the codebook before it in the same frame."""
    smoothing: np.ndarray

    @classmethod
    def fit(cls, recordings: Sequence[np.ndarray], ids: int, depth: bool) -> Bigram:
        """Count codes ``[frames, codebooks]`` of each recording. ``depth``: a frame's earlier codebooks may be seen."""
        assert recordings, "no codes to count"
        num_codebooks = recordings[0].shape[1]
        kept, held = zip(*(np.split(codes, [len(codes) * 9 // 10]) for codes in recordings), strict=True)
        best = np.full(num_codebooks, np.inf)
        contexts = np.zeros(num_codebooks, np.int64)
        smoothing = np.full(num_codebooks, SMOOTHINGS[0])
        for context in (TIME, DEPTH) if depth and num_codebooks > 1 else (TIME,):
            wanted = np.where(np.arange(num_codebooks) > 0, context, TIME)
            counted = cls._count(kept, ids, wanted, smoothing)
            for amount in SMOOTHINGS:
                trial = replace(counted, smoothing=np.full(num_codebooks, amount))
                nats = sum(np.nansum(trial.nats(codes), axis=0) for codes in held)
                better = nats < best
                best, contexts = np.where(better, nats, best), np.where(better, wanted, contexts)
                smoothing = np.where(better, amount, smoothing)
        return cls._count(recordings, ids, contexts, smoothing)

    @classmethod
    def _count(cls, recordings: Sequence[np.ndarray], ids: int, contexts: np.ndarray, smoothing: np.ndarray) -> Bigram:
        unigram = np.zeros((len(contexts), ids), np.int64)
        keys = []
        for codes in recordings:
            for codebook, column in enumerate(codes.T.astype(np.int64)):
                unigram[codebook] += np.bincount(column[column >= 0], minlength=ids)
            key = _keys(codes, ids, contexts)
            keys.append(key[key >= 0])
        pairs, counts = np.unique(np.concatenate(keys), return_counts=True)
        return cls(ids, unigram, pairs, counts, contexts, smoothing)

    def unigram_nats(self, codes: np.ndarray) -> np.ndarray:
        """-log p of each code ``[frames, codebooks]`` without its context; nan where a code is nothing."""
        smoothed = self.unigram + 0.5
        nats = -np.log(smoothed / smoothed.sum(axis=1, keepdims=True))
        return np.where(codes < 0, np.nan, nats[np.arange(codes.shape[1]), np.maximum(codes, 0)])

    def nats(self, codes: np.ndarray) -> np.ndarray:
        """-log p of each code ``[frames, codebooks]``; the unigram where there is no token before it."""
        unigram = self.unigram_nats(codes)
        keys = _keys(codes, self.ids, self.contexts)
        before = np.maximum(keys // self.ids, 0)
        totals = np.bincount(self.pairs // self.ids, weights=self.pair_counts,
                             minlength=len(self.contexts) * self.ids)[before]
        at = np.minimum(np.searchsorted(self.pairs, keys), len(self.pairs) - 1)
        seen = np.where(self.pairs[at] == keys, self.pair_counts[at], 0) if len(self.pairs) else 0 * keys
        mixed = -np.log((seen + self.smoothing * np.exp(-unigram)) / (totals + self.smoothing))
        return np.where(keys < 0, unigram, mixed)

    def arrays(self) -> dict[str, np.ndarray]:
        return {"unigram": self.unigram, "pairs": self.pairs, "pair_counts": self.pair_counts,
                "contexts": self.contexts, "smoothing": self.smoothing}


def _keys(codes: np.ndarray, ids: int, contexts: np.ndarray) -> np.ndarray:
    """The pair each code ``[frames, codebooks]`` makes with the token before it; -1 where either is nothing."""
    codes = codes.astype(np.int64)
    own = np.concatenate([np.full_like(codes[:1], -1), codes[:-1]])
    beside = np.concatenate([np.full_like(codes[:, :1], -1), codes[:, :-1]], axis=1)
    before = np.where(contexts == DEPTH, beside, own)
    keys = (np.arange(codes.shape[1]) * ids + before) * ids + codes
    return np.where((codes < 0) | (before < 0), -1, keys)
