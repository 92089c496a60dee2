"""Rates against closed forms and torch's own schedulers; resuming is exact; averages and early stopping."""

import copy
import json
import math

import pytest
import torch
from torch import nn

from avray.settings.trainer import OptimizerSettings, ScheduleSettings
from avray.train.optim import OPTIMIZERS, EarlyStopping, Ema, build_optimizer, build_schedule


def small_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 1))


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> float:
    generator = torch.Generator().manual_seed(step)
    inputs = torch.randn(16, 4, generator=generator)
    loss = (model(inputs) - inputs.sum(1, keepdim=True)).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_learns(name):
    model = small_model()
    optimizer = build_optimizer(model, OptimizerSettings(name=name, lr=1e-2))
    first = train_step(model, optimizer, 0)
    for step in range(1, 60):
        last = train_step(model, optimizer, step)
    assert last < first


def test_adamw_is_torchs():
    ours, theirs = small_model(), small_model()
    optimizer = build_optimizer(ours, OptimizerSettings(lr=1e-2, weight_decay=0.3))
    reference = torch.optim.AdamW(theirs.parameters(), lr=1e-2, weight_decay=0.3)
    for step in range(5):
        train_step(ours, optimizer, step)
        train_step(theirs, reference, step)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_decay_of_matrices_leaves_biases_and_norms_out():
    model = small_model()
    model[0].requires_grad_(False)
    groups = build_optimizer(model, OptimizerSettings(decay="matrices")).param_groups
    assert [group["weight_decay"] for group in groups] == [0.01, 0.0]
    assert [parameter.ndim for group in groups for parameter in group["params"]] == [2, 1, 1, 1]


def test_bad_settings_name_the_key():
    model = small_model()
    with pytest.raises(ValueError, match="optimizer.name=lamb"):
        build_optimizer(model, OptimizerSettings(name="lamb"))
    with pytest.raises(ValueError, match="optimizer.decay"):
        build_optimizer(model, OptimizerSettings(decay="none"))
    with pytest.raises(ValueError, match="no trainable parameter"):
        build_optimizer(model.requires_grad_(False), OptimizerSettings(lr=1e-2))
    optimizer = build_optimizer(small_model(), OptimizerSettings(lr=1e-2))
    with pytest.raises(ValueError, match="schedule.name"):
        build_schedule(optimizer, ScheduleSettings(name="step"), 10)
    with pytest.raises(ValueError, match="warmup_steps=10"):
        build_schedule(optimizer, ScheduleSettings(name="cosine", warmup_steps=10), 10)


def rates(settings: ScheduleSettings, steps: list[int], max_steps: int = 100) -> list[float]:
    optimizer = build_optimizer(small_model(), OptimizerSettings(lr=2.0))
    schedule = build_schedule(optimizer, settings, max_steps)
    found = []
    for step in steps:
        assert schedule.step(step) == optimizer.param_groups[0]["lr"]
        found.append(optimizer.param_groups[0]["lr"])
    return found


def test_shapes_of_the_rate():
    assert rates(ScheduleSettings("constant", warmup_steps=3), [0, 1, 2, 3, 99]) == [0.5, 1.0, 1.5, 2.0, 2.0]
    a_tenth = [rates(ScheduleSettings("linear", **given), range(100))
               for given in ({"warmup_steps": 10}, {"warmup_fraction": 0.1})]
    assert a_tenth[0] == a_tenth[1]
    assert rates(ScheduleSettings("linear", min_lr_ratio=0.1), [0, 50, 500]) == pytest.approx([2, 1.1, 0.2])
    cosine = rates(ScheduleSettings("cosine", warmup_steps=20, min_lr_ratio=0.5), [20, 40, 60, 100])
    assert cosine == pytest.approx([2.0, 1.5 + 0.5 * math.cos(math.pi / 4), 1.5, 1.0])


