"""Sweeps without Ray: spaces, draws, the journal, rungs, results, and everything that is refused at start."""

from __future__ import annotations

import json
import math
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ray.tune.experiment import Trial
from ray.tune.schedulers import AsyncHyperBandScheduler, TrialScheduler

from avray import cli
from avray.config import ObjectiveSettings, SweepSettings, TuneSettings, to_mapping
from avray.errors import OutOfMemory, TrainingFailed, WorkerFailed
from avray.settings import composing
from avray.tuning.checks import check, check_folder
from avray.tuning.journal import Journal, Record
from avray.tuning.resources import DRIVER_CPUS, needs_of, of_trial, room_for, too_big
from avray.tuning.results import best_of, pareto, ranked, table_of, value_of
from avray.tuning.scheduling import Asha, first_rung, make_scheduler, perturb_every, reason_of
from avray.tuning.search import Listed, Suggest, Tpe, study_of
from avray.tuning.space import candidates, default_params, put, read_space
from avray.tuning.sweep import heed_memory_kills
from avray.tuning.trial import Plan, finish, trial_settings

LR = "trainer.optimizer.lr"
LOSS = (ObjectiveSettings(),)


def sweep_settings(*overrides: str) -> SweepSettings:
    settings = cli.compose(cli.SWEEP, overrides)
    assert isinstance(settings, SweepSettings)
    return settings


# ── spaces ────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("family", sorted(path.stem for path in (composing.CONF_DIR / "family").glob("[!_]*.yaml")))
def test_every_family_ships_a_space_that_every_search_takes(family: str) -> None:
    if family == "own":
        return
    for tune in sorted(path.stem for path in (composing.CONF_DIR / "tune").glob("*.yaml")):
        settings = sweep_settings(f"family={family}", f"tune={tune}")
        check(settings, read_space(settings.tune.space))


def test_keys_dotted_and_nested_and_taken_out() -> None:
    settings = sweep_settings("tune.space.trainer.optimizer.lr={loguniform: [1e-3, 2e-3]}",
                              "tune.space.trainer.batch_size={choice: [8, 16]}",
                              "tune.space.family.dropout=null")
    space = read_space(settings.tune.space)
    assert set(space.keys) == {LR, "trainer.optimizer.weight_decay", "trainer.batch_size"}
    assert (space[LR].low, space[LR].high) == (1e-3, 2e-3), "the command line outweighs the YAML"


def test_an_experiment_brings_its_familys_space() -> None:
    settings = sweep_settings("experiment=codec_lm_demo")
    assert settings.family["name"] == "codec_lm" and LR in settings.tune.space


