"""EnCodec at 24 kHz, files to codes: avray's blocks and batches against stock ``transformers``, file by file.

``python benchmarks/encodec.py`` makes a network of the real size with random weights (scaled so that its latents vary
as a trained one's do), 16 files of 2 to 16 s, and encodes them at 6 kbps on two threads, taking turns, five times. The
same network and numbers: what differs is layout, batching by length, folded weight norm and padding. bfloat16, which
is another arithmetic, stands apart.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from transformers import EncodecConfig, EncodecModel

from avray.codecs.network import NetworkCodec
from avray.codecs.pretrained import Pretrained
from benchmarks.measure import Table, interleaved

RATE_HZ, KBPS = 24_000, 6.0


@torch.no_grad()
def random_network(folder: Path) -> EncodecModel:
    """Stock, in evaluation mode, and saved to ``folder``. As initialised, all frames of noise are nearly equal."""
    torch.manual_seed(0)
    model = EncodecModel(EncodecConfig()).eval()
    for name, weight in model.named_parameters():
        weight.mul_(2 if name.endswith("original0") else 1)
    latents = model.encoder(torch.from_numpy(sound(10.0, 0))[None, None])[0].T
    for stage, layer in enumerate(model.quantizer.layers):
        spread = torch.randn_like(layer.codebook.embed) * latents.std(0) * 0.8**stage
        layer.codebook.embed.copy_(spread + (latents.mean(0) if stage == 0 else 0))
    model.save_pretrained(folder)
    return model


def sound(seconds: float, seed: int) -> np.ndarray:
    """Noise whose level and colour change."""
    rng = np.random.default_rng(seed)
    num_samples = int(seconds * RATE_HZ)
    level = np.interp(np.arange(num_samples), np.linspace(0, num_samples, 20), rng.uniform(0.01, 0.3, 20))
    noise = rng.normal(size=num_samples + 7)
    return (level * np.convolve(noise, rng.dirichlet(np.ones(8)) * 2, "valid")).astype(np.float32)


@torch.no_grad()
def stock_codes(model: EncodecModel, files: list[np.ndarray]) -> list[np.ndarray]:
    return [model.encode(torch.from_numpy(file)[None, None], bandwidth=KBPS).audio_codes[0, 0].numpy()
            for file in files]


def avray_codes(codec: NetworkCodec, files: list[np.ndarray]) -> list[np.ndarray]:
    return [codec.to_codes(torch.from_numpy(latents.T)[None])[0].numpy() for latents in codec.encode_batch(files)]


def streamed(codec: NetworkCodec, file: np.ndarray) -> np.ndarray:
    stream = codec.stream()
    pieces = [stream.push(file[start : start + 5_000]) for start in range(0, len(file), 5_000)]
    return np.concatenate([*pieces, stream.finish()])


def timed(run: Callable[[], object], seconds: float) -> Callable[[], float]:
    """Seconds of sound encoded in a second."""
    def rate() -> float:
        start = time.perf_counter()
        run()
        return seconds / (time.perf_counter() - start)
    return rate


def share_equal(codes: list[np.ndarray], expected: list[np.ndarray]) -> float:
    return float(np.mean(np.concatenate([(a == b).ravel() for a, b in zip(codes, expected, strict=True)])))


@torch.no_grad()
def agreement(model: EncodecModel, codecs: dict[str, NetworkCodec], files: list[np.ndarray]) -> dict[str, dict]:
    expected = stock_codes(model, files)
    latents = [model.encoder(torch.from_numpy(file)[None, None])[0].T.numpy() for file in files]
    found = {}
    for name, codec in codecs.items():
        ours, pieces = codec.encode_batch(files), streamed(codec, files[0])
        found[name] = {
            "equal_codes": share_equal(avray_codes(codec, files), expected),
            "latent_error": max(float(np.abs(a - b).max()) for a, b in zip(ours, latents, strict=True)),
            "latent_range": max(float(np.abs(b).max()) for b in latents),
            "streamed_equal_codes": share_equal(
                [codec.to_codes(torch.from_numpy(pieces.T)[None])[0].numpy()], expected[:1])}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--files", type=int, default=16)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    files = [sound(seconds, seed) for seed, seconds in enumerate(np.linspace(2, 16, options.files) + 0.0037)]
    files = [files[index] for index in np.random.default_rng(0).permutation(len(files))]
    seconds = sum(map(len, files)) / RATE_HZ
    with tempfile.TemporaryDirectory() as folder:
        model = random_network(Path(folder))
        codecs = {f"avray, {dtype}": Pretrained("encodec_24khz", path=folder, bandwidth_kbps=KBPS, dtype=dtype).load()
                  for dtype in ("float32", "bfloat16")}
    found = agreement(model, codecs, files)  # and a warm-up
    stock = "transformers, file by file"
    runs = {stock: timed(partial(stock_codes, model, files), seconds)}
    for name, codec in codecs.items():
        runs[name] = timed(partial(avray_codes, codec, files), seconds)
    table = Table("EnCodec 24 kHz to codes at 6 kbps", "× real time", interleaved(runs, options.repeats), stock)
    print(table.markdown() + "\n")
    for name, row in found.items():
        print(f"{name}: {row['equal_codes']:.4%} of the codes are those of transformers "
              f"({row['streamed_equal_codes']:.4%} streamed); "
              f"latents within {row['latent_error']:.2g}, where they reach {row['latent_range']:.2g}")
    if options.json:
        options.json.write_text(json.dumps({"speed": table.as_dict(), "agreement": found,
                                            "threads": options.threads, "seconds": seconds}, indent=1))


if __name__ == "__main__":
    main()
