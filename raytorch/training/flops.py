"""Floating-point operations of PyTorch code, counted while it runs, from the shapes of what it multiplies."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

_counting: list["FlopCounter"] = []
"""Those at work in this process; a variable of its threads would be lost in a backward pass, which has its own."""


class FlopCounter(TorchDispatchMode):
    """Counts matrix products, convolutions, attention and recurrent layers in its block, forward and backward.

    A multiplication and an addition are two operations, attention counts whole, also where it looks back alone, and
    what is element by element does not count, as in ``torch.utils.flop_counter``, whose formulas these are. Unlike its
    ``FlopCounterMode`` it leaves modules as they are, and adds nothing to autograd's graph: results are those without.
    What ``torch.compile`` has compiled and custom kernels are not seen.

    Attributes:
        total: Operations until now.

    Example:
        >>> weight = torch.ones(4, 2, requires_grad=True)
        >>> with FlopCounter() as counter:
        ...     torch.autograd.backward((torch.ones(3, 4) @ weight).sum())
        >>> counter.total  # 3 x 4 x 2 multiplications and additions, and as many for the gradient
        96
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.total = 0

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Code that is compiled stays so while it is counted, in PyTorch that asks."""
        return True

    def __enter__(self) -> "FlopCounter":
        super().__enter__()  # type: ignore[no-untyped-call]
        _counting.append(self)
        return self

    def __exit__(self, *error: Any) -> None:
        _counting.remove(self)
        super().__exit__(*error)  # type: ignore[no-untyped-call]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # comes again with what this worker has of it
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        packet = getattr(func, "_overloadpacket", None)
        if packet in _OF_RECURRENT:
            self.total += _of_recurrent(args) * _OF_RECURRENT[packet]
        elif packet in flop_registry:
            self.total += int(flop_registry[packet](*args, **kwargs, out_val=result))
        return result


@contextmanager
def not_counted() -> Iterator[None]:
    """Leave out what is computed in the block: what is done a second time, to save memory, is no work of the model."""
    before = [(counter, counter.total) for counter in _counting]
    try:
        yield
    finally:
        for counter, total in before:
            counter.total = total


def counted(step: Callable[[], Any]) -> int | None:
    """How many operations a call of ``step`` takes; None where it has none that can be counted.

    What it raises is raised.
    """
    with FlopCounter() as counter:
        step()
    return counter.total or None


# -- recurrent layers, for which PyTorch has no formula ----------------------------------------------------------------


def _packets(*names: str) -> list[Any]:
    return [getattr(torch.ops.aten, name) for name in names if hasattr(torch.ops.aten, name)]


_OF_RECURRENT: dict[Any, int] = {
    **dict.fromkeys(_packets("mkldnn_rnn_layer", "_cudnn_rnn"), 2),
    **dict.fromkeys(_packets("mkldnn_rnn_layer_backward", "_cudnn_rnn_backward"), 4),
}
"""Operations for each weight and place of a sequence."""


def _of_recurrent(args: tuple[Any, ...]) -> int:
    """Numbers in the matrices of a recurrent layer, times the places of all sequences."""
    weights = args[1] if isinstance(args[1], list | tuple) else args[1:3]
    return int(args[0].shape[:-1].numel() * sum(each.numel() for each in weights if each.dim() == 2))
