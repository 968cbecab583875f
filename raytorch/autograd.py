"""PyTorch's own ``backward`` and ``grad``, functions with a backward pass of one's own, and checkpointing."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx
from torch.utils.checkpoint import checkpoint as torch_checkpoint

from raytorch.errors import UserError
from raytorch.tensor_ops import OVERRIDABLE, overridable

backward = torch.autograd.backward
grad = torch.autograd.grad

# They honour __torch_function__ by themselves, but torch.overrides does not list them.
OVERRIDABLE.update({f"{__name__}.backward": backward, f"{__name__}.grad": grad})


class Context:
    """State that a forward pass keeps for its backward pass: tensors in order, and values by name.

    ``Context()`` is filled and read by hand. The functions of a :class:`CustomFunction` are given one over PyTorch's
    own ctx: that keeps what is saved, and its members are the context's too (``needs_input_grad``, ``mark_dirty``,
    ``mark_non_differentiable``, ``set_materialize_grads``, and any attribute that is set).

    Args:
        ctx: What to keep it in; a new ctx by default.
    """

    _ctx: Any = None
    _tensors: tuple[Any, ...]
    _values: dict[str, Any]

    def __init__(self, ctx: FunctionCtx | None = None) -> None:
        ctx = FunctionCtx() if ctx is None else ctx
        vars(self).update(_ctx=ctx, _tensors=(), _values=vars(ctx).setdefault("raytorch_values", {}))

    def save_tensor(self, tensor: Tensor) -> None:
        """Keep ``tensor`` after those kept already."""
        self.save_for_backward(*self._tensors, tensor)

    def save_for_backward(self, *tensors: Tensor | None) -> None:
        """Keep ``tensors`` in place of those kept already. See ``FunctionCtx.save_for_backward``."""
        vars(self)["_tensors"] = tensors
        self._ctx.save_for_backward(*tensors)

    @property
    def saved_tensors(self) -> tuple[Tensor, ...]:
        """The tensors kept, in the order in which they were saved."""
        return self._tensors or getattr(self._ctx, "saved_tensors", ())

    def save_value(self, name: str, value: Any) -> None:
        """Keep ``value``, which is no tensor, under ``name``, in place of one of that name."""
        self._values[name] = value

    def value(self, name: str) -> Any:
        """The value kept under ``name``.

        Raises:
            UserError: There is none of that name.
        """
        if name not in self._values:
            raise UserError(f"the context has no value {name!r}; it has {', '.join(sorted(self._values)) or 'none'}")
        return self._values[name]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ctx, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if hasattr(Context, name):
            raise AttributeError(f"{name} is a member of every Context; set another attribute, or save_value")
        setattr(self._ctx, name, value)


class CustomFunction:
    """A differentiable function whose backward pass is given, run as a ``torch.autograd.Function``.

    Args:
        forward: ``forward(context, *args)`` computes the output, a tensor or a tuple of them, and saves in the
            :class:`Context` what backward needs. ``args`` need not be tensors.
        backward: ``backward(context, *grad_outputs)`` takes the gradient of each output and returns that of each of
            ``args``, None for one that has none. Made of differentiable operations, it can be differentiated again.

    Example:
        >>> def forward(context, x):
        ...     context.save_tensor(x)
        ...     return x**2
        >>> def backward(context, gradient):
        ...     (x,) = context.saved_tensors
        ...     return 2 * x * gradient
        >>> x = torch.tensor([3.0], requires_grad=True)
        >>> CustomFunction(forward, backward).apply(x).backward()
        >>> x.grad
        tensor([6.])
    """

    def __init__(self, forward: Callable[..., Any], backward: Callable[..., Any]) -> None:
        self.forward, self.backward = forward, backward
        members = {
            "forward": staticmethod(lambda ctx, *args: forward(Context(ctx), *args)),
            "backward": staticmethod(lambda ctx, *grad_outputs: backward(Context(ctx), *grad_outputs)),
        }
        name = getattr(forward, "__name__", "CustomFunction")  # for PyTorch's messages
        self._function: type[torch.autograd.Function] = type(name, (torch.autograd.Function,), members)

    @overridable
    def apply(self, *args: Any) -> Any:
        """Return what ``forward`` returns for ``args``, in a graph that ``backward`` differentiates.

        See ``torch.autograd.Function.apply``.
        """
        return self._function.apply(*args)

    def __reduce__(self) -> tuple[Any, ...]:
        return CustomFunction, (self.forward, self.backward)


@overridable
def checkpoint(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """``function(*args, **kwargs)``, run again in the backward pass in place of keeping what that needs.

    Both runs draw the same random numbers. ``function`` must do the same each time.
    See ``torch.utils.checkpoint.checkpoint`` with ``use_reentrant=False``.

    Example:
        >>> x = torch.tensor([3.0], requires_grad=True)
        >>> checkpoint(torch.square, x).backward()
        >>> x.grad
        tensor([6.])
    """
    # Handed over as positional arguments, none of kwargs is taken for an option of PyTorch's, and the GPUs of all
    # tensors are found, whose generators are to be restored.
    return torch_checkpoint(
        lambda call, args, kwargs: call(*args, **kwargs), function, args, kwargs, use_reentrant=False
    )
