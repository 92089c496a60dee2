"""``instruct`` on real recordings: sounds of ESC-10 asked for by their labels, and speech cleaned of noise.

    python -m benchmarks.instruct_real rows DATA FOLDER      # DATA has env/esc10, speech and MANIFEST.csv
    python pipelines/train.py experiment=instruct_esc10 data.path=FOLDER/esc10.jsonl data.allowed_roots=[DATA] \\
        run.dir=runs/esc10
    python pipelines/train.py experiment=instruct_enhancement data.path=FOLDER/speech.jsonl data.allowed_roots=[DATA] \\
        family.noise_folder=FOLDER/noise family.noisy_versions=1 run.dir=runs/clean
    python -m benchmarks.instruct_real labels FOLDER runs/esc10
    python -m benchmarks.instruct_real clean FOLDER runs/clean

Labels: folds 1 and 2 are learnt from, fold 3 is held out. A clip is a vector of 32: the first principal components of
its bands' mean, spread and change, learnt from folds 1 and 2. The kernel distance to fold 3 stands beside that of real
clips, of the mean spectrum and of white noise; a softmax regression over the same vectors, learnt from real clips, says
what label it hears. All went through the codec, as what is generated does.

Cleaning: held-out speakers at 0 dB under white noise and under clips of fold 3. The log-spectral distance to the clean
recording, and the SI-SDR where the magnitudes that came out shape the noisy spectrum, whose phase is kept.
"""

from __future__ import annotations

import argparse
import csv
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import soxr
import torch
from torch import nn

from avray.codecs.base import decode_all
from avray.codecs.spectral import SAMPLE_RATE_HZ, Spectral, SpectralCodec
from avray.data import recipes
from avray.engine import Generator, resampled
from avray.family import Options, Request
from avray.media import Audio, probe, read_audio, write_audio
from avray.metrics.frechet import kernel_distance
from avray.metrics.signal import si_sdr
from avray.metrics.spectral import log_spectral_distance

HELD_OUT_SPEAKERS = ("103", "1235", "4441", "6000")
PIECE_S = 2.0
SPEEDS = (0.9, 1.0, 1.1)
"""At which speech and noises are played to learn from (Ko et al. 2015): there are two minutes of speech, 158 noises."""
EVERY_S = 0.0075
"""Between the beginnings of the pieces that are learnt from, each with a noise of its own."""
NUM_WHITE = 100
DIMENSIONS = 32


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("verb", choices=("rows", "labels", "clean"))
    parser.add_argument("paths", nargs=2, type=Path)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--steps", type=int, help="of the solver; else the model's own")
    parser.add_argument("--guidance", type=float)
    given = parser.parse_args()
    first, second = given.paths
    if given.verb == "rows":
        write_rows(first.absolute(), second.absolute())
        return
    options = Options(num_steps=given.steps, guidance_scale=given.guidance)
    model = Generator.open(second, slots=4)
    figures = (labels if given.verb == "labels" else clean)(first, model, options)
    print(table(figures))
    if given.json:
        given.json.write_text(json.dumps(figures, indent=1))


def table(rows: dict[str, dict[str, float]]) -> str:
    columns = list(dict.fromkeys(name for row in rows.values() for name in row))
    lines = [f"| | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    return "\n".join(lines + [
        f"| {name} | " + " | ".join(f"{row[column]:.4g}" if column in row else "" for column in columns) + " |"
        for name, row in rows.items()])


