"""What is left of a session that was closed: an error that says so."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from in_process import InProcess, local_session
from torch import nn

from raytorch.errors import SessionLostError
from raytorch.session.session import Session


def test_after_it_was_closed_everything_raises_that_the_session_is_lost() -> None:
    session = local_session(2)
    tensor, module = session.ones(2), session.module(nn.Linear, 2, 2)
    optimizer = session.optimizer("sgd", module.parameters(), lr=0.1)
    (tensor + 1).sum().item()
    session.close()
    session.close()  # once more does no harm
    uses: list[Callable[[], Any]] = [
        tensor.fetch,
        tensor.item,
        lambda: tensor.shape,
        lambda: tensor + 1,
        lambda: tensor.add_(1),
        lambda: tensor.cos(),
        lambda: session.tensor([1.0]),
        lambda: session.scatter(torch.ones(2)),
        lambda: session.zeros(2),
        lambda: session.rank(0).zeros(2),
        lambda: session.manual_seed(0),
        lambda: session.run(len, [1]),
        lambda: session.get(1),
        lambda: module(tensor),
        module.state_dict,
        optimizer.step,
        session.stats,
        session.handles,
        session.barrier,
        session.synchronize,
    ]
    for use in uses:
        with pytest.raises(SessionLostError, match="connect again"):
            use()


def test_a_loss_that_the_transport_saw_is_told_once_and_again_to_whoever_asks() -> None:
    class Losing(InProcess):
        """Loses its workers when it is told to."""

        lost: SessionLostError | None = None

        def send(self, packed: bytes, attachments: Any) -> Any:
            if self.lost:
                raise self.lost
            return super().send(packed, attachments)

    transport = Losing(1, None)
    session = Session(transport)
    tensor = session.ones(2)
    tensor.fetch()
    transport.lost = SessionLostError("the session is lost: rank 0 is gone")
    for _ in range(2):
        with pytest.raises(SessionLostError, match="rank 0 is gone"):
            tensor.fetch()
    assert not session._recorder.stream._idle.join(5)
    session.close()  # does not tell it again
