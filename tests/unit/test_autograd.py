"""Contexts, custom functions and checkpointing, against PyTorch's own gradients."""

import copy
import gc
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck
from torch.autograd.function import FunctionCtx, once_differentiable

from raytorch import autograd
from raytorch.autograd import Context, CustomFunction, checkpoint
from raytorch.errors import UserError


class Handle:
    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return function, args, kwargs or {}


def numbers(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


# -- a context by hand -------------------------------------------------------------------------------------------------


def test_a_context_keeps_tensors_in_order_and_values_by_name() -> None:
    context, first, second = Context(), torch.ones(1), torch.ones(2)
    assert context.saved_tensors == ()
    context.save_tensor(first)
    context.save_tensor(second)
    assert [id(tensor) for tensor in context.saved_tensors] == [id(first), id(second)]
    context.save_for_backward(second)
    assert [id(tensor) for tensor in context.saved_tensors] == [id(second)]
    context.save_value("scale", 2)
    context.save_value("scale", 3)
    context.save_value("saved_tensors", None)  # any name will do
    assert (context.value("scale"), context.value("saved_tensors")) == (3, None)


def test_an_unknown_value_is_refused_with_the_names_there_are() -> None:
    context = Context()
    with pytest.raises(UserError, match=r"^the context has no value 'scale'; it has none$"):
        context.value("scale")
    context.save_value("shift", 1)
    context.save_value("factor", 1)
    with pytest.raises(UserError, match=r"^the context has no value 'scale'; it has factor, shift$"):
        context.value("scale")


def test_a_context_takes_any_attribute_but_its_own_members() -> None:
    context = Context()
    context.scale = 2
    assert context.scale == 2
    assert copy.copy(context).scale == 2
    with pytest.raises(AttributeError, match="value is a member of every Context"):
        context.value = 2
    with pytest.raises(AttributeError, match="needs_input_grad"):
        _ = context.needs_input_grad


def test_a_context_keeps_handles_as_well() -> None:
    context, handle = Context(), Handle()
    context.save_tensor(handle)
    assert context.saved_tensors == (handle,)


# -- custom functions --------------------------------------------------------------------------------------------------


def forward_power(context: Context, base: Tensor, exponent: int) -> Tensor:
    context.save_tensor(base)
    context.save_value("exponent", exponent)
    return base**exponent


def backward_power(context: Context, grad_output: Tensor) -> tuple[Tensor, None]:
    (base,), exponent = context.saved_tensors, context.value("exponent")
    return grad_output * exponent * base ** (exponent - 1), None


power = CustomFunction(forward_power, backward_power)


def test_a_custom_function_is_a_node_of_pytorchs_graph() -> None:
    result = power.apply(numbers(3), 3)
    assert type(result.grad_fn).__name__ == "forward_powerBackward"
    assert isinstance(result.grad_fn, torch.autograd.graph.Node)


def test_gradients_of_first_and_second_order_are_right() -> None:
    base = numbers(4)
    assert gradcheck(lambda base: power.apply(base, 3), base)
    assert gradgradcheck(lambda base: power.apply(base, 3), base)


def test_the_same_functions_run_by_hand() -> None:
    base, grad_output, context = numbers(4), torch.rand(4, dtype=torch.float64), Context()
    by_hand, none = backward_power(context, (forward_power(context, base, 3), grad_output)[1])
    (applied,) = autograd.grad(power.apply(base, 3), base, grad_output)
    torch.testing.assert_close(by_hand, applied)
    assert none is None


def test_several_outputs_and_inputs() -> None:
    def forward(context: Context, a: Tensor, name: str, b: Tensor) -> tuple[Tensor, Tensor]:
        assert name == "product"
        product, total = a * b, a + b
        context.save_for_backward(a, b, product)
        return product, total

    def backward(context: Context, of_product: Tensor, of_total: Tensor) -> tuple[Any, ...]:
        a, b, _ = context.saved_tensors
        return of_product * b + of_total, None, of_product * a + of_total

    function = CustomFunction(forward, backward)
    inputs = numbers(3), numbers(3)
    assert gradcheck(lambda a, b: function.apply(a, "product", b), inputs)
    assert gradgradcheck(lambda a, b: function.apply(a, "product", b), inputs)


def test_all_that_pytorchs_ctx_offers_is_there() -> None:
    seen: dict[str, Any] = {}

    def forward(ctx: Any, a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.count = 1
        ctx.save_tensor(b)
        ctx.save_tensor(a)
        assert len(ctx.saved_tensors) == 2
        places = a.argsort()
        ctx.mark_non_differentiable(places)
        ctx.mark_dirty(b)
        return a * 2, places, b.add_(1)

    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        seen.update(needs=ctx.needs_input_grad, count=ctx.count, grads=[grad is None for grad in grads])
        return grads[0] * 2, None

    a, b = numbers(3), torch.zeros(3, dtype=torch.float64)
    doubled, places, added = CustomFunction(forward, backward).apply(a, b)
    assert added is b
    assert not places.requires_grad
    autograd.backward(doubled.sum())
    assert seen == {"needs": (True, False), "count": 1, "grads": [False, True, True]}
    assert a.grad is not None
    assert a.grad.tolist() == [2, 2, 2]


def test_a_backward_pass_can_be_run_again_and_forbid_a_second_derivative() -> None:
    function = CustomFunction(forward_power, once_differentiable(backward_power))
    base = numbers(3)
    result, weights = function.apply(base, 2), numbers(3)
    (first,) = autograd.grad(result, base, weights, retain_graph=True)
    (again,) = autograd.grad(result, base, weights, create_graph=True)
    torch.testing.assert_close(first, again)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        autograd.backward(again.sum())


def test_saved_tensors_are_pytorchs_business() -> None:
    base, packed = numbers(3), []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: packed.append(tensor) or 0, lambda _: base * 0):
        result = power.apply(base, 2).sum()
    (gradient,) = autograd.grad(result, base)
    assert [tensor.shape for tensor in packed] == [base.shape]
    assert gradient.tolist() == [0, 0, 0]

    changed = numbers(3) * 1
    result = power.apply(changed, 2)
    changed.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        autograd.backward(result.sum())


def test_what_a_graph_kept_goes_with_it() -> None:
    def forward(context: Context, tensor: Tensor, kept: nn.Module) -> Tensor:
        output = tensor.exp()
        context.save_tensor(output)
        context.kept = kept
        return output

    kept = nn.Identity()
    alive = weakref.ref(kept)
    result = CustomFunction(forward, lambda context, grad: (grad * context.saved_tensors[0], None)).apply(
        numbers(3), kept
    )
    gc.disable()
    try:
        del kept
        assert alive() is not None
        del result
        assert alive() is None
    finally:
        gc.enable()


def test_an_error_in_backward_comes_out_as_it_was_raised() -> None:
    function = CustomFunction(lambda context, tensor: tensor * 2, lambda context, grad: context.value("scale"))
    with pytest.raises(UserError, match="no value 'scale'"):
        autograd.backward(function.apply(numbers(1)))


def test_a_custom_function_can_be_sent_to_a_worker() -> None:
    base = numbers(3)
    received = pickle.loads(pickle.dumps(power))
    torch.testing.assert_close(received.apply(base, 2), base**2)


def test_handles_take_a_custom_function_over() -> None:
    handle = Handle()
    assert power.apply(handle, 3) == (CustomFunction.apply, (power, handle, 3), {})


def test_a_context_stands_on_the_ctx_it_is_given() -> None:
    ctx: Any = FunctionCtx()
    Context(ctx).save_value("scale", 2)
    Context(ctx).shift = 3
    assert Context(ctx).value("scale") == 2
    assert ctx.shift == 3


# -- checkpointing -----------------------------------------------------------------------------------------------------


class Block(nn.Module):
    """Counts its forward passes."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Dropout(0.5)) for _ in range(4)))
        self.calls = 0

    def forward(self, inputs: Tensor, *, scale: Any = 1.0, debug: bool = False) -> Tensor:
        self.calls += 1
        return self.layers(inputs) * scale


def bytes_kept(forward: Callable[[], Tensor], parameters: list[nn.Parameter]) -> tuple[int, Tensor]:
    """What the graph of ``forward`` keeps besides parameters."""
    own = {parameter.untyped_storage().data_ptr() for parameter in parameters}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = forward()
    return sum(kept.values()), result


def test_a_checkpoint_keeps_its_input_alone_and_computes_the_rest_again() -> None:
    block, inputs = Block(), torch.randn(32, 16, requires_grad=True)
    parameters = list(block.parameters())

    torch.manual_seed(0)
    plain_bytes, plain = bytes_kept(lambda: block(inputs), parameters)
    expected = autograd.grad(plain.sum(), [inputs, *parameters])
    assert block.calls == 1

    torch.manual_seed(0)
    checkpoint_bytes, result = bytes_kept(lambda: checkpoint(block, inputs), parameters)
    torch.testing.assert_close(result, plain)  # the same dropout
    assert block.calls == 2
    torch.manual_seed(1)  # the second run draws as the first one did all the same
    got = autograd.grad(result.sum(), [inputs, *parameters])
    assert block.calls == 3

    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
    assert plain_bytes > 8 * inputs.nbytes
    assert checkpoint_bytes == 0  # the input is held by its owner


def test_activations_inside_of_a_checkpoint_are_gone_after_the_forward_pass() -> None:
    inside: list[weakref.ref[Tensor]] = []

    def function(inputs: Tensor) -> Tensor:
        hidden = inputs.exp()
        inside.append(weakref.ref(hidden))
        return hidden * hidden

    inputs = numbers(3)
    plain, checkpointed = function(inputs), checkpoint(function, inputs)
    assert [ref() is not None for ref in inside] == [True, False]
    torch.testing.assert_close(autograd.grad(checkpointed.sum(), inputs), autograd.grad(plain.sum(), inputs))


def test_all_keyword_arguments_are_the_functions() -> None:
    block, scale = Block().eval(), torch.tensor(3.0, requires_grad=True)
    inputs = torch.randn(2, 16)
    result = checkpoint(block, inputs, scale=scale, debug=True)
    autograd.backward(result.sum())
    torch.testing.assert_close(scale.grad, block(inputs).sum())


def test_checkpoints_can_be_differentiated_twice() -> None:
    inputs = numbers(3)
    assert gradgradcheck(lambda inputs: checkpoint(torch.sin, inputs), inputs)


def test_a_handle_takes_a_checkpoint_over() -> None:
    handle = Handle()
    assert checkpoint(torch.sin, handle) == (autograd.checkpoint, (torch.sin, handle), {})
    assert checkpoint(handle, 1, scale=2) == (autograd.checkpoint, (handle, 1), {"scale": 2})


# -- backward and grad -------------------------------------------------------------------------------------------------


def test_backward_and_grad_are_pytorchs_own_and_can_be_taken_over() -> None:
    assert autograd.backward is torch.autograd.backward
    assert autograd.grad is torch.autograd.grad
    handle: Any = Handle()
    function, args, kwargs = autograd.backward([handle], [handle])
    assert (function, args, kwargs["grad_tensors"]) == (autograd.backward, ((handle,),), [handle])
    function, args, _ = autograd.grad(handle, [handle])
    assert (function, args) == (autograd.grad, ((handle,), (handle,)))
