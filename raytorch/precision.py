"""The arithmetic of forward and backward: fp32 or bf16 autocast, and the memory layout that is fastest for it."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Precision:
    """How a worker computes; weights, gradients and optimizer state stay float32 either way."""

    bf16: bool
    device_type: str

    @classmethod
    def choose(cls, name: Literal["auto", "fp32", "bf16"], device: torch.device) -> "Precision":
        """The precision of that name; ``auto`` is bf16 where ``device`` has instructions for it."""
        return cls(name == "bf16" or (name == "auto" and has_bf16(device)), device.type)

    @property
    def name(self) -> str:
        """``bf16`` or ``fp32``."""
        return "bf16" if self.bf16 else "fp32"

    @property
    def channels_last(self) -> bool:
        """Whether convolutions compute faster with channels last: on CPUs, and in bf16 everywhere."""
        return self.bf16 or self.device_type == "cpu"

    def autocast(self) -> AbstractContextManager[None]:
        """The context for forward passes; see ``torch.autocast``."""
        return torch.autocast(self.device_type, torch.bfloat16) if self.bf16 else nullcontext()

    def arrange(self, module: nn.Module) -> nn.Module:
        """``module`` with its convolutions' weights in the layout of :meth:`layout`, in place."""
        for parameter in module.parameters():
            parameter.data = self.layout(parameter.data)
        return module

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
    """Whether ``device`` has instructions for bfloat16, so that it is faster than float32."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") or capabilities.get("bf16"))
