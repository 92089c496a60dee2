"""The cached step, torch's and the compiled one, against the whole model; and that a row is its own."""

import shutil

import pytest
import torch

from avray.errors import MissingDependency
from avray.nn import native
from avray.nn.kv_cache import CachedTransformer
from avray.nn.transformer import Transformer, TransformerConfig

needs_compiler = pytest.mark.skipif(not shutil.which("gcc"), reason="no gcc")
WEIGHTS = ["torch", *(pytest.param(kind, marks=needs_compiler) for kind in ("float32", "bfloat16", "int8"))]
TOLERANCE = {"torch": 2e-5, "float32": 2e-5, "bfloat16": 2e-2, "int8": 5e-2}
OPTIONS = {
    "gpt": {},
    "llama": dict(positions="rotary", norm="rms", mlp="swiglu", num_kv_heads=1, qk_norm=True, bias=False),
    "wide": dict(width=128, num_heads=2, num_streams=2, head_bias=True, qkv_bias=True, tied=True,
                 positions="sinusoidal"),
    "odd": dict(vocabulary=50, mlp_width=48, num_kv_heads=2),
}


def made(options: dict) -> Transformer:
    sizes = dict(vocabulary=40, context=96, width=64, num_layers=2, num_heads=4)
    model = Transformer(TransformerConfig(**sizes | options))
    generator = torch.Generator().manual_seed(0)
    model.init(generator)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def inputs(rows: int, steps: int, width: int) -> torch.Tensor:
    return torch.randn(rows, steps, width, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_steps_after_a_prompt_are_the_whole_model(options, weights):
    """Rows with prompts of different lengths, stepped together, for every count of rows the kernel treats apart."""
    model = made(options)
    for rows in (1, 3, 8, 11):
        x = inputs(rows, 90, model.config.width)
        with torch.no_grad():
            whole = model.logits(model(x))
        cached = CachedTransformer(model, rows, weights)
        lengths = [(7 * row) % 60 for row in range(rows)]
        for row, length in enumerate(lengths):
            cached.prefill(row, x[row, :length])
        for _ in range(25):
            logits = cached.step(torch.stack([x[row, at] for row, at in enumerate(lengths)]), lengths)
            expected = torch.stack([whole[row, at] for row, at in enumerate(lengths)])
            error = (logits - expected).norm() / expected.norm()
            assert error < TOLERANCE[weights]
            lengths = [at + 1 for at in lengths]


@pytest.mark.parametrize("weights", WEIGHTS)
def test_a_row_is_the_same_whoever_else_is_there(weights):
    """Alone among idle rows and beside longer ones: the same bits. The compiled step keeps them for any number of
    rows, and in any of them."""
    model = made(dict(context=700))
    x = inputs(1, 70, 64)[0]

    def run(rows: int, mine: int, others: int) -> torch.Tensor:
        cached = CachedTransformer(model, rows, weights)
        noise = inputs(rows, 700, 64)
        for row in range(rows):
            if row != mine:
                cached.prefill(row, noise[row, :others])
        steps = []
        for at in range(70):
            now = noise[:, at].clone()
            now[mine] = x[at]
            steps.append(cached.step(now, [at if row == mine else others for row in range(rows)])[mine].clone())
        return torch.stack(steps)

    alone = run(4, 1, 0)
    assert torch.equal(alone, run(4, 1, 300))
    assert torch.equal(alone, run(4, 1, 699))
    if weights != "torch":
        assert torch.equal(alone, run(1, 0, 0))
        assert torch.equal(alone, run(13, 12, 200))


@needs_compiler
def test_threads_change_nothing():
    model, results = made({}), []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            cached = CachedTransformer(model, 2, "float32")
            results.append(torch.stack([cached.step(x, [i, i]).clone() for i, x in enumerate(inputs(20, 2, 64))]))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@pytest.mark.gpu
def test_a_captured_step_is_the_step():
    model = made(dict(context=600)).cuda()
    x = inputs(3, 600, 64).cuda()
    plain, captured = CachedTransformer(model, 3), CachedTransformer(model, 3, cuda_graph=True)
    for cached in (plain, captured):
        cached.prefill(1, x[1, :280])
    for at in range(300):
        positions = [at, 280 + at, 0]
        now = torch.stack([x[0, at], x[1, 280 + at], x[2, 0]])
        torch.testing.assert_close(captured.step(now, positions), plain.step(now, positions), atol=1e-4, rtol=1e-4)


def test_a_cuda_graph_needs_a_gpu():
    with pytest.raises(ValueError, match="cuda_graph"):
        CachedTransformer(made({}), 1, cuda_graph=True)


def test_a_missing_compiler_is_named(monkeypatch):
    monkeypatch.setattr(native, "_loaded", None)
    monkeypatch.setenv("CC", "no-such-compiler")
    with pytest.raises(MissingDependency, match="weights=torch"):
        CachedTransformer(made({}), 1, "int8")


def test_a_compiler_that_fails_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(native, "_loaded", None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CC", "false")
    with pytest.raises(MissingDependency, match="could not compile"):
        CachedTransformer(made({}), 1, "float32")


def test_sizes_the_compiled_step_cannot_take():
    with pytest.raises(ValueError, match="multiple of 16"):
        CachedTransformer(made(dict(num_heads=8)), 1, "float32")