def write_rows(data: Path, folder: Path) -> None:
    for name in ("noise", "speech"):
        (folder / name).mkdir(parents=True)
    with open(data / "MANIFEST.csv") as file:
        texts = {row["file"]: row["text"] for row in csv.DictReader(file)}
    sounds = [{"audio": str(path), "text": texts[str(path.relative_to(data))], "label": int(path.parent.name) - 1,
               "split": "validation" if path.name.startswith("3-") else "train"}
              for path in sorted((data / "env" / "esc10").rglob("*.ogg"))]
    recordings = [path for name in ("librispeech", "ljspeech") for path in sorted((data / "speech" / name).iterdir())]
    held = [path for path in recordings if path.name.split("-")[0] in HELD_OUT_SPEAKERS]
    speech = [{"audio": str(path), "split": "validation"} for path in held]
    for path in recordings:
        if path not in held:
            speech += [row for copy in at_speeds(path, folder / "speech") for row in pieces_of(copy)]
    for name, rows in (("esc10", sounds), ("speech", speech)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for sound in sounds:
        if sound["split"] == "train":
            at_speeds(Path(str(sound["audio"])), folder / "noise")
    rng = np.random.default_rng(0)
    for index in range(NUM_WHITE):
        write(folder / "noise" / f"white{index:03d}.wav", 0.1 * rng.standard_normal(5 * SAMPLE_RATE_HZ))
    print(f"{len(sounds)} sounds, {len(speech)} pieces of speech and {NUM_WHITE} of white noise are in {folder}")


def at_speeds(path: Path, folder: Path) -> list[Path]:
    """Copies of a recording, its pitch as much higher as it is shorter."""
    copies = []
    for speed in SPEEDS:
        copies.append(folder / f"{path.stem}@{speed:g}.wav")
        write(copies[-1], soxr.resample(samples_of(str(path)), SAMPLE_RATE_HZ * speed, SAMPLE_RATE_HZ))
    return copies


def write(path: Path, samples: np.ndarray) -> None:
    write_audio(path, Audio(samples[None].astype(np.float32), SAMPLE_RATE_HZ), "wav")


def pieces_of(path: Path) -> Iterator[dict[str, Any]]:
    for index in range(int((probe(str(path)).duration_s - PIECE_S) / EVERY_S) + 1):
        yield {"audio": str(path), "start_s": round(index * EVERY_S, 4), "duration_s": PIECE_S, "split": "train"}


def read_rows(path: Path, split: str) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [row for row in rows if row["split"] == split]


def samples_of(path: str) -> np.ndarray:
    """Mono, at the codec's rate."""
    return resampled(read_audio(path), SAMPLE_RATE_HZ)


def labels(folder: Path, model: Generator, options: Options) -> dict[str, dict[str, float]]:
    codec = Spectral().load("cpu")
    learnt, held = (read_rows(folder / "esc10.jsonl", split) for split in ("train", "validation"))
    heard = [frames(codec, samples_of(row["audio"])) for row in learnt]
    real = [frames(codec, samples_of(row["audio"])) for row in held]
    asked = [Request(text=row["text"], seed=index, options=options) for index, row in enumerate(held)]
    made = [again(codec, one.audio.samples[0]) for one in model.generate_many(asked)]
    space = Space([summary(one) for one in heard])
    classify = Classifier(space, heard, [row["label"] for row in learnt])
    mean = np.concatenate(heard).mean(0, dtype=np.float64).astype(np.float32)
    rng = np.random.default_rng(0)
    level = np.sqrt(np.mean([np.mean(np.square(samples_of(row["audio"]))) for row in learnt]))
    white = [frames(codec, (level * rng.standard_normal(5 * SAMPLE_RATE_HZ)).astype(np.float32)) for _ in held]
    target = space([summary(one) for one in real])
    wanted = [row["label"] for row in held]

    def judged(some: Sequence[np.ndarray], right: Sequence[int] | None) -> dict[str, float]:
        found = {"kernel distance to fold 3": kernel_distance(space([summary(one) for one in some]), target)}
        return found if right is None else found | {"label heard": classify.accuracy(some, right)}

    return {"folds 1 and 2, real": judged(heard, None),
            "fold 3, one half to the other": {"kernel distance to fold 3": kernel_distance(target[::2], target[1::2]),
                                              "label heard": classify.accuracy(real, wanted)},
            "generated": judged(made, wanted),
            "the mean spectrum": judged([np.tile(mean, (len(one), 1)) for one in real], wanted),
            "white noise": judged(white, wanted)}


def frames(codec: SpectralCodec, samples: np.ndarray) -> np.ndarray:
    """Of a recording that went through the codec."""
    return again(codec, decode_all(codec, codec.encode_batch([samples])[0]))


def again(codec: SpectralCodec, samples: np.ndarray) -> np.ndarray:
    return codec.encode_batch([samples])[0].astype(np.float32)


def summary(one: np.ndarray) -> np.ndarray:
    """Mean, spread and mean change from frame to frame of each band."""
    return np.concatenate([one.mean(0), one.std(0), np.abs(np.diff(one, axis=0)).mean(0)])


class Space:
    """Standardised principal components of what it is made of."""

    def __init__(self, vectors: Sequence[np.ndarray]) -> None:
        x = np.stack(vectors).astype(np.float64)
        self.mean, self.scale = x.mean(0), x.std(0) + 1e-3
        _, values, components = np.linalg.svd((x - self.mean) / self.scale, full_matrices=False)
        self.components = components[:DIMENSIONS].T / (values[:DIMENSIONS] / np.sqrt(len(x)))

    def __call__(self, vectors: Sequence[np.ndarray]) -> np.ndarray:
        return ((np.stack(vectors) - self.mean) / self.scale) @ self.components


class Classifier:
    """Softmax regression."""

    def __init__(self, space: Space, heard: Sequence[np.ndarray], right: Sequence[int]) -> None:
        self.space = space
        torch.manual_seed(0)
        self.linear = nn.Linear(DIMENSIONS, max(right) + 1)
        x, y = self.vectors(heard), torch.tensor(right)
        optimiser = torch.optim.AdamW(self.linear.parameters(), 1e-2, weight_decay=0.3)
        for _ in range(400):
            optimiser.zero_grad()
            nn.functional.cross_entropy(self.linear(x), y).backward()
            optimiser.step()

    def vectors(self, some: Sequence[np.ndarray]) -> torch.Tensor:
        return torch.from_numpy(self.space([summary(one) for one in some]).astype(np.float32))

    @torch.no_grad()
    def accuracy(self, some: Sequence[np.ndarray], right: Sequence[int]) -> float:
        return float((self.linear(self.vectors(some)).argmax(1) == torch.tensor(right)).float().mean())


def clean(folder: Path, model: Generator, options: Options) -> dict[str, dict[str, float]]:
    codec = Spectral().load("cpu")
    pieces = []
    for row in read_rows(folder / "speech.jsonl", "validation"):
        whole, length = samples_of(row["audio"]), round(PIECE_S * SAMPLE_RATE_HZ)
        pieces += [whole[at : at + length] for at in range(0, len(whole) - length + 1, length)]
    others = [row["audio"] for row in read_rows(folder / "esc10.jsonl", "validation")]
    figures = {}
    for kind in ("white noise", "other clips"):
        rows = []
        for seed, piece in enumerate(pieces):
            source = f":source={others[seed % len(others)]}" if kind == "other clips" else ""
            noisy = recipes.apply(f"noise:snr_db=0:seed={seed}{source}", piece, SAMPLE_RATE_HZ)
            request = Request(audio=Audio(noisy[None], SAMPLE_RATE_HZ), seed=seed, options=options)
            made = model.generate_many([request])[0].audio.samples[0]
            shaped = with_noisy_phase(codec, noisy, made)
            rows.append((log_spectral_distance(noisy, piece, SAMPLE_RATE_HZ),
                         log_spectral_distance(fitting(made, len(piece)), piece, SAMPLE_RATE_HZ),
                         log_spectral_distance(shaped, piece, SAMPLE_RATE_HZ),
                         si_sdr(noisy, piece), si_sdr(shaped, piece)))
        noisy_lsd, made_lsd, shaped_lsd, before, after = np.mean(rows, 0)
        figures[kind] = {"pieces": float(len(pieces)), "LSD noisy (dB)": noisy_lsd, "LSD generated": made_lsd,
                         "lower by": 1 - made_lsd / noisy_lsd, "LSD with the noisy phase": shaped_lsd,
                         "SI-SDR noisy (dB)": before, "with the noisy phase": after, "gain": after - before}
    return figures


def fitting(samples: np.ndarray, length: int) -> np.ndarray:
    return np.pad(samples[:length], (0, max(0, length - len(samples))))


def with_noisy_phase(codec: SpectralCodec, noisy: np.ndarray, made: np.ndarray) -> np.ndarray:
    """The noisy sound, each bin as much softer as the generated sound is than it, smoothed over the codec's bands."""
    synthesis = codec.synthesis
    window, hop = synthesis.window, synthesis.hop
    made = fitting(made, len(noisy))
    wanted, heard = (codec.magnitudes(torch.from_numpy(again(codec, one))) for one in (made, noisy))
    gain = (wanted / heard.clamp_min(1e-6)).clamp_max(1.0).T
    padded = torch.nn.functional.pad(torch.from_numpy(noisy), (synthesis.edge, window))
    shape = torch.hann_window(window)
    spectrum = torch.fft.rfft(padded.unfold(0, window, hop)[: gain.shape[1]] * shape).T
    frames_ = torch.fft.irfft((spectrum * gain).T, window) * shape
    total, weight = torch.zeros(len(padded)), torch.zeros(len(padded))
    for index, frame in enumerate(frames_):
        total[index * hop : index * hop + window] += frame
        weight[index * hop : index * hop + window] += shape.square()
    return (total / weight.clamp_min(1e-3))[synthesis.edge : synthesis.edge + len(noisy)].numpy()


if __name__ == "__main__":
    main()
