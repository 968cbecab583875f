"""``torch.nn.utils`` on handles: one, a list or a generator of them gives what PyTorch gives, or is refused."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from compared import assert_same
from in_process import local_session
from torch import Tensor, nn
from torch.nn import utils
from torch.nn.utils import clip_grad_norm_ as named_early
from torch.nn.utils import parametrize, prune, rnn, stateless

from raytorch.errors import RemoteOpError, SessionError
from raytorch.session.session import Session

DATA = [torch.tensor([[3.0, 4.0], [0.0, 12.0]]), torch.tensor([5.0, -84.0])]


@pytest.fixture
def session() -> Iterator[Session]:
    with local_session(1) as session:
        yield session


def with_gradients(tensors: list[Any]) -> list[Any]:
    """Leaves whose gradients are themselves, and one that has none."""
    leaves = [tensor.requires_grad_() for tensor in tensors]
    sum((leaf * leaf.detach()).sum() for leaf in leaves[:-1]).backward()
    return leaves


def the_norm_then_the_clip(leaves: list[Any]) -> Any:
    norm = utils.get_total_norm([leaf.grad for leaf in leaves[:-1]])
    utils.clip_grads_with_norm_(leaves, 1.0, norm)
    return norm


CLIPS: dict[str, Callable[[list[Any]], Any]] = {
    "one": lambda leaves: utils.clip_grad_norm_(leaves[0], 0.1),
    "one without a gradient": lambda leaves: utils.clip_grad_norm_(leaves[-1], 0.1),
    "a list": lambda leaves: utils.clip_grad_norm_(leaves, 0.1),
    "a generator": lambda leaves: utils.clip_grad_norm_((leaf for leaf in leaves), 0.1),
    "a dictionary's": lambda leaves: utils.clip_grad_norm_(dict(enumerate(leaves)).values(), 0.1),
    "keywords": lambda leaves: utils.clip_grad_norm_(parameters=leaves, max_norm=1.0, norm_type=float("inf")),
    "in no need": lambda leaves: utils.clip_grad_norm_(leaves, 1e6, norm_type=1),
    "not one by one": lambda leaves: utils.clip_grad_norm_(leaves, 0.1, foreach=True),
    "a name from before": lambda leaves: named_early(leaves, 0.1),
    "values": lambda leaves: utils.clip_grad_value_(leaves, 4.5),
    "values of one": lambda leaves: utils.clip_grad_value_(leaves[0], 4.5),
    "the norm": lambda leaves: utils.get_total_norm([leaf.grad for leaf in leaves[:-1]], 3.0),
    "the norm of one": lambda leaves: utils.get_total_norm(leaves[0].detach()),
    "the norm, then the clip": the_norm_then_the_clip,
}


@pytest.mark.parametrize("name", CLIPS)
def test_gradients_are_clipped_as_by_pytorch(session: Session, name: str) -> None:
    local = [*DATA, torch.ones(3)]
    for _ in range(2):
        mine = with_gradients([session.tensor(tensor) for tensor in local])
        theirs = with_gradients([tensor.clone() for tensor in local])
        assert_same(CLIPS[name](mine), CLIPS[name](theirs))
        assert_same([leaf.grad for leaf in mine], [leaf.grad for leaf in theirs])
        assert_same(mine, theirs)


def test_the_gradients_of_a_module_are_clipped_in_every_step(session: Session) -> None:
    local, remote = nn.Linear(2, 2), session.module(nn.Linear, 2, 2)
    remote.load_state_dict(local.state_dict())
    for _ in range(3):
        for module, data in ((remote, session.tensor(DATA[0])), (local, DATA[0])):
            module.zero_grad()
            module(data).square().sum().backward()
        norm = utils.clip_grad_norm_(remote.parameters(), 0.5)
        assert_same(norm, utils.clip_grad_norm_(local.parameters(), 0.5))
        for mine, theirs in zip(remote.parameters(), local.parameters(), strict=True):
            assert_same(mine.grad, theirs.grad)


def test_a_norm_that_is_not_finite_is_told(session: Session) -> None:
    leaf = session.tensor([1.0], requires_grad=True)
    (leaf * float("inf")).sum().backward()
    utils.clip_grad_norm_(leaf, 1.0, error_if_nonfinite=True)
    with pytest.raises(RemoteOpError, match=r"clip_grad_norm_[^!]*non-finite"):
        session.synchronize()


def test_parameters_go_to_a_vector_and_back(session: Session) -> None:
    for form in (list, iter, tuple):
        mine, theirs = [session.tensor(tensor) for tensor in DATA], [tensor.clone() for tensor in DATA]
        vector = utils.parameters_to_vector(form(mine))
        assert_same(vector, utils.parameters_to_vector(form(theirs)))
        utils.vector_to_parameters(vector * 2, form(mine))
        utils.vector_to_parameters(utils.parameters_to_vector(theirs) * 2, form(theirs))
        assert_same(mine, theirs)
        utils.vector_to_parameters(torch.arange(6.0), form(mine))
        assert_same(utils.parameters_to_vector(mine), torch.arange(6.0))
    assert_same(utils.parameters_to_vector(mine[0]), torch.arange(4.0))
    net = session.module(nn.Linear, 2, 1)
    utils.vector_to_parameters(session.ones(3), net.parameters())
    assert net.state_dict()["weight"].tolist() == [[1, 1]]


def test_local_tensors_among_handles_are_refused_and_alone_go_on_as_before(session: Session) -> None:
    local, handle = with_gradients([DATA[0].clone(), torch.ones(1)]), session.ones(2, 2)
    for use in (
        lambda: utils.clip_grad_norm_([handle, *local], 1.0),
        lambda: utils.clip_grad_value_(iter([handle, *local]), 1.0),
        lambda: utils.vector_to_parameters(session.ones(5), local),
    ):
        with pytest.raises(SessionError, match="handles, or local tensors, but not both"):
            use()
    assert utils.clip_grad_norm_(iter(local), 1.0).item() == 13
    with pytest.warns(UserWarning, match="empty generator"):
        utils.clip_grad_norm_((leaf for leaf in ()), 1.0)


# -- sequences ---------------------------------------------------------------------------------------------------------

BATCH = torch.arange(12.0).reshape(3, 2, 2)
PACKS: dict[str, Callable[[Callable[[Tensor], Any]], Any]] = {
    "pad": lambda put: rnn.pad_sequence([put(BATCH[0]), put(BATCH[1][:1])]),
    "pad one tensor": lambda put: rnn.pad_sequence(put(BATCH), batch_first=True),
    "unpad": lambda put: rnn.unpad_sequence(put(BATCH.clone()), put(torch.tensor([3, 1]))),
    "pack": lambda put: tuple(rnn.pack_padded_sequence(put(BATCH), [3, 1]))[:2],
    "pack by a tensor": lambda put: tuple(rnn.pack_padded_sequence(put(BATCH), put(torch.tensor([3, 1]))))[:2],
    "pack what is not sorted": lambda put: tuple(
        rnn.pack_padded_sequence(put(BATCH), put(torch.tensor([1, 3])), enforce_sorted=False)
    ),
    "pack several": lambda put: tuple(rnn.pack_sequence([put(BATCH[0]), put(BATCH[1][:1])]))[:2],
    "and back": lambda put: rnn.pad_packed_sequence(rnn.pack_padded_sequence(put(BATCH), [3, 1])),
    "unpack": lambda put: rnn.unpack_sequence(rnn.pack_sequence([put(BATCH[0]), put(BATCH[1][:1])])),
}


@pytest.mark.parametrize("name", PACKS)
def test_sequences_are_packed_as_by_pytorch(session: Session, name: str) -> None:
    for _ in range(2):
        assert_same(PACKS[name](session.tensor), PACKS[name](lambda tensor: tensor))


def test_a_remote_module_takes_packed_sequences_of_handles(session: Session) -> None:
    local, remote = nn.LSTM(2, 3), session.module(nn.LSTM, 2, 3)
    remote.load_state_dict(local.state_dict())
    mine, _ = remote(rnn.pack_padded_sequence(session.tensor(BATCH), [3, 1]))
    theirs, _ = local(rnn.pack_padded_sequence(BATCH, [3, 1]))
    assert_same(mine.data, theirs.data)


def test_a_write_to_a_row_reaches_the_tensor(session: Session) -> None:
    handle = session.zeros(2, 2)
    for row in handle:
        row.add_(1)
        row[0] = 5
    assert handle.tolist() == [[5, 1], [5, 1]]


# -- what takes a module -----------------------------------------------------------------------------------------------

ON_MODULES: dict[str, Callable[[Any], Any]] = {
    "weight_norm": utils.weight_norm,
    "spectral_norm": utils.spectral_norm,
    "parametrizations.weight_norm": utils.parametrizations.weight_norm,
    "parametrizations.spectral_norm": utils.parametrizations.spectral_norm,
    "parametrizations.orthogonal": utils.parametrizations.orthogonal,
    "is_parametrized": parametrize.is_parametrized,
    "register_parametrization": lambda net: parametrize.register_parametrization(net, "weight", nn.ReLU()),
    "prune": lambda net: prune.l1_unstructured(net, "weight", 0.5),
    "prune several": lambda net: prune.global_unstructured([(net, "weight")], prune.L1Unstructured, amount=0.5),
    "is_pruned": prune.is_pruned,
    "fuse_linear_bn_eval": lambda net: utils.fuse_linear_bn_eval(net, net),
    "functional_call": lambda net: stateless.functional_call(net, {}, (net,)),
    "func.functional_call": lambda net: torch.func.functional_call(net, {}, (net,)),
    "averaged": torch.optim.swa_utils.AveragedModel,
    "a child": nn.Sequential,
    "a parameter": lambda net: nn.Parameter(net.get("weight")),
    "fuse_conv_bn_weights": lambda net: utils.fuse_conv_bn_weights(
        *[net.get("weight")] * 4, 0.1, *[net.get("weight")] * 2
    ),
    "an attribute": lambda net: net.weight,
    "assigned": lambda net: setattr(net, "weight", 1),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ON_MODULES)
def test_what_works_on_a_local_module_is_refused_with_a_remote_one(session: Session, name: str) -> None:
    net = session.module(nn.Linear, 2, 2)
    with pytest.raises((SessionError, AttributeError, TypeError, ValueError)):
        ON_MODULES[name](net)
    assert list(net.state_dict()) == ["weight", "bias"]


def test_it_runs_on_the_workers(session: Session) -> None:
    net = session.module(nn.Linear, 2, 2)
    with pytest.raises(AttributeError, match=r"get\('weight'\) reads it on the workers.*session\.run\(function"):
        net.weight.sum()
    session.run(parametrize.register_parametrization, net, "weight", nn.ReLU())
    assert session.run(parametrize.is_parametrized, net) is True
    assert "parametrizations.weight.original" in net.state_dict()
    assert (net.get("weight") >= 0).all()
