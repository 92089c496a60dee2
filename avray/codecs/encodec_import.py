"""Meta's own EnCodec checkpoints (``encodec_24khz-d7cc33bc.th``) as a ``transformers`` model.

The file is a plain state dict, read with ``weights_only=True``: a pickle that holds anything but tensors is refused.
The settings of the network are not in it; they are read off the shapes, so that networks of other sizes load as well.
"""

from __future__ import annotations

import pickle  # noqa: TID251 (for the name of its error: nothing is unpickled)
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from avray.errors import CheckpointError

_RENAMED = (
    (r"^(encoder|decoder)\.model\.", r"\1.layers."),
    (r"\.(conv\.conv|convtr\.convtr)\.", ".conv."),
    (r"\.(conv|convtr)\.norm\.", ".norm."),
    (r"\.weight_g$", ".parametrizations.weight.original0"),
    (r"\.weight_v$", ".parametrizations.weight.original1"),
    (r"^quantizer\.vq\.layers\.(\d+)\._codebook\.", r"quantizer.layers.\1.codebook."),
)


def read_meta_checkpoint(path: Path) -> nn.Module:
    """An ``EncodecModel`` with the weights of a ``.th`` file. CheckpointError for a file that is no such checkpoint."""
    from transformers import EncodecModel

    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise CheckpointError(f"{path}: not a file of plain tensors.") from error
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise CheckpointError(f"{path}: expected a state dict of EnCodec, name by name.")
    try:
        model = EncodecModel(settings_of(state))
        model.load_state_dict({renamed(name): value for name, value in state.items()})
    except (KeyError, RuntimeError, ValueError) as error:
        raise CheckpointError(f"{path}: these are not the weights of an EnCodec model ({error}).") from error
    return model


def renamed(name: str) -> str:
    """A parameter's name at Meta -> its name in ``transformers``."""
    for pattern, replacement in _RENAMED:
        name = re.sub(pattern, replacement, name)
    return name


def settings_of(state: Mapping[str, Tensor]):  # type: ignore[no-untyped-def]
    """The ``EncodecConfig`` that has these shapes. KeyError where the names are not EnCodec's."""
    from transformers import EncodecConfig

    kernels = {int(match[1]): value for name, value in state.items()
               if (match := re.fullmatch(r"encoder\.model\.(\d+)\.conv\.conv\.weight(_v)?", name))}
    if len(kernels) < 3:
        raise KeyError("encoder.model.0.conv.conv.weight")
    first, *strided, last = (kernels[index] for index in sorted(kernels))
    block = {int(match[1]): value for name, value in state.items()
             if (match := re.fullmatch(r"encoder\.model\.1\.block\.(\d+)\.conv\.conv\.weight(_v)?", name))}
    num_filters, channels, kernel_size = first.shape
    codebook_size, width = state["quantizer.vq.layers.0._codebook.embed"].shape
    num_codebooks = sum(name.endswith("._codebook.embed") for name in state)
    ratios = [value.shape[2] // 2 for value in reversed(strided)]
    is_24khz = "encoder.model.0.conv.conv.weight_g" in state
    num_lstm = sum(bool(re.fullmatch(r"encoder\.model\.\d+\.lstm\.weight_hh_l\d+", name)) for name in state)
    num_blocks = len({match[0] for name in state if (match := re.match(r"encoder\.model\.\d+\.block\.", name))})
    config = EncodecConfig(
        sampling_rate=24_000 if is_24khz else 48_000, audio_channels=channels, normalize=not is_24khz,
        chunk_length_s=None if is_24khz else 1.0, overlap=None if is_24khz else 0.01, hidden_size=width,
        num_filters=num_filters, num_residual_layers=num_blocks // len(ratios), upsampling_ratios=ratios,
        norm_type="weight_norm" if is_24khz else "time_group_norm", kernel_size=kernel_size,
        last_kernel_size=last.shape[2], residual_kernel_size=block[min(block)].shape[2],
        use_causal_conv=is_24khz, compress=num_filters // block[min(block)].shape[0], num_lstm_layers=num_lstm,
        codebook_size=codebook_size, use_conv_shortcut=any(".shortcut." in name for name in state))
    # A thousandth above, because transformers rounds the number of codebooks down.
    config.target_bandwidths = [(num_codebooks + 0.001) * config.frame_rate * config.codebook_nbits / 1000]
    return config
