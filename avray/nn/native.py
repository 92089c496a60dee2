"""The step of a cached transformer as one compiled call: ``step.c``, for the CPU.

torch needs some 80 calls for a step of six layers and reads float32 weights at less than half the speed of memory;
compiled, a step is one call that reads them at nearly full speed, or reads bfloat16 or int8 weights, which are half and
a quarter of the bytes. The compiler is the system's, at first use, for this very processor; what it made is kept by the
hash of source and command. Nothing falls back: without a compiler this is an error that says so.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from ctypes import POINTER, Structure, c_float, c_int32, c_void_p
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from avray.errors import MissingDependency
from avray.nn.transformer import Transformer

Weights = Literal["float32", "bfloat16", "int8"]
LANES = 16
_TYPES = ("float32", "bfloat16", "int8")
_FLAGS = ("-O3", "-march=native", "-fno-math-errno", "-fopenmp", "-fPIC")


def _all(names: str, kind: Any) -> list[Any]:
    return [(name, kind) for name in names.split()]


class _Linear(Structure):
    _fields_ = _all("weight scale bias", c_void_p) + _all("inputs panels type unused", c_int32)


class _Layer(Structure):
    _fields_ = _all("qkv out up down", _Linear) + _all(
        "norm1 norm1_bias norm2 norm2_bias query_norm key_norm cache", c_void_p)


class _Model(Structure):
    _fields_ = [
        ("layers", POINTER(_Layer)), ("head", _Linear),
        *_all("norm norm_bias x qkv mixed hidden logits scratch", c_void_p),
        *_all("num_layers rows width hidden_size num_heads kv_heads head_size context", c_int32),
        *_all("qkv_size up_size logits_size scratch_size threads rms gated cache_type", c_int32),
        ("epsilon", c_float), *_all("arrived round", c_int32)]


class NativeStep:
    """A transformer's step over ``cache`` ``[layers, rows, 2 x kv heads, context, head]``, which it fills, float32 or
    bfloat16; the context is a multiple of 16.

    ValueError for a model that is not on the CPU or whose sizes are no multiples of 16; MissingDependency without a
    compiler. It keeps a second copy of the weights, in its own layout.
    """

    def __init__(self, transformer: Transformer, cache: Tensor, weights: Weights):
        config, rows = transformer.config, cache.shape[1]
        context = cache.shape[3]
        if cache.device.type != "cpu":
            raise ValueError(f"family.weights={weights} is for the CPU, and the model is on {cache.device}: use torch.")
        for name, size in (("width", config.width), ("mlp_width", config.hidden), ("head size", config.head_dim)):
            if size % LANES or config.head_dim > 256:
                raise ValueError(f"The compiled step needs a {name} that is a multiple of {LANES}, not {size}.")
        self._step = _library().avray_step
        self._kept: list[object] = [cache]
        self._weights: Weights = weights
        threads = torch.get_num_threads()
        scratch = rows * config.width + context
        qkv, up = (_padded(layer.out_features)
                   for layer in (transformer.blocks[0].attention.qkv, transformer.blocks[0].mlp.up))
        model = _Model(num_layers=config.num_layers, rows=rows, width=config.width, hidden_size=config.hidden,
                       num_heads=config.num_heads, kv_heads=config.kv_heads, head_size=config.head_dim,
                       context=context, threads=threads, rms=config.norm == "rms", gated=config.mlp == "swiglu",
                       epsilon=transformer.norm.eps, cache_type=int(cache.dtype == torch.bfloat16),
                       qkv_size=qkv, up_size=up, logits_size=_padded(config.vocabulary), scratch_size=scratch)
        model.layers = (_Layer * config.num_layers)(
            *(self._layer(block, cache[i]) for i, block in enumerate(transformer.blocks)))
        model.head = self._linear(transformer.head)
        model.norm, model.norm_bias = self._norm(transformer.norm)
        self.num_ids = config.vocabulary
        self.x = self._buffer(model, "x", rows, config.width)
        self._buffer(model, "mixed", rows, config.width)
        self._buffer(model, "scratch", threads, scratch)
        self._buffer(model, "qkv", rows, qkv)
        self._buffer(model, "hidden", rows, up)
        self.logits = self._buffer(model, "logits", rows, model.logits_size)
        self._model = model

    def __call__(self, x: Tensor, positions: Tensor, angles: Tensor | None) -> Tensor:
        """Logits ``[rows, ids]`` of embeddings ``[rows, width]`` at ``positions`` ``[rows]``, valid until the next
        call. ``angles`` ``[rows, head]`` are those of rotary positions."""
        self.x.copy_(x)
        turned = None if angles is None else angles.contiguous()
        self._step(ctypes.byref(self._model), c_void_p(positions.data_ptr()),
                   None if turned is None else c_void_p(turned.data_ptr()))
        return self.logits[:, : self.num_ids]

    def _layer(self, block: nn.Module, cache: Tensor) -> _Layer:
        attention, mlp = block.attention, block.mlp
        (norm1, bias1), (norm2, bias2) = self._norm(block.norm1), self._norm(block.norm2)
        return _Layer(self._linear(attention.qkv), self._linear(attention.out), self._linear(mlp.up),
                      self._linear(mlp.down), norm1, bias1, norm2, bias2,
                      self._norm(attention.query_norm)[0], self._norm(attention.key_norm)[0], cache.data_ptr())

    def _norm(self, norm: nn.Module | None) -> tuple[int | None, int | None]:
        return self._keep(getattr(norm, "weight", None)), self._keep(getattr(norm, "bias", None))

    def _linear(self, linear: nn.Linear) -> _Linear:
        weight = _pad(linear.weight.detach().float())
        scale, type_ = None, _TYPES.index(self._weights)
        if self._weights == "int8":
            scale = weight.abs().amax(dim=1).clamp(min=1e-12) / 127
            weight, scale = _in_int32(weight / scale[:, None]), scale / 2**24
        elif self._weights == "bfloat16":
            weight = weight.bfloat16()
        panels = weight.view(-1, LANES, weight.shape[1]).transpose(1, 2).contiguous()
        bias = None if linear.bias is None else _pad(linear.bias.detach().float())
        return _Linear(self._keep(panels), self._keep(scale), self._keep(bias), linear.in_features, len(panels), type_)

    def _keep(self, tensor: Tensor | None) -> int | None:
        """The address of a tensor that lives as long as this object does."""
        if tensor is None:
            return None
        if tensor.dtype not in (torch.int32, torch.bfloat16):
            tensor = tensor.detach().float().contiguous()
        self._kept.append(tensor)
        return tensor.data_ptr()

    def _buffer(self, model: _Model, name: str, rows: int, size: int) -> Tensor:
        buffer = torch.zeros(rows, size)
        setattr(model, name, self._keep(buffer))
        return buffer


def _in_int32(weight: Tensor) -> Tensor:
    """``[out, in]`` in -127 … 127 as ``[out, in / 4]`` int32, four to each, the first in the lowest byte. The kernel
    reads a byte with all below it as its fraction, so each is rounded to what its fraction leaves: half a unit at most,
    as ever, for one instruction less."""
    packed = torch.zeros(len(weight), weight.shape[1] // 4, dtype=torch.int64)
    for i in range(4):
        fraction = packed.double() / 2 ** (8 * i)
        byte = (weight[:, i::4].double() - fraction).round().clamp(-128, 127).long()
        packed |= (byte & 255) << 8 * i
    return packed.to(torch.int32)


def _padded(size: int) -> int:
    return -(-size // LANES) * LANES


def _pad(tensor: Tensor) -> Tensor:
    """Zeros after the last output, up to whole panels."""
    missing = _padded(len(tensor)) - len(tensor)
    return torch.cat([tensor, tensor.new_zeros(missing, *tensor.shape[1:])])


_loaded: ctypes.CDLL | None = None


def _library() -> ctypes.CDLL:
    global _loaded
    if _loaded is None:
        _loaded = ctypes.CDLL(str(_compiled()))
        _loaded.avray_step.restype = None
    return _loaded


def _compiled() -> Path:
    """The shared library, made if its source, compiler or processor is new. MissingDependency where that fails.

    It is linked without OpenMP on purpose: the symbols are found in the copy that torch has loaded, so that there is
    one team of threads and not two."""
    compiler = shutil.which(os.environ.get("CC", "gcc"))
    if compiler is None:
        raise MissingDependency("The compiled step needs gcc (or CC=…): install it, or use family.weights=torch.")
    source = Path(__file__).with_name("step.c")
    target = subprocess.run([compiler, *_FLAGS, "-Q", "--help=target"], capture_output=True, check=False).stdout
    version = subprocess.run([compiler, "--version"], capture_output=True, check=False).stdout
    name = hashlib.blake2b(source.read_bytes() + target + version, digest_size=8).hexdigest()
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "avray"
    library = folder / f"step-{name}.so"
    if not library.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as work:
            made, linked = f"{work}/step.o", f"{work}/step.so"
            for command in ([*_FLAGS, "-c", str(source), "-o", made], ["-shared", made, "-o", linked]):
                done = subprocess.run([compiler, *command], capture_output=True, text=True, check=False)
                if done.returncode:
                    raise MissingDependency(f"{compiler} could not compile the step ({done.stderr.strip()[:300]}): "
                                            "use gcc 9 or newer, or family.weights=torch.")
            os.replace(linked, library)
    return library