@pytest.mark.parametrize(("space", "sentence"), [
    ({}, "tune.space has nothing to search in it"),
    ({LR: None}, "tune.space has nothing to search in it"),
    ({LR: 1e-3}, f"tune.space.{LR} must be a distribution"),
    ({LR: {"loguniform": [1e-2, 1e-5]}}, f"tune.space.{LR}: loguniform has its bounds reversed: write [1e-05, 0.01]."),
    ({LR: {"uniform": [1, 1]}}, f"tune.space.{LR}: uniform from 1 to 1 searches nothing"),
    ({LR: {"loguniform": [0, 1]}}, f"tune.space.{LR}: loguniform must begin above 0"),
    ({LR: {"loguniform": [1, "x"]}}, f"tune.space.{LR}: loguniform must be two numbers"),
    ({"a": {"int": [1.5, 3]}}, "tune.space.a: int must have whole numbers as bounds"),
    ({"a": {"choice": []}}, "tune.space.a: choice must be a list of values"),
    ({"a": {"uniform": [0, 1], "choice": [1]}}, "tune.space.a must have one of uniform"),
    ({"a": {"uniform": [0, 1], "step": 2}}, "tune.space.a.step must be above 0 and at most 1"),
    ({"a": {"uniform": [0, 1], "when": {"b": 1}}}, "tune.space.a hangs on b, which is not searched"),
    ({"a": {"choice": [1], "when": {"b": 1}}, "b": {"choice": [1], "when": {"a": 1}}}, "tune.space: the conditions of"),
    ({"a": {"choice": [1], "when": {"b": 3}}, "b": {"choice": [1, 2]}}, "tune.space.a: b never takes the value 3."),
])
def test_a_wrong_space_is_a_sentence(space: Mapping[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError) as caught:
        read_space(space)
    assert str(caught.value).startswith(sentence) and "\n" not in str(caught.value)


@given(st.integers(0, 2**40), st.integers(0, 1000))
def test_draws_are_in_range_on_the_raster_and_follow_from_the_number(seed: int, number: int) -> None:
    space = read_space({"a": {"loguniform": [1e-5, 1e-2]}, "b": {"int": [2, 5]}, "c": {"uniform": [0, 1], "step": 0.25},
                        "d": {"logint": [1, 64]}, "e": {"choice": ["x", [1, 2]]},
                        "f": {"uniform": [3, 4], "when": {"e": "x"}}})
    params = space.draw(seed, number)
    assert params == space.draw(seed, number)
    assert 1e-5 <= params["a"] <= 1e-2 and params["b"] in (2, 3, 4, 5) and params["c"] in (0, 0.25, 0.5, 0.75, 1)
    assert isinstance(params["d"], int) and 1 <= params["d"] <= 64
    assert ("f" in params) == (params["e"] == "x"), "a condition is kept"
    more = read_space({"a": {"loguniform": [1e-5, 1e-2]}, "z": {"int": [0, 1]}})
    assert more.draw(seed, number)["a"] == params["a"], "another key leaves a value alone"
    new = space.explore(params, seed, number, 50, 0.0)
    assert 0.79 * params["a"] <= new["a"] <= 1.21 * params["a"] and abs(new["b"] - params["b"]) <= 1


def test_draws_cover_their_range() -> None:
    space = read_space({"a": {"loguniform": [1e-4, 1e-2]}, "b": {"int": [0, 3]}})
    drawn = [space.draw(0, number) for number in range(400)]
    assert 0.4 < sum(params["a"] < 1e-3 for params in drawn) / 400 < 0.6
    assert {params["b"] for params in drawn} == {0, 1, 2, 3}


def test_a_grid_counts_what_does_not_apply_once() -> None:
    space = read_space({"kind": {"choice": ["a", "b"]}, "x": {"uniform": [0, 1], "when": {"kind": "a"}}})
    grid = space.grid(3)
    assert grid == [{"kind": "a", "x": 0}, {"kind": "a", "x": 0.5}, {"kind": "a", "x": 1}, {"kind": "b"}]
    assert candidates(space, "grid", 0, None, 3, {"kind": "b"})[0] == {"kind": "b"}
    assert len(candidates(space, "grid", 0, None, 3, {"kind": "b"})) == 4
    assert len(candidates(space, "random", 0, 7, 3, None)) == 7


def test_values_go_where_they_belong() -> None:
    settings = sweep_settings("codec.num_codebooks=4")
    changed = trial_settings(settings, {LR: 0.5, "codec.num_codebooks": 2, "family.dropout": 0.3}, "x")
    assert changed.trainer.optimizer.lr == 0.5 and changed.family["dropout"] == 0.3
    assert changed.codec["num_codebooks"] == changed.family["codec"]["num_codebooks"] == 2
    assert settings.trainer.optimizer.lr != 0.5, "the sweep's own settings stay"
    assert put({"a": {"b": 1}}, {"a.c": [1]}) == {"a": {"b": 1, "c": [1]}}
    assert default_params(read_space(settings.tune.space), to_mapping(settings))[LR] == settings.trainer.optimizer.lr


# ── refused at start ──────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("overrides", "sentence"), [
    (["tune.space.trainer.optimizer.rl={uniform: [0, 1]}"],
     "tune.space.trainer.optimizer.rl: trainer.optimizer.rl is not a setting; did you mean trainer.optimizer.lr?"),
    (["tune.space.family.dropoot={uniform: [0, 1]}"], "tune.space.family.dropoot: family.dropoot is not a setting"),
    (["tune.space.trainer.optimizer.lr={uniform: [-1, 1]}"],
     "tune.space.trainer.optimizer.lr has -1.0 among its values: trainer.optimizer.lr must be above 0"),
    (["tune.space.family.head={choice: [mse, msse]}", "tune=random"],
     "tune.space.family.head has 'msse' among its values: family.head"),
    (["tune.space.trainer.num_workers={int: [1, 2]}"], "tune.space.trainer.num_workers cannot be searched"),
    (["tune.space.run.dir={choice: [a]}"], "tune.space.run.dir cannot be searched"),
    (["tune.space.trainer.max_steps={int: [1, 200]}"], "tune.space.trainer.max_steps cannot be searched with"),
    (["tune=pbt", "tune.space.family.num_layers={int: [1, 2]}"],
     "tune.space.family.num_layers cannot be searched with"),
    (["tune=pbt", "tune.perturb_every_steps=30"], "tune.perturb_every_steps (30) must be a multiple of"),
    (["tune.objectives=[{metric: wer}]"], "tune.objectives: family continuation reports no wer"),
    (["trainer.validate_every_steps=0"], "trainer.validate_every_steps=0 leaves a sweep nothing to compare"),
    (["trainer.max_steps=null", "trainer.max_epochs=1"], "tune.scheduler=asha counts in steps"),
    (["trainer.max_steps=20"], "trainer.validate_every_steps (25) must be at most trainer.max_steps (20)"),
    (["tune.min_steps=300"], "tune.min_steps (300) must be at most trainer.max_steps (200)."),
])
def test_what_cannot_be_is_refused(overrides: list[str], sentence: str) -> None:
    with pytest.raises(ValueError) as caught:
        settings = sweep_settings(*overrides)
        check(settings, read_space(settings.tune.space))
    assert str(caught.value).startswith(sentence) and "\n" not in str(caught.value)


