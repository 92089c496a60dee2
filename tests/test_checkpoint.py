"""What a checkpoint keeps, which one a path stands for, and what is pruned."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn

from avray import checkpoint as ck
from avray.checkpoint import Checkpoint, Content
from avray.errors import CheckpointError
from avray.family import Fitted


def content(value: float = 1.0, **changes: Any) -> Content:
    parts = {
        "model": {"weight": torch.full((3, 2), value)},
        "family": {"name": "toy", "width": 2},
        "fitted": Fitted({"codes": np.arange(6, dtype=np.uint16).reshape(2, 3)}, {"vocabulary": ["a", "é"]}),
        "settings": {"seed": 3, "data": {"path": None}},
        "trainer": {"epoch": 2, "optimizer": {"state": {0: {"step": torch.tensor(4.0)}}}},
        "figures": {"validation_loss": value},
        "card": "# A model\n",
    }
    return Content(**(parts | changes))


def reseal(folder: Path, **changes: Any) -> None:
    """Give a tampered folder a manifest that fits it again, as someone with bad intent would."""
    manifest = json.loads((folder / "manifest.json").read_text()) | changes
    for name in manifest["files"]:
        path = folder / name
        if path.is_file():
            data = path.read_bytes()
            manifest["files"][name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    manifest["sha256"] = ck.store.digest(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))


def equal(one: Any, two: Any) -> bool:
    if isinstance(one, torch.Tensor | np.ndarray):
        return type(one) is type(two) and one.dtype == two.dtype and one.shape == two.shape and (one == two).all()
    if isinstance(one, dict):
        return isinstance(two, dict) and [*one] == [*two] and all(equal(one[key], two[key]) for key in one)
    if isinstance(one, list | tuple):
        return type(one) is type(two) and len(one) == len(two) and all(map(equal, one, two))
    return type(one) is type(two) and (one == two or one != one)


# ── what is kept ─────────────────────────────────────────


def test_everything_comes_back(tmp_path: Path) -> None:
    given_content = content(ema={"weight": torch.full((3, 2), 9.0)})
    folder = ck.save(tmp_path, 100, given_content, links=("best", "last"))
    opened = Checkpoint.open(tmp_path / "best")
    assert folder == tmp_path / "checkpoints" / "step-00000100" and opened.path == folder.resolve()
    assert (opened.step, opened.family, opened.settings) == (
        100,
        given_content.family,
        given_content.settings,
    )
    assert opened.figures == {"validation_loss": 1.0}
    assert opened.fitted.digest() == given_content.fitted.digest()
    assert (folder / "README.md").read_text() == "# A model\n"
    assert equal(opened.weights("model"), given_content.model)
    assert equal(opened.weights("ema"), given_content.ema) and equal(opened.weights(), given_content.ema)
    assert equal(opened.trainer_state(), given_content.trainer)
    assert sorted(json.loads((folder / "manifest.json").read_text())["files"]) == sorted(
        path.name for path in folder.iterdir() if path.name != "manifest.json"
    )


def test_every_dtype_and_shape_as_the_library_reads_it(tmp_path: Path) -> None:
    dtypes = [
        torch.float64,
        torch.float32,
        torch.float16,
        torch.bfloat16,
        torch.float8_e4m3fn,
        torch.float8_e5m2,
    ]
    dtypes += [
        torch.int64,
        torch.int32,
        torch.int16,
        torch.int8,
        torch.uint64,
        torch.uint32,
        torch.uint16,
        torch.uint8,
    ]
    state = {str(dtype): torch.arange(5).to(dtype) for dtype in dtypes}
    state |= {
        "bool": torch.tensor([True, False, True]),
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 4),
    }
    state |= {"also_empty": torch.zeros(0, 4), "transposed": torch.arange(6.0).view(2, 3).t()}
    state |= {"wide": torch.ones(1).expand(4), "é.0/x": torch.ones(1)}
    folder = ck.save(tmp_path, 1, content(model=state))
    loaded, library = Checkpoint.open(folder).weights("model"), load_file(folder / "model.safetensors")
    assert loaded.keys() == state.keys() == library.keys()
    for name, tensor in state.items():
        for other in (loaded[name], library[name]):
            assert other.dtype == tensor.dtype and torch.equal(other.float(), tensor.float()), name


def test_the_largest_file_is_not_read_again_to_hash_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*given: Any) -> None:
        raise AssertionError("a file was read back")

    monkeypatch.setattr(hashlib, "file_digest", refuse)
    ck.save(tmp_path, 1, content())


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 4)
        self.head = nn.Linear(4, 5, bias=False)
        self.head.weight = self.embedding.weight
        self.norm = nn.BatchNorm1d(4)


def test_tied_weights_are_stored_once_and_stay_tied(tmp_path: Path) -> None:
    model = Tied()
    folder = ck.save(tmp_path, 1, content(model=model.state_dict()))
    assert "head.weight" not in load_file(folder / "model.safetensors")
    opened = Checkpoint.open(folder)
    assert opened.weights().keys() == model.state_dict().keys()
    with torch.device("meta"):
        empty = Tied()
    for other in (Tied(), empty):
        opened.load_into(other)
        assert other.head.weight is other.embedding.weight and other.head.weight.requires_grad
        assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in other.state_dict().items())
    empty.head.weight.data.add_(1)  # the file is mapped into memory, and must not see this
    assert torch.equal(Checkpoint.open(folder).weights()["head.weight"], model.head.weight)


def test_a_model_that_does_not_fit_is_named(tmp_path: Path) -> None:
    folder = ck.save(tmp_path, 1, content(model={"weight": torch.zeros(2, 3), "old": torch.zeros(1)}))
    model = nn.Linear(3, 4)
    before = model.weight.clone()
    with pytest.raises(
        CheckpointError, match=r"lacks bias; has, unknown .* old; .* weight \[2, 3\] \(model: \[4, 3\]\)"
    ):
        Checkpoint.open(folder).load_into(model)
    assert torch.equal(model.weight, before)
    with pytest.raises(CheckpointError, match="no average"):
        Checkpoint.open(folder).weights("ema")


def test_a_buffer_that_nothing_fills_is_named(tmp_path: Path) -> None:
    class Rotary(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("angles", torch.ones(2), persistent=False)

    with torch.device("meta"):
        model = nn.ModuleDict({"linear": nn.Linear(2, 2), "rotary": Rotary()})
    folder = ck.save(
        tmp_path,
        1,
        content(model={k: torch.zeros_like(v, device="cpu") for k, v in model.state_dict().items()}),
    )
    with pytest.raises(CheckpointError, match=r"rotary\.angles"):
        Checkpoint.open(folder).load_into(model)


def test_weights_alone_generate_but_do_not_resume(tmp_path: Path) -> None:
    whole = ck.save(tmp_path / "a", 1, content())
    for name in ("trainer.json", "trainer.safetensors"):
        (whole / name).unlink()
    for folder in (whole, ck.save(tmp_path / "b", 1, content(trainer=None))):
        opened = Checkpoint.open(folder)
        assert opened.trainer_state() is None and equal(opened.weights(), content().model)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"family": {"name": "toy", "codec": [{"_target_": "os.system"}]}},
            "family: codec: 0 has a _target_",
        ),
        ({"family": {"name": "${oc.env:HOME}"}}, "interpolation"),
        ({"settings": {"path": Path("x")}}, r"settings.json.*path is a \w*Path"),
        ({"fitted": Fitted(data={"codes": {3: "a"}})}, "codes is a dictionary with keys that are not text"),
        ({"trainer": {"hook": print}}, "hook is a builtin_function_or_method"),
        (
            {"model": {"weight": torch.zeros(1, dtype=torch.complex64)}},
            "weight in model.safetensors is torch.complex64",
        ),
        ({"model": {"weight": torch.zeros(1, device="meta")}}, "weight in model.safetensors .* on meta"),
    ],
)
def test_what_cannot_be_kept_is_said_and_leaves_nothing(tmp_path: Path, changes: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ck.save(tmp_path, 1, content(**changes))
    assert not any((tmp_path / "checkpoints").glob("*"))


# ── nested state ─────────────────────────────────────────

keys = st.one_of(
    st.text(max_size=4),
    st.integers(),
    st.booleans(),
    st.none(),
    st.tuples(st.integers(), st.text(max_size=2)),
)
leaves = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=5),
    st.builds(lambda n: torch.arange(n, dtype=torch.bfloat16), st.integers(0, 3)),
    st.builds(lambda n: torch.tensor(n), st.integers(0, 9)),
    st.builds(lambda n: np.arange(n, dtype=np.uint32).reshape(1, n), st.integers(0, 3)),
)
nested = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.tuples(inner, inner),
        st.dictionaries(keys, inner, max_size=3),
        st.dictionaries(st.sampled_from(["$", "a", "a.b", "name", "items"]), inner, max_size=3),
    ),
    max_leaves=12,
)


@settings(max_examples=200, deadline=None)
@given(nested)
def test_nested_state_survives_json(state: Any) -> None:
    flat = ck.flatten_state(state)
    assert equal(ck.unflatten_state(flat.tensors, json.loads(json.dumps(flat.tree))), state)


def test_training_goes_on_to_the_bit(tmp_path: Path) -> None:
    def make() -> tuple[nn.Module, torch.optim.Optimizer, Any]:
        torch.manual_seed(0)
        model = nn.Linear(4, 4)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, betas=(0.9, 0.95), amsgrad=True)
        return model, optimizer, torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=9)

    def train(model: nn.Module, optimizer: torch.optim.Optimizer, schedule: Any) -> None:
        for _ in range(3):
            noise = random.random() + np.random.rand()
            optimizer.zero_grad()
            (model(torch.randn(2, 4)).square().sum() * noise).backward()
            optimizer.step()
            schedule.step()

    model, optimizer, schedule = make()
    train(model, optimizer, schedule)
    trainer = {
        "optimizer": optimizer.state_dict(),
        "schedule": {key: value for key, value in schedule.state_dict().items() if not callable(value)},
        "random": {
            "python": random.getstate(),
            "numpy": np.random.get_state(),
            "torch": torch.get_rng_state(),
        },
        "generator": np.random.default_rng(3).bit_generator.state,
    }
    ck.save(tmp_path, 3, content(model=model.state_dict(), trainer=trainer))
    train(model, optimizer, schedule)

    again, optimizer, schedule = make()
    opened = Checkpoint.open(tmp_path)
    opened.load_into(again)
    state = opened.trainer_state()
    assert state is not None and equal(state["generator"], trainer["generator"])
    optimizer.load_state_dict(state["optimizer"])
    schedule.load_state_dict(state["schedule"])
    random.setstate(state["random"]["python"])
    np.random.set_state(state["random"]["numpy"])
    torch.set_rng_state(state["random"]["torch"])
    train(again, optimizer, schedule)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


@pytest.mark.parametrize(
    "tree", [{"$": "tensor", "name": "gone"}, {"$": "call", "name": "os"}, {"$": "dict", "items": 3}]
)
def test_a_tree_of_someone_else_is_refused(tree: Any) -> None:
    with pytest.raises(CheckpointError, match="trainer.json"):
        ck.unflatten_state({}, tree)


# ── which one a path stands for ──────────────────────────


def test_steps_are_numbers_not_text(tmp_path: Path) -> None:
    for step in (9, 100, 99, 100_000_000, 20, 99_999_999):
        ck.save(tmp_path, step, content(), links=())
    assert [int(path.name[5:]) for path in ck.checkpoints(tmp_path)] == [
        9,
        20,
        99,
        100,
        99_999_999,
        100_000_000,
    ]
    newest = ck.newest(tmp_path)
    assert newest is not None and newest.name == "step-100000000"
    assert ck.newest(tmp_path / "nothing") is None


def test_a_run_a_link_a_pointer_and_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = ck.save(tmp_path, 1, content(), links=("best", "last"))
    second = ck.save(tmp_path, 2, content())
    assert os.readlink(tmp_path / "best") == "checkpoints/step-00000001"
    assert ck.resolve(tmp_path) == ck.resolve(tmp_path / "best") == ck.resolve(first) == first.resolve()
    assert ck.resolve(tmp_path / "last") == second.resolve()
    (tmp_path / "best").unlink()
    assert ck.resolve(tmp_path) == second.resolve()
    (tmp_path / "best").write_text("checkpoints/step-00000001\n")
    assert ck.resolve(tmp_path) == ck.resolve(tmp_path / "best") == first.resolve()
    ck.point(tmp_path, "best", second)
    monkeypatch.chdir(tmp_path)
    assert ck.resolve("best") == ck.resolve(".") == second.resolve()


def test_a_store_without_links_gets_pointer_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*given: Any, **named: Any) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(os, "symlink", refuse)
    folder = ck.save(tmp_path, 1, content(), links=("best", "last"))
    assert (tmp_path / "last").read_text() == "checkpoints/step-00000001\n"
    assert ck.resolve(tmp_path / "last") == folder.resolve() == ck.resolve(tmp_path)


def test_a_path_that_stands_for_nothing(tmp_path: Path) -> None:
    folder = ck.save(tmp_path / "run", 5, content(), links=("last",))
    (tmp_path / "empty" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run" / "best").symlink_to("checkpoints/step-00000004")
    (folder.parent / "step-00000006").mkdir()
    (tmp_path / "pointer").write_text("../../etc")
    for path, message in {
        "run/best": "leads to .*step-00000004, which is gone.*step-00000005",
        "run": "leads to .*step-00000004, which is gone.*step-00000005",
        "run/checkpoints/step-00000006": "never finished.*step-00000005",
        "run/checkpoints/step-00000007": "does not exist.*step-00000005",
        "empty": "no finished checkpoint yet",
        "nowhere": "does not exist",
        "pointer": "is no checkpoint",
        "run/checkpoints/step-00000005/model.safetensors": "weights without the model",
        "run/checkpoints/step-00000005/manifest.json": "is no checkpoint",
    }.items():
        with pytest.raises(CheckpointError, match=message):
            Checkpoint.open(tmp_path / path)


# ── pruning and replacing ────────────────────────────────


@settings(max_examples=15, deadline=None)
@given(
    st.sets(st.integers(0, 120), min_size=1, max_size=6),
    st.integers(1, 3),
    st.sampled_from([0, 10]),
    st.data(),
)
def test_pruning_keeps_what_it_promises(
    tmp_path_factory: pytest.TempPathFactory,
    steps: set[int],
    keep_last: int,
    keep_every: int,
    data: st.DataObject,
) -> None:
    run = tmp_path_factory.mktemp("run")
    best, protected = data.draw(st.sampled_from(sorted(steps))), data.draw(st.sampled_from(sorted(steps)))
    folders = {step: ck.save(run, step, content(trainer=None), links=("last",)) for step in sorted(steps)}
    ck.point(run, "best", folders[best])
    removed = ck.prune(run, keep_last, keep_every, protect=[folders[protected]])
    expected = {*sorted(steps)[-keep_last:], best, protected} | {s for s in steps if keep_every and s % keep_every == 0}
    assert {int(path.name[5:]) for path in ck.checkpoints(run)} == expected
    assert {int(path.name[5:]) for path in removed} == steps - expected
    assert len([*(run / "checkpoints").iterdir()]) == len(expected)


def test_pruning_never_removes_the_newest(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="keep_last"):
        ck.prune(tmp_path, 0)


def test_the_same_step_again_replaces_it(tmp_path: Path) -> None:
    ck.save(tmp_path, 1, content(1.0))
    ck.save(tmp_path, 1, content(2.0))
    assert Checkpoint.open(tmp_path / "last").figures == {"validation_loss": 2.0}
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000001"]


# ── formats ──────────────────────────────────────────────


def test_an_older_format_is_read(tmp_path: Path) -> None:
    folder = ck.save(tmp_path, 1, content(trainer={"epoch": 1, "figures": {"validation_loss": 0.5}}, figures={}))
    reseal(folder, format_version=1)
    assert Checkpoint.open(folder).figures == {"validation_loss": 0.5}
    for name in ("trainer.json", "trainer.safetensors"):
        (folder / name).unlink()
    assert Checkpoint.open(folder).figures == {}


@pytest.mark.parametrize("version", [ck.FORMAT_VERSION + 1, 0, -1])
def test_another_format_is_named(tmp_path: Path, version: int) -> None:
    older = ck.save(tmp_path, 1, content())
    folder = ck.save(tmp_path, 2, content())
    reseal(folder, format_version=version)
    assert ck.newest(tmp_path) == folder  # it is there: going on from an older one unasked would lose its steps
    with pytest.raises(CheckpointError, match=rf"format {version}.*upgrade avray.*{older.name}"):
        Checkpoint.open(folder)


# ── saving in the background ─────────────────────────────


def test_a_background_save_holds_what_was_given(tmp_path: Path) -> None:
    weight, moment = torch.ones(2), torch.ones(2)
    done: list[tuple[str, str]] = []

    def then(folder: Path) -> None:
        done.append((folder.name, os.readlink(tmp_path / "last")))

    with ck.AsyncSaver() as saver:
        for step in (1, 2):
            given_content = content(
                model={"a": weight, "b": weight}, ema={"a": weight * 2}, trainer={"m": moment, "tied": weight}
            )
            saver.save(tmp_path, step, given_content, ("last",), then)
            weight.fill_(7)
            moment.fill_(7)
        written = saver.wait()
        assert written is not None and written.name == "step-00000002" and saver.wait() is None
    assert done == [(f"step-0000000{n}", f"checkpoints/step-0000000{n}") for n in (1, 2)]
    first = Checkpoint.open(tmp_path / "checkpoints" / "step-00000001")
    assert equal(first.weights("model"), {"a": torch.ones(2), "b": torch.ones(2)})
    assert equal(first.weights("ema"), {"a": torch.full((2,), 2.0)})
    assert equal(first.trainer_state(), {"m": torch.ones(2), "tied": torch.ones(2)})
    assert [*load_file(first.path / "model.safetensors")] == ["a"]


def test_a_background_error_is_raised_at_the_next_call(tmp_path: Path) -> None:
    ck.save(tmp_path, 1, content())
    (tmp_path / "blocked").write_text("")
    pruned: list[Path] = []
    saver = ck.AsyncSaver()
    saver.save(tmp_path / "blocked", 2, content(), ("last",), pruned.append)
    with pytest.raises(CheckpointError, match="Saving .*blocked"):
        saver.save(tmp_path, 3, content())
    assert not pruned and saver.wait() is None
    saver.save(tmp_path / "blocked", 4, content())
    with pytest.raises(CheckpointError, match="Saving .*blocked"):
        saver.close()


# What a run never changes ------------------------------------------------------------------------------------------

def with_base(value: float, base: float = 7.0) -> Content:
    tied = torch.full((50, 40), base)
    model = {"weight": torch.full((3, 2), value), "base.tokens": tied, "base.head": tied}
    return content(value, model=model, ema={**model, "weight": torch.full((3, 2), value / 2)},
                   unchanging=frozenset({"base.tokens", "base.head"}))


def test_a_frozen_base_is_saved_once_under_its_hash(tmp_path: Path) -> None:
    folders = [ck.save(tmp_path, step, with_base(float(step))) for step in (1, 2, 3)]
    bases = list((tmp_path / "checkpoints").glob("base-*"))
    assert len(bases) == 1 and hashlib.sha256(bases[0].read_bytes()).hexdigest() in bases[0].name
    for step, folder in enumerate(folders, 1):
        assert set(load_file(folder / "model.safetensors")) == {"weight"}
        assert sum(path.stat().st_size for path in folder.iterdir()) < 50 * 40 * 4
        opened = Checkpoint.open(folder)
        assert opened.weights("model")["base.head"].eq(7).all()
        assert opened.weights("ema")["base.tokens"].shape == (50, 40)
        assert opened.weights("model")["weight"].eq(step).all() and opened.weights("best")["weight"].eq(step / 2).all()
    ck.prune(tmp_path, keep_last=1)
    ck.sweep(tmp_path)
    assert bases[0].exists() and ck.newest(tmp_path) == folders[2]
    ck.save(tmp_path, 4, with_base(4.0, base=8.0))
    assert len(list((tmp_path / "checkpoints").glob("base-*"))) == 2, "another base has another name"


def test_a_base_that_is_gone_or_damaged(tmp_path: Path) -> None:
    folder = ck.save(tmp_path, 1, with_base(1.0))
    base, = (tmp_path / "checkpoints").glob("base-*")
    copied = tmp_path / "elsewhere/step"
    copied.parent.mkdir()
    shutil.copytree(folder, copied)
    with pytest.raises(CheckpointError, match="copy that file beside it"):
        Checkpoint.open(copied)
    shutil.copy(base, copied)
    assert Checkpoint.open(copied).weights("model")["base.head"].eq(7).all()
    data = bytearray(base.read_bytes())
    data[-1] ^= 1
    base.write_bytes(data)
    with pytest.raises(CheckpointError, match="base-.* is damaged"):
        Checkpoint.open(folder)
    reseal(folder, base={"name": "../../secret.safetensors", "bytes": 1})
    with pytest.raises(CheckpointError, match="no name of a base"):
        Checkpoint.open(folder)


@pytest.mark.parametrize(("best", "left"), [(2, 2), (6, 4)])
def test_a_paused_trial_goes_back_to_where_it_was(tmp_path: Path, best: int, left: int) -> None:
    from avray.tuning.trial import go_back

    folders = {step: ck.save(tmp_path, step, content(step)) for step in (2, 4, 6, 10)}
    ck.point(tmp_path, "best", folders[best])
    (tmp_path / "summary.json").touch()
    go_back(tmp_path, folders[4])
    assert ck.checkpoints(tmp_path) == [folders[2], folders[4]]
    assert ck.follow(tmp_path, "last") == folders[4] and ck.follow(tmp_path, "best") == folders[left]
    assert not (tmp_path / "summary.json").exists()
    assert Checkpoint.open(tmp_path).step == left


def test_a_trial_that_takes_over_anothers_checkpoint_takes_its_base_too(tmp_path: Path) -> None:
    from avray.tuning.trial import copy_checkpoint

    folder = ck.save(tmp_path / "donor", 1, with_base(1.0))
    (tmp_path / "heir").mkdir()
    copied = copy_checkpoint(folder, tmp_path / "heir")
    shutil.rmtree(tmp_path / "donor")
    assert Checkpoint.open(copied).weights("model")["base.head"].eq(7).all()
    assert ck.newest(tmp_path / "heir") == copied
