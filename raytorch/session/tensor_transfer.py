"""Tensors on their way between client and workers: as NumPy arrays, which Ray moves without pickling their bytes."""

import weakref
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from raytorch.errors import SessionError

_CARRIERS = {
    torch.bfloat16: torch.uint16,
    torch.complex32: torch.uint32,
    torch.float8_e4m3fn: torch.uint8,
    torch.float8_e4m3fnuz: torch.uint8,
    torch.float8_e5m2: torch.uint8,
    torch.float8_e5m2fnuz: torch.uint8,
    torch.float8_e8m0fnu: torch.uint8,
}
"""For dtypes that NumPy does not have: one of the same size that it has."""

INLINE = 64 * 1024
"""Bytes up to which data travels within a call rather than through the object store."""
_LARGEST_RESIZABLE = 1 << 20
"""Bytes up to which PyTorch's own memory is as fast to fill as NumPy's."""
MOST_ADOPTED = 512 * 2**20
"""Bytes of the object store that the tensors of a worker may keep; it serves everybody on the node."""


@dataclass(frozen=True)
class Payload:
    """A dense tensor's content."""

    array: Any
    """The elements; None where they travel apart."""
    dtype: torch.dtype
    requires_grad: bool = False
    is_private: bool = False
    """True if nobody but the receiver has the array's memory."""

    @classmethod
    def of(cls, tensor: Tensor) -> "Payload":
        """The content of ``tensor``, without a copy where it is on a CPU. Raises SessionError: it cannot be moved."""
        _require_movable(tensor)
        plain, carrier = tensor, _CARRIERS.get(tensor.dtype)
        if carrier:
            plain = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous().view(carrier)
        # By force also what autograd keeps without memory: a tensor that is zero throughout.
        return cls(plain.numpy(force=True), tensor.dtype, tensor.requires_grad)

    @classmethod
    def of_words(
        cls, content: bytearray, carrier: str, shape: tuple[int, ...], dtype: str, requires_grad: bool
    ) -> "Payload":
        """The payload that :meth:`words` described."""
        return cls(np.frombuffer(content, carrier).reshape(shape), getattr(torch, dtype), requires_grad)

    def words(self) -> tuple[Any, ...]:
        """The payload in what pickle is quick with, for small ones; not bytes, as Python may share short ones."""
        dtype = str(self.dtype).removeprefix("torch.")
        return bytearray(self.array.tobytes()), self.array.dtype.str, self.array.shape, dtype, self.requires_grad

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return int(self.array.nbytes)

    def copy(self) -> "Payload":
        """The same in memory of its own."""
        return replace(self, array=self.array.copy())

    def tensor(self) -> Tensor:
        """A tensor that owns its memory."""
        # NumPy's copy, not torch's: it asks for huge pages, which makes large copies several times as fast.
        return self._tensor(np.array(self.array, copy=True, order="C"))

    def resizable(self) -> Tensor:
        """As :meth:`tensor`, in memory of PyTorch's where that is as fast, so that it can be resized."""
        if self.array.nbytes > _LARGEST_RESIZABLE:
            return self.tensor()
        return self.tensor().detach().clone().requires_grad_(self.requires_grad)

    def adopted(self) -> Tensor:
        """A tensor in the array's own memory, for an array that nobody else has."""
        array = np.asarray(self.array, order="C")
        return self._tensor(array if array.flags.writeable else np.asarray(_Writable(array)))

    def _tensor(self, array: np.ndarray[Any, Any]) -> Tensor:
        plain = torch.from_numpy(array)
        tensor = plain.view(self.dtype) if self.dtype in _CARRIERS else plain
        return tensor.requires_grad_() if self.requires_grad else tensor


def as_tensor(data: Any) -> Tensor:
    """Data of a client's as a tensor. Raises SessionError: no tensor can be made of it, or it cannot be moved."""
    if isinstance(data, Tensor):
        _require_movable(data)
        return data
    try:
        return torch.as_tensor(data)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise SessionError(
            f"no tensor can be made of a {type(data).__name__}: {error}; give a tensor, an array, a number or nested "
            "lists of numbers, all of one length"
        ) from None


def _require_movable(tensor: Tensor) -> None:
    if is_lazy(tensor) or tensor.is_meta:
        raise SessionError("a tensor without content cannot be moved; give it some first")
    if tensor.layout != torch.strided:
        raise SessionError(f"a {tensor.layout} tensor cannot be moved; call to_dense() first")
    if tensor.is_quantized:
        raise SessionError("a quantized tensor cannot be moved; call dequantize() or int_repr() first")


class AdoptedMemory:
    """The arrays in the object store that tensors of this process have taken over: at most ``most`` bytes."""

    def __init__(self, most: int = MOST_ADOPTED) -> None:
        self._most = most
        self._arrays: list[weakref.ref[Any]] = []

    def admit(self, payload: Payload) -> Payload:
        """``payload``, which is private no longer if there is no room for its array."""
        if not payload.is_private:
            return payload
        alive = [array for reference in self._arrays if (array := reference()) is not None]
        if sum(array.nbytes for array in alive) + payload.nbytes > self._most:
            return replace(payload, is_private=False)
        self._arrays = [weakref.ref(array) for array in (*alive, payload.array)]
        return payload


def advised(error: BaseException) -> str:
    """Return what an error says, with what to do where it is about memory that came from the client."""
    reason = f"{type(error).__name__}: {error}"
    if "storage that is not resizable" not in reason:
        return reason
    return (
        f"{reason}; a large tensor from the client keeps the memory that it came in: upload it anew, and resize a copy "
        "of it, x = x.clone()"
    )


class _Writable:
    """An array that Ray marks read-only, as others could have it too, without the mark."""

    def __init__(self, array: np.ndarray[Any, Any]) -> None:
        self._array = array  # keeps the memory
        interface = array.__array_interface__
        self.__array_interface__ = {**interface, "data": (interface["data"][0], False)}