def test_plateau_is_torchs_and_resumes():
    losses = [3.0, 2.0, 2.1, 2.0, 1.9999, 2.2, 1.5, 1.6, math.nan, 1.6, 1.6, 1.6, 1.6, 1.6, 1.6, 0.1]
    optimizer = build_optimizer(small_model(), OptimizerSettings(lr=1.0))
    schedule = build_schedule(optimizer, ScheduleSettings("plateau", patience=2, min_lr_ratio=0.2), 1)
    reference = torch.optim.SGD(small_model().parameters(), lr=1.0)
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(reference, factor=0.5, patience=2, min_lr=0.2)
    for index, loss in enumerate(losses):
        state = json.loads(json.dumps(schedule.state_dict()))
        optimizer = build_optimizer(small_model(), OptimizerSettings(lr=1.0))
        schedule = build_schedule(optimizer, schedule.settings, 1)
        schedule.load_state_dict(state)
        schedule.observe(loss)
        plateau.step(loss)
        assert schedule.step(index) == pytest.approx(reference.param_groups[0]["lr"])
    assert schedule.plateau_factor < 1


def test_stop_and_resume_gives_the_same_bits():
    settings = ScheduleSettings("cosine", warmup_steps=3)

    def run(first: int, last: int, model: nn.Module, optimizer_state, ema_state):
        optimizer = build_optimizer(model, OptimizerSettings(lr=1e-2))
        schedule = build_schedule(optimizer, settings, 20)
        ema = Ema(model, 0.9)
        if optimizer_state is not None:
            optimizer.load_state_dict(optimizer_state)
            ema.load_state_dict(ema_state)
        for step in range(first, last):
            schedule.step(step)
            train_step(model, optimizer, step)
            ema.update(step)
        return optimizer.state_dict(), ema.state_dict()

    whole, stopped = small_model(), small_model()
    _, whole_ema = run(0, 12, whole, None, None)
    halfway = copy.deepcopy(run(0, 5, stopped, None, None))
    _, stopped_ema = run(5, 12, stopped, *halfway)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), stopped.parameters(), strict=True))
    assert all(torch.equal(whole_ema[name], stopped_ema[name]) for name in whole_ema)


def test_ema_values_and_swap():
    model = nn.Linear(1, 1, bias=False)
    ema = Ema(model, 0.5, warmup=False)
    start = model.weight.item()
    with torch.no_grad():
        model.weight += 1.0
    ema.update(0)
    with pytest.raises(RuntimeError), ema.swapped():
        assert model.weight.item() == pytest.approx(start + 0.5)
        raise RuntimeError
    assert model.weight.item() == pytest.approx(start + 1.0)
    warm = Ema(model, 0.999)
    with torch.no_grad():
        model.weight += 1.0
    warm.update(0)
    assert warm.state_dict()["weight"].item() == pytest.approx(start + 1.0 + 0.9)


def test_ema_of_bfloat16_keeps_small_changes_and_restores_bits():
    model = nn.Linear(8, 8).to(torch.bfloat16)
    ema = Ema(model, 0.9999, warmup=False)
    before = model.weight.detach().clone()
    with torch.no_grad():
        model.weight += 1.0
    after = model.weight.detach().clone()
    ema.update(0)
    moved = ema.state_dict()["weight"] - before.float()
    torch.testing.assert_close(moved, 1e-4 * (after - before).float(), rtol=0.05, atol=1e-7)
    with ema.swapped():
        pass
    assert torch.equal(model.weight, after)


def test_ema_of_another_model_is_refused():
    with pytest.raises(ValueError, match="another model"):
        Ema(small_model(), 0.9).load_state_dict({"weight": torch.zeros(1)})


def test_early_stopping():
    stopping = EarlyStopping(patience=2)
    assert [stopping.observe(loss) for loss in (2.0, 1.0, math.nan)] == [True, True, False]
    assert not stopping.stop
    resumed = EarlyStopping(patience=2)
    resumed.load_state_dict(json.loads(json.dumps(stopping.state_dict())))
    assert not resumed.observe(1.0)
    assert resumed.stop and not stopping.stop
    never = EarlyStopping(patience=0)
    never.observe(math.inf)
    assert not never.stop and never.best is None
