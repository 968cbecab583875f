"""Between two lines of metrics nothing waits for the device: a step on one that has no numbers to tell."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lone_runs import train, without_ray
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from raytorch.config import Augment, Averaging, Loss
from raytorch.config.file import from_data
from raytorch.datasets import MicroBatch, TrainLoader
from raytorch.distributed import Worker
from raytorch.models.objectives import loss_function
from raytorch.training import batch_loss, loop
from raytorch.training.averaging import WeightAverage
from raytorch.training.batch_loss import BatchLoss
from raytorch.training.optimizer_steps import OptimizerSteps
from raytorch.training.precision import Precision
from raytorch.training.step_log import StepLog

META = torch.device("meta")
STEPS = 4


class Tokens(nn.Module):
    """Logits (B, T, classes) of tokens (B, T)."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm, self.head = nn.Embedding(7, 8), nn.BatchNorm1d(5), nn.Linear(8, 7)

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.head(self.norm(self.embed(tokens)))
        return logits


def mean_loss(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]).flatten(0, 1), batch[1].flatten())


def token_loss(model: nn.Module, batch: Any) -> Any:
    return loss_function(Loss(), model, compiled=True)(model, batch)


@pytest.mark.parametrize("loss", [mean_loss, token_loss], ids=["mean", "sum and count"])
@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "muon"])
def test_a_step_asks_for_no_number_of_the_device(loss: Any, optimizer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tensor on the meta device has none, and any question for one is an error there."""
    monkeypatch.setattr(batch_loss, "_at_once", lambda *given: None)  # of the first step
    config = from_data({"steps": STEPS, "optimizer": {"name": optimizer}, "clip_norm": 1.0, "ema": {}})
    model, worker = Tokens().to(META), Worker(0, 1, META)
    part, log = BatchLoss(model, worker), StepLog(worker)
    steps = OptimizerSteps(config, model, Precision("fp32", "cpu"), total_steps=STEPS, steps_per_epoch=2)
    average = WeightAverage(model, Averaging())
    tokens = torch.zeros(3, 5, dtype=torch.int64, device=META)
    for step in range(STEPS):
        steps.zero_grad()
        value = loss(model, (tokens, tokens))
        torch.autograd.backward(steps.scaled(part.part(value, MicroBatch((tokens, tokens), 3, 1.0))))
        total = part.finish()
        assert steps.take()
        log.add(step, {"loss": total})
        average.update()
    with pytest.raises(RuntimeError, match="meta"):
        log.take()


class Asked(TorchDispatchMode):
    """Counts tensors whose number is asked for, but for those that an optimizer keeps on the CPU."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


def test_a_run_asks_for_numbers_with_its_lines_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    train_step = loop.Trainer.train_step

    def counted(trainer: Any, micro_batches: Any) -> None:
        with Asked() as mode:
            train_step(trainer, micro_batches)
        asked.append(mode.count)

    monkeypatch.setattr(loop.Trainer, "train_step", counted)
    keys: dict[str, Any] = {"epochs": None, "steps": 8, "clip_norm": 1.0, "ema": {}, "precision": "bf16"}
    with without_ray(tmp_path, monkeypatch):
        train("run", {"name": "convnet", "channels": [4]}, **keys)
    assert asked == [0] * 8


@pytest.mark.parametrize("counted", [[3.0, 5.0], [0.0, 2.0], [0.0, 0.0]])
def test_counts_that_are_not_waited_for_give_the_same_gradients(
    counted: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for waits in (False, True):
        monkeypatch.setattr(batch_loss, "has_to_be_waited_for", lambda device, waits=waits: waits)
        torch.manual_seed(0)
        model = nn.Linear(3, 1)
        part = BatchLoss(model, Worker(0, 1, torch.device("cpu")))
        for count in (1.0, *counted[:1], *counted):
            model.zero_grad()
            for each in (count, count):
                total = model(torch.ones(2, 3)).square().sum() / (1.0 if each else 0.0)
                torch.autograd.backward(part.part((total, torch.tensor(each)), MicroBatch(None, 2, 1.0)))
            loss = part.finish()
            found.append([loss, *(weight.grad.clone() for weight in model.parameters() if weight.grad is not None)])
    half = len(found) // 2
    for one, other in zip(found[:half], found[half:], strict=True):
        for left, right in zip(one, other, strict=True):
            torch.testing.assert_close(left, right)


def test_a_count_that_is_none_makes_the_loss_nan_where_it_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch_loss, "has_to_be_waited_for", lambda device: True)
    model = nn.Linear(3, 1)
    part = BatchLoss(model, Worker(0, 1, torch.device("cpu")))
    losses = []
    for count in (2.0, -1.0, 2.0):
        total = model(torch.ones(2, 3)).square().sum()
        torch.autograd.backward(part.part((total, torch.tensor(count)), MicroBatch(None, 2, 1.0)))
        losses.append(part.finish().isnan().item())
    assert losses == [False, True, False]
    first = BatchLoss(model, Worker(0, 1, torch.device("cpu")))
    first.part((model(torch.ones(2, 3)).sum(), torch.tensor(-1.0)), MicroBatch(None, 2, 1.0))
    with pytest.raises(ValueError, match="negative or infinite count"):
        first.finish()


class Asking:
    """A data set on the meta device, whose batches are what it is asked for."""

    device = META

    def __len__(self) -> int:
        return 8

    def read(self, requests: Any) -> Any:
        return iter(requests)


def test_draws_and_orders_come_to_a_device_without_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[bool] = []
    to = Tensor.to

    def told_to(tensor: Tensor, *where: Any, **how: Any) -> Tensor:
        told.append(how.get("non_blocking", False))
        return to(tensor, *where, **how)

    monkeypatch.setattr(Tensor, "to", told_to)
    loader = TrainLoader(Asking(), batch_size=4, augment=Augment(crop=2, flip=True))  # type: ignore[arg-type]
    assert len(list(loader.remaining())) == 2
    assert told == [True] * 5
