"""``continuation`` with ``head=flow``: a causal transformer over latent frames, and a small flow for each frame.

Squared error makes the mean of all that could follow, which is quieter and smoother than any of it. Here the
transformer says what follows as a vector, and a small network conditioned on it carries noise to one frame (Li et al.
2024, MAR; CALM, Rouard et al. 2025). Frames are drawn one after another, so a prompt and its continuation may have any
length, each frame is sound at once, and a seed chooses among what could follow.

In training the frames that are heard get a little noise of random strength, so that the model has met frames as wrong
as its own before it hears them (CALM); the head's loss is taken several times a frame, which costs little beside the
transformer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from avray.family import Batch, Fitted, Options, Piece
from avray.nn.dit import level_waves
from avray.nn.flow import Solver, Walk, draw_levels, towards
from avray.nn.kv_cache import CachedTransformer
from avray.nn.transformer import Transformer, TransformerConfig


@dataclass(frozen=True)
class FlowHeadConfig:
    """The transformer has the family's layers and heads at ``width``. ``context`` is how many frames it hears at most;
    ``draws`` how often a frame's flow is learnt from in a step."""

    width: int = 128
    head_width: int = 192
    head_layers: int = 2
    context: int = 1024
    draws: int = 2
    history_noise: float = 0.3
    num_steps: int = 8
    solver: Solver = "euler"
    temperature: float = 1.0
    """Of the noise each frame starts from; less is nearer to the mean."""

    def __post_init__(self) -> None:
        for name in ("width", "head_width", "head_layers", "context", "draws"):
            if getattr(self, name) < 1:
                raise ValueError(f"family.flow.{name} must be at least 1, got {getattr(self, name)}.")
        if not 0 <= self.history_noise <= 10:
            raise ValueError(f"family.flow.history_noise must be from 0 to 10, got {self.history_noise}.")
        if not 0 <= self.temperature <= 10:
            raise ValueError(f"family.flow.temperature must be from 0 to 10, got {self.temperature}.")
        self.walk(self.num_steps)

    def walk(self, num_steps: int) -> Walk:
        return Walk(num_steps, self.solver, sway=0.0)


class FlowPredictor(nn.Module):
    """A learnt start, frames through a causal transformer, and the head."""

    def __init__(self, config: FlowHeadConfig, num_layers: int, num_heads: int, feed_forward: int, dropout: float,
                 fitted: Fitted) -> None:
        super().__init__()
        channels = fitted.data["width"]
        self.config = config
        self.enter = nn.Linear(channels, config.width)
        self.start = nn.Parameter(torch.empty(config.width))
        self.transformer = Transformer(TransformerConfig(
            vocabulary=config.head_width, context=config.context, width=config.width, num_layers=num_layers,
            num_heads=num_heads, mlp_width=feed_forward, positions="rotary", norm="rms", qk_norm=True, dropout=dropout,
            bias=False))
        # Frames come in place of tokens, and the output product gives the head what it is conditioned on.
        del self.transformer.embedding
        self.head = FlowHead(channels, config.head_width, config.head_layers)
        self.mean, self.scale = (torch.from_numpy(fitted.arrays[name].copy()) for name in ("mean", "scale"))

    def init(self, generator: torch.Generator) -> None:
        self.transformer.init(generator)
        for part in (self.enter, self.head):
            for name, parameter in part.named_parameters():
                if parameter.ndim < 2 or name.startswith("leave") or "modulate" in name:
                    nn.init.zeros_(parameter)
                else:
                    nn.init.xavier_uniform_(parameter, generator=generator)
        nn.init.normal_(self.start, std=0.02, generator=generator)

    def normalised(self, frames: Tensor) -> Tensor:
        return (frames - self.mean.to(frames.device)) / self.scale.to(frames.device)

    def restored(self, frames: Tensor) -> Tensor:
        return frames * self.scale.to(frames.device) + self.mean.to(frames.device)

    def embed(self, frames: Float[Tensor, "*batch channels"]) -> Float[Tensor, "*batch width"]:
        return self.enter(frames)

    def foresee(self, heard: Float[Tensor, "batch time channels"]) -> Float[Tensor, "batch next head"]:
        """What each frame is conditioned on, and the one after the last: ``[batch, time + 1, head_width]``."""
        x = torch.cat([self.start.expand(len(heard), 1, -1), self.embed(heard)], 1)
        return self.transformer.head(self.transformer(x))

    def forward(self, frames: Float[Tensor, "batch time channels"], generator: torch.Generator | None,
                noise: Tensor, levels: Tensor) -> Float[Tensor, "draws batch time"]:
        """Squared errors of the direction, summed over channels; ``noise`` ``[draws, batch, time, channels]`` and
        ``levels`` ``[draws, batch, time]``. Without a generator frames are heard as they are."""
        heard = frames[:, :-1]
        if generator is not None and self.config.history_noise:
            strength = self.config.history_noise * torch.rand(len(heard), 1, 1, generator=generator,
                                                              device=heard.device)
            heard = heard + strength * torch.randn(heard.shape, generator=generator, device=heard.device)
        told = self.foresee(heard)
        mixed = torch.lerp(frames.expand_as(noise), noise, levels[..., None])
        direction = self.head(mixed, levels, told.expand(len(noise), -1, -1, -1))
        return (direction.float() - (noise - frames)).square().sum(-1)


