"""Losses of a global batch over workers and micro-batches, against plain PyTorch on the batch as a whole."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from ranks import on_ranks
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.testing import assert_close

from raytorch.config.file import from_data
from raytorch.datasets import MicroBatch
from raytorch.distributed import Worker, gradient_sync
from raytorch.distributed.collectives import all_reduce
from raytorch.errors import ConfigError
from raytorch.models.objectives import ratio, total
from raytorch.training.batch_loss import BatchLoss
from raytorch.training.optimizer_steps import OptimizerSteps
from raytorch.training.precision import Precision
from raytorch.training.step_log import reduced

CPU = torch.device("cpu")
PAD = -1
MICRO_BATCHES = 2
SIZES = [12, 7, 5, 1, 2] * 4
"""Samples of the global batches; of the small ones not every worker has one."""
Batch = tuple[Tensor, Tensor]


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(11, 8), nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 5))


def batches() -> list[Batch]:
    """Tokens (B, L) and their tags, of uneven lengths; one batch counts nothing in its first half, one nothing."""
    generator = torch.Generator().manual_seed(1)
    drawn = []
    for number, size in enumerate(SIZES):
        tokens = torch.randint(11, (size, 6), generator=generator)
        tags = torch.randint(5, (size, 6), generator=generator)
        lengths = torch.randint(1, 7, (size, 1), generator=generator)
        tags = tags.masked_fill(torch.arange(6) >= lengths, PAD)
        tags[: {5: 6, 10: size}.get(number, 0)] = PAD
        drawn.append((tokens, tags))
    return drawn


def parts(batch: Batch, worker: Worker) -> list[MicroBatch]:
    """A worker's micro-batches, as the loader splits a global batch; without a sample it gets another one's."""
    tokens, tags = batch
    size, count, parts = len(tokens), MICRO_BATCHES, []
    for part in range(worker.rank * count, (worker.rank + 1) * count):
        low, high = (size * end // (count * worker.world_size) for end in (part, part + 1))
        here = slice(low, high) if high > low else slice(0, 1)
        parts.append(MicroBatch((tokens[here], tags[here]), high - low, (high - low) * worker.world_size / size))
    return parts


def token_loss(model: Any, batch: Batch) -> tuple[Tensor, Tensor]:
    tokens, tags = batch
    losses = F.cross_entropy(model(tokens).transpose(1, 2), tags, ignore_index=PAD, reduction="sum")
    return losses, (tags != PAD).sum()


def sample_loss(model: Any, batch: Batch) -> Tensor:
    tokens, tags = batch
    return F.cross_entropy(model(tokens).transpose(1, 2), tags, ignore_index=PAD, reduction="none").mean(1)


def mean_loss(model: Any, batch: Batch) -> Tensor:
    return sample_loss(model, batch).mean()


def token_accuracy(model: Any, batch: Batch) -> tuple[Tensor, Tensor]:
    tokens, tags = batch
    return ((model(tokens).argmax(-1) == tags) & (tags != PAD)).sum(), (tags != PAD).sum()


def expected_loss(loss: Callable[..., Any], model: nn.Module, batch: Batch) -> Tensor:
    """The loss of the batch as a whole, in plain PyTorch."""
    value = loss(model, batch)
    return value[0] / value[1].clamp(min=1) if isinstance(value, tuple) else value.mean()


OPTIMIZERS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "sgd": lambda model: torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9, weight_decay=1e-3),
    "adamw": lambda model: torch.optim.AdamW(model.parameters(), lr=0.01),
}


def train_as_plain_pytorch(worker: Worker, loss: Callable[..., Any], optimizer: str) -> None:
    reference, model = net(), net()
    wrapped = DistributedDataParallel(model, gradient_as_bucket_view=True) if worker.world_size > 1 else model
    plain, ours = OPTIMIZERS[optimizer](reference), OPTIMIZERS[optimizer](model)
    batch_loss = BatchLoss(model, worker)
    for batch in batches():
        plain.zero_grad()
        whole = expected_loss(loss, reference, batch)
        torch.autograd.backward(whole)
        plain.step()

        ours.zero_grad()
        for number, micro_batch in enumerate(parts(batch, worker), start=1):
            with gradient_sync(wrapped, enabled=number == MICRO_BATCHES):
                torch.autograd.backward(batch_loss.part(loss(wrapped, micro_batch.content), micro_batch))
        reported = batch_loss.finish()
        ours.step()
        assert_close(all_reduce(reported) / worker.world_size, whole.detach())
    for own, expected in zip(model.parameters(), reference.parameters(), strict=True):
        assert_close(own, expected, rtol=1e-4, atol=1e-5)


def measure_as_one_process(worker: Worker) -> None:
    model, sums = net(), torch.zeros(2, dtype=torch.float64)
    right = counted = 0
    for batch in batches():
        for part in parts(batch, worker):
            if part.samples:
                sums += total(token_accuracy(model, part.content), part.samples, "accuracy")
        correct, count = token_accuracy(model, batch)
        right, counted = right + int(correct), counted + int(count)
    assert ratio(*all_reduce(sums).tolist(), "accuracy") == right / counted


def train_in_fp16_as_in_fp32(worker: Worker) -> None:
    """As plain PyTorch but for rounding; a gradient that overflows on one worker has all of them leave a step out."""
    reference, model, precision = net(), net(), Precision("fp16", "cpu")
    wrapped = DistributedDataParallel(model, gradient_as_bucket_view=True) if worker.world_size > 1 else model
    config = from_data({"steps": 20, "optimizer": {"name": "sgd", "lr": 0.5}, "clip_norm": 0.1, "precision": "fp16"})
    plain = torch.optim.SGD(reference.parameters(), lr=0.5, momentum=0.9)
    steps = OptimizerSteps(config, model, precision, total_steps=20, steps_per_epoch=20)
    batch_loss, left_out, taken = BatchLoss(model, worker), 12, list[int]()
    for step, batch in enumerate(batches()):
        steps.zero_grad()
        for number, micro_batch in enumerate(parts(batch, worker), start=1):
            with gradient_sync(wrapped, enabled=number == MICRO_BATCHES):
                with precision.autocast():
                    value, count = token_loss(wrapped, micro_batch.content)
                overflow = torch.inf if step == left_out and worker.rank == worker.world_size - 1 else 1.0
                torch.autograd.backward(steps.scaled(batch_loss.part((value * overflow, count), micro_batch)))
        batch_loss.finish()
        is_taken = steps.take()
        assert all_reduce(torch.tensor(float(is_taken))) == is_taken * worker.world_size
        if is_taken:
            taken.append(step)
            plain.zero_grad()
            torch.autograd.backward(expected_loss(token_loss, reference, batch))
            nn.utils.clip_grad_norm_(reference.parameters(), 0.1)
            plain.step()
    assert len(taken) > 10  # sums are large: until their scale is found, steps are left out
    assert left_out not in taken
    for own, expected in zip(model.parameters(), reference.parameters(), strict=True):
        assert_close(own, expected, rtol=0, atol=0.01)


def count_nothing(worker: Worker) -> None:
    """A loss that is not even a number where nothing is counted leaves the weights alone."""
    model = nn.Linear(1, 1)
    batch_loss = BatchLoss(model, worker)
    part = MicroBatch((torch.ones(1, 1),), 1, 1.0)
    torch.autograd.backward(batch_loss.part((model(part.content[0]).sum() * float("nan"), 0), part))
    assert batch_loss.finish().item() == 0
    assert [parameter.grad.tolist() for parameter in model.parameters() if parameter.grad is not None] == [[[0]], [0]]


def refuse_a_count_of_another_worker(worker: Worker) -> None:
    model = nn.Linear(1, 1)
    batch_loss = BatchLoss(model, worker)
    part = MicroBatch((torch.ones(1, 1),), 1, 1.0)
    count = -1 if worker.rank == worker.world_size - 1 else 5
    torch.autograd.backward(batch_loss.part((model(part.content[0]).sum(), count), part))
    with pytest.raises(ValueError, match=r"^loss returned a negative or infinite count; return \(sum, count\), "):
        batch_loss.finish()


def evaluate_the_same_and_others(worker: Worker) -> None:
    """A number that all workers have is that number: in float64, a third of three times 0.1 is another."""
    told = reduced(worker, {"same": 0.1, "own": float(worker.rank), "pair": (worker.rank, 2), "nan": math.nan}, "here")
    world_size = worker.world_size
    assert told.pop("nan") != 0
    assert told == {"same": 0.1, "own": (world_size - 1) / 2, "pair": (world_size - 1) / 4}


class Heads(nn.Module):
    """Two heads on a body, of which a batch names those that it needs."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.heads = nn.Linear(2, 2), nn.ModuleList(nn.Linear(2, 1, bias=False) for _ in range(2))

    def forward(self, inputs: Tensor, heads: list[int]) -> Tensor:
        body = self.body(inputs)
        return torch.stack([self.heads[head](body) for head in heads]).sum(0)[:, 0]


