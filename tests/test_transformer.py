"""Parameter counts of the presets, and that every option is causal and learns."""

import pytest
import torch
from torch.nn import functional as F

from avray.nn.transformer import SIZES, Transformer, TransformerConfig, rotary, rotate, sinusoids

SMALL = dict(vocabulary=24, context=16, width=32, num_layers=2, num_heads=4)
OPTIONS = {
    "default": {},
    "tied": dict(tied=True),
    "rotary": dict(positions="rotary"),
    "sinusoidal": dict(positions="sinusoidal"),
    "rms": dict(norm="rms"),
    "swiglu": dict(mlp="swiglu"),
    "grouped": dict(num_kv_heads=2),
    "qk_norm": dict(qk_norm=True),
    "streams": dict(num_streams=3),
    "llama": dict(positions="rotary", norm="rms", mlp="swiglu", num_kv_heads=1, qk_norm=True, bias=False),
}


def parameters(config: TransformerConfig) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in Transformer(config).parameters())


def small(options: dict, **more) -> Transformer:
    model = Transformer(TransformerConfig(**SMALL, **options, **more))
    model.init(torch.Generator().manual_seed(0))
    return model


def test_the_originals_counts():
    assert parameters(TransformerConfig()) == 12_213_504
    assert parameters(TransformerConfig(tied=True)) == 11_820_288


def test_multitask_sizes():
    """The other original with this shape: 199,296 + 129 V."""
    config = TransformerConfig(vocabulary=100, context=64, width=64, num_layers=4, num_heads=4,
                               positions="sinusoidal", head_bias=True)
    assert parameters(config) == 199_296 + 129 * 100


def test_gpt2_size():
    """GPT-2's own 124,439,808 with its vocabulary, context and biases."""
    config = TransformerConfig(vocabulary=50257, context=1024, tied=True, qkv_bias=True, **SIZES["gpt2"])
    assert parameters(config) == 124_439_808


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_causal(options):
    model = small(options).eval()
    streams = model.config.num_streams
    tokens = torch.randint(0, 24, (2, 10, streams), generator=torch.Generator().manual_seed(1))
    changed = tokens.clone()
    changed[:, 6] = (changed[:, 6] + 1) % 24
    with torch.no_grad():
        one, two = (model.logits(model(model.embed(t))) for t in (tokens, changed))
    assert one.shape == (2, 10, streams, 24 // streams)
    assert torch.equal(one[:, :6], two[:, :6])
    assert not torch.allclose(one[:, 6:], two[:, 6:])


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_learns_one_batch(options):
    model = small(options)
    streams = model.config.num_streams
    tokens = torch.randint(0, 24 // streams, (2, 9, streams), generator=torch.Generator().manual_seed(2))
    ids = tokens + torch.arange(streams) * (24 // streams)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)

    def step() -> float:
        logits = model.logits(model(model.embed(ids[:, :-1])))
        loss = F.cross_entropy(logits.flatten(0, 2), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.item()

    first = step()
    for _ in range(60):
        last = step()
    assert last < 0.2 * first
    assert all(p.grad is not None for p in model.parameters())


def test_grouped_queries_are_shared_heads():
    """One key and value head for all is the same as that head repeated."""
    grouped, full = small(dict(num_kv_heads=1)).eval(), small({}).eval()
    for block, other in zip(grouped.blocks, full.blocks, strict=True):
        query, key, value = block.attention.qkv.weight.split([32, 8, 8])
        repeated = torch.cat([query, key.repeat(4, 1), value.repeat(4, 1)])
        other.attention.qkv.weight = torch.nn.Parameter(repeated)
    own = {k: v for k, v in grouped.state_dict().items() if "qkv" not in k}
    full.load_state_dict(own, strict=False)
    x = torch.randn(1, 7, 32)
    torch.testing.assert_close(grouped(x), full(x))


def test_rotary_depends_on_distance_alone():
    query, key = torch.randn(2, 16)
    def product(i, j):
        angles = rotary(torch.tensor([i, j]), 16, 10_000.0)
        return rotate(query, angles[0]) @ rotate(key, angles[1])
    torch.testing.assert_close(product(3, 1), product(103, 101))
    assert not torch.isclose(product(3, 1), product(4, 1))


def test_sinusoids_begin_at_zero_and_one():
    table = sinusoids(torch.arange(4), 8)
    assert table.shape == (4, 8)
    assert torch.equal(table[0], torch.tensor([0.0, 1.0] * 4))
    torch.testing.assert_close(table[1, 0], torch.tensor(1.0).sin())


def test_nothing_adds_nothing():
    model = small(dict(num_streams=3))
    tokens = torch.tensor([[[-1, 9, -1]]])
    assert torch.equal(model.embed(tokens)[0, 0], model.embedding.weight[9])


@pytest.mark.parametrize("name, value", [("num_heads", 5), ("num_kv_heads", 3), ("mlp", "relu"), ("dropout", 1.0),
                                         ("streams", 5), ("positions", "alibi"), ("norm", "batch")])
def test_bad_settings_are_named(name, value):
    wrong = {"num_streams" if name == "streams" else name: value}
    with pytest.raises(ValueError, match=name):
        TransformerConfig(**{**SMALL, **wrong})


def test_more_than_the_context_is_refused():
    with pytest.raises(ValueError, match="context of 16"):
        small({})(torch.zeros(1, 17, 32))
