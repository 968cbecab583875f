"""PyTorch's operators on its own samples (the tables that PyTorch itself is tested with): with handles and locally."""

import functools
import itertools
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from raytorch.errors import RaytorchError, RemoteOpError
from raytorch.session.function_names import FACTORIES
from raytorch.session.remote_tensor import RemoteTensor
from raytorch.session.session import Session
from raytorch.session.tensor_transfer import Payload

SEED = 42
"""The seed that PyTorch's table sets before operators that draw random numbers."""
UNINITIALISED = {
    *("empty", "empty_like", "empty_permuted", "empty_strided", "new_empty", "new_empty_strided"),
    *("resize_", "resize_as_"),
}
"""Operators that give whatever the memory holds: only shapes and dtypes are compared."""
METHODS = {
    "item": "item",
    "cauchy": "cauchy_",
    "exponential": "exponential_",
    "geometric": "geometric_",
    "log_normal": "log_normal_",
    "normal.in_place": "normal_",
    "uniform": "uniform_",
}
"""Operators that PyTorch's table calls as ``torch.Tensor.item(tensor)``, which Python refuses to do with another class,
and the methods that they are."""


class DifferentError(AssertionError):
    """A result with handles is not PyTorch's."""


@dataclass
class Outcome:
    """What became of the operators."""

    calls: int = 0
    """Calls that gave the same; each was made twice."""
    gradients: int = 0
    """Operators whose gradients were the same too."""
    equal: list[str] = field(default_factory=list)
    different: dict[str, str] = field(default_factory=dict)
    """How an operator differed first."""
    unavailable: list[str] = field(default_factory=list)
    """Those of which this processor runs no sample, for want of a device or of instructions."""


def run_operators(session: Session, *, samples: int, gradients: bool, every: int = 1) -> Outcome:
    """Run the first samples of operators, as a function, as a method and in place, and compare.

    Args:
        session: Where the handles live.
        samples: How many of each operator and dtype.
        gradients: Whether to compare the gradients of the first sample too.
        every: Take every operator of the table, every second one, and so on.
    """
    outcome = Outcome()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the samples reach everything that PyTorch warns of
        for op in table()[::every]:
            _run_operator(session, op, samples, gradients, outcome)
    return outcome


@functools.cache
def table() -> list[Any]:
    """PyTorch's table of its operators."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ImportWarning)  # it would rather have hypothesis
        from torch.testing._internal import common_utils, opinfo
        from torch.testing._internal.common_methods_invocations import op_db
    # It looks for a unittest.TestCase through the whole stack, again for each sample: most of the time of all this.
    common_utils.extract_test_fn = opinfo.core.extract_test_fn = lambda: None
    # The import forbids the whole process to assign to torch.backends.cudnn.benchmark and its like.
    # torch.backends stands in its own place, so that the flag has to be set where its functions look for it.
    torch.backends.flags_frozen.__globals__["__allow_nonbracketed_mutation_flag"] = True
    assert not torch.backends.flags_frozen()
    return list(op_db)


def name_of(op: Any) -> str:
    """The name of an operator of the table, with that of its variant."""
    return f"{op.name}.{op.variant_test_name}" if op.variant_test_name else str(op.name)


def _run_operator(session: Session, op: Any, samples: int, gradients: bool, outcome: Outcome) -> None:
    try:
        calls = sum(_run_dtype(session, op, dtype, samples) for dtype in _dtypes(op))
        differentiated = gradients and _run_gradients(session, op)
        session.synchronize()
        if not calls:
            outcome.unavailable.append(name_of(op))
            return
    except (AssertionError, AttributeError, TypeError, ValueError, RaytorchError) as error:
        outcome.different[name_of(op)] = f"{type(error).__name__}: {error}"
        _settle(session)
    else:
        outcome.equal.append(name_of(op))
        outcome.calls += calls
        outcome.gradients += differentiated


def _dtypes(op: Any) -> list[torch.dtype]:
    supported = op.supported_dtypes("cpu")
    return [dtype for dtype in (torch.float32, torch.int64) if dtype in supported] or [
        dtype for dtype in (torch.complex64, torch.float8_e4m3fn) if dtype in supported
    ]


def _samples(op: Any, dtype: torch.dtype, count: int, *, requires_grad: bool = False) -> list[Any]:
    torch.default_generator.manual_seed(SEED)
    return list(itertools.islice(op.sample_inputs("cpu", dtype, requires_grad=requires_grad), count))


def _run_dtype(session: Session, op: Any, dtype: torch.dtype, samples: int) -> int:
    return sum(
        _same_call(session, local, remote, sample, compare_values=op.name not in UNINITIALISED)
        for sample in _samples(op, dtype, samples)
        for local, remote in _variants(session, op)
    )


def _variants(session: Session, op: Any) -> Iterator[tuple[Callable[..., Any], Callable[..., Any]]]:
    """The ways to call an operator, each for local tensors and for handles."""
    if op.name in FACTORIES:
        yield op.op, getattr(session, op.name)
    else:
        yield op.op, _for_handles(op)
    if op.method_variant:
        yield op.method_variant, _method(op.name)
    others = (op.inplace_variant, op.operator_variant, op.inplace_operator_variant, *(alias.op for alias in op.aliases))
    for variant in others:
        if variant:
            yield variant, _as_method(variant)


def _for_handles(op: Any) -> Callable[..., Any]:
    return _method(METHODS[name_of(op)]) if name_of(op) in METHODS else _as_method(op.op)


def _as_method(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` or, for a function of the class ``torch.Tensor``, what calls it as a method."""
    name = getattr(function, "__name__", "")
    return _method(name) if getattr(Tensor, name, None) == function else function


