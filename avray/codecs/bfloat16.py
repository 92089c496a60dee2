"""Whether this CPU's bfloat16 convolutions can be trusted.

On CPUs with AMX, oneDNN 3.12 (torch 2.13) gives numbers that have nothing to do with the right ones for some
convolutions of few channels, a kernel of 8 over 8 channels for one, and says nothing (pytorch/pytorch#169688 and
#163347 are of that kind). Which ones differs by version and by CPU, so each of a network's is tried.
"""

from __future__ import annotations

import torch
from torch import nn

TOLERANCE = 0.05
"""Of the largest number of the float32 result: bfloat16 has 8 bits, right results differ by less than a hundredth."""


@torch.no_grad()
def check_convolutions(model: nn.Module) -> None:
    """ValueError, with the cure, where a convolution of ``model`` (bfloat16, on the CPU) is far from what it is in
    float32. Convolutions of one shape are tried once."""
    tried = set()
    for layer in model.modules():
        if not isinstance(layer, nn.Conv1d | nn.ConvTranspose1d) or layer.weight.dtype != torch.bfloat16:
            continue
        shape = layer.extra_repr()
        if shape in tried:
            continue
        tried.add(shape)
        length = layer.dilation[0] * (layer.kernel_size[0] - 1) + 1 + 31 * layer.stride[0]
        heard = torch.randn(1, layer.in_channels, length, generator=torch.Generator().manual_seed(0))
        near = layer(heard.bfloat16()).float()
        exact = layer.float()(heard)
        layer.bfloat16()
        if not (near - exact).abs().max() <= TOLERANCE * exact.abs().max():
            raise ValueError(f"codec.dtype = bfloat16: torch works out the convolution {layer} wrong on this CPU; take "
                             "float32 or a GPU, or set the environment variable ONEDNN_MAX_CPU_ISA=AVX512_CORE_FP16.")
