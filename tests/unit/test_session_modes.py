"""What a block of the client's sets for the calls in it holds on the workers too, or is refused there."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from compared import assert_same
from in_process import local_session
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.autograd.graph import allow_mutation_on_saved_tensors, save_on_cpu, saved_tensors_hooks
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from raytorch.errors import RemoteOpError, SessionError
from raytorch.session.session import Session

DATA = torch.tensor([[1.0, 2.0], [3.0, 4.0]])


@pytest.fixture
def session() -> Iterator[Session]:
    with local_session(1) as session:
        yield session


MODES: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "no_grad": torch.no_grad,
    "set_grad_enabled": lambda: torch.set_grad_enabled(False),
    "inference_mode": torch.inference_mode,
    "no inference_mode": lambda: torch.inference_mode(False),
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "no autocast": lambda: torch.autocast("cpu", torch.bfloat16, enabled=False),
}


@pytest.mark.parametrize("name", MODES)
def test_a_block_holds_for_the_calls_in_it(session: Session, name: str) -> None:
    for _ in range(2):
        results = []
        for leaf in (session.tensor(DATA, requires_grad=True), DATA.clone().requires_grad_()):
            with MODES[name]():
                product = leaf @ leaf
                inner = product.requires_grad, product.is_inference(), product.dtype
            results.append((product, inner, (leaf @ leaf).requires_grad))
        (mine, *rest), (theirs, *expected) = results
        assert_same(mine, theirs)
        assert rest == expected


def test_blocks_inside_of_others_hold_together(session: Session) -> None:
    with torch.autocast("cpu", torch.bfloat16), torch.inference_mode():
        mine, theirs = session.tensor(DATA) @ session.tensor(DATA), DATA @ DATA
        assert mine.is_inference()
        assert_same(mine, theirs)
        with torch.autocast("cpu", enabled=False):
            assert (session.tensor(DATA) @ session.tensor(DATA)).dtype == torch.float32
    assert (session.tensor(DATA) * 2).is_inference() is False


@pytest.mark.parametrize("check_nan", [True, False])
def test_anomalies_are_detected_in_the_block_alone(session: Session, check_nan: bool) -> None:
    for is_on in (False, True, False):
        leaf = session.tensor([0.0], requires_grad=True)
        loss = (leaf.sqrt() * 0).sum()
        with torch.autograd.set_detect_anomaly(is_on, check_nan):
            loss.backward()
        if is_on and check_nan:
            with pytest.raises(RemoteOpError, match="'SqrtBackward0' returned nan"):
                session.synchronize()
        else:
            assert leaf.grad.isnan().all()
    assert not torch.is_anomaly_enabled()


BLOCKS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "saved_tensors_hooks": lambda: saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor * 100),
    "save_on_cpu": save_on_cpu,
    "allow_mutation_on_saved_tensors": allow_mutation_on_saved_tensors,
    "FlopCounterMode": lambda: FlopCounterMode(display=False),
    "FakeTensorMode": FakeTensorMode,
}


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("known", [False, True])
def test_a_block_that_acts_on_local_tensors_is_refused(session: Session, name: str, known: bool) -> None:
    leaf = session.tensor(DATA, requires_grad=True)
    for refused in [False, True] if known else [True]:
        if refused:
            with BLOCKS[name](), pytest.raises(SessionError, match=r"acts on tensors of this process.*session\.run"):
                leaf * 2
        else:
            leaf * 2
    (leaf * 2).sum().backward()
    assert leaf.grad.tolist() == [[2, 2], [2, 2]]
    with torch.no_grad(), save_on_cpu():  # saves nothing
        assert (leaf * 2).sum().item() == 20


def test_a_checkpoint_that_is_not_reentrant_is_refused_with_the_way_out(session: Session) -> None:
    leaf = session.tensor(DATA, requires_grad=True)
    with pytest.raises(SessionError, match=r"torch\.utils\.checkpoint.*session\.checkpoint"):
        checkpoint(lambda x: x.sin(), leaf, use_reentrant=False)
    session.checkpoint(torch.sin, leaf).sum().backward()
    assert_same(leaf.grad, DATA.cos())


# -- transforms of functions -------------------------------------------------------------------------------------------

LOCAL = torch.ones(2)
TRANSFORMS: dict[str, Callable[[Any], Any]] = {
    "grad": lambda h: torch.func.grad(lambda x: (x * h).sum())(LOCAL),
    "grad of a handle": lambda h: torch.func.grad(lambda x: x.sum())(h),
    "vmap": lambda h: torch.vmap(lambda x: x * h)(LOCAL),
    "vmap of a handle": lambda h: torch.vmap(lambda x: x * 2)(h),
    "jvp": lambda h: torch.func.jvp(lambda x: x * h, (LOCAL,), (LOCAL,)),
    "jvp of a handle": lambda h: torch.func.jvp(torch.sin, (h,), (h,)),
    "vjp": lambda h: torch.func.vjp(lambda x: x * h, LOCAL),
    "vjp of a handle": lambda h: torch.func.vjp(torch.sin, h),
    "jacrev": lambda h: torch.func.jacrev(torch.sin)(h),
    "jacfwd": lambda h: torch.func.jacfwd(torch.sin)(h),
    "hessian": lambda h: torch.func.hessian(lambda x: x.sin().sum())(h),
    "functional_call": lambda h: torch.func.functional_call(nn.Linear(2, 2), {"weight": h, "bias": h[0]}, (h,)),
    "autograd.jacobian": lambda h: torch.autograd.functional.jacobian(torch.sin, h),
    "autograd.hvp": lambda h: torch.autograd.functional.hvp(lambda x: x.sin().sum(), h, h),
    "autograd.jacobian by closure": lambda h: torch.autograd.functional.jacobian(lambda x: x * h, LOCAL),
    "jit.trace": lambda h: torch.jit.trace(lambda x: x * h, (LOCAL,)),
    "make_fx": lambda h: torch.fx.experimental.proxy_tensor.make_fx(lambda x: x * h)(LOCAL),
    "symbolic_trace": lambda h: torch.fx.symbolic_trace(lambda x: x * h),
}


def dual_beside_a_handle(h: Any) -> Any:
    with forward_ad.dual_level():
        return forward_ad.make_dual(LOCAL, LOCAL) * h


TRANSFORMS["forward mode"] = dual_beside_a_handle


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", TRANSFORMS)
def test_a_transform_of_a_function_of_handles_is_refused(session: Session, name: str) -> None:
    with pytest.raises((SessionError, TypeError, ValueError, RuntimeError, NotImplementedError)) as info:
        TRANSFORMS[name](session.tensor(DATA))
    assert str(info.value)
