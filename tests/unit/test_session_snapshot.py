"""Saving a session and going on in another one, under the same handles."""

from pathlib import Path
from typing import Any

import pytest
import torch
from in_process import InProcess, local_session
from torch import nn

from raytorch.errors import HandleError, RemoteOpError, SessionError
from raytorch.session import save as snapshot
from raytorch.session.connect import connect
from raytorch.session.interpreter import Interpreter
from raytorch.session.registry import Registry
from raytorch.session.session import Session


class Doubling(nn.Module):
    """A class that is not PyTorch's."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * x * self.weight


class Shifting(nn.Module):
    """A module with a tensor that its state does not have."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("shift", torch.ones(2), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.shift


def saved(session: Session, path: Path, **options: Any) -> Session:
    """Another session that goes on from the first one's state."""
    session.save(path)
    session.close()
    other = local_session(session.workers)
    other.restore(path, **options)
    return other


def step(x: Any, net: Any, optimizer: Any, scheduler: Any) -> None:
    optimizer.zero_grad()
    net(x).square().mean().backward()
    optimizer.step()
    scheduler.step()


def test_training_goes_on_with_the_same_bits(tmp_path: Path) -> None:
    results = []
    for is_interrupted in (False, True):
        session = local_session()
        session.manual_seed(3)
        x = session.randn(8, 4)
        net = session.module(nn.Sequential, session.module(nn.Linear, 4, 3), session.module(nn.Dropout, 0.5))
        optimizer = session.optimizer("adam", net.parameters(), lr=0.1)
        scheduler = session.scheduler(torch.optim.lr_scheduler.StepLR, optimizer, step_size=2)
        for _ in range(3):
            step(x, net, optimizer, scheduler)
        if is_interrupted:
            handles = [(held.handle, held.kind) for held in (net, optimizer, scheduler)]
            x_handle = x.handle
            session = saved(session, tmp_path / "saved")
            x = session.get(x_handle)
            net, optimizer, scheduler = (session.get(handle, kind) for handle, kind in handles)
        for _ in range(3):
            step(x, net, optimizer, scheduler)
        results.append(net.state_dict())
        assert scheduler.get_last_lr() == [pytest.approx(0.1 * 0.1**3)]
    assert results[0].keys() == results[1].keys()
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


def test_modules_keep_their_modes_and_what_is_frozen(tmp_path: Path) -> None:
    session = local_session()
    backbone, head = session.module(nn.Linear, 4, 3), session.module(nn.Dropout, 0.5)
    net = session.module(nn.Sequential, backbone, head)
    head.eval()
    backbone.requires_grad_(False)
    backbone.get("bias").requires_grad_()
    handle = net.handle
    net = saved(session, tmp_path / "saved").get(handle, "module")
    assert [net.get(f"{place}training") for place in ("", "0.", "1.")] == [True, True, False]
    assert {name: part.requires_grad for name, part in net.named_parameters().items()} == {
        "0.weight": False,
        "0.bias": True,
    }


def test_tensors_keep_handles_dtypes_gradients_and_identity(tmp_path: Path) -> None:
    session = local_session()
    leaf = session.tensor([1.0, 2.0], requires_grad=True)
    (leaf * 3).sum().backward()
    brain = session.tensor(torch.arange(6, dtype=torch.bfloat16).reshape(2, 3).T)
    same = session.get(brain.handle)
    handles = [held.handle for held in (leaf, brain, same)]
    other = saved(session, tmp_path / "saved")
    leaf, brain, same = (other.get(handle) for handle in handles)
    assert [held.handle for held in (leaf, brain, same)] == handles
    assert leaf.requires_grad
    assert torch.equal(leaf.grad.fetch(), torch.tensor([3.0, 3.0]))
    same += 1
    assert torch.equal(brain.fetch(), torch.arange(6, dtype=torch.bfloat16).reshape(2, 3).T + 1)


def test_an_optimizer_steps_the_parameters_that_came_back(tmp_path: Path) -> None:
    session = local_session()
    weight = session.ones(2, requires_grad=True)
    optimizer = session.optimizer("sgd", [weight], lr=1.0)
    handles = weight.handle, optimizer.handle
    other = saved(session, tmp_path / "saved")
    weight, optimizer = other.get(handles[0]), other.get(handles[1], "optimizer")
    weight.sum().backward()
    optimizer.step()
    assert weight.tolist() == [0.0, 0.0]


def test_new_handles_do_not_meet_restored_ones(tmp_path: Path) -> None:
    session = local_session()
    kept = [session.ones(1) for _ in range(5)]
    other = saved(session, tmp_path / "saved")
    made = [other.zeros(1) for _ in range(5)]
    assert not {held.handle for held in made} & {held.handle for held in kept}
    assert other.get(kept[0].handle).item() == 1


def test_each_rank_saves_its_own(tmp_path: Path) -> None:
    session = local_session(workers=2)
    x = session.scatter(torch.arange(4.0))
    handle = x.handle
    other = saved(session, tmp_path / "saved")
    assert [part.tolist() for part in other.get(handle).fetch(all=True)] == [[0.0, 1.0], [2.0, 3.0]]


def test_what_a_single_rank_has_is_saved_and_told_too(tmp_path: Path) -> None:
    session = local_session(workers=2)
    x, context = session.rank(1).tensor([1.0, 2.0]), session.rank(1).context()
    handle = x.handle
    assert session.save(tmp_path / "saved") == [context.handle]
    other = local_session(workers=2)
    other.restore(tmp_path / "saved")
    assert (other.get(handle) * 2).tolist() == [2, 4]