def leave_a_head_out(worker: Worker) -> None:
    """All that the last micro-batch needs is averaged; a head that it leaves out is told in the same step."""
    model = Heads()
    net = DistributedDataParallel(model, gradient_as_bucket_view=True)
    batch_loss = BatchLoss(model, worker)

    def take_step(heads: list[list[int]]) -> None:
        model.zero_grad()
        for number, each in enumerate(heads, start=1):
            part = MicroBatch((torch.ones(3, 2), each), 3, 0.5)
            with gradient_sync(net, enabled=number == len(heads)):
                torch.autograd.backward(batch_loss.part(net(*part.content), part))
        batch_loss.finish()

    for heads in ([[0], [0, 1]], [[0, 1], [1, 0]], [[0, 1]]):
        take_step(heads)
    told = (
        r"^model: the loss does not depend on heads\.1\.weight in the last of 2 micro-batches \(accumulate\); with sev"
    )
    with pytest.raises(ConfigError, match=told):
        take_step([[0, 1], [0]])


def check_all(worker: Worker) -> None:
    for loss, optimizer in ((token_loss, "sgd"), (token_loss, "adamw"), (sample_loss, "sgd"), (mean_loss, "sgd")):
        train_as_plain_pytorch(worker, loss, optimizer)
    train_in_fp16_as_in_fp32(worker)
    measure_as_one_process(worker)
    count_nothing(worker)
    evaluate_the_same_and_others(worker)
    refuse_a_count_of_another_worker(worker)
    if worker.world_size > 1:
        leave_a_head_out(worker)


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_workers_and_micro_batches_train_and_measure_as_plain_pytorch_does_the_batch_as_a_whole(workers: int) -> None:
    on_ranks(check_all, workers)


