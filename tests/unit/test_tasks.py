"""Tasks: losses against plain PyTorch, and totals that add up over batches."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from raytorch import datasets
from raytorch.config import DigitsData, ResNet18Model, RunConfig
from raytorch.config.run import smallest_batch
from raytorch.datasets import TrainLoader
from raytorch.errors import ConfigError
from raytorch.models.networks import END, PAD, Architecture
from raytorch.models.tasks import Classification, Task, Transcription, build_task, require_enough_samples

LABELS = torch.tensor([3, 1, 0, 2])
STRIPS = torch.tensor([[3, 1, END, PAD, PAD], [2, 0, 9, 7, END], [5, END, PAD, PAD, PAD], [8, 8, 1, END, PAD]])


def _task(num_classes: int = 5, **config: Any) -> Task:
    return build_task(RunConfig.model_validate({"epochs": 1, **config}), num_classes)


def _strips_task(**config: Any) -> Task:
    return _task(data="mnist_strips", model="seq2seq", **config)


class _Says(nn.Module):
    """A model that gives the same outputs, and the same greedy tokens, whatever it is shown."""

    def __init__(self, outputs: Tensor, tokens: Tensor | None = None) -> None:
        super().__init__()
        self.outputs, self.tokens = nn.Parameter(outputs), tokens

    def forward(self, *_inputs: Tensor) -> Tensor:
        return self.outputs

    def greedy(self, _images: Tensor, length: int) -> Tensor:
        assert self.tokens is not None
        return self.tokens[:, :length]


def test_the_model_decides_the_task() -> None:
    assert isinstance(_task(), Classification)
    assert isinstance(_strips_task(), Transcription)


def test_models_and_data_sets_mean_the_same_by_a_token() -> None:
    assert (END, PAD) == (datasets.END, datasets.PAD)


# -- classification ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        ("cross_entropy", lambda outputs: F.cross_entropy(outputs, LABELS)),
        (
            {"name": "cross_entropy", "label_smoothing": 0.2},
            lambda outputs: F.cross_entropy(outputs, LABELS, label_smoothing=0.2),
        ),
        ("bce", lambda outputs: F.binary_cross_entropy(outputs.sigmoid(), F.one_hot(LABELS, 5).float())),
        ("bce_with_logits", lambda outputs: F.binary_cross_entropy_with_logits(outputs, F.one_hot(LABELS, 5).float())),
        ("mse", lambda outputs: F.mse_loss(outputs.softmax(1), F.one_hot(LABELS, 5).float())),
    ],
    ids=["cross_entropy", "smoothed", "bce", "bce_with_logits", "mse"],
)
@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
def test_classification_loss_equals_pytorchs_mean(loss: Any, expected: Any, bf16: bool) -> None:
    outputs = torch.randn(4, 5, generator=torch.Generator().manual_seed(0))
    model = _Says(outputs.bfloat16() if bf16 else outputs)
    task = _task(loss=loss)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        value = task.loss(model, torch.zeros(4), LABELS)
        totals = task.evaluate(model, torch.zeros(4), LABELS)
    reference = expected(model.outputs.float())
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, reference)
    torch.testing.assert_close(totals[0].float(), 4 * reference)
    value.backward()
    assert model.outputs.grad is not None
    assert model.outputs.grad.isfinite().all()


def test_classification_counts_every_sample_once() -> None:
    outputs = torch.eye(5)[torch.tensor([3, 1, 4, 2])]
    totals = _task().evaluate(_Says(outputs), torch.zeros(4), LABELS)
    assert totals.dtype == torch.float64
    assert totals[1:].tolist() == [4, 3, 4]
    assert not totals.requires_grad


# -- transcription -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_transcription_loss_is_the_mean_over_strips_of_the_mean_over_tokens(smoothing: float) -> None:
    logits = torch.randn(4, 5, END + 1)
    model = _Says(logits)
    lengths = [3, 5, 2, 4]
    expected = torch.stack(
        [
            F.cross_entropy(logits[strip, :length], STRIPS[strip, :length], label_smoothing=smoothing)
            for strip, length in enumerate(lengths)
        ]
    ).mean()
    task = _strips_task(loss={"name": "cross_entropy", "label_smoothing": smoothing})
    torch.testing.assert_close(task.loss(model, torch.zeros(4), STRIPS), expected)
    model.tokens = STRIPS
    totals = task.evaluate(model, torch.zeros(4), STRIPS)
    torch.testing.assert_close(totals[0].float(), 4 * expected)


def test_transcription_counts_digits_only() -> None:
    written = STRIPS.clone()
    written[STRIPS == PAD] = END
    written[STRIPS == END] = 0  # a missed END costs nothing
    written[1, 0], written[3, 2] = 9, END  # two of ten digits are wrong
    model = _Says(torch.randn(4, 5, END + 1), written)
    assert _strips_task().evaluate(model, torch.zeros(4), STRIPS)[1:].tolist() == [4, 8, 10]


# -- both --------------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["classification", "transcription"])
def trial(request: pytest.FixtureRequest) -> tuple[Task, nn.Module, Tensor, Tensor]:
    """A task, a model for it, and a batch."""
    torch.manual_seed(0)
    name, task, shape, targets = (
        ("mlp", _task(), (1, 8, 8), LABELS)
        if request.param == "classification"
        else ("seq2seq", _strips_task(), (1, 8, 16), STRIPS)
    )
    config = RunConfig.model_validate(
        {"epochs": 1, "model": name, "data": "mnist_strips" if name == "seq2seq" else "digits"}
    )
    model = Architecture(config.model, shape, 5).build().eval()
    return task, model, torch.randn(4, *shape), targets


def test_the_loss_of_a_batch_is_the_mean_over_its_parts(trial: tuple[Task, nn.Module, Tensor, Tensor]) -> None:
    task, model, inputs, targets = trial
    parts = 0.25 * task.loss(model, inputs[:1], targets[:1]) + 0.75 * task.loss(model, inputs[1:], targets[1:])
    torch.testing.assert_close(task.loss(model, inputs, targets), parts)


def test_evaluations_add_up(trial: tuple[Task, nn.Module, Tensor, Tensor]) -> None:
    task, model, inputs, targets = trial
    parts = task.evaluate(model, inputs[:1], targets[:1]) + task.evaluate(model, inputs[1:], targets[1:])
    whole = task.evaluate(model, inputs, targets)
    torch.testing.assert_close(whole, parts, rtol=1e-5, atol=0)
    torch.testing.assert_close((whole[0] / whole[1]).float(), task.loss(model, inputs, targets))


# -- batch normalization -----------------------------------------------------------------------------------------------


def check_split(model: str, samples: int, **config: Any) -> None:
    run = RunConfig.model_validate({"epochs": 1, "model": model, "data": {"name": "digits"}, **config})
    data = run.data.model_copy(update={"train_samples": samples})
    train_set = datasets.load_dataset(data, "train", torch.device("cpu"))
    net = Architecture(run.model, train_set.input_shape, train_set.num_classes).build()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    require_enough_samples(run, build_task(run, 10), net, train_set)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert net.training


def test_a_split_that_leaves_a_worker_a_sample_alone_is_refused_with_one_that_does_not() -> None:
    split: dict[str, Any] = {"batch_size": 32, "scaling": {"workers": {"min": 1, "max": 4}}, "accumulate": 2}
    with pytest.raises(ConfigError) as failure:
        check_split("resnet18", 41, **split)
    assert str(failure.value) == (
        "batch_size (32): the 41 training samples leave a batch of 9 for 4 workers x 2 micro-batches, and batch "
        "normalization needs two for each; take batch_size: 33, fewer workers, or a lower accumulate"
    )
    check_split("resnet18", 41, **split | {"batch_size": 33})
    check_split("resnet18", 41, **split | {"accumulate": 1})
    check_split("mlp", 41, **split)  # which has none


@pytest.mark.parametrize("parts", range(1, 5))
def test_what_is_left_gives_every_worker_two_samples_where_whole_batches_give_it_eight(parts: int) -> None:
    for samples in range(2 * parts, 300):
        assert smallest_batch(samples, 32) >= min(2 * parts, samples)


def test_resnet_trains_on_what_once_left_a_worker_a_sample_alone() -> None:
    check_split("resnet18", 33, batch_size=32)
    train_set = datasets.load_dataset(DigitsData(train_samples=33), "train", torch.device("cpu"))
    net = Architecture(ResNet18Model(), train_set.input_shape, train_set.num_classes).build()
    for rank in range(2):
        for [part] in TrainLoader(train_set, batch_size=32, rank=rank, world_size=2).remaining():
            _task(10).loss(net, part.inputs, part.targets).backward()  # type: ignore[no-untyped-call]