def test_a_class_of_the_users_needs_trust(tmp_path: Path) -> None:
    session = local_session()
    net = session.module(Doubling)
    handle = net.handle
    with pytest.raises(RemoteOpError, match="trust=True"):
        saved(session, tmp_path / "saved")
    other = local_session()
    other.restore(tmp_path / "saved", trust=True)
    assert other.get(handle, "module")(other.ones(2)).tolist() == [2.0, 2.0]


def test_what_cannot_be_saved_is_told(tmp_path: Path) -> None:
    session = local_session()
    kept, context = session.ones(1), session.context()
    assert session.save(tmp_path / "saved") == [context.handle]
    assert kept.item() == 1


def test_a_snapshot_of_another_number_of_workers_is_refused(tmp_path: Path) -> None:
    local_session(workers=2).save(tmp_path / "saved")
    with pytest.raises(RemoteOpError, match="saved by 2 workers"):
        local_session().restore(tmp_path / "saved")


def session_on_meta() -> Session:
    """One whose worker makes tensors elsewhere than on the CPU, as on a GPU, but without their contents."""
    transport = InProcess(1, None)
    transport.interpreters = [Interpreter(Registry(), device="meta")]
    return Session(transport)


def test_modules_are_made_and_restored_on_the_workers_device(tmp_path: Path) -> None:
    other = session_on_meta()
    assert other.module(nn.Linear, 2, 3)(other.ones(1, 2)).device.type == "meta"
    session = local_session()
    net = session.module(Shifting)
    session.save(tmp_path / "saved")
    other = session_on_meta()
    other.restore(tmp_path / "saved", trust=True)
    assert other.get(net.handle, "module")(other.ones(2)).device.type == "meta"


def test_handles_that_are_there_are_not_replaced(tmp_path: Path) -> None:
    local_session(workers=2).save(tmp_path / "saved")
    other = local_session(workers=2)
    mine = other.rank(1).ones(2)
    with pytest.raises(SessionError, match="the session has handles"):
        other.restore(tmp_path / "saved")
    assert mine.tolist() == [1, 1]
    mine.free()
    other.restore(tmp_path / "saved")


def test_a_session_that_is_joined_is_not_restored_to(tmp_path: Path) -> None:
    session = local_session()
    session.save(tmp_path / "saved")
    with pytest.raises(SessionError, match="a session that was joined"):
        Session(session._transport, client=1).restore(tmp_path / "saved")
    with pytest.raises(SessionError, match="would replace what the session 'shared' has"):
        connect(name="shared", restore=tmp_path / "saved")


def test_a_folder_without_a_snapshot_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RemoteOpError, match="holds no saved session"):
        local_session().restore(tmp_path)


def test_a_folder_that_exists_is_not_overwritten(tmp_path: Path) -> None:
    session = local_session()
    session.ones(1)
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "precious").touch()
    with pytest.raises(RemoteOpError):
        session.save(tmp_path / "saved")
    assert [file.name for file in tmp_path.iterdir()] == ["saved"]
    with pytest.raises(HandleError):
        session.get(999)


def test_a_save_that_fails_on_one_rank_leaves_nothing_of_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(registry: Registry, folder: Path, device: torch.device) -> list[int]:
        if folder.name == "rank-1":
            raise OSError("the disk is full")
        return save(registry, folder, device)

    save = snapshot.save
    session = local_session(workers=2)
    kept = session.ones(1)
    with monkeypatch.context() as patch:
        patch.setattr(snapshot, "save", failing)
        with pytest.raises(RemoteOpError, match="the disk is full"):
            session.save(tmp_path / "saved")
    assert list(tmp_path.iterdir()) == []
    session.save(tmp_path / "saved")
    assert kept.item() == 1


def test_a_session_that_cannot_be_restored_leaves_the_random_numbers_as_they_were(tmp_path: Path) -> None:
    session = local_session()
    kept = session.module(nn.Linear, 30, 30)
    session.manual_seed(3)
    session.save(tmp_path / "saved")
    other = local_session(max_bytes=1000)
    other.manual_seed(7)
    expected = torch.randn(3, generator=torch.Generator().manual_seed(7)).tolist()
    with pytest.raises(RemoteOpError, match="QuotaError"):
        other.restore(tmp_path / "saved")
    assert other.randn(3).tolist() == expected
    assert kept.handle


def test_what_a_client_that_had_joined_made_leaves_both_clients_ranges_of_handles_free(tmp_path: Path) -> None:
    transport = InProcess(1, None)
    session, guest = Session(transport), Session(transport, client=3)
    theirs = guest.ones(2)
    mine = session.zeros(2)
    guest.synchronize()
    session.save(tmp_path / "saved")
    other = local_session()
    other.restore(tmp_path / "saved")
    assert other.get(theirs.handle).fetch().tolist() == [1, 1]
    assert other.get(mine.handle).fetch().tolist() == [0, 0]
    assert mine.handle < other.ones(1).handle < 100
    skipping: Any = other._transport
    assert skipping.skipped == 3


def test_nothing_is_restored_where_clients_have_joined_whose_handles_are_in_the_folder(tmp_path: Path) -> None:
    class Shared(InProcess):
        """A session that others have joined."""

        def skip_clients(self, last: int) -> None:
            raise SessionError("others have joined")

    guest = Session(InProcess(1, None), client=1)
    theirs = guest.ones(2)
    guest.save(tmp_path / "saved")
    session = Session(Shared(1, None))
    with pytest.raises(SessionError, match="others have joined"):
        session.restore(tmp_path / "saved")
    assert session.handles() == []
    with pytest.raises(HandleError):
        session.get(theirs.handle)