class FlowHead(nn.Module):
    """Residual layers of two products, modulated by what is foreseen and the level of noise; they say the frame, from
    which the direction follows."""

    def __init__(self, channels: int, width: int, num_layers: int) -> None:
        super().__init__()
        self.enter, self.level = nn.Linear(channels, width), nn.Linear(256, width)
        self.modulate = nn.ModuleList(nn.Linear(width, 3 * width) for _ in range(num_layers))
        self.up = nn.ModuleList(nn.Linear(width, 2 * width) for _ in range(num_layers))
        self.down = nn.ModuleList(nn.Linear(2 * width, width) for _ in range(num_layers))
        self.leave = nn.Linear(width, channels)

    def forward(self, x: Float[Tensor, "*batch channels"], levels: Float[Tensor, "*batch"],
                told: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch channels"]:
        state = F.silu(told + self.level(level_waves(levels).to(told.dtype)))
        noisy, x = x, self.enter(x)
        for modulate, up, down in zip(self.modulate, self.up, self.down, strict=True):
            shift, scale, gate = modulate(state).chunk(3, -1)
            hidden = torch.addcmul(shift, F.layer_norm(x, x.shape[-1:]), 1 + scale)
            x = x + (1 + gate) * down(F.silu(up(hidden)))
        return towards(noisy, self.leave(F.layer_norm(x, x.shape[-1:])), levels[..., None])


def flow_loss(model: FlowPredictor, batch: Batch, generator: torch.Generator) -> Tensor:
    """Over the frames of input and output together, each by its weight. A frame's levels and noise come from the
    generator in training and from its place alone in evaluation."""
    frames = model.normalised(batch["sequence"])
    shape = (model.config.draws, *frames.shape[:2])
    if model.training:
        levels = draw_levels(shape[0] * shape[1] * shape[2], generator, frames.device).view(shape)
        noise = torch.randn(*shape, frames.shape[2], generator=generator, device=frames.device)
    else:
        own, longest = torch.Generator().manual_seed(0), model.config.context
        levels = draw_levels(longest * shape[0], own, "cpu").view(longest, shape[0])[: shape[2]].T[:, None]
        noise = torch.randn(longest, shape[0], frames.shape[2], generator=own)[: shape[2]].transpose(0, 1)[:, None]
        levels, noise = (part.to(frames.device).expand(-1, shape[1], *part.shape[2:]) for part in (levels, noise))
    errors = model(frames, generator if model.training else None, noise, levels)
    return (errors.mean(0) * batch["sequence_weight"]).sum()


@dataclass
class _Slot:
    """``frames`` heard and made so far, in the window; normalised."""

    frames: list[Tensor]
    left: int
    noise: torch.Generator
    walk: Walk
    temperature: float


@dataclass(frozen=True)
class FlowOptions:
    """A request's options with their defaults filled in."""

    num_frames: int
    num_steps: int
    temperature: float


class FrameSampler:
    """A ``Sampler`` whose step makes one frame ``[1, width]`` of each busy slot. Every step runs all slots, so that a
    slot's frames are the same bits whatever the others do. When the window is full, its later half is heard anew."""

    def __init__(self, model: FlowPredictor, slots: int, wanted: Callable[[Options], FlowOptions]) -> None:
        self.model, self.slots, self.wanted = model.eval(), slots, wanted
        self.device = model.start.device
        self.cache = CachedTransformer(model.transformer, slots)
        self.busy: dict[int, _Slot] = {}

    def admit(self, slots: Sequence[int], batch: Batch, seeds: Sequence[int], options: Sequence[Options]) -> None:
        for row, slot in enumerate(slots):
            assert slot not in self.busy, f"slot {slot} is busy"
            valid = batch.tensors.get("valid")
            given = batch["input"][row] if valid is None else batch["input"][row, valid[row]]
            how = self.wanted(options[row])
            frames = self.model.normalised(given.to(self.device))[-self.model.config.context // 2 :]
            state = _Slot(list(frames), how.num_frames, torch.Generator().manual_seed(seeds[row]),
                          self.model.config.walk(how.num_steps), how.temperature)
            self._hear(slot, state)
            self.busy[slot] = state

    def drop(self, slot: int) -> None:
        self.busy.pop(slot, None)

    @torch.inference_mode()
    def _hear(self, slot: int, state: _Slot) -> None:
        """Fill the slot's cache with all but the last frame, which the next step embeds."""
        x = torch.cat([self.model.start[None], self.model.embed(torch.stack(state.frames[:-1]))]) if len(
            state.frames) > 1 else self.model.start[None]
        self.cache.prefill(slot, x)

    @torch.inference_mode()
    def step(self) -> list[Piece]:
        if not self.busy:
            return []
        for slot, state in self.busy.items():
            if len(state.frames) + 1 >= self.model.config.context:
                state.frames = state.frames[-(self.model.config.context // 2) :]
                self._hear(slot, state)
        width = len(self.model.mean)
        last, positions = torch.zeros(self.slots, width, device=self.device), [0] * self.slots
        for slot, state in self.busy.items():
            last[slot], positions[slot] = state.frames[-1], len(state.frames)
        told = self.cache.step(self.model.embed(last), positions)[:, 0]
        pieces = []
        for slot, state in list(self.busy.items()):
            frame = self._draw(state, told[slot : slot + 1])
            state.frames.append(frame)
            state.left -= 1
            pieces.append(Piece(slot, self.model.restored(frame)[None].float().cpu().numpy(), state.left == 0))
            if state.left == 0:
                self.drop(slot)
        return pieces

    def _draw(self, state: _Slot, told: Tensor) -> Tensor:
        """One frame, from noise; alone, so that its bits are its own."""
        noise = torch.randn(1, 1, len(self.model.mean), generator=state.noise).to(self.device)
        x = state.temperature * noise

        def velocity(x: Tensor, level: float) -> Tensor:
            return self.model.head(x, torch.full(x.shape[:2], level, device=x.device), told[None])

        for index in range(state.walk.num_steps):
            x = state.walk.step(x, index, velocity)
        return x[0, 0]


def sequences(inputs: np.ndarray, outputs: np.ndarray, heard: Sequence[int], made: Sequence[int],
              weights: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """Input and output end to end ``[batch, time, width]``, and the weight of each frame in the loss."""
    longest = max([1, *(a + b for a, b in zip(heard, made, strict=True))])
    joined = np.zeros((len(inputs), longest, inputs.shape[2]), np.float32)
    weight = np.zeros((len(inputs), longest), np.float32)
    for row, (a, b, w) in enumerate(zip(heard, made, weights, strict=True)):
        joined[row, :a], joined[row, a : a + b] = inputs[row, :a], outputs[row, :b]
        weight[row, : a + b] = w
    return joined, weight
