"""What goes wrong on the workers or in the use of handles is told once, where it happened, and harms nothing else."""

import gc
import inspect
import pickle
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from compared import assert_same, held_by
from in_process import local_session
from torch import nn

from raytorch import errors
from raytorch.errors import (
    HandleError,
    RaytorchError,
    RemoteOpError,
    SessionError,
    SessionLostError,
    UnknownFunctionError,
)
from raytorch.session.session import Session

TIMEOUT_S = 30.0


@pytest.fixture
def session() -> Iterator[Session]:
    """Each test leaves no error untold."""
    with local_session(2) as session:
        yield session


def failing(session: Session) -> Any:
    """A tensor that an operation did not give."""
    return session.ones(2, 3) @ session.ones(2, 3)


def caught(use: Callable[[], Any]) -> RemoteOpError:
    with pytest.raises(RemoteOpError) as info:
        use()
    return info.value


def here() -> int:
    """The caller's line."""
    frame = inspect.currentframe()
    assert frame
    assert frame.f_back
    return frame.f_back.f_lineno


# -- what an error says ------------------------------------------------------------------------------------------------


def test_an_error_names_the_operation_its_arguments_the_rank_and_the_clients_line(session: Session) -> None:
    left, right = session.ones(2, 3), session.ones(4, 5, dtype=torch.float64)
    product, line = torch.matmul(left, right), here()
    error = caught(product.fetch)
    assert error.operation == "torch.matmul"
    assert (error.rank, error.file, error.line) == (0, __file__, line)
    message = str(error)
    assert "torch.matmul(float32[2, 3], float64[4, 5]) failed on rank 0" in message
    assert f"recorded at {__file__}:{line}" in message
    assert "RuntimeError" in message


def test_the_line_is_that_of_the_call_also_when_the_call_is_known(session: Session) -> None:
    good, bad = session.ones(2, 2), session.ones(3, 3)
    for other in (good, good, bad):
        total, line = good + other, here()
    error = caught(total.item)
    assert (error.operation, error.file, error.line) == ("torch.Tensor.__add__", __file__, line)


def test_keyword_and_nested_arguments_are_shown(session: Session) -> None:
    parts = [session.ones(2), session.ones(2, 2)]
    assert "torch.cat([float32[2], float32[2, 2]], dim=0)" in str(caught(torch.cat(parts, dim=0).fetch))
    assert "torch.sum(float32[2], dim=[7])" in str(caught(torch.sum(parts[0], dim=[7]).fetch))


def test_the_traceback_of_a_function_of_ones_own_is_shown(session: Session) -> None:
    def outer(tensor: Any) -> Any:
        return inner(tensor)

    def inner(tensor: Any) -> Any:
        raise ValueError(f"not {tuple(tensor.shape)}, please")

    message = str(caught(lambda: session.run(outer, session.ones(2))))
    assert "ValueError: not (2,), please" in message
    assert message.count(Path(__file__).name) >= 2
    assert "in inner" in message


def test_code_of_ones_own_has_its_source_on_the_workers(session: Session) -> None:
    class Own(nn.Module):
        def forward(self, tensor: Any) -> Any:
            raise LookupError(inspect.getsource(Own.forward))

    def double(tensor: Any) -> Any:
        return 2 * tensor, inspect.getsource(double)

    assert session.run(double, session.ones(1))[1] == inspect.getsource(double)
    message = str(caught(session.module(Own)(session.ones(1)).fetch))
    assert inspect.getsource(Own.forward) in message


def test_arguments_that_are_no_tensors_are_shown_by_their_names(session: Session) -> None:
    class Silent:
        def __repr__(self) -> str:
            raise AssertionError("not to be called")

        def speak(self, *words: Any) -> None:
            raise LookupError

    speech = session.object(Silent).call("speak", {"to": session.ones(3)}, nn.Linear, slice(1, None))
    message = str(caught(speech.fetch))
    assert "(test_arguments_that_are_no_tensors_are_shown_by_their_names.<locals>.Silent, 'speak'," not in message
    assert "(Silent, 'speak', {to: float32[3]}, Linear, slice(1, None, None)) failed" in message


def test_a_worker_other_than_the_first_is_named(session: Session) -> None:
    one = session.rank(1)
    error = caught((one.ones(2) @ one.ones(3)).fetch)
    assert error.rank == 1
    assert "failed on rank 1" in str(error)


# -- what it harms -----------------------------------------------------------------------------------------------------


def test_all_that_depends_on_a_failure_raises_it_and_other_work_goes_on(session: Session) -> None:
    other = session.ones(2)
    broken = failing(session)
    dependents = [broken + 1, torch.stack([other, broken.sum()]), (broken * 2).sum(0).max(), other + broken]
    other += 1
    first = caught(broken.fetch)
    for dependent in dependents:
        error = caught(dependent.fetch)
        assert (error.operation, error.line, str(error)) == (first.operation, first.line, str(first))
    assert other.tolist() == [2, 2]
    assert (other * other).sum().item() == 8


