"""The override protocol on functions of our own: who is asked, with what, and when nobody is."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from raytorch import autograd, distributed, tensor_ops
from raytorch.distributed import collectives
from raytorch.tensor_ops import OVERRIDABLE, overridable


class Handle:
    """Records what it is asked for, as a session's handle does; it is no tensor."""

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return function, args, kwargs


class Refusing:
    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return NotImplemented


class Metres(Tensor):
    """A subclass that leaves everything to PyTorch."""


@overridable
def scaled(tensors: Any, factor: Any = 2.0, *, bias: Any = 0.0) -> Any:
    """Scale."""
    return [tensor * factor + bias for tensor in tensors]


def test_tensors_are_computed_with_at_once() -> None:
    tensor = torch.ones(2, requires_grad=True)
    (result,) = scaled([tensor], bias=nn.Parameter(torch.ones(2)))
    torch.testing.assert_close(result, torch.full((2,), 3.0))


@pytest.mark.parametrize("place", ["list", "tuple", "argument", "keyword"])
def test_a_handle_takes_the_call_over_with_its_arguments_as_given(place: str) -> None:
    handle, tensor = Handle(), torch.ones(2)
    args: tuple[Any, ...] = {"list": ([tensor, handle],), "tuple": ((handle,),)}.get(place, (tensor,))
    args += (handle,) if place == "argument" else ()
    kwargs = {"bias": handle} if place == "keyword" else {}
    recorded = scaled(*args, **kwargs)
    assert recorded == (scaled, args, kwargs)
    assert all(given is kept for given, kept in zip(args, recorded[1], strict=True))


def test_a_handle_deeper_than_a_list_is_not_looked_for() -> None:
    with pytest.raises(TypeError):
        scaled([[Handle()]])


def test_a_type_that_does_not_implement_the_function_is_named() -> None:
    with pytest.raises(TypeError, match=r"no implementation found for 'test_overrides\.scaled'.*Refusing"):
        scaled([Refusing()])


def test_a_subclass_of_tensor_keeps_its_type() -> None:
    (result,) = scaled([torch.ones(2).as_subclass(Metres)])
    assert type(result) is Metres


def test_the_default_device_holds_inside_of_a_function() -> None:
    @overridable
    def padded(tensor: Tensor) -> Tensor:
        return torch.cat([tensor, torch.zeros(1)])

    with torch.device("meta"):
        assert padded(torch.ones(1)).is_meta


def test_a_mode_sees_what_a_handle_is_asked_for() -> None:
    seen: list[Any] = []

    class Watching(TorchFunctionMode):
        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(function)
            return function(*args, **(kwargs or {}))

    with Watching():
        function, _, _ = scaled([Handle()])
    assert seen == [scaled]
    assert function is scaled


def test_a_decorated_function_keeps_its_name_and_documentation() -> None:
    assert (scaled.__name__, scaled.__module__, scaled.__doc__) == ("scaled", __name__, "Scale.")


def test_functions_are_named_by_where_they_are() -> None:
    ours = {name: function for name, function in OVERRIDABLE.items() if name.startswith("raytorch.")}
    assert ours == {
        f"raytorch.{name}": function
        for name, function in {
            "tensor_ops.index": tensor_ops.index,
            "autograd.backward": torch.autograd.backward,
            "autograd.grad": torch.autograd.grad,
            "autograd.CustomFunction.apply": autograd.CustomFunction.apply,
            "autograd.checkpoint": autograd.checkpoint,
            "distributed.collectives.all_reduce": collectives.all_reduce,
            "distributed.collectives.all_gather": collectives.all_gather,
            "distributed.collectives.broadcast": collectives.broadcast,
            "distributed.collectives.reduce_scatter": collectives.reduce_scatter,
            "distributed.is_available": torch.distributed.is_available,
            "distributed.init_process_group": distributed.init_process_group,
            "distributed.destroy_process_group": distributed.destroy_process_group,
            "distributed.barrier": distributed.barrier,
        }.items()
    }


@pytest.mark.parametrize("name", ["all_reduce", "all_gather", "broadcast", "reduce_scatter"])
def test_collectives_can_be_taken_over(name: str) -> None:
    function, handle = getattr(collectives, name), Handle()
    assert function(handle) == (function, (handle,), {})


def test_a_list_to_scatter_can_be_taken_over() -> None:
    handles = [Handle(), Handle()]
    assert collectives.reduce_scatter(handles, op="max") == (collectives.reduce_scatter, (handles,), {"op": "max"})