@pytest.mark.parametrize(("given_", "sentence"), [
    ({"num_samples": 0}, "tune.num_samples must be at least 1"),
    ({"num_samples": None}, "tune.num_samples=null is for tune.search=grid"),
    ({"objectives": ()}, "tune.objectives is empty"),
    ({"objectives": LOSS + LOSS}, "tune.objectives names a metric twice"),
    ({"scheduler": "pbt", "search": "optuna"}, "tune.scheduler=pbt finds values of its own"),
    ({"scheduler": "pbt", "num_samples": 1}, "tune.scheduler=pbt needs tune.num_samples of at least 2"),
    ({"quantile": 0.7}, "tune.quantile must be at most 0.5"),
    ({"reduction_factor": 1.0}, "tune.reduction_factor must be above 1"),
])
def test_tune_settings_check_themselves(given_: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence.replace("(", r"\(")):
        TuneSettings(**given_)


def test_a_name_already_used(tmp_path: Path) -> None:
    settings = sweep_settings(f"run.dir={tmp_path}/a")
    journal = tmp_path / "a" / "journal.jsonl"
    check_folder(settings, journal)
    with pytest.raises(ValueError, match="resume=true and .* holds no sweep"):
        check_folder(sweep_settings(f"run.dir={tmp_path}/a", "resume=true"), journal)
    journal.parent.mkdir()
    (journal.parent / ".avray-shared-a1b2").touch()  # of a driver that was killed while it asked who sees this folder
    check_folder(settings, journal)
    (journal.parent / "notes.txt").touch()
    with pytest.raises(ValueError, match="holds files already: give another run.dir"):
        check_folder(settings, journal)
    journal.touch()
    with pytest.raises(ValueError, match="holds a sweep: go on with it by resume=true, or give another run.dir"):
        check_folder(settings, journal)
    check_folder(sweep_settings(f"run.dir={tmp_path}/a", "resume=true"), journal)


