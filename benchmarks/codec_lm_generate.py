"""Codec tokens a second: avray's sampler beside ``transformers`` generate and CTranslate2, with the same weights.

    python -m benchmarks.codec_lm_generate [--tokens 256] [--threads 1] [--repeats 5] [--json FILE]

The original's size: 12,213,504 parameters, one stream of 1024 ids, drawn at temperature 1 from all ids, float32 unless
it says otherwise. That the weights are the same is checked by a greedy continuation, token for token. Everything is
counted: embedding, steps, drawing, turning tokens into codes.

The bound is reading every weight once a token at the speed this machine reads memory, measured in each turn (the
greatest of 512 MB). 44 MB of float32 weights do not fit a 32 MB cache, so memory binds; 22 MB of bfloat16 and 11 MB of
int8 do, where it is the cache, and for several streams the arithmetic, that binds: their bound is no bound of theirs.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from avray.codecs.spectral import Spectral
from avray.families.codec_lm import CodecLM, CodecTransformer
from avray.family import Fitted, Options
from avray.nn.kv_cache import CachedTransformer
from avray.nn.patterns import Delay, Flatten
from benchmarks.measure import Table, interleaved

IDS, CODEBOOKS, FRAME_RATE_HZ, PARAMETERS = 1024, 4, 75.0, 12_213_504
FAMILY = CodecLM(Spectral(), CODEBOOKS, Flatten(offsets=False))
FITTED = Fitted({}, {"codec": FAMILY.codec.column_id(), "cardinality": IDS, "frame_rate_hz": FRAME_RATE_HZ})
PEER = "transformers generate"


def built(family: CodecLM) -> CodecTransformer:
    model = family.build(FITTED)
    family.init(model, torch.Generator().manual_seed(0))
    return model.eval()


def gpt2_of(model: CodecTransformer) -> GPT2LMHeadModel:
    """The same weights in ``transformers``' GPT-2 (whose bias on queries, keys and values stays 0)."""
    config = model.transformer.config
    peer = GPT2LMHeadModel(GPT2Config(
        vocab_size=IDS, n_positions=config.context, n_embd=config.width, n_layer=config.num_layers,
        n_head=config.num_heads, activation_function="gelu", tie_word_embeddings=False, bos_token_id=0,
        eos_token_id=None))
    own = model.transformer
    pairs = [(peer.transformer.wte, own.embedding), (peer.transformer.wpe, own.position),
             (peer.transformer.ln_f, own.norm), (peer.lm_head, own.head)]
    for theirs, ours in zip(peer.transformer.h, own.blocks, strict=True):
        pairs += [(theirs.ln_1, ours.norm1), (theirs.attn.c_attn, ours.attention.qkv),
                  (theirs.attn.c_proj, ours.attention.out), (theirs.ln_2, ours.norm2),
                  (theirs.mlp.c_fc, ours.mlp.up), (theirs.mlp.c_proj, ours.mlp.down)]
    with torch.no_grad():
        for theirs, ours in pairs:
            weight = ours.weight.T if type(theirs).__name__ == "Conv1D" else ours.weight
            theirs.weight.copy_(weight)
            if getattr(theirs, "bias", None) is not None:
                theirs.bias.copy_(0 * theirs.bias if ours.bias is None else ours.bias)
    return peer.eval()


def check_same(model: CodecTransformer, peer: GPT2LMHeadModel, num_tokens: int = 64) -> None:
    """Both go on with the same tokens, taking the likeliest."""
    expected = peer.generate(torch.tensor([[5]]), max_new_tokens=num_tokens, do_sample=False, pad_token_id=0)
    cache, tokens = CachedTransformer(model.transformer, 1), [5]
    with torch.inference_mode():
        for at in range(num_tokens):
            x = model.transformer.embed(torch.tensor([[[tokens[-1]]]]))[0]
            tokens.append(int(cache.step(x, [at]).argmax()))
    assert tokens == expected[0].tolist(), "the weights differ"


def generate_peer(peer: GPT2LMHeadModel, num_tokens: int, cache: str | None) -> Callable[[], float]:
    def run() -> float:
        began = time.perf_counter()
        peer.generate(torch.tensor([[5]]), max_new_tokens=num_tokens, min_new_tokens=num_tokens, do_sample=True,
                      top_k=0, pad_token_id=0, cache_implementation=cache)
        return num_tokens / (time.perf_counter() - began)

    return run


def generate_ctranslate2(peer: GPT2LMHeadModel, num_tokens: int, threads: int, folder: str) -> Callable[[], float]:
    """CTranslate2's decoder of the same weights in int8. Its last id ends a text and is kept from being drawn."""
    import ctranslate2
    from ctranslate2.specs import common_spec, transformer_spec

    config, state = peer.config, {name: tensor.numpy() for name, tensor in peer.state_dict().items()}
    spec = transformer_spec.TransformerDecoderModelSpec.from_config(
        num_layers=config.n_layer, num_heads=config.n_head, pre_norm=True, activation=common_spec.Activation.GELU)

    def product(to: Any, name: str) -> None:
        to.weight, to.bias = np.ascontiguousarray(state[f"{name}.weight"].T), state[f"{name}.bias"]

    def norm(to: Any, name: str) -> None:
        to.gamma, to.beta = state[f"{name}.weight"], state[f"{name}.bias"]

    decoder = spec.decoder
    decoder.scale_embeddings = False
    decoder.embeddings.weight = state["transformer.wte.weight"]
    decoder.position_encodings.encodings = state["transformer.wpe.weight"]
    decoder.projection.weight = state["lm_head.weight"]
    norm(decoder.layer_norm, "transformer.ln_f")
    for i, layer in enumerate(decoder.layer):
        name = f"transformer.h.{i}"
        norm(layer.self_attention.layer_norm, f"{name}.ln_1")
        product(layer.self_attention.linear[0], f"{name}.attn.c_attn")
        product(layer.self_attention.linear[1], f"{name}.attn.c_proj")
        norm(layer.ffn.layer_norm, f"{name}.ln_2")
        product(layer.ffn.linear_0, f"{name}.mlp.c_fc")
        product(layer.ffn.linear_1, f"{name}.mlp.c_proj")
    spec.register_vocabulary([f"t{i}" for i in range(IDS)])
    spec.config.bos_token = spec.config.unk_token = "t0"
    spec.config.eos_token = f"t{IDS - 1}"
    spec.validate()
    spec.optimize(quantization="int8")
    spec.save(folder)
    generator = ctranslate2.Generator(folder, device="cpu", intra_threads=threads, compute_type="int8")

    def run() -> float:
        began = time.perf_counter()
        result = generator.generate_batch([["t5"]], max_length=num_tokens, min_length=num_tokens, sampling_topk=0,
                                          include_prompt_in_result=False)
        assert len(result[0].sequences_ids[0]) == num_tokens
        return num_tokens / (time.perf_counter() - began)

    return run