def _method(name: str) -> Callable[..., Any]:
    return lambda tensor, *args, **kwargs: getattr(tensor, name)(*args, **kwargs)


def _same_call(
    session: Session, local: Callable[..., Any], remote: Callable[..., Any], sample: Any, *, compare_values: bool
) -> bool:
    """Whether PyTorch made the call; if it raised, so does the session."""
    given = _Inputs(sample, _copied)
    try:
        expected, random = _seeded(local, lambda: local(*given.args, **given.kwargs))
    except Exception as error:
        _raises_too(session, remote, sample, error)
        return False
    for _ in range(2):  # what a call gives is asked for the first time, and known from then on
        handles = _Inputs(sample, functools.partial(_sent, session))
        if random:
            _seed(session)
        _compare(remote(*handles.args, **handles.kwargs), expected, compare_values)
        for handle, tensor in zip(handles.tensors, given.tensors, strict=True):
            if tensor._version:  # changed in place
                _compare(handle, tensor, compare_values)
    return True


def _raises_too(session: Session, remote: Callable[..., Any], sample: Any, error: Exception) -> None:
    for _ in range(2):
        handles = _Inputs(sample, functools.partial(_sent, session))
        with pytest.raises((RemoteOpError, type(error))):
            _wait(session, remote(*handles.args, **handles.kwargs))
        _settle(session)


def _wait(session: Session, result: Any) -> None:
    if isinstance(result, RemoteTensor):
        result.fetch()
    else:
        session.synchronize()


def _run_gradients(session: Session, op: Any) -> bool:
    """Whether there is a gradient to compare: of the sum of the first sample's results."""
    if not op.supports_autograd or torch.float32 not in op.supported_backward_dtypes("cpu") or op.name in FACTORIES:
        return False
    samples = _samples(op, torch.float32, 1, requires_grad=True)
    return bool(samples) and _same_gradients(session, op, samples[0])


def _same_gradients(session: Session, op: Any, sample: Any) -> bool:
    given = _Inputs(sample, _copied)
    needed = [place for place, tensor in enumerate(given.tensors) if tensor.requires_grad]
    function = _for_handles(op)
    expected, random = _seeded(op.op, lambda: _gradients(function, sample, given, needed))
    if expected is None:
        return False
    handles = _Inputs(sample, functools.partial(_sent, session))
    if random:
        _seed(session)
    _compare(_gradients(function, sample, handles, needed), expected, compare_values=True)
    return True


def _gradients(function: Callable[..., Any], sample: Any, inputs: "_Inputs", needed: list[int]) -> Any:
    """Gradients by the inputs that are needed, local tensors or handles; None if no result depends on them."""
    results = _tensors(sample.output_process_fn_grad(function(*inputs.args, **inputs.kwargs)))
    summed = [(part.abs() if part.is_complex() else part).sum() for part in results if part.requires_grad]
    if not summed:
        return None
    return torch.autograd.grad(
        sum(summed[1:], summed[0]), [inputs.tensors[place] for place in needed], allow_unused=True
    )