# -- what a loss must not return ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (None, TypeError, r"^loss returned NoneType for 4 samples; return "),
        (torch.zeros(4, 5, requires_grad=True), TypeError, r"^loss returned a tensor \(4, 5\) for 4 samples"),
        (torch.ones(4), ValueError, r"^loss has no gradient; compute it by the model"),
        (torch.ones(4, dtype=torch.int64), ValueError, r"^loss has no gradient"),
        ((torch.ones(()), 4), ValueError, r"^loss has no gradient"),
        (0.5, ValueError, r"^loss has no gradient"),
    ],
)
def test_what_cannot_be_minimized_is_refused(value: Any, error: type[Exception], message: str) -> None:
    batch_loss = BatchLoss(nn.Linear(1, 1), Worker(0, 1, CPU))
    with pytest.raises(error, match=message):
        batch_loss.part(value, MicroBatch((), 4, 1.0))


def test_a_loss_keeps_to_one_form() -> None:
    batch_loss, loss = BatchLoss(nn.Linear(1, 1), Worker(0, 1, CPU)), torch.ones((), requires_grad=True)
    batch_loss.part((loss, 3), MicroBatch((), 4, 1.0))
    batch_loss.finish()
    with pytest.raises(TypeError, match=r"^loss returned \(sum, count\) for some batches and a tensor for others"):
        batch_loss.part(loss, MicroBatch((), 4, 1.0))


@pytest.mark.parametrize("count", [1, 9])
def test_parameters_that_have_no_gradient_are_told_where_ddp_would_wait_for_them(count: int) -> None:
    model = nn.ModuleDict({"used": nn.Linear(2, 1), "frozen": nn.Linear(2, 1).requires_grad_(False)})
    model["heads"] = nn.ModuleList(nn.Linear(2, 1, bias=False) for _ in range(count))
    losses = {size: BatchLoss(model, Worker(0, size, CPU)) for size in (1, 2)}
    for loss in losses.values():
        part = MicroBatch(torch.ones(3, 2), 3, 1.0)
        torch.autograd.backward(loss.part(model["used"](part.content)[:, 0], part))
    assert losses[1].finish() == losses[2]._loss  # a worker alone waits for nobody
    with pytest.raises(ConfigError) as caught:
        losses[2].finish()
    names = ", ".join(f"heads.{number}.weight" for number in range(min(count, 5)))
    more = " and 4 more" if count > 5 else ""
    assert str(caught.value).startswith(f"model: the loss does not depend on {names}{more}; with several workers every")