def generate_avray(family: CodecLM, model: CodecTransformer, num_streams: int, seconds: float) -> Callable[[], float]:
    """Tokens a second in all, with every slot busy."""
    sampler = family.sampler(model, FITTED, num_streams)
    nothing = np.zeros((0, CODEBOOKS), np.uint16)
    batch = family.collate([{"id": str(i), "weight": 1.0, "audio.codes": nothing} for i in range(num_streams)], FITTED)

    def run() -> float:
        began, num_tokens = time.perf_counter(), 0
        slots = range(num_streams)
        sampler.admit(slots, batch, slots, [Options(seconds=seconds)] * num_streams)
        while sampler.busy:
            num_tokens += sum(piece.data.size for piece in sampler.step())
        return num_tokens / (time.perf_counter() - began)

    return run


def weight_bytes(model: CodecTransformer) -> float:
    """Read for each token in float32: everything but the tables of embeddings."""
    tables = (model.transformer.embedding, model.transformer.position)
    numbers = sum(p.numel() for p in model.parameters()) - sum(table.weight.numel() for table in tables)
    return 4 * numbers


def read_bytes_per_s(memory: Tensor) -> float:
    best = 0.0
    for _ in range(3):
        began = time.perf_counter()
        memory.max()
        best = max(best, memory.numel() * memory.element_size() / (time.perf_counter() - began))
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default, text in (("tokens", 256, "tokens a stream"), ("threads", 1, "torch threads"),
                                ("streams", 8, "streams at once"), ("repeats", 5, "turns")):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{text}; {default} by default")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"

    model = built(FAMILY)
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS
    peer = gpt2_of(model)
    check_same(model, peer)
    delayed = replace(FAMILY, pattern=Delay())
    delayed_model = built(delayed)
    seconds = args.tokens / CODEBOOKS / FRAME_RATE_HZ
    memory = torch.randn(128 * 1024 * 1024)
    names = {"torch": "avray, torch float32"} | {
        weights: f"avray, compiled {weights}" for weights in ("float32", "bfloat16", "int8")}
    with tempfile.TemporaryDirectory() as folder:
        one = {PEER: generate_peer(peer, args.tokens, None),
               f"{PEER}, static cache": generate_peer(peer, args.tokens, "static")}
        if importlib.util.find_spec("ctranslate2"):
            one["CTranslate2 int8"] = generate_ctranslate2(peer, args.tokens, args.threads, folder)
        many, audio = {}, {}
        for weights, name in names.items():
            family = replace(FAMILY, weights=weights)
            one[name] = generate_avray(family, model, 1, seconds)
            many[name] = generate_avray(family, model, args.streams, seconds)
            family = replace(delayed, weights=weights)
            for streams in (1, args.streams):
                run = generate_avray(family, delayed_model, streams, 4.0)
                audio[f"{name}, {streams} stream(s)"] = lambda run=run: run() / CODEBOOKS / FRAME_RATE_HZ
        bound = "bound: float32 weights once a token"
        everything = one | {bound: lambda: read_bytes_per_s(memory) / weight_bytes(model)}
        everything |= {f"{name}, {args.streams} streams": run for name, run in many.items()} | audio
        for run in everything.values():
            run()
        results = interleaved(everything, args.repeats)

    where = f"{args.tokens} tokens, {args.threads} thread(s)"
    first = Table(f"one stream, {where}", "tokens/s", {name: results[name] for name in [*one, bound]}, PEER)
    print(first.markdown(), end="\n\n")
    figures: dict[str, Any] = {"one stream": first.as_dict()}
    for name in names.values():
        pair = {name: results[name], f"{name}, {args.streams} streams": results[f"{name}, {args.streams} streams"]}
        table = Table(f"{args.streams} streams, {where}", "tokens/s in all", pair, name)
        print(table.markdown(), end="\n\n")
        figures[f"{name}, streams"] = table.as_dict()
    table = Table("delay, 4 codebooks, 4 s", "seconds of sound a second", {name: results[name] for name in audio},
                  next(iter(audio)))
    print(table.markdown())
    figures["delay"] = table.as_dict()
    share = statistics.median(a / b for a, b in zip(results[names["float32"]], results[bound], strict=True))
    print(f"\nThe compiled float32 step reaches {share:.0%} of its bound, drawing and bookkeeping included.")
    if args.json:
        args.json.write_text(json.dumps({"share of the bound": share, **figures}, indent=2))


if __name__ == "__main__":
    main()
