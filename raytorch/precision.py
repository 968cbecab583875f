"""The arithmetic of forward and backward: fp32, or bf16 autocast with channels_last."""

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

    def autocast(self) -> AbstractContextManager[None]:
        """The context for forward passes; see ``torch.autocast``."""
        return torch.autocast(self.device_type, torch.bfloat16) if self.bf16 else nullcontext()

    def arrange(self, module: nn.Module) -> nn.Module:
        """``module`` with convolution weights laid out channels last under bf16, in place."""
        if self.bf16:
            for parameter in module.parameters():
                parameter.data = self.layout(parameter.data)
        return module

    def layout(self, tensor: Tensor) -> Tensor:
        """Images (N, C, H, W) and clips (N, C, T, H, W) laid out channels last under bf16; the values are the same."""
        formats = {4: torch.channels_last, 5: torch.channels_last_3d}
        if not self.bf16 or tensor.dim() not in formats:
            return tensor
        # Not .contiguous(): one channel fits both layouts, and then the strides decide with which one PyTorch goes on.
        arranged = torch.empty_like(tensor, memory_format=formats[tensor.dim()])
        return arranged.copy_(tensor)


def has_bf16(device: torch.device) -> bool:
    """Whether ``device`` has instructions for bfloat16, so that it is faster than float32."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") or capabilities.get("bf16"))