# ── resources ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_how_many_at_a_time_and_why() -> None:
    settings = sweep_settings("trainer.num_workers=2", "data.embed_workers=1", "tune.max_concurrent=8")
    assert room_for(settings, 0, 16, {"CPU": 8}).trials == 3
    assert "7 of 8 CPUs are left for trials" in room_for(settings, 0, 16, {"CPU": 8}).why
    assert room_for(settings, 1, 16, {"CPU": 80}).why.startswith("8 trials at a time, as tune.max_concurrent=8")
    assert room_for(settings, 1, 4, {"CPU": 80}).why.startswith("4 trials at a time, as there are 4 trials")
    gpus = sweep_settings("trainer.use_gpu=true", "trainer.num_workers=2")
    room = room_for(gpus, 0, 16, {"CPU": 80, "GPU": 4})
    assert room.trials == 2 and "there are 4 GPUs" in room.why


def test_a_trial_of_one_worker_holds_what_the_worker_needs() -> None:
    alone = sweep_settings("trainer.use_gpu=true", "trainer.cpus_per_worker=3")
    assert of_trial(alone) == {"CPU": 3, "GPU": 1}
    assert of_trial(sweep_settings("trainer.cpus_per_worker=3", "trainer.num_workers=2")) == {"CPU": DRIVER_CPUS}
    assert room_for(sweep_settings(), 0, 16, {"CPU": 9}).trials == 8


def test_trials_leave_the_encoders_beside_them_their_gpus() -> None:
    settings = sweep_settings("trainer.use_gpu=true", "data.embed_workers=1", "data.embed_num_gpus=0.5")
    assert room_for(settings, 1, 16, {"CPU": 80, "GPU": 4}).trials == 4
    room = room_for(settings, 1, 16, {"CPU": 80, "GPU": 4}, embeds_beside=True)
    assert room.trials == 3 and "3.5 of 4 GPUs are left for trials" in room.why


def test_a_trial_killed_for_its_memory_is_one_that_failed() -> None:
    """Ray's monitor kills it; Ray Tune would end the sweep."""
    from ray.air.execution._internal.actor_manager import RayActorManager
    from ray.exceptions import OutOfMemoryError, RayActorError

    heed_memory_kills()
    heed_memory_kills()
    told: list[Exception] = []
    actor = types.SimpleNamespace(actor_id=1, _on_error=lambda _actor, error: told.append(error))
    task = types.SimpleNamespace(_tracked_actor=actor, _on_error=lambda _actor, error: told.append(error))
    manager = types.SimpleNamespace(_failed_actor_ids=set(), _cleanup_actor=lambda tracked_actor: None)
    RayActorManager._actor_task_failed(manager, task, OutOfMemoryError("node running low on memory"))  # type: ignore[arg-type]
    assert len(told) == 2 and all(isinstance(error, RayActorError) for error in told)
    trial = types.SimpleNamespace(get_error=lambda: told[0])
    assert reason_of(trial).startswith("The trial ran out of memory: search smaller models")


def test_what_never_fits_is_said() -> None:
    settings = sweep_settings("trainer.cpus_per_worker=8")
    assert "none of 2 has them" in str(too_big(settings, [{"CPU": 4}, {"CPU": 4}]))
    assert too_big(settings, [{"CPU": 4}, {"CPU": 8}]) is None
    assert "logical GPUs" in str(needs_of(sweep_settings("trainer.use_gpu=true"), 0, 1).refusal({"CPU": 80}))


# ── the journal, the search, the rungs ────────────────────────────────────────────────────────────────────────────


