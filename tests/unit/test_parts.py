"""What a loop registers, on several workers without Ray."""

from typing import Any

import torch
from ranks import on_ranks
from torch import Tensor, nn

from raytorch.config import RunConfig
from raytorch.distributed import Worker
from raytorch.distributed.collectives import all_gather
from raytorch.training import parts
from raytorch.training.precision import Precision


class Features(nn.Module):
    """A layer of which some is not trained, some not saved, and some no tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3, 1)
        self.frozen = nn.Parameter(torch.randn(3), requires_grad=False)
        self.register_buffer("drawn", torch.randn(3), persistent=False)

    def get_extra_state(self) -> dict[str, int]:
        return {"version": 1}

    def set_extra_state(self, state: Any) -> None:
        pass

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head((x + self.frozen) * self.get_buffer("drawn"))
        return out


def register_what_each_has_drawn(worker: Worker) -> None:
    parts.data_parallel = lambda module: module  # type: ignore[attr-defined] # Ray's is not here
    torch.manual_seed(worker.rank)
    drawn = Features()
    registered = parts.Parts(RunConfig(epochs=1), worker, Precision.choose("fp32", worker.device))
    net = registered.add_model("net", drawn, {})
    for tensor in (*net.parameters(), *net.buffers()):
        first, second = all_gather(tensor)
        assert torch.equal(first, second)


def test_a_model_is_the_same_on_all_workers_to_its_last_buffer() -> None:
    on_ranks(register_what_each_has_drawn, 2)
