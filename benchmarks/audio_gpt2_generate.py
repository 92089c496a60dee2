"""Writing about what is heard: avray's slots beside transformers' ``generate`` on the very same network.

    python -m benchmarks.audio_gpt2_generate [--size small|gpt2] [--repeats 5] [--json FILE]

The peer is the base model's own ``generate`` with our cross-attention hooked onto its layers, greedy, with its cache,
so that both run the same products; a recording of 20 s, 128 tokens, no end. The bound is the weights read once a
step at the machine's memory bandwidth, where they do not fit its cache; a small network is bound by calls instead.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch

from avray.codecs.spectral import Spectral
from avray.encoders.tokens import Bytes
from avray.families.audio_gpt2 import AudioGPT2
from avray.family import Options
from benchmarks.measure import Table, interleaved

SIZES = {"small": dict(width=192, num_layers=4, num_heads=4), "gpt2": dict(width=768, num_layers=12, num_heads=12)}
TOKENS, SECONDS = 128, 20.0


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    family = AudioGPT2(Spectral(), context=256, dropout=0.0, **SIZES[options.size])
    frames = np.random.default_rng(0).normal(-5, 2, (round(SECONDS * 75), 128)).astype(np.float32)
    row = {"id": "", "weight": 1.0, "text": "", "audio.features": frames}
    fitted = family.fit(iter([{**row, "text": "words"}]))
    model = family.build(fitted).eval()
    family.init(model, torch.Generator().manual_seed(0))
    batch = family.collate([row], fitted)
    unending = Bytes(end=10**6)

    def with_avray(slots: int) -> float:
        sampler = family.sampler(model, fitted, slots)
        began = time.perf_counter()
        for slot in range(slots):
            sampler.admit([slot], batch, [0], [Options(max_tokens=TOKENS)])
        sampler.tokens = unending
        written = 0
        while sampler.busy:
            written += sum(len(piece.data.ids) for piece in sampler.step())
        assert written == slots * TOKENS
        return written / (time.perf_counter() - began)

    def with_transformers(rows: int) -> float:
        began = time.perf_counter()
        with torch.inference_mode():
            heard = model.hear(batch["audio"].expand(rows, -1, -1), batch["frames"].expand(rows))
            with model.listening(heard):
                given = torch.full((rows, 1), 256)
                made = model.base.generate(given, attention_mask=torch.ones_like(given), max_new_tokens=TOKENS,
                                           do_sample=False, eos_token_id=None, pad_token_id=0)
        assert made.shape == (rows, TOKENS + 1)
        return rows * TOKENS / (time.perf_counter() - began)

    for rows in (1, 4):
        peer = f"transformers generate, {rows} at once"
        results = interleaved({f"avray, {rows} at once": lambda rows=rows: with_avray(rows),
                               peer: lambda rows=rows: with_transformers(rows)}, options.repeats)
        table = Table(f"audio_gpt2 {options.size}, tokens from 20 s of sound", "tokens a second", results, against=peer)
        print(table.markdown(), flush=True)
        if options.json:
            Path(f"{options.json}.{rows}").write_text(json.dumps(table.as_dict()))


if __name__ == "__main__":
    main()