def journal_of(path: Path, losses: Mapping[int, list[float]], ended: Mapping[int, str] | None = None) -> Journal:
    journal = Journal(path)
    for number, found in losses.items():
        journal.write("start", number, params={LR: 10 ** -(2 + number % 3)})
        for index, loss in enumerate(found):
            journal.write("result", number, step=25 * (index + 1), loss=loss, decision="CONTINUE", seconds=1.0)
        state = (ended or {}).get(number)
        if state:
            journal.write("end", number, state=state, values={"validation_loss": min(found)}, seconds=2.0)
    return journal


def test_a_journal_is_read_as_it_was_written_half_lines_aside(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    journal = journal_of(path, {0: [2.0, 1.0], 1: [3.0]}, {0: "finished"})
    again = Journal(path)
    assert again.records == journal.records and again.events == journal.events
    with open(path, "a") as file:
        file.write('{"event": "res')
    after = Journal(path)
    assert after.records == journal.records
    after.write("end", 1, state="failed", error="x")
    assert Journal(path).records[1].state == "failed"
    assert [one.number for one in Journal(path).unfinished] == []


def test_a_search_goes_on_with_what_was_under_way(tmp_path: Path) -> None:
    journal = journal_of(tmp_path / "j", {0: [1.0], 1: [2.0]}, {0: "finished"})
    space = read_space({LR: {"loguniform": [1e-4, 1e-2]}})
    listed = candidates(space, "random", 3, 4, 3, None)
    search = Suggest(journal, Listed(listed), 4)
    given_ = [search.suggest(str(i)) for i in range(4)]
    assert [one["trial"]["number"] for one in given_[:3]] == [1, 2, 3] and given_[3] == "FINISHED"
    assert given_[0]["trial"]["params"] == journal.records[1].params, "with the values it had"
    assert given_[2]["trial"]["params"] == listed[3]


def test_optuna_goes_where_the_loss_is_low(tmp_path: Path) -> None:
    settings = TuneSettings(search="optuna", scheduler="none", num_samples=40)
    space = read_space({LR: {"loguniform": [1e-5, 1e-1]}, "k": {"choice": [[1], [2]]},
                        "m": {"int": [1, 9], "when": {"k": [[2]]}}})
    journal = Journal(tmp_path / "j")
    asker = Tpe(space, journal, settings, 0, None)
    for number in range(30):
        params = asker.ask(number)
        journal.write("start", number, params=params)
        assert ("m" in params) == (params["k"] == [2])
        loss = (math.log10(params[LR]) + 3) ** 2 + (0.5 if params["k"] == [1] else 0.0)
        journal.write("end", number, state="finished", values={"validation_loss": loss}, seconds=1.0)
    late = [abs(math.log10(journal.records[number].params[LR]) + 3) for number in range(20, 30)]
    assert sorted(late)[5] < 0.8, "1.0 for draws at random"
    assert asker.ask(30) == Tpe(space, Journal(tmp_path / "j"), settings, 0, None).ask(30), "a resume asks the same"


def test_several_objectives_reach_optuna() -> None:
    tune = TuneSettings(objectives=(ObjectiveSettings(), ObjectiveSettings("snr", "max")))
    records = [Record(0, {LR: 1e-3}, "finished", values={"validation_loss": 1.0, "snr": 3.0}),
               Record(1, {LR: 1.0}, "failed")]
    study = study_of(records, read_space({LR: {"loguniform": [1e-4, 1e-2]}}), tune)
    assert [trial.values for trial in study.best_trials] == [[1.0, 3.0]]


def test_rungs_are_rays_but_never_stop_the_last_step() -> None:
    ours, theirs = Asha(200, 25, 3.0, 1), AsyncHyperBandScheduler(
        time_attr="step", metric="loss", mode="min", max_t=200, grace_period=25, reduction_factor=3)
    rungs = [[rung[0] for rung in one._brackets[0]._rungs] for one in (ours, theirs)]
    assert rungs == [[75, 25], [75, 25]]
    assert [ours.judge(n, 25, loss) for n, loss in enumerate([3.0, 2.0, 4.0, 1.0])] == [
        "CONTINUE", "CONTINUE", "STOP", "CONTINUE"]
    assert ours.judge(4, 25, math.nan) == "STOP" and ours.judge(5, 25, 0.5) == "CONTINUE"
    assert ours.judge(6, 200, 9.0) == TrialScheduler.CONTINUE
    for step, loss in ((25, 1.5), (75, 9.0)):
        ours.judge(7, step, loss)
    assert ours._brackets[0]._rungs[0][1] == {"6": -9.0, "7": -1.5}, "a trial is worth its best so far"
    brackets = Asha(200, 25, 3.0, 2)
    assert brackets.bracket(0) is brackets.bracket(2) is not brackets.bracket(1)


def test_a_resume_stands_on_the_same_rungs(tmp_path: Path) -> None:
    settings = sweep_settings()
    space = read_space(settings.tune.space)
    journal = journal_of(tmp_path / "j", {n: [loss] for n, loss in enumerate([3.0, 2.0, 1.5])})
    scheduler = make_scheduler(settings, space, Journal(tmp_path / "j"))
    fresh = Asha(200, first_rung(settings), settings.tune.reduction_factor, 1)
    for number, record in journal.records.items():
        fresh.judge(number, 25, record.results[0][1])
    assert scheduler.inner._brackets[0]._rungs == fresh._brackets[0]._rungs
    assert (first_rung(settings), perturb_every(settings)) == (25, 50)


# ── results, failures ─────────────────────────────────────────────────────────────────────────────────────────────


class Member:
    """What population based training looks at of a trial."""

    def __init__(self, number: int) -> None:
        self.config = {"trial": {"number": number, "params": {}}}
        self.status, self.trial_id, self.checkpoint = Trial.RUNNING, str(number), None
        self.run_metadata, self.experiment_tag = Trial("avray", stub=True).run_metadata, ""

    def is_finished(self) -> bool:
        return self.status in (Trial.TERMINATED, Trial.ERROR)


class Population:
    """And of their controller."""

    search_alg = None

    def __init__(self, size: int) -> None:
        self.members = [Member(number) for number in range(size)]

    def get_trials(self) -> list[Member]:
        return self.members

    def get_live_trials(self) -> list[Member]:
        return [member for member in self.members if not member.is_finished()]


def test_a_population_does_not_wait_for_the_dead(tmp_path: Path) -> None:
    settings = sweep_settings("tune=pbt", "tune.perturb_every_steps=25", "trainer.validate_every_steps=25")
    scheduler = make_scheduler(settings, read_space(settings.tune.space), Journal(tmp_path / "journal.jsonl"))
    population = Population(2)
    waits, dies = population.members
    for member in population.members:
        scheduler.on_trial_add(population, member)
    assert scheduler.inner.on_trial_result(population, waits, {"step": 25, "loss": 1.0}) == TrialScheduler.PAUSE
    waits.status = Trial.PAUSED
    assert scheduler.choose_trial_to_run(population) is None, "the other is on its way"
    dies.status = Trial.ERROR
    assert scheduler.choose_trial_to_run(population) is waits


def test_the_best_has_finished(tmp_path: Path) -> None:
    records = [Record(0, {}, "stopped", [(25, 0.5)]), Record(1, {}, "finished", values={"validation_loss": 2.0}),
               Record(2, {}, "finished", values={"validation_loss": 1.0}), Record(3, {}, "failed", error="x, y")]
    assert [one.number for one in ranked(records, LOSS)] == [2, 1, 0, 3]
    assert best_of(records, LOSS) is records[2] and best_of(records[:1], LOSS) is records[0]
    assert best_of(records[3:], LOSS) is None
    assert best_of(records, (ObjectiveSettings("validation_loss", "max"),)) is records[1]
    settings = sweep_settings()
    lines = table_of(records, settings, read_space(settings.tune.space)).splitlines()
    assert lines[0].startswith("trial,state,validation_loss,steps,seconds,") and lines[4].endswith('"x, y"')


def test_a_pareto_front() -> None:
    both = (ObjectiveSettings(), ObjectiveSettings("snr", "max"))
    points = [(1.0, 1.0), (2.0, 3.0), (2.0, 2.0), (3.0, 3.0), (math.nan, 9.0)]
    records = [Record(n, {}, "finished", values={"validation_loss": a, "snr": b}) for n, (a, b) in enumerate(points)]
    assert [one.number for one in pareto(records, both)] == [0, 1]
    assert value_of(records[4], both[0]) is None


@pytest.mark.parametrize(("error", "attempt", "again"), [
    (WorkerFailed("A worker failed: killed"), 1, True), (WorkerFailed("A worker failed: killed"), 2, False),
    (OutOfMemory("A worker ran out of memory: lower it."), 1, False),
    (TrainingFailed("The gradient is nan."), 1, False), (ValueError("family.width is wrong."), 1, False),
    (KeyError("bug"), 1, True), (KeyError("bug"), 2, False),
])
def test_which_failures_are_tried_again(error: Exception, attempt: int, again: bool) -> None:
    plan = Plan(sweep_settings())
    if again:
        with pytest.raises(type(error)):
            finish(plan, error, attempt)
        return
    ended = finish(plan, error, attempt)
    assert ended["state"] == "failed" and str(error).strip("'\"") in ended["error"] and "\n" not in ended["error"]


def test_running_out_of_memory_is_named() -> None:
    from avray.train.trainer import explained

    class Failed(Exception):
        worker_failures = {0: RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")}

    error = explained(Failed())
    assert isinstance(error, OutOfMemory) and "ran out of memory" in str(error)
    Failed.worker_failures = {0: RuntimeError("killed")}
    assert isinstance(explained(Failed()), WorkerFailed) and not isinstance(explained(Failed()), OutOfMemory)
    ended = finish(Plan(sweep_settings("tune.max_failures=0")), error, 1)
    assert ended["error"].startswith("A worker ran out of memory")


def test_pictures_are_drawn(tmp_path: Path) -> None:
    from avray.tuning.pictures import draw, importance

    settings = sweep_settings(f"run.dir={tmp_path}", "tune.objectives=[{metric: validation_loss},{metric: parameters}]")
    space = read_space({LR: {"loguniform": [1e-4, 1e-2]}, "family.dropout": {"uniform": [0, 1]}})
    records = []
    for number in range(12):
        params = space.draw(0, number)
        loss = abs(math.log10(params[LR]) + 3)
        records.append(Record(number, params, "finished", [(25, loss + 1), (50, loss)],
                              {"validation_loss": loss, "parameters": 5.0}))
    assert draw(settings, space, records) == []
    for name in ("loss.png", "parallel.png", "importance.png", "pareto.png"):
        assert (tmp_path / name).stat().st_size > 5000
    weights = importance(settings, space, records)
    assert weights[LR] > weights["family.dropout"]
    assert "importance.png needs 4 trials" in draw(settings, space, records[:2])[0]


def test_the_table_off_a_terminal_says_each_end_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from avray.tuning.table import Watching

    settings = sweep_settings()
    journal = journal_of(tmp_path / "j", {0: [1.0], 1: [2.0]}, {0: "finished"})
    with Watching(settings, read_space(settings.tune.space), 2) as watching:
        watching.show(journal)
        watching.show(journal)
    assert capsys.readouterr().err.strip() == "1/2 trial 0 finished at step 25 · validation_loss 1 · lr=0.01"
    assert watching.table(journal.trials).row_count == 2
    assert json.loads((tmp_path / "j").read_text().splitlines()[0])["params"] == {LR: 0.01}
