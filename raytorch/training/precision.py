"""The arithmetic of forward and backward: fp32, TF32, or autocast to bf16 or fp16, and the layout that suits it."""

import warnings
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.library import Library

from raytorch.errors import ConfigError

PrecisionName = Literal["fp32", "tf32", "bf16", "fp16"]
CAST_TO: dict[PrecisionName, torch.dtype] = {"bf16": torch.bfloat16, "fp16": torch.float16}
FIRST_WITH_TF32 = 8
"""Major number of the compute capability of the first GPUs that have it (Ampere)."""


@dataclass(frozen=True)
class Precision:
    """How a worker computes; weights, gradients and optimizer state stay float32 either way."""

    name: PrecisionName
    device_type: str

    @classmethod
    def choose(cls, name: Literal["auto"] | PrecisionName, device: torch.device) -> "Precision":
        """The precision of that name; ``auto`` is bf16 where ``device`` has instructions for it, else fp32.

        ``tf32`` is fp32 where it has none for that. Raises ConfigError.
        """
        if name == "bf16" and device.type == "cuda" and not torch.cuda.is_bf16_supported():
            raise ConfigError(
                f"precision: bf16: {torch.cuda.get_device_name(device)} cannot compute in bfloat16; take fp16, fp32 or "
                "auto"
            )
        if name == "auto":
            name = "bf16" if has_bf16(device) else "fp32"
        if name == "tf32" and not has_tf32(device):
            name = "fp32"
        return cls(name, device.type)

    @property
    def cast_to(self) -> torch.dtype | None:
        """The type that autocast computes in; None without it."""
        return CAST_TO.get(self.name)

    def prepare(self) -> None:
        """Let this process multiply float32 numbers as they are, or with TF32 rounded to 10 bits.

        By itself PyTorch rounds them in convolutions alone.
        """
        # The newer ``fp32_precision`` would make the compiler, which reads these, raise an error for a mixture.
        torch.set_float32_matmul_precision("high" if self.name == "tf32" else "highest")
        torch.backends.cudnn.allow_tf32 = self.name == "tf32"

    @property
    def channels_last(self) -> bool:
        """True if convolutions compute faster with channels last: on CPUs, and in 16 bits everywhere."""
        return self.name != "fp32" or self.device_type == "cpu"

    def autocast(self) -> AbstractContextManager[None]:
        """The context for forward passes; see :func:`autocast`."""
        return autocast(self.device_type, self.cast_to) if self.cast_to else nullcontext()

    def loss_scaler(self) -> torch.amp.GradScaler | None:
        """What keeps gradients in the range of fp16; None for the others, which have float32's."""
        return torch.amp.GradScaler(self.device_type) if self.name == "fp16" else None

    def to_memory_format(self, module: nn.Module) -> nn.Module:
        """``module`` with its convolutions' weights in the layout of :meth:`layout`, in place."""
        for parameter in module.parameters():
            parameter.data = self.layout(parameter.data)
        return module

    def layout_of(self, batch: Any) -> Any:
        """A batch with the tensors in it as :meth:`layout` has them; those in tuples, lists and dictionaries too."""
        if isinstance(batch, Tensor):
            return self.layout(batch)
        if isinstance(batch, Mapping):
            return {key: self.layout_of(part) for key, part in batch.items()}
        return type(batch)(map(self.layout_of, batch)) if type(batch) in (tuple, list) else batch

    def layout(self, tensor: Tensor) -> Tensor:
        """Images (N, C, H, W) and clips (N, C, T, H, W) laid out for fast convolutions; the values are the same."""
        formats = {4: torch.channels_last, 5: torch.channels_last_3d}
        if not self.channels_last or tensor.dim() not in formats:
            return tensor
        # Not .contiguous(): one channel fits both layouts, and then the strides decide with which one PyTorch goes on.
        arranged = torch.empty_like(tensor, memory_format=formats[tensor.dim()])
        return arranged.copy_(tensor)


def choose_attention(device: torch.device) -> None:
    """Turn PyTorch's flash attention off on CPUs, where it trains short sequences more slowly than the plain kernel."""
    torch.backends.cuda.enable_flash_sdp(device.type != "cpu")  # the switch is under cuda, but holds for CPUs too


def has_bf16(device: torch.device) -> bool:
    """Tell whether ``device`` has instructions for bfloat16, so that it is faster than float32."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") or capabilities.get("bf16"))


def has_tf32(device: torch.device) -> bool:
    """Tell whether ``device`` has instructions that multiply float32 numbers which are rounded to 10 bits."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= FIRST_WITH_TF32


# -- autocast ----------------------------------------------------------------------------------------------------------


def autocast(device_type: str, dtype: torch.dtype) -> torch.autocast:
    """``torch.autocast``, in which float32 stands in where the device cannot compute an operation in ``dtype``.

    That is so of LSTMs alone: oneDNN has none in bfloat16 on a CPU without AVX-512, and none that trains in float16.
    """
    if device_type == "cpu" and not _has_lstm(dtype):
        _choose_lstm()
    return torch.autocast(device_type, dtype)


@cache
def _has_lstm(dtype: torch.dtype) -> bool:
    """Tell whether this CPU can train an LSTM in ``dtype``."""
    row, weight, bias = torch.ones(1, 1, 1, dtype=dtype), torch.ones(4, 1, dtype=dtype), torch.ones(4, dtype=dtype)
    weight.requires_grad_()
    try:
        with torch.enable_grad():
            states, *_ = _lstm(row, weight, weight, bias, bias, row[0], row[0], *_LSTM_OF_ONE)
            torch.autograd.backward(states.sum())
    except RuntimeError:
        return False
    return True


_lstm = torch.ops.aten.mkldnn_rnn_layer.default
_LSTM_OF_ONE: tuple[Any, ...] = (False, [], 2, 1, 1, True, False, False, True)
"""Not reversed, no batch sizes, an LSTM, one unit, one layer, biases, one direction, batch second, training."""


@cache
def _choose_lstm() -> Library:
    """Let autocast compute LSTMs in the type that it casts to only where there is one; holds as long as the result."""
    library = Library("aten", "IMPL")  # type: ignore[no-untyped-call]
    with warnings.catch_warnings():  # torch 2.11 warns of any kernel that takes another's place
        warnings.filterwarnings("ignore", "Warning only once for all operators")
        library.impl("mkldnn_rnn_layer", _autocast_lstm, "AutocastCPU")  # type: ignore[no-untyped-call]
    return library


def _autocast_lstm(*args: Any) -> Any:
    wanted = torch.get_autocast_dtype("cpu")
    dtype = wanted if _has_lstm(wanted) else torch.float32
    with torch.autocast("cpu", enabled=False):
        return _lstm(*(arg.to(dtype) if isinstance(arg, Tensor) else arg for arg in args))
