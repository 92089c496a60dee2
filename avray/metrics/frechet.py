"""How far two sets of sounds are apart in the space of an embedding.

Notable: means and covariances are accumulated in float64 and merge (Chan et al. 1979), so a set never has to
be held, and the matrix root comes from symmetric eigenvalues: no complex parts, no failure where there are
fewer vectors than dimensions. A figure says nothing without its embedding, rate and counts, so it carries
them, and a hash of the reference set that does not depend on its order: two figures compare only where all of
these agree.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Float

from avray.family import Media
from avray.media import Audio

Vectors = Float[np.ndarray, "count dim"]
Others = Float[np.ndarray, "other_count dim"]  # a second set: of another count


@dataclass
class Gaussian:
    """Mean and covariance of vectors that come in pieces."""

    count: int = 0
    mean: np.ndarray = field(default_factory=lambda: np.zeros(0))
    scatter: np.ndarray = field(default_factory=lambda: np.zeros((0, 0)))

    def add(self, vectors: Vectors) -> None:
        vectors = np.asarray(vectors, np.float64)
        if vectors.ndim != 2:
            raise ValueError(f"Expected vectors [count, dim], got an array of shape {vectors.shape}.")
        if len(vectors):
            mean = vectors.mean(axis=0)
            centred = vectors - mean
            self.merge(Gaussian(len(vectors), mean, centred.T @ centred))

    def merge(self, other: Gaussian) -> None:
        if not other.count:
            return
        if not self.count:
            self.count, self.mean, self.scatter = other.count, other.mean.copy(), other.scatter.copy()
            return
        if len(self.mean) != len(other.mean):
            raise ValueError(f"Embeddings of {len(self.mean)} and {len(other.mean)} dimensions do not mix.")
        count, step = self.count + other.count, other.mean - self.mean
        self.scatter += other.scatter + np.outer(step, step) * (self.count * other.count / count)
        self.mean += step * (other.count / count)
        self.count = count

    def covariance(self) -> Float[np.ndarray, "dim dim"]:
        """Unbiased, as numpy.cov; ValueError below two vectors."""
        if self.count < 2:
            raise ValueError(f"A covariance needs at least 2 vectors, got {self.count}.")
        return self.scatter / (self.count - 1)


def frechet_distance(a: Gaussian, b: Gaussian) -> float:
    """Squared 2-Wasserstein distance of the two Gaussians (Heusel et al. 2017, as FID and FAD give it): |μa -
    μb|² + tr(A + B - 2 (A^½ B A^½)^½). Biased upwards for few vectors; ValueError below two of either."""
    if len(a.mean) != len(b.mean):
        raise ValueError(f"Embeddings of {len(a.mean)} and {len(b.mean)} dimensions do not compare.")
    first, second = a.covariance(), b.covariance()
    values, vectors = np.linalg.eigh(first)
    root = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
    cross = np.linalg.eigvalsh(root @ second @ root)
    distance = np.square(a.mean - b.mean).sum() + np.trace(first) + np.trace(second)
    return max(0.0, float(distance - 2 * np.sqrt(np.maximum(cross, 0)).sum()))


def kernel_distance(a: Vectors, b: Others) -> float:
    """Unbiased squared maximum mean discrepancy under the kernel (x·y/dim + 1)³ (Bińkowski et al. 2018, KID).
    Needs no Gaussian and is unbiased at any count, so it can be slightly negative. Holds all pairs: a few
    thousand vectors. ValueError below two of either."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if min(len(a), len(b)) < 2:
        raise ValueError(f"A kernel distance needs at least 2 vectors of each, got {len(a)} and {len(b)}.")

    def within(x: np.ndarray) -> float:
        kernel = (x @ x.T / x.shape[1] + 1) ** 3
        return float((kernel.sum() - np.trace(kernel)) / (len(x) * (len(x) - 1)))

    return within(a) + within(b) - 2 * float(((a @ b.T / a.shape[1] + 1) ** 3).mean())


@dataclass
class FrechetDistance:
    """A Metric: Fréchet distance between all that was generated and all targets. ``embed`` maps a sound to
    vectors ``[count, dim]``: one for a whole clip, or one a frame."""

    embed: Callable[[Audio], Vectors]
    embedding: str
    sample_rate_hz: int
    generated: Gaussian = field(default_factory=Gaussian)
    reference: Gaussian = field(default_factory=Gaussian)
    reference_hash: int = 0

    def update(self, generated: Media, target: Media | None, row: object = None) -> None:
        self._take(generated, self.generated)
        if isinstance(target, Audio):
            self._take(target, self.reference)
            content = np.ascontiguousarray(target.samples, dtype=np.float32).tobytes()
            digest = hashlib.blake2b(content, digest_size=8).digest()
            self.reference_hash = (self.reference_hash + int.from_bytes(digest)) % 2**64

    def merge(self, other: FrechetDistance) -> None:
        if (self.embedding, self.sample_rate_hz) != (other.embedding, other.sample_rate_hz):
            raise ValueError(f"{self.embedding} at {self.sample_rate_hz} Hz and {other.embedding} at "
                             f"{other.sample_rate_hz} Hz do not merge: use one embedding.")
        self.generated.merge(other.generated)
        self.reference.merge(other.reference)
        self.reference_hash = (self.reference_hash + other.reference_hash) % 2**64

    def value(self) -> float:
        """nan below two vectors of either set."""
        if min(self.generated.count, self.reference.count) < 2:
            return float("nan")
        return frechet_distance(self.generated, self.reference)

    def details(self) -> dict[str, object]:
        """What the figure must be quoted with."""
        return {"embedding": self.embedding, "sample_rate_hz": self.sample_rate_hz,
                "num_generated": self.generated.count, "num_reference": self.reference.count,
                "reference": f"{self.reference_hash:016x}"}

    def _take(self, audio: Media, into: Gaussian) -> None:
        if not isinstance(audio, Audio):
            raise ValueError(f"This figure is about sound, got {type(audio).__name__}.")
        if audio.sample_rate_hz != self.sample_rate_hz:
            raise ValueError(f"{self.embedding} is to be given {self.sample_rate_hz} Hz, got a sound at "
                             f"{audio.sample_rate_hz} Hz: resample it first.")
        into.add(self.embed(audio))
