"""The codec without weights: log-mel frames in, Griffin-Lim out, residual k-means for codes.

Latents are ``[128, time]``, 75 frames a second of 24 kHz mono, the very shape of EnCodec's: the natural logarithm of
128 mel bands (Slaney's scale, 0 to 12 kHz) of the magnitude spectrum under a Hann window of 1024, scaled so that a
sine of full scale stands near 0 and held above log(1e-5). Frame t is centred on sample ``320 * t + 160``, and beyond
both ends there is silence, so n samples give exactly ``ceil(n / 320)`` frames. Codes are the nearest of the centroids
that residual k-means found in the training set, ``[codebooks, time]``.

Everything is worked out in blocks of a fixed number of frames counted from the start, because a matrix product
differs in its last bit with the number of its rows: so frames, codes and samples are the same bits whatever the
pieces they were pushed in.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from avray.codecs.griffin_lim import GriffinLim, Inversion, advance
from avray.codecs.rvq import ResidualKMeans, ResidualQuantizer
from avray.codecs.together import Block, Decoder, in_batches, num_rows
from avray.family import Fitted

SAMPLE_RATE_HZ = 24_000
NUM_BANDS = 128
FLOOR = 1e-5
BLOCK_FRAMES = 128
_INVERSION_ROUNDS = 10


@dataclass(frozen=True)
class Spectral:
    """Log-mel frames and Griffin-Lim: needs no weights."""

    num_codebooks: int = 8
    """Stages of residual k-means."""
    cardinality: int = 1024
    """Centroids a stage, at most; fewer where the data is too little to place them."""
    frames_per_centroid: int = 256
    """What it takes to place one: an hour carries 1024, four minutes 64."""
    num_rounds: int = 32
    """Griffin-Lim rounds a block."""
    name: str = field(default="spectral", init=False)

    def __post_init__(self) -> None:
        for setting in ("num_codebooks", "cardinality", "frames_per_centroid", "num_rounds"):
            if getattr(self, setting) < 1:
                raise ValueError(f"codec.{setting} = {getattr(self, setting)}: it takes at least 1.")
        if self.cardinality > 65536:
            raise ValueError(f"codec.cardinality = {self.cardinality}: codes are 16 bits, 65536 is the most.")

    @property
    def needs_fit(self) -> bool:
        return True

    def column_id(self) -> str:
        return "spectral-v1"

    def load(self, device: torch.device | str = "cpu", fitted: Fitted | None = None) -> SpectralCodec:
        return SpectralCodec(self, torch.device(device), fitted)

    def fit(self, latents: Float[np.ndarray, "time width"], seed: int = 0) -> Fitted:
        """Residual k-means; array ``codebooks`` ``[num_codebooks, cardinality, width]``. ValueError for no frames."""
        return ResidualKMeans(self.num_codebooks, self.cardinality, self.frames_per_centroid).fit(latents, seed)


class SpectralCodec:
    """A ``Codec`` (see ``base``)."""

    sample_rate_hz = SAMPLE_RATE_HZ
    width = NUM_BANDS

    def __init__(self, config: Spectral, device: torch.device, fitted: Fitted | None) -> None:
        self.config, self.device = config, device
        self.synthesis = GriffinLim(num_rounds=config.num_rounds)
        self.hop_samples = self.synthesis.hop
        self.frame_rate_hz = self.sample_rate_hz / self.hop_samples
        self.quantizer = ResidualQuantizer.of(fitted, device)
        self.num_codebooks, self.cardinality = self.quantizer.num_codebooks, self.quantizer.cardinality
        self.decode_rows = num_rows(device)
        window = self.synthesis.window
        self.window = torch.hann_window(window, device=device)
        self.basis = torch.tensor(mel_bands(window) / (window / 4), dtype=torch.float32, device=device)

    def num_frames(self, num_samples: int) -> int:
        return -(-num_samples // self.hop_samples)

    @property
    def block_samples(self) -> int:
        """Samples under the windows of one block of frames."""
        return (BLOCK_FRAMES - 1) * self.hop_samples + self.synthesis.window

    def encode(self, samples: Float[Tensor, "batch samples"]) -> Float[Tensor, "batch width time"]:
        num_frames = self.num_frames(samples.shape[-1])
        num_blocks = -(-num_frames // BLOCK_FRAMES)
        edge, stride = self.synthesis.edge, BLOCK_FRAMES * self.hop_samples
        room = num_blocks * stride + self.synthesis.window
        padded = samples.new_zeros(len(samples), room, device=self.device, dtype=torch.float32)
        padded[:, edge : edge + samples.shape[-1]] = samples
        latents = torch.zeros(len(samples), num_blocks * BLOCK_FRAMES, self.width, device=self.device)
        for row in range(len(samples)):
            for block in range(num_blocks):
                piece = padded[row, block * stride : block * stride + self.block_samples]
                latents[row, block * BLOCK_FRAMES : (block + 1) * BLOCK_FRAMES] = self.analyse(piece)
        return latents[:, :num_frames].transpose(1, 2)

    def analyse(self, piece: Float[Tensor, " samples"]) -> Float[Tensor, "frames width"]:
        """One block of exactly ``BLOCK_FRAMES`` frames."""
        frames = piece.unfold(0, self.synthesis.window, self.hop_samples) * self.window
        spectra = torch.fft.rfft(frames)
        # By hand, as abs() takes 2.4 times as long: it guards against overflow that samples near 1 cannot reach.
        magnitudes = torch.addcmul(spectra.real.square(), spectra.imag, spectra.imag).sqrt_()
        return (magnitudes @ self.basis).clamp_min_(FLOOR).log_()

    def magnitudes(self, latents: Float[Tensor, "frames width"]) -> Float[Tensor, "frames bins"]:
        """The non-negative spectra whose bands come nearest: ten rounds of expectation-maximisation (Richardson
        1972, Lucy 1974) from the band levels spread out; 100 rounds were no better (log-spectral distance 4.35 dB)."""
        bands = (latents.clamp_max(5.0).exp() - FLOOR).clamp_min(1e-10)
        spread = self.basis / self.basis.sum(0)
        weight = self.basis.sum(1).clamp_min(1e-9)
        spectra = bands @ (spread.T / self.basis.sum(0)[:, None])
        for _ in range(_INVERSION_ROUNDS):
            spectra = spectra * ((bands / (spectra @ self.basis).clamp_min(1e-9)) @ self.basis.T) / weight
        return spectra

    def encode_batch(self, recordings: Sequence[np.ndarray]) -> list[np.ndarray]:
        return [self.encode(torch.from_numpy(_mono(samples))[None])[0].T.cpu().numpy() for samples in recordings]

    def stream(self) -> SpectralEncoder:
        return SpectralEncoder(self)

    def decoder(self) -> SpectralDecoder:
        return SpectralDecoder(self)

    @torch.inference_mode()
    def decode_blocks(self, blocks: Sequence[Block]) -> list[np.ndarray]:
        """Blocks of as many frames, whose signals have as much context and end or go on alike."""
        made: list[np.ndarray] = []
        for rows, filled in in_batches(blocks, self.decode_rows):
            frames = torch.from_numpy(np.stack([row.latents for row in filled])).to(self.device, torch.float32)
            magnitudes = torch.stack([self.magnitudes(row) for row in frames])
            signals = [row.state for row in rows] + [copy(rows[0].state) for _ in filled[len(rows) :]]
            made += [*advance(signals, magnitudes, rows[0].alike[-1])[: len(rows)].cpu().numpy()]  # type: ignore[index]
        return made

    def to_codes(self, latents: Float[Tensor, "batch width time"],
                 num_codebooks: int | None = None) -> Int[Tensor, "batch codebooks time"]:
        return self.quantizer.encode(latents, num_codebooks)

    def from_codes(self, codes: Int[Tensor, "batch codebooks time"]) -> Float[Tensor, "batch width time"]:
        return self.quantizer.decode(codes)


class SpectralEncoder:
    """Samples in, frames out as soon as a whole block of them is there: 1.7 s, and 22 ms of samples to come."""

    def __init__(self, codec: SpectralCodec) -> None:
        self.codec = codec
        self.held = np.zeros(codec.synthesis.edge, dtype=np.float32)
        self.num_samples = self.num_frames = 0

    def push(self, piece: np.ndarray) -> np.ndarray:
        piece = _mono(piece)
        self.num_samples += len(piece)
        self.held = np.concatenate([self.held, piece])
        stride, frames = BLOCK_FRAMES * self.codec.hop_samples, []
        while len(self.held) >= self.codec.block_samples:
            block = torch.from_numpy(self.held[: self.codec.block_samples].copy()).to(self.codec.device)
            frames.append(self.codec.analyse(block).cpu().numpy())
            self.held = self.held[stride:]
            self.num_frames += BLOCK_FRAMES
        return np.concatenate(frames) if frames else np.zeros((0, self.codec.width), np.float32)

    def finish(self) -> np.ndarray:
        missing = self.codec.num_frames(self.num_samples) - self.num_frames
        frames = self.push(np.zeros(self.codec.block_samples, np.float32)) if missing else self.push(np.zeros(0))
        return frames[:missing]


class SpectralDecoder(Decoder):
    """Frames in, samples out a block at a time; see ``griffin_lim``. The first block is short, so that sound begins
    with frame 18 (0.24 s), the next ones twice as long each up to the full length, which costs least: on one core
    23 s of sound a second in blocks of 12, 32 in 24, 42 in 48, and all of them sound alike (2.87 dB from the
    original)."""

    def __init__(self, codec: SpectralCodec) -> None:
        self.codec = codec
        self.signal = Inversion(codec.synthesis, codec.device)
        self.waiting = np.zeros((0, codec.width), np.float32)
        self.step = codec.synthesis.first_step
        self.wanted = self.step + codec.synthesis.lookahead
        self.is_over = False

    def put(self, latents: np.ndarray) -> None:
        """ValueError for anything but ``[t, width]``."""
        if latents.ndim != 2 or latents.shape[1] != self.codec.width:
            raise ValueError(f"Expected latents [time, {self.codec.width}], got shape {latents.shape}.")
        self.waiting = np.concatenate([self.waiting, latents], dtype=np.float32)

    def take(self, last: bool) -> Block | None:
        if len(self.waiting) >= self.wanted:
            latents, self.waiting = np.split(self.waiting, [self.wanted])
            self.step = self.wanted = min(2 * self.step, self.codec.synthesis.step)
            return self._block(latents, is_last=False)
        if last and not self.is_over and len(self.waiting) + len(self.signal.magnitudes):
            self.is_over = True
            return self._block(self.waiting, is_last=True)
        return None

    def _block(self, latents: np.ndarray, is_last: bool) -> Block:
        alike = (len(latents), len(self.signal.magnitudes), self.signal.num_context, is_last)
        return Block(latents, self.codec.decode_blocks, alike, self.signal)


def mel_bands(window: int) -> Float[np.ndarray, "bins bands"]:
    """Triangles that peak at 1, evenly spaced on Slaney's scale: 26 Hz apart up to 1 kHz, logarithmic above. HTK's
    crowds its lowest bands closer than the bins of the spectrum are, and pitch came back three times as far off."""
    knee_hz, knee, log_step = 1000.0, 15.0, math.log(6.4) / 27
    top = knee + math.log(SAMPLE_RATE_HZ / 2 / knee_hz) / log_step
    marks = np.linspace(0, top, NUM_BANDS + 2)
    edges_hz = np.where(marks < knee, marks * knee_hz / knee, knee_hz * np.exp(log_step * (marks - knee)))
    bins_hz = np.arange(window // 2 + 1)[:, None] * (SAMPLE_RATE_HZ / window)
    rising = (bins_hz - edges_hz[:-2]) / np.diff(edges_hz)[:-1]
    falling = (edges_hz[2:] - bins_hz) / np.diff(edges_hz)[1:]
    return np.maximum(0, np.minimum(rising, falling))


def _mono(samples: np.ndarray) -> np.ndarray:
    if samples.ndim != 1:
        raise ValueError(f"Expected mono samples [samples], got shape {samples.shape}: average the channels first.")
    return np.ascontiguousarray(samples, dtype=np.float32)
