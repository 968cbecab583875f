"""The names of functions in instructions: the same on the client and on the workers, and of one function each."""

import pickle

import cloudpickle
import numpy as np
import pytest
import torch
from in_process import local_session
from torch.nn import functional as F

from raytorch.errors import SessionError, UnknownFunctionError
from raytorch.session import function_names, worker_functions
from raytorch.tensor_ops import OVERRIDABLE


def test_every_function_that_pytorch_lists_as_overridable_has_a_name() -> None:
    listed = [each for several in torch.overrides.get_overridable_functions().values() for each in several]
    assert len(listed) > 1_400
    for function in listed:
        assert function_names.function_named(function_names.name_of(function)) == function


def test_every_name_resolves_to_a_function_of_that_name() -> None:
    table = function_names._functions()
    assert len(table) > 2_000
    assert len(table) == len(function_names._names())
    for name, function in table.items():
        assert function_names.name_of(function) == name
        assert function_names.function_named(name) is function


@pytest.mark.parametrize(
    "function",
    [torch.ops.aten.mul, torch.ops.aten.mul.Tensor, torch.ops.aten.relu.default, torch.ops.prims.cos],
)
def test_operators_of_the_dispatcher_resolve_too(function: object) -> None:
    assert function_names.function_named(function_names.name_of(function)) is function


@pytest.mark.parametrize(
    "function",
    [
        *(torch.meshgrid, torch.rand_like, torch.normal, torch.as_strided, torch.Tensor.fill_, torch.Tensor.__rdiv__),
        *(F.hardswish, F.hardsigmoid, F.relu_, torch.nn.init.normal_, torch.sparse.sampled_addmm),
        *(torch.Tensor.grad.__get__, torch.Tensor.grad.__set__, torch.autograd.grad, torch._foreach_add_),
        torch.random.manual_seed,
    ],
)
def test_functions_that_pytorch_hands_to_handles_without_listing_them_resolve(function: object) -> None:
    assert function_names.function_named(function_names.name_of(function)) == function


def test_the_names_of_raytorchs_own_functions_are_the_tables_own() -> None:
    for name, function in (OVERRIDABLE | worker_functions.PRIMITIVES).items():
        if name.startswith("raytorch."):  # other tests make functions of their own overridable
            assert function_names.function_named(function_names.name_of(function)) == function
    for name in function_names.FACTORIES:
        assert function_names.name_of(getattr(torch, name)).removeprefix("torch.") in function_names.FACTORIES


@pytest.mark.parametrize("name", ["torch.nothing", "torch.ops.aten.nothing", "torch.ops.load_library", "os.system"])
def test_a_name_of_no_function_is_refused(name: str) -> None:
    with pytest.raises(UnknownFunctionError, match="has no function"):
        function_names.function_named(name)


@pytest.mark.parametrize("function", [print, torch.load, np.exp, lambda tensor: tensor])
def test_a_function_that_takes_no_handles_is_refused_with_the_remedy(function: object) -> None:
    with pytest.raises(UnknownFunctionError, match=r"session\.run"):
        function_names.name_of(function)


# -- arguments and results that the operators' own samples do not have -------------------------------------------------


def test_numpys_numbers_are_operands_on_either_side_as_with_tensors() -> None:
    with local_session() as session:
        tensor = session.tensor(torch.ones(2))
        for result in (np.float32(3) * tensor, tensor * np.float32(3), tensor.new_full((2,), np.int64(3))):
            assert result.fetch().tolist() == [3.0, 3.0]
        with pytest.raises(SessionError, match=r"session\.tensor\(array\)"):
            np.ones(2) + tensor


def test_a_generator_of_the_clients_is_refused_and_one_on_the_worker_draws() -> None:
    with local_session() as session:
        tensor = session.tensor(torch.zeros(3))
        with pytest.raises(SessionError, match="manual_seed"):
            tensor.uniform_(generator=torch.Generator())
        generator = session.object(torch.Generator)
        generator.call("manual_seed", 5)
        drawn = [tensor.uniform_(generator=generator).fetch() for _ in range(2)]
    here = torch.Generator().manual_seed(5)
    for each in drawn:
        torch.testing.assert_close(each, torch.rand(3, generator=here), rtol=0, atol=0)


def test_functions_that_change_a_list_or_a_keyword_in_place_return_it() -> None:
    with local_session() as session:
        tensors = [session.tensor(torch.ones(2)), session.tensor(torch.ones(3))]
        assert torch._foreach_add_(tensors, 1) is tensors
        assert [tensor.fetch().tolist() for tensor in tensors] == [[2.0, 2.0], [2.0, 2.0, 2.0]]
        assert torch.nn.init.constant_(tensors[0], 5.0) is tensors[0]
        assert tensors[0].fetch().tolist() == [5.0, 5.0]


def test_a_number_is_formatted_as_a_tensors_is() -> None:
    with local_session() as session:
        assert f"{session.tensor(2.0):.2f}" == "2.00"
        assert f"{session.tensor(2.0)}".startswith("RemoteTensor")


@pytest.mark.parametrize("form", [torch.channels_last, torch.preserve_format, torch.contiguous_format])
def test_memory_formats_do_not_travel_by_the_name_of_the_clients_script(form: torch.memory_format) -> None:
    for dumps in (pickle.dumps, cloudpickle.dumps):
        assert b"pkgutil" in dumps(form)  # which the workers have too
        assert pickle.loads(dumps(form)) == form
