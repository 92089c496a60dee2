"""One model over many workers: DDP or FSDP2 around the loss, and the few collectives the loop needs.

What is wrapped is a small module whose ``forward`` *is* the loss: calling a model's parts from outside would go round
the wrapper and leave gradients unsynchronised. DDP rebuilds its buckets after the first step, so that a resumed run
would differ in its bits at 3 or more workers; ``find_unused_parameters=True`` keeps the first buckets (measured), and
heads that a batch does not reach need it anyway. ``torch.distributed.tensor``, a fifth of the time that a worker's
imports take, is imported under FSDP2 only.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from avray.family import Batch, Family


class LossModule(nn.Module):
    """``forward(tensors, generator)`` -> the loss terms' sums ``[terms]``, in the order of ``family.terms``."""

    def __init__(self, family: Family, model: nn.Module) -> None:
        super().__init__()
        self.family = family
        self.model = model
        self.names = list(family.terms)

    def forward(self, tensors: dict[str, Tensor], generator: torch.Generator) -> Tensor:
        sums = self.family.loss(self.model, Batch(tensors, {}), generator)
        assert set(sums) == set(self.names), f"loss() gave {sorted(sums)}, terms are {sorted(self.names)}"
        return torch.stack([sums[name].float() for name in self.names])


class Parallel:
    """The wrapped loss module, and how to synchronise, save and restore it."""

    def __init__(self, module: LossModule, mode: Literal["ddp", "fsdp2"], device: torch.device, *,
                 compiled: bool = False, mixed: torch.dtype | None = None) -> None:
        self.module = module
        self.world_size = dist.get_world_size() if dist.is_initialized() else 1
        self.device = device
        self.is_fsdp = mode == "fsdp2" and dist.is_initialized()
        if self.is_fsdp:
            _fully_shard(module, mixed)
        elif self.world_size > 1:
            ids = [device] if device.type == "cuda" else None
            self._ddp = nn.parallel.DistributedDataParallel(module, device_ids=ids, find_unused_parameters=True,
                                                            gradient_as_bucket_view=True)
        self._call: Any = getattr(self, "_ddp", module)
        if compiled:
            self._call = torch.compile(self._call)

    def __call__(self, tensors: dict[str, Tensor], generator: torch.Generator) -> Tensor:
        return self._call(tensors, generator)

    def synchronising(self, last: bool) -> AbstractContextManager[None]:
        """Gradients travel in the backward pass of a step's last micro-batch only."""
        if self.is_fsdp:
            self.module.set_requires_gradient_sync(last)
            return nullcontext()
        return nullcontext() if last or self.world_size == 1 else self._ddp.no_sync()

    def clip(self, max_norm: float | None) -> float:
        """The global gradient norm before clipping, the same on every rank."""
        parameters = [p for p in self.module.parameters() if p.grad is not None]
        norm = torch.nn.utils.clip_grad_norm_(parameters, max_norm if max_norm is not None else float("inf"),
                                              foreach=not self.is_fsdp or None)
        return float(whole(norm))

    def model_state(self) -> dict[str, Tensor]:
        """The whole model's weights, on rank 0 complete; every rank must call."""
        if not self.is_fsdp:
            return self.module.model.state_dict()
        return {name: whole(tensor) for name, tensor in self.module.model.state_dict().items()}

    def optimizer_state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """``optimizer.state_dict()`` with whole tensors; every rank must call."""
        state = optimizer.state_dict()
        if self.is_fsdp:
            state["state"] = {index: {key: whole(value) if isinstance(value, Tensor) else value
                                      for key, value in moments.items()} for index, moments in state["state"].items()}
        return state

    def load_optimizer(self, optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
        """Restore whole moments, cut into this rank's shards where the parameters are. Rates, decays and betas stay
        those of the settings, so that what is given anew counts (a resumed run, a trial with another's weights)."""
        own = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        moments = {index: {key: like(parameters[int(index)], value) if isinstance(value, Tensor) and value.ndim
                           else value for key, value in one.items()} for index, one in state["state"].items()}
        optimizer.load_state_dict({**state, "state": moments})
        for group, settings in zip(optimizer.param_groups, own, strict=True):
            group.update(settings)

    def load_model(self, state: Mapping[str, Tensor]) -> None:
        """Restore whole weights, cut into this rank's shards. Names and shapes were checked on reading."""
        with torch.no_grad():
            for name, target in self.module.model.state_dict().items():
                target.copy_(like(target, state[name]))


def like(target: Tensor, tensor: Tensor) -> Tensor:
    """A whole tensor laid out as ``target`` is: this rank's shard of it under FSDP2, else itself."""
    if not hasattr(target, "device_mesh"):
        return tensor
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(target, DTensor)
    return distribute_tensor(tensor.to(target.device), target.device_mesh, target.placements)


def whole(tensor: Tensor) -> Tensor:
    """The inverse of :func:`like`; every rank must call."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def repeated_blocks(model: nn.Module) -> Iterator[nn.Module]:
    """The members of every ModuleList: a transformer's layers, which are what is recomputed and sharded as a unit."""
    for module in model.modules():
        if isinstance(module, nn.ModuleList):
            yield from module


def recompute_activations(model: nn.Module) -> None:
    """Activation checkpointing of every repeated block; names in the state dict stay as they are."""
    blocks = list(repeated_blocks(model))
    if not blocks:
        raise ValueError("trainer.activation_checkpointing=true has no effect: this model has no repeated blocks.")
    for block in blocks:
        forward = block.forward

        def recomputed(*args: Any, forward: Any = forward, **kwargs: Any) -> Any:
            return checkpoint(forward, *args, use_reentrant=False, **kwargs)

        block.forward = recomputed


def total(values: Sequence[float], device: torch.device) -> list[float]:
    """Sums over all ranks, in float64 (float32 on mps)."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return list(values)
    tensor = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(tensor)
    return tensor.tolist()


def agreed(value: Any) -> Any:
    """Rank 0's value on every rank: what all must decide alike."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def _fully_shard(module: LossModule, mixed: torch.dtype | None) -> None:
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    policy = MixedPrecisionPolicy(param_dtype=mixed, reduce_dtype=torch.float32) if mixed else MixedPrecisionPolicy()
    for block in repeated_blocks(module.model):
        fully_shard(block, mp_policy=policy)
    fully_shard(module, mp_policy=policy)