def test_taking_apart_what_an_operation_did_not_give_raises_its_error(session: Session) -> None:
    broken = failing(session)
    for take_apart in (lambda: list(broken), lambda: list(broken.split(1)), lambda: len(broken.max(0))):
        assert caught(take_apart).operation == "torch.Tensor.__matmul__"


def test_every_result_of_a_failed_operation_raises_its_error(session: Session) -> None:
    values, indices = torch.max(session.ones(2, 3), 1)
    assert_same(values, torch.ones(2))
    values, indices = torch.max(session.ones(2), 1)
    assert str(caught(values.fetch)) == str(caught(indices.fetch))
    assert caught(indices.tolist).operation == "torch.max"


FAILING_IN_PLACE: dict[str, Callable[[Session, Any], Any]] = {
    "add_": lambda s, a: a.add_(s.ones(7)),
    "setitem": lambda s, a: a.__setitem__(9, 0.0),
    "setitem of a wrong shape": lambda s, a: a.__setitem__(0, s.ones(7)),
    "an operator": lambda s, a: a.__iadd__(s.ones(7)),
    "what was never made": lambda s, a: a.add_(failing(s)),
    "out": lambda s, a: torch.add(s.ones(2, 2), s.ones(7), out=a),
    "a list": lambda s, a: torch._foreach_add_([a], [s.ones(7)]),
    "init": lambda s, a: nn.init.uniform_(a, 2.0, 1.0),
    "data": lambda s, a: setattr(a, "grad", s.ones(7)),
}


@pytest.mark.parametrize("name", FAILING_IN_PLACE)
def test_a_failed_operation_in_place_is_told_by_the_next_result_and_leaves_the_tensor(
    session: Session, name: str
) -> None:
    for _ in range(2):
        tensor = session.ones(2, 2)
        FAILING_IN_PLACE[name](session, tensor)
        caught(tensor.fetch)
        assert tensor.tolist() == [[1, 1], [1, 1]]
        assert (tensor.add_(1) * 2).tolist() == [[4, 4], [4, 4]]


def test_a_failed_backward_pass_harms_no_tensor(session: Session) -> None:
    weight = session.tensor([2.0], requires_grad=True)
    session.ones(1).backward()
    assert "does not require grad" in str(caught(weight.fetch))
    (weight * weight).backward()
    assert weight.grad.item() == 4
    assert weight.item() == 2


def test_a_failure_on_one_rank_leaves_the_others_result(session: Session) -> None:
    shards = session.scatter(torch.arange(3))  # two elements, and one
    doubled = shards * torch.tensor([10, 20])[:2]
    one_only = session.run(lambda shard: shard.view(2) if len(shard) == 2 else shard, shards)
    assert one_only.tolist() == [0, 1]
    assert [part.tolist() for part in doubled.fetch(all=True)] == [[0, 20], [20, 40]]
    reshaped = shards.view(2)
    assert caught(lambda: until_raised(session)).rank == 1
    assert reshaped.tolist() == [0, 1]
    assert caught(lambda: reshaped.fetch(all=True)).rank == 1


def test_what_failed_leaves_nothing_on_the_workers(session: Session) -> None:
    def uneven(shard: Any) -> Any:
        return shard.view(2) if len(shard) == 2 else 0

    shards = session.scatter(torch.arange(3))
    for use in (failing(session).fetch, lambda: session.run(uneven, 1), lambda: session.ones(2).view(5).item()):
        caught(use)
    assert session.rank(1).run(uneven, shards) == 0
    assert session.run(lambda shard: len(shard) if len(shard) == 2 else shard, shards) == 2
    del use
    assert [[handle for handle, _ in registry] for registry in held_by(session)] == [[shards.handle]] * 2


def test_a_raised_error_keeps_no_handle_once_it_is_dealt_with(session: Session) -> None:
    gc.disable()
    try:
        with pytest.raises(RemoteOpError):
            failing(session).fetch()
        session.ones(2).view(5)
        with pytest.raises(RemoteOpError):
            session.synchronize()
        assert session.handles() == []
    finally:
        gc.enable()


# -- when it is told ---------------------------------------------------------------------------------------------------


def until_raised(session: Session) -> None:
    """Ask for results until one raises."""
    probe, deadline = session.ones(1), time.monotonic() + TIMEOUT_S
    while time.monotonic() < deadline:
        probe.item()


@pytest.mark.parametrize("known", [False, True])
def test_an_error_that_nobody_asked_about_is_raised_by_the_next_result_once(session: Session, known: bool) -> None:
    if known:
        session.ones(2, 2) @ session.ones(2, 2)
    good = session.ones(2)
    failing(session)
    assert caught(good.fetch).operation == "torch.Tensor.__matmul__"
    assert good.tolist() == [1, 1]
    session.synchronize()