def _seeded(function: Callable[..., Any], call: Callable[[], Any]) -> tuple[Any, bool]:
    """What ``call``, a call of ``function`` after seeding, gives, and whether it drew random numbers."""
    state = torch.default_generator.manual_seed(SEED).get_state()
    result = call()
    # The table's own functions of random operators seed, and restore the state.
    seeds_itself = "wrapper_set_seed" in getattr(getattr(function, "__code__", None), "co_names", ())
    return result, seeds_itself or not torch.equal(state, torch.default_generator.get_state())


def _seed(session: Session) -> None:
    """Seed the workers; and this process, whose state the table's functions restore: in-process workers share it."""
    torch.default_generator.manual_seed(SEED)
    session.manual_seed(SEED)


class _Inputs:
    """A sample's arguments with every tensor replaced; one that is there twice is replaced by the same."""

    def __init__(self, sample: Any, replace: Callable[[Tensor], Any]) -> None:
        self._replace = replace
        self._replaced: dict[int, Any] = {}
        self.args = (self._of(sample.input), *self._of(tuple(sample.args)))
        self.kwargs = self._of(sample.kwargs)

    @property
    def tensors(self) -> list[Any]:
        return list(self._replaced.values())

    def _of(self, value: Any) -> Any:
        match value:
            case Tensor():
                if id(value) not in self._replaced:
                    self._replaced[id(value)] = self._replace(value)
                return self._replaced[id(value)]
            case list() | tuple():
                parts = [self._of(part) for part in value]
                return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
            case dict():
                return {key: self._of(part) for key, part in value.items()}
            case slice():
                return slice(self._of(value.start), self._of(value.stop), self._of(value.step))
        return value


def _copied(tensor: Tensor) -> Tensor:
    """The tensor as it arrives on a worker: contiguous."""
    if tensor.layout == torch.strided:
        return Payload.of(tensor).resizable()
    return tensor.detach().clone().requires_grad_(tensor.requires_grad)


def _sent(session: Session, tensor: Tensor) -> RemoteTensor:
    if tensor.layout == torch.strided:
        return session.tensor(tensor)
    dense = session.tensor(tensor.detach().to_dense())
    sparse: RemoteTensor = dense.to_sparse(layout=tensor.layout).requires_grad_(tensor.requires_grad)
    return sparse


def _tensors(value: Any) -> list[Any]:
    match value:
        case Tensor() | RemoteTensor():
            return [value]
        case list() | tuple():
            return [tensor for part in value for tensor in _tensors(part)]
        case dict():
            return _tensors(list(value.values()))
    return []


def _compare(result: Any, expected: Any, compare_values: bool) -> None:
    """Raise if a result with handles is not the local one: in structure, types, shapes, dtypes, layouts and values."""
    match expected:
        case Tensor():
            _require(isinstance(result, RemoteTensor), "is no tensor", result)
            _compare_tensor(result, expected, compare_values)
        case list() | tuple():
            _require(type(result) is type(expected) and len(result) == len(expected), type(expected), result)
            for part, expected_part in zip(result, expected, strict=True):
                _compare(part, expected_part, compare_values)
        case dict():
            _require(type(result) is type(expected) and list(result) == list(expected), list(expected), result)
            _compare(list(result.values()), list(expected.values()), compare_values)
        case _:
            _require(type(result) is type(expected), type(expected), result)
            _require(not compare_values or result == expected or expected != expected, expected, result)


def _compare_tensor(result: RemoteTensor, expected: Tensor, compare_values: bool) -> None:
    if expected.layout != torch.strided:
        _require(result.layout == expected.layout, expected.layout, result.layout)
        result, expected = result.to_dense(), expected.to_dense()
    fetched = result.fetch()
    _require(fetched.shape == expected.shape, expected.shape, fetched.shape)
    _require(fetched.dtype == expected.dtype, expected.dtype, fetched.dtype)
    if compare_values:
        torch.testing.assert_close(fetched.detach(), expected.detach(), rtol=0, atol=0, equal_nan=True)


def _require(holds: bool, expected: Any, result: Any) -> None:
    if not holds:
        raise DifferentError(f"expected {expected}, and got {result!r}")


def _settle(session: Session) -> None:
    """Let go of the errors that nobody has been told of."""
    while True:
        try:
            session.synchronize()
        except RemoteOpError:
            continue
        return
