"""How much device memory a run will need, without allocating it: weights, gradients and moments are counted on the meta
device, activations by running the loss there and adding up what autograd keeps for the backward pass."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from avray.config import TrainerSettings
from avray.family import Batch, Family, Fitted
from avray.train.parallel import recompute_activations

MOMENTS = {"adamw": 2, "adam": 2, "nadam": 2, "radam": 2, "sgd": 1, "adafactor": 0}


@dataclass(frozen=True)
class Memory:
    """Bytes on one device."""

    weights: int
    gradients: int
    optimizer: int
    ema: int
    activations: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.ema + self.activations

    def as_figures(self) -> dict[str, int]:
        return {**vars(self), "total": self.total}

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {value / 2**30:.2f}" for name, value in vars(self).items())
        return f"{self.total / 2**30:.2f} GiB ({parts})"


def count_parameters(family: Family, fitted: Fitted) -> int:
    """Of the model, shared ones once; built on the meta device."""
    with torch.device("meta"):
        model = family.build(fitted)
    return sum(parameter.numel() for parameter in model.parameters())


def estimate(family: Family, fitted: Fitted, batch: Batch, settings: TrainerSettings) -> Memory:
    """For one micro-batch like ``batch`` on one device. ``fsdp2`` shares weights, gradients and moments."""
    with torch.device("meta"):
        model = family.build(fitted)
    if settings.activation_checkpointing:
        recompute_activations(model)
    weights_here = {id(parameter) for parameter in model.parameters()}
    kept: dict[int, Tensor] = {}  # by storage, held so that no identity is used twice

    def keep(tensor: Tensor) -> Tensor:
        base = tensor if tensor._base is None else tensor._base
        if id(base) not in weights_here:
            kept[id(base)] = base
        return tensor

    meta = Batch({name: tensor.to("meta") for name, tensor in batch.tensors.items()}, batch.counts, batch.ids)
    dtype = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[settings.precision]
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        if dtype is None:
            family.loss(model, meta, torch.Generator())
        else:
            with torch.autocast(settings.device_name, dtype):
                family.loss(model, meta, torch.Generator())
    trained = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    share = settings.min_workers if settings.parallel == "fsdp2" else 1
    return Memory(weights // share, trained // share, MOMENTS.get(settings.optimizer.name, 2) * trained // share,
                  trained // share if settings.ema_decay else 0,
                  sum(base.numel() * base.element_size() for base in kept.values()))