def test_each_of_several_errors_is_raised_in_the_order_in_which_they_happened(session: Session) -> None:
    good = session.ones(2)
    good.view(3)
    failing(session)
    good.add(session.ones(5))
    raised = []
    for _ in range(6):
        try:
            good.fetch()
        except RemoteOpError as error:
            raised.append(error.operation)
    assert raised == ["torch.Tensor.view", "torch.Tensor.__matmul__", "torch.Tensor.add"]


def test_an_error_on_another_rank_only_is_raised_by_a_result_once(session: Session) -> None:
    one = session.rank(1)
    one.ones(2) @ one.ones(3)
    error = caught(lambda: until_raised(session))
    assert (error.rank, error.operation) == (1, "torch.Tensor.__matmul__")
    session.synchronize()
    assert session.ones(1).item(all=True) == [1, 1]
    failing(one)
    assert caught(session.synchronize).rank == 1
    session.synchronize()


def test_leaving_a_session_raises_what_was_not_told_but_not_in_place_of_another_error() -> None:
    with pytest.raises(RemoteOpError, match="__matmul__"), local_session(2) as session:
        failing(session)
    with pytest.raises(ZeroDivisionError), local_session(2) as session:
        divide_by_zero(failing(session))


def divide_by_zero(_: Any) -> None:
    raise ZeroDivisionError


# -- misuse ------------------------------------------------------------------------------------------------------------


def test_a_handle_of_another_session_is_refused(session: Session) -> None:
    with local_session(2) as other:
        mine, theirs = session.ones(2), other.ones(2)
        for use in (
            lambda: mine + theirs,
            lambda: torch.stack([theirs, mine]),
            lambda: session.run(len, theirs),
            lambda: session.optimizer("sgd", [theirs], lr=1),
        ):
            with pytest.raises(HandleError, match=r"of another session: fetch\(\) it there"):
                use()
        assert (mine + theirs.fetch()).tolist() == [2, 2]


def test_a_local_tensor_is_not_changed_from_afar(session: Session) -> None:
    local, remote = torch.ones(2), session.ones(2)
    for use in (
        lambda: local.add_(remote),
        lambda: torch.add(remote, 1, out=local),
        lambda: local.__setitem__(0, remote[0]),
    ):
        with pytest.raises(SessionError, match=r"local tensor.*fetch\(\)"):
            use()
    assert local.tolist() == [1, 1]


def test_tensors_on_different_ranks_do_not_meet(session: Session) -> None:
    zero, one = session.rank(0).ones(2), session.rank(1).ones(2)
    for use in (lambda: zero + one, lambda: torch.cat([one, zero]), lambda: zero.add_(one)):
        with pytest.raises(SessionError, match=r"ranks (0 and 1|1 and 0): fetch\(\) one of them"):
            use()
    with pytest.raises(SessionError, match="ranks 0 and 1"):
        session.rank(0).run(len, one)
    assert (zero + session.rank(0).tensor(one.fetch())).tolist() == [2, 2]


def test_a_function_that_workers_do_not_know_is_refused_with_the_remedy(session: Session) -> None:
    class Twice(torch.autograd.Function):
        pass

    with pytest.raises(UnknownFunctionError, match=r"session\.run\(function, \.\.\.\)"):
        session.ones(2)._recorder.call(Twice.apply, [session.ones(2)])
    with pytest.raises(UnknownFunctionError, match="test_a_function"):
        session.ones(2)._recorder.call(lambda: None, [])


def test_an_unknown_optimizer_is_refused_with_those_there_are(session: Session) -> None:
    with pytest.raises(SessionError, match=r"there is no optimizer 'lbfgs'; there are .*adamw"):
        session.optimizer("lbfgs", [session.ones(2)])


def test_an_object_that_could_not_be_made_raises_what_its_class_did(session: Session) -> None:
    module = session.module(nn.Linear, -1, 2, bias="no")
    output = module(session.ones(2))
    assert "Linear" in str(caught(output.fetch))
    with pytest.raises(RemoteOpError, match="Linear"):
        module.state_dict()
    with pytest.raises(RemoteOpError, match="empty parameter list"):
        session.optimizer("sgd", [], lr=0.1).state_dict()


# -- between processes -------------------------------------------------------------------------------------------------


def test_every_error_survives_pickling() -> None:
    classes = [value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, RaytorchError)]
    assert SessionLostError in classes
    for kind in classes:
        copy = pickle.loads(pickle.dumps(kind("what to do")))
        assert (type(copy), str(copy)) == (kind, "what to do")


def test_an_error_of_an_operation_keeps_what_it_knows(session: Session) -> None:
    error = caught(failing(session).fetch)
    copy = pickle.loads(pickle.dumps(error))
    assert (type(copy), str(copy), vars(copy)) == (RemoteOpError, str(error), vars(error))
    assert copy.instruction != (0, 0)
