"""The one training loop, for every family, on one rank. No Ray in it: Ray Train, torchrun and a test call it alike.

Everything that varies from step to step is a function of (seed, step, micro-batch, rank): the rows, the dropout, the
noise a loss draws. So a checkpoint needs no random states and no position but its step, and stopping after k steps and
resuming gives the parameters that n steps without a stop give, to the bit.

The gradient is that of  sum_t weight_t * (sum of the term over the global batch) / (count of the term in it).  Counts
depend on the data alone and are added up over ranks and micro-batches before the forward pass, so masks, padding,
accumulation and uneven ranks do not bend it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from avray.checkpoint import FOLDER, AsyncSaver, Checkpoint, Content, newest, prune
from avray.config import instantiate
from avray.data.loader import Loader, Source, Step
from avray.errors import CheckpointError, TrainingFailed
from avray.mirror import working_copy
from avray.progress import Progress
from avray.train.card import model_card
from avray.train.job import Job
from avray.train.loggers import LoggerGroup
from avray.train.optim import EarlyStopping, Ema, build_optimizer, build_schedule
from avray.train.parallel import LossModule, Parallel, agreed, like, recompute_activations, total, whole
from avray.train.samples import awaited
from avray.train.validation import Validation, validation_loss

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Place:
    """Where a rank runs, and whom it tells. ``train_source`` gives the source of an epoch from a step on."""

    rank: int
    world_size: int
    device: torch.device
    train_source: Callable[[int, int], Source]
    validation_source: Source
    progress: Callable[[Progress], None] = lambda progress: None
    report: Callable[[Mapping[str, float]], None] = lambda figures: None
    leaving: Callable[[], tuple[str, ...]] = lambda: ()
    """Nodes of this group that are about to be taken away; all ranks ask equally often and hear the same."""
    between_steps: Callable[[], None] = lambda: None
    """What it raises ends the run."""
    sample: Callable[[Path, int], None] = lambda checkpoint, step: None
    saved: Callable[[Path, int], None] = lambda checkpoint, step: None
    loggers: Callable[[int | None], LoggerGroup] = lambda resume_step: LoggerGroup([])


@dataclass
class Outcome:
    """What a run came to; the same on every rank."""

    step: int
    best_validation_loss: float | None
    validation_loss: float | None
    baselines: dict[str, float]
    rows_per_s: float
    waiting: float
    stopped_early: bool


@dataclass
class Window:
    """Sums since the last line of figures."""

    began: float = field(default_factory=time.perf_counter)
    steps: int = 0
    waited_s: float = 0.0
    sums: Tensor | None = None
    counts: list[float] = field(default_factory=list)


class Loop:
    """``run()`` trains to the end, the step to stop at, or the end of patience."""

    def __init__(self, job: Job, place: Place) -> None:
        self.job, self.place = job, place
        self.trainer, self.seed = job.settings.trainer, job.settings.seed
        self.family, self.fitted = job.family, job.fitted
        self.device = place.device
        self.order = job.train_order
        self.names = list(self.family.terms)
        self.weights = [self.family.terms[name] for name in self.names]
        self.hooks = [instantiate(dict(hook), f"trainer.hooks[{i}]") for i, hook in enumerate(self.trainer.hooks)]
        torch.set_num_threads(self.trainer.num_threads)
        self._build()

    # ── building and restoring ────────────────────────────────────────────────────────────────────────────────────

    def _build(self) -> None:
        trainer, job = self.trainer, self.job
        torch.manual_seed(self.seed)
        model = self.family.build(self.fitted)
        self.family.init(model, torch.Generator().manual_seed(self.seed))
        model.to(self.device)
        if trainer.activation_checkpointing:
            recompute_activations(model)
        module = LossModule(self.family, model)
        mixed = DTYPES[trainer.precision] if trainer.precision != "fp32" else None
        self.parallel = Parallel(module, trainer.parallel, self.device, compiled=trainer.compile, mixed=mixed)
        self.model = model
        self.optimizer = build_optimizer(module, trainer.optimizer)
        self.schedule = build_schedule(self.optimizer, trainer.schedule, job.max_steps)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=trainer.precision == "fp16")
        self.stopping = EarlyStopping(trainer.early_stopping_patience)
        self.step = 0
        self.skipped = 0
        self.leaving: set[str] = set()
        self.validation: Validation | None = None
        run_dir = working_copy(job.settings.run.dir)
        found = newest(run_dir) if self.place.rank == 0 else None
        start = agreed(found.name if found is not None else None)  # a copy may lie elsewhere on each node
        resumed = Checkpoint.open(run_dir / FOLDER / start) if start is not None else None
        if resumed is None and job.settings.init_from:
            self._load_weights(Checkpoint.open(job.settings.init_from).weights("best"))
        self.ema = Ema(module.model, trainer.ema_decay) if trainer.ema_decay else None
        if resumed is not None:
            self._restore(resumed)
        self.saver = AsyncSaver() if self.place.rank == 0 else None
        self.resumed = resumed is not None
        self.loggers = self.place.loggers(self.step if self.resumed else None)

    def _load_weights(self, state: Mapping[str, Tensor]) -> None:
        own = self.parallel.module.model.state_dict()
        wrong = [name for name in {*own, *state} if name not in own or name not in state
                 or own[name].shape != state[name].shape]
        if wrong:
            raise CheckpointError(f"The checkpoint is of another model: {len(wrong)} tensors differ, {min(wrong)} "
                                  "first.")
        self.parallel.load_model(state)

    def _restore(self, checkpoint: Checkpoint) -> None:
        state = checkpoint.trainer_state()
        if state is None:
            raise CheckpointError(f"{checkpoint.path} holds weights alone: start from it with init_from=, not "
                                  "resume=true.")
        for key, now in self.job.identity.items():
            if state["identity"].get(key) != now:
                raise CheckpointError(
                    f"The run cannot go on exactly: {key} was {state['identity'].get(key)} and is {now} now; restore "
                    f"it, or start a new run with init_from={self.job.settings.run.dir}."
                )
        self._load_weights(checkpoint.weights("model"))
        self.parallel.load_optimizer(self.optimizer, state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.stopping.load_state_dict(state["stopping"])
        self.scaler.load_state_dict(state["scaler"]) if self.scaler.is_enabled() else None
        if self.ema is not None:
            averages = checkpoint.weights("ema")
            own = self.ema.state_dict()
            self.ema.load_state_dict({name: like(own[name], averages[name]) for name in own if name in averages})
        self.step = checkpoint.step
        self.validation = Validation(**state["validation"]) if state["validation"] else None

    # ── the loop ──────────────────────────────────────────────────────────────────────────────────────────────────

    def run(self) -> Outcome:
        """Train. TrainingFailed, naming step and rows, on a loss that is not finite."""
        try:
            self._steps()
            self._call_hooks("on_train_end")
        except BaseException as error:
            self.loggers.close(failed=isinstance(error, Exception))
            raise
        self.loggers.close()
        elapsed = max(1e-9, time.perf_counter() - self.began)
        last = self.validation
        return Outcome(self.step, self.stopping.best, last.loss if last else None, last.baselines if last else {},
                       (self.step - self.first_step) * self.order.batch_size / elapsed,
                       self.waited_s / elapsed, self.stopping.stop)

    def _steps(self) -> None:
        trainer, job = self.trainer, self.job
        end = min(job.max_steps, trainer.stop_at_step or job.max_steps)
        self._call_hooks("on_train_start")
        with self.saver or contextlib.nullcontext(), self._profiler() as profiler:
            self.window = Window()
            if self.step == 0:
                self._after_step(is_first=True)
            self.window = Window()
            self.began, self.waited_s, self.first_step = time.perf_counter(), 0.0, self.step
            while self.step < end and not self.stopping.stop:
                epoch, in_epoch = divmod(self.step, self.order.steps_per_epoch)
                self._call_hooks("on_epoch_start")
                loader = self._loader()
                for step in loader.epoch(self.place.train_source(epoch, in_epoch), epoch, in_epoch):
                    self.place.between_steps()
                    self._train_step(step)
                    self._after_step(is_last=self.step >= end)
                    if profiler is not None:
                        profiler.step()
                    if self.step >= end or self.stopping.stop:
                        break
                self._call_hooks("on_epoch_end")

    def _train_step(self, step: Step) -> None:
        counts = total([sum(batch.counts[name] for batch in step.micro_batches) for name in self.names], self.device)
        self.schedule.step(self.step)
        self.optimizer.zero_grad(set_to_none=True)
        scales = torch.tensor([weight / count if count else 0.0
                               for weight, count in zip(self.weights, counts, strict=True)], device=self.device)
        sums = torch.zeros(len(self.names), device=self.device)
        for index, batch in enumerate(step.micro_batches):
            generator = self._reseed("train", self.step, index)
            with self.parallel.synchronising(index == len(step.micro_batches) - 1):
                with self._autocast():
                    part = self.parallel(batch.to(self.device).tensors, generator)
                # DDP and FSDP average gradients over ranks; the loss is a sum over them.
                self.scaler.scale((part * scales).sum() * self.parallel.world_size).backward()
            sums += part.detach()
        self.scaler.unscale_(self.optimizer)
        self.norm = self.parallel.clip(self.trainer.clip_norm)
        if math.isfinite(self.norm) or self.scaler.is_enabled():
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self.skipped = 0
        else:
            self._not_finite(step)
        if self.ema is not None:
            self.ema.update(self.step)
        self.step += 1
        window = self.window
        window.steps += 1
        window.waited_s += step.waited_s
        self.waited_s += step.waited_s
        window.sums = sums if window.sums is None else window.sums + sums
        window.counts = [a + b for a, b in zip(window.counts or [0.0] * len(counts), counts, strict=True)]

    def _not_finite(self, step: Step) -> None:
        ids = [name for batch in step.micro_batches for name in batch.ids if name]
        self.skipped += 1
        if self.trainer.nan_policy == "stop" or self.skipped > self.trainer.max_skipped:
            raise TrainingFailed(
                f"The gradient is not finite at step {self.step} (rows on rank {self.place.rank}: {', '.join(ids[:8])}"
                f"{' …' if len(ids) > 8 else ''}): lower trainer.optimizer.lr, set trainer.clip_norm, or take "
                "trainer.nan_policy=skip. The checkpoints before it are kept."
            )

    def _after_step(self, is_first: bool = False, is_last: bool = False) -> None:
        """Figures, validation, checkpoint and samples that are due at ``self.step`` (updates done)."""
        trainer = self.trainer

        def due(every: int) -> bool:
            return bool(every) and (self.step % every == 0 or is_last)

        figures: dict[str, float] = {}
        if not is_first and (self.step % trainer.log_every_steps == 0 or is_last):
            figures |= self._figures()
        best = False
        if due(trainer.validate_every_steps):
            best = self._validate()
            assert self.validation is not None
            figures |= self.validation.figures()
        self._tell(figures)
        noticed = bool(figures) and self._noticed()
        sampling = due(trainer.samples_every) and trainer.num_samples > 0
        stopping = self.stopping.stop
        if best or sampling or is_last or stopping or noticed or (due(trainer.checkpoint_every_steps) and not is_first):
            self._save(best, sampling)

    def _noticed(self) -> bool:
        """Whether nodes are to be taken away that were not before: a checkpoint is due while they are there."""
        before, self.leaving = self.leaving, set(self.place.leaving())
        return not self.leaving <= before

    def _figures(self) -> dict[str, float]:
        window, self.window = self.window, Window()
        assert window.sums is not None
        sums = total(window.sums.tolist(), self.device)
        means = [s / count if count else 0.0 for s, count in zip(sums, window.counts, strict=True)]
        elapsed = time.perf_counter() - window.began
        figures = {"train/loss": sum(w * mean for w, mean in zip(self.weights, means, strict=True)),
                   "train/learning_rate": self.optimizer.param_groups[0]["lr"], "train/gradient_norm": self.norm,
                   "train/rows_per_s": window.steps * self.order.batch_size / elapsed,
                   "train/waiting": window.waited_s / elapsed}
        if len(means) > 1:
            figures |= {f"train/{name}": mean for name, mean in zip(self.names, means, strict=True)}
        return figures

    def _tell(self, figures: Mapping[str, float]) -> None:
        if figures:
            if self.place.rank == 0:
                self.loggers.scalars(self.step, figures)
                self.place.progress(Progress(
                    self.step, figures.get("train/loss"), self.validation.loss if self.validation else None,
                    figures.get("train/learning_rate"), figures.get("train/rows_per_s"), figures.get("train/waiting")))
            self.place.report({"step": self.step, **figures})

    # ── validation ────────────────────────────────────────────────────────────────────────────────────────────────

    def _validate(self) -> bool:
        """Loss and baselines over the validation rows, every row once; True if it is the best so far."""
        self._call_hooks("on_validation_start")
        began = time.perf_counter()
        module = self.parallel.module.eval()
        with self.ema.swapped() if self.ema is not None else contextlib.nullcontext(), self._autocast():
            self.validation = validation_loss(
                self.family, self.fitted, self.job.validation_order, self.place.validation_source, self.parallel,
                self.device, self.place.rank, self.place.world_size, self.trainer.validate_max_rows)
        module.train()
        self.window.began += time.perf_counter() - began
        self.schedule.observe(self.validation.loss)
        best = self.stopping.observe(self.validation.loss)
        if self.step == 0:
            self.stopping.num_bad = 0
        self._call_hooks("on_validation_end")
        return best

    # ── checkpoints ───────────────────────────────────────────────────────────────────────────────────────────────

    def _save(self, best: bool, sampling: bool) -> None:
        model = self.parallel.model_state()
        state = {"optimizer": self.parallel.optimizer_state(self.optimizer), "schedule": self.schedule.state_dict(),
                 "stopping": self.stopping.state_dict(), "scaler": self.scaler.state_dict(),
                 "identity": self.job.identity,
                 "validation": None if self.validation is None else dataclasses.asdict(self.validation)}
        ema = None if self.ema is None else averaged(self.model, model, self._ema_state())
        if self.saver is None:
            return
        job, step = self.job, self.step
        figures = {"validation_loss": self.validation.loss, "baselines": self.validation.baselines} \
            if self.validation else {}
        content = Content(model=model, family=job.family_record, fitted=job.fitted, settings=job.settings_record,
                          ema=ema, trainer=state, figures=figures, card=model_card(job, step, figures),
                          unchanging=frozen(self.model, model))
        run_dir = working_copy(job.settings.run.dir)

        def published(folder: Path) -> None:
            prune(run_dir, self.trainer.keep_last, self.trainer.keep_every_steps, awaited(job.settings.run.dir))
            self.place.saved(folder, step)
            if sampling:
                self.place.sample(folder, step)

        self.saver.save(run_dir, step, content, ("last", "best") if best else ("last",), published)

    def _ema_state(self) -> dict[str, Tensor]:
        assert self.ema is not None
        return {name: whole(tensor) for name, tensor in self.ema.state_dict().items()}

    # ── small things ──────────────────────────────────────────────────────────────────────────────────────────────

    def _loader(self) -> Loader:
        return Loader(self.order, lambda rows: self.family.collate(rows, self.fitted), self.place.rank,
                      self.place.world_size, self.trainer.accumulate, self.job.settings.data.prefetch_steps,
                      pin=self.device.type == "cuda")

    def _reseed(self, *key: Any) -> torch.Generator:
        """Dropout's generator and the loss's own, from (seed, purpose, step, micro-batch, rank)."""
        text = ":".join(map(str, (self.seed, *key, self.place.rank)))
        value = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1
        torch.manual_seed(value)
        return torch.Generator(self.device).manual_seed(value)

    def _autocast(self) -> contextlib.AbstractContextManager[None]:
        precision = self.trainer.precision
        if precision == "fp32":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, DTYPES[precision])

    def _call_hooks(self, moment: str) -> None:
        for hook in self.hooks:
            method = getattr(hook, moment, None)
            if method is not None:
                method(self)

    @contextlib.contextmanager
    def _profiler(self) -> Iterator[Any]:
        """Steps 5 to 9 after the start, as a Chrome trace in the run folder."""
        if not (self.trainer.profile and self.place.rank == 0):
            yield None
            return
        folder = working_copy(self.job.settings.run.dir) / "profile"
        folder.mkdir(parents=True, exist_ok=True)
        schedule = torch.profiler.schedule(wait=3, warmup=2, active=5, repeat=1)
        with torch.profiler.profile(schedule=schedule, record_shapes=True, on_trace_ready=lambda profile: (
                profile.export_chrome_trace(str(folder / "trace.json")))) as profiler:
            yield profiler


def frozen(module: torch.nn.Module, state: Mapping[str, Tensor]) -> frozenset[str]:
    """Names in ``state`` of what training does not touch, under each name of a tied weight."""
    return frozenset(name for name, parameter in module.named_parameters(remove_duplicate=False)
                     if not parameter.requires_grad and name in state)


def averaged(module: torch.nn.Module, state: Mapping[str, Tensor], averages: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``state`` with the averages in place of what was averaged: a tied weight under each of its names."""
    first: dict[int, str] = {}
    names = {name: first.setdefault(id(parameter), name)
             for name, parameter in module.named_parameters(remove_duplicate=False)}
    made = {name: average.to(state[name].dtype) for name, average in averages.items()}
    return {name: made.get(names.get(name, name), tensor) for name, tensor in state.items()}
