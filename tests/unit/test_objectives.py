"""Losses against plain PyTorch, metrics counted by hand, and totals that add up over batches."""

import copy
import math
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from raytorch import datasets
from raytorch.config import DigitsData, Loss, Metric, ResNet18Model, RunConfig
from raytorch.datasets import TrainLoader
from raytorch.datasets.in_memory import END, PAD
from raytorch.datasets.own import OwnDataset
from raytorch.errors import ConfigError
from raytorch.models.image_transformers import Seq2Seq
from raytorch.models.networks import Architecture
from raytorch.models.objectives import (
    EachCallOnce,
    judged_ratio,
    loss_function,
    metrics_of,
    ratio,
    require_enough_samples,
    total,
)

LABELS = torch.tensor([3, 1, 0, 2])
STRIPS = torch.tensor([[3, 1, END, PAD, PAD], [2, 0, 9, 7, END], [5, END, PAD, PAD, PAD], [8, 8, 1, END, PAD]])


def loss_of(model: nn.Module, batch: Any, loss: Any = "cross_entropy") -> Tensor:
    """The loss of each sample."""
    losses = loss_function(RunConfig.model_validate({"epochs": 1, "loss": loss}).loss, model)(model, batch)
    assert isinstance(losses, Tensor)
    return losses


def accuracy_of(model: nn.Module, batch: Any) -> list[float]:
    """What counts as right, and what counts."""
    return total(
        metrics_of([Metric(name="accuracy")], model)["accuracy"](model, batch), len(batch[1]), "accuracy"
    ).tolist()


class _Says(nn.Module):
    """A model that gives the same outputs whatever it is shown."""

    def __init__(self, outputs: Tensor) -> None:
        super().__init__()
        self.outputs = nn.Parameter(outputs)
        self.calls = 0

    def forward(self, *_inputs: Tensor, **_named: Tensor) -> Tensor:
        self.calls += 1
        return self.outputs


class _Writes(_Says):
    """The same of strips: a model that brings losses and metrics of its own, and writes the same tokens."""

    losses, metrics = Seq2Seq.losses, Seq2Seq.metrics

    def __init__(self, outputs: Tensor, tokens: Tensor = STRIPS) -> None:
        super().__init__(outputs)
        self.tokens = tokens

    def greedy(self, _images: Tensor, length: int) -> Tensor:
        return self.tokens[:, :length]


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
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        losses = loss_of(model, (torch.zeros(4), LABELS), loss)
    reference = expected(model.outputs.float())
    assert (losses.dtype, losses.shape) == (torch.float32, (4,))
    torch.testing.assert_close(losses.mean(), reference)
    torch.autograd.backward(losses.mean())
    assert model.outputs.grad is not None
    assert model.outputs.grad.isfinite().all()


ROWS, CLASSES = torch.randn(8, 3), torch.arange(8) % 3


@pytest.mark.parametrize(
    ("outputs", "targets", "found"),
    [
        (torch.randn(8, 2), torch.randn(8), r"a tensor \(8, 2\), and the targets are a tensor \(8,\) of float32"),
        (torch.randn(8), CLASSES, r"a tensor \(8,\), and the targets are a tensor \(8,\) of int64"),
        (ROWS, CLASSES[:, None], r"a tensor \(8, 3\), and the targets are a tensor \(8, 1\) of int64"),
        (ROWS, [0, 1], r"the targets are list"),
        ((ROWS, ROWS), CLASSES, r"the model returns \(a tensor \(8, 3\), a tensor \(8, 3\)\)"),
    ],
)
@pytest.mark.parametrize("name", ["cross_entropy", "mse", "accuracy"])
def test_what_raytorchs_own_have_for_classes_is_refused_for_other_things(
    name: Any, outputs: Any, targets: Any, found: str
) -> None:
    kind = "metrics" if name == "accuracy" else "loss"
    judge: Any = (
        metrics_of([Metric(name=name)], nn.Identity())[name]
        if name == "accuracy"
        else loss_function(Loss(name=name), nn.Identity())
    )
    with pytest.raises(
        ConfigError, match=rf"^{kind}: {name} is for classes: .* Here .*{found}.*; name one of your own"
    ):
        judge(nn.Identity(), (outputs, targets))
    with pytest.raises(ConfigError, match=r"Here a batch is dict; name one of your own, FILE\.py:NAME"):
        judge(nn.Identity(), {"x": outputs, "y": targets})


def test_targets_may_be_probabilities_of_classes() -> None:
    probabilities = torch.rand(8, 3).softmax(1)
    given = loss_function(Loss(), nn.Identity())(nn.Identity(), (ROWS, probabilities))
    torch.testing.assert_close(given, F.cross_entropy(ROWS, probabilities, reduction="none"))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_tokens_are_counted_each_but_for_padding(smoothing: float) -> None:
    outputs, targets = torch.randn(4, 5, 6), torch.randint(6, (4, 5))
    targets[1, 2:] = -100
    outputs[0] = F.one_hot(targets[0], 6) * 9.0
    loss = loss_function(Loss(label_smoothing=smoothing), nn.Identity())(nn.Identity(), (outputs, targets))
    assert isinstance(loss, tuple)
    mean = F.cross_entropy(outputs.flatten(0, 1), targets.flatten(), label_smoothing=smoothing)
    torch.testing.assert_close(loss[0] / loss[1], mean)
    right = int((outputs.argmax(2) == targets).sum())
    assert accuracy_of(nn.Identity(), (outputs, targets)) == [right, 17]
    assert right >= 5
    with pytest.raises(ConfigError, match=r"^loss: mse is for classes: "):
        loss_function(Loss(name="mse"), nn.Identity())(nn.Identity(), (outputs, targets))


def test_classification_counts_every_sample_once() -> None:
    outputs = torch.eye(5)[torch.tensor([3, 1, 4, 2])]
    assert accuracy_of(_Says(outputs), (torch.zeros(4), LABELS)) == [3, 4]


# -- transcription -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_transcription_loss_is_the_mean_over_strips_of_the_mean_over_tokens(smoothing: float) -> None:
    logits = torch.randn(4, 5, END + 1)
    lengths = [3, 5, 2, 4]
    expected = torch.stack(
        [
            F.cross_entropy(logits[strip, :length], STRIPS[strip, :length], label_smoothing=smoothing)
            for strip, length in enumerate(lengths)
        ]
    ).mean()
    loss = {"name": "cross_entropy", "label_smoothing": smoothing}
    torch.testing.assert_close(loss_of(_Writes(logits), (torch.zeros(4), STRIPS), loss).mean(), expected)


def test_transcription_counts_digits_only() -> None:
    written = STRIPS.clone()
    written[STRIPS == PAD] = END
    written[STRIPS == END] = 0  # a missed END costs nothing
    written[1, 0], written[3, 2] = 9, END  # two of ten digits are wrong
    assert accuracy_of(_Writes(torch.randn(4, 5, END + 1), written), (torch.zeros(4), STRIPS)) == [8, 10]


# -- both --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "data", "shape", "targets"),
    [("mlp", "digits", (1, 8, 8), LABELS), ("seq2seq", "mnist_strips", (1, 8, 16), STRIPS)],
)
def test_totals_of_parts_add_up_to_that_of_the_batch(
    name: str, data: str, shape: tuple[int, ...], targets: Tensor
) -> None:
    torch.manual_seed(0)
    config = RunConfig.model_validate({"epochs": 1, "model": name, "data": data})
    model = Architecture(config.model, shape, 5).build().eval()
    inputs = torch.randn(4, *shape)
    for judge in (loss_function(config.loss, model), *metrics_of(config.judged_by, model).values()):
        whole, first, rest = (
            total(judge(model, (inputs[part], targets[part])), len(targets[part]), "loss")
            for part in (slice(None), slice(1), slice(1, None))
        )
        assert (whole.dtype, whole.requires_grad) == (torch.float64, False)
        torch.testing.assert_close(whole, first + rest, rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (torch.tensor(0.5), [4, 8]),  # a mean, as often as it has samples
        (0.5, [4, 8]),
        (torch.arange(8), [28, 8]),
        (torch.arange(8) > 2, [5, 8]),
        ((torch.tensor(3.5), torch.tensor(5)), [3.5, 5]),
        ((0.1, 3), [0.1, 3]),
        ((torch.tensor(0.0), 0), [0, 0]),
    ],
)
def test_the_forms_that_a_loss_or_metric_may_return(value: Any, expected: list[float]) -> None:
    assert total(value, 8, "f1").tolist() == expected


@pytest.mark.parametrize(
    ("value", "form"),
    [
        (None, "NoneType"),
        ({"f1": 0.5}, "dict"),
        (torch.zeros(8, 5), "a tensor (8, 5)"),
        (torch.zeros(7), "a tensor (7,)"),
        ((torch.tensor(1.0),), "(a tensor ())"),
        ((1.0, 2, 3), "(float, int, int)"),
        ((1.0, None), "(float, NoneType)"),
        ((torch.zeros(8), torch.ones(8)), "(a tensor (8,), a tensor (8,))"),
    ],
)
def test_other_forms_are_refused_with_those_that_there_are(value: Any, form: str) -> None:
    with pytest.raises(TypeError) as failure:
        total(value, 8, "f1")
    assert str(failure.value) == (
        f"f1 returned {form} for 8 samples; return a tensor of a number for each, (8,), their mean, (), or a tuple "
        "(sum, count) of two numbers"
    )


@pytest.mark.parametrize("count", [-1, float("nan"), float("inf"), torch.tensor(-0.5)])
def test_a_count_that_is_none_is_refused_also_among_others(count: Any) -> None:
    sums, counts = (total((1.0, 9), 8, "f1") + total((1.0, count), 8, "f1")).tolist()
    with pytest.raises(ValueError, match=r"^f1 returned a negative or infinite count; return \(sum, count\)"):
        ratio(sums, counts, "f1")


def test_of_nothing_the_ratio_is_zero() -> None:
    assert (ratio(3.0, 4.0, "f1"), ratio(0.0, 0.0, "f1"), ratio(float("nan"), 0.0, "f1")) == (0.75, 0, 0)


def test_what_judges_by_nothing_is_no_number_and_no_loss() -> None:
    assert judged_ratio(3.0, 4.0, "f1") == 0.75
    assert math.isnan(judged_ratio(0.0, 0.0, "f1"))
    with pytest.raises(ValueError, match=r"^loss: nothing was counted in the whole split"):
        judged_ratio(0.0, 0.0, "loss")
    with pytest.raises(ValueError, match=r"^loss returned a negative or infinite count"):
        judged_ratio(0.0, math.nan, "loss")


def test_a_run_is_judged_by_the_metrics_that_it_names() -> None:
    class Judged(_Writes):
        metrics = {"accuracy": 1, "f1": 2}  # type: ignore[dict-item, assignment]  # noqa: RUF012

    model = Judged(torch.eye(5)[:4])
    assert metrics_of([], model) == {}
    assert metrics_of([Metric(name="f1"), Metric(name="accuracy")], model) == {"f1": 2, "accuracy": 1}
    with pytest.raises(ConfigError, match=r"^metrics: the model has no metric f2; one of accuracy, mae, f1$"):
        metrics_of([Metric(name="f2")], model)


def test_what_a_model_holds_under_these_names_is_its_own_business() -> None:
    model = nn.Linear(2, 2)
    model.metrics, model.losses = [1.0], nn.ModuleList()  # type: ignore[assignment]
    assert list(metrics_of([Metric(name="accuracy")], model)) == ["accuracy"]
    assert loss_function(Loss(), model)


@torch.no_grad()
def test_a_loss_and_a_metric_of_a_batch_share_a_call() -> None:
    model, inputs = _Says(torch.eye(5)[:4]), torch.zeros(4)
    once = EachCallOnce(model)
    loss_of(once, (inputs, LABELS))  # type: ignore[arg-type]
    assert accuracy_of(once, (inputs, LABELS)) == accuracy_of(model, (inputs, LABELS))  # type: ignore[arg-type]
    assert model.calls == 2
    once(torch.zeros(4))
    once(inputs, key=inputs)
    assert model.calls == 4


@torch.no_grad()
def test_what_a_metric_changes_in_place_is_computed_anew_for_the_next() -> None:
    class Both(nn.Linear):
        def forward(self, inputs: Tensor) -> Any:
            return {"outputs": (super().forward(inputs),)}

    model, inputs = Both(2, 2), torch.randn(3, 2)
    once, expected = EachCallOnce(model), model(inputs)["outputs"][0]
    once(inputs)["outputs"][0][1].clamp_(0, 0)
    assert torch.equal(once(inputs)["outputs"][0], expected)
    assert once(inputs)["outputs"][0] is once(inputs)["outputs"][0]


def penalty(model: Any, batch: Any) -> Tensor:
    inputs = batch[0].clone().requires_grad_()
    [gradient] = torch.autograd.grad(model(inputs).sum(), inputs, create_graph=True)
    return gradient.square().sum(dim=1)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_loss_that_computes_gradients_is_evaluated_with_them(precision: str) -> None:
    model, inputs = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)), torch.randn(5, 3)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        expected = penalty(model, (inputs,)).detach()
        with torch.no_grad():
            once = EachCallOnce(model)
            plain = once.judged(lambda model, batch: model(batch[0]), (inputs,))
            found = once.judged(penalty, (inputs,))
            assert not plain.requires_grad
            assert once.judged(lambda model, batch: model(batch[0]), (inputs,)) is plain
    assert torch.equal(found, expected)
    assert all(parameter.grad is None for parameter in model.parameters())
    with torch.no_grad(), pytest.raises(RuntimeError, match="something else"):
        EachCallOnce(model).judged(fails, (inputs,))


def fails(model: Any, batch: Any) -> Tensor:
    raise RuntimeError("something else")


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_of_the_model_that_a_metric_is_given_is_one_of_the_model(copied: Any) -> None:
    model = nn.Linear(2, 2)
    once = EachCallOnce(model)
    inputs = torch.randn(3, 2)
    outputs = once(inputs)
    twin = copied(once)
    assert type(twin) is nn.Linear
    assert twin is not model
    assert torch.equal(twin(inputs), outputs)


# -- batch normalization -----------------------------------------------------------------------------------------------


def check_split(model: str, samples: int, **config: Any) -> None:
    run = RunConfig.model_validate({"epochs": 1, "model": model, "data": {"name": "digits"}, **config})
    data = run.data.model_copy(update={"train_samples": samples})
    train_set = datasets.load_dataset(data, "train", torch.device("cpu"))
    net = Architecture(run.model, train_set.input_shape, train_set.num_classes).build()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    require_enough_samples(run, loss_function(run.loss, net), net, train_set)
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


def test_a_loss_that_computes_gradients_may_leave_a_worker_a_sample_alone() -> None:
    rows = OwnDataset(TensorDataset(torch.randn(9, 3)), torch.device("cpu"))
    require_enough_samples(RunConfig(epochs=1, batch_size=8, accumulate=8), penalty, nn.Linear(3, 1), rows)


def test_resnet_trains_on_what_once_left_a_worker_a_sample_alone() -> None:
    check_split("resnet18", 33, batch_size=32)
    train_set = datasets.load_dataset(DigitsData(train_samples=33), "train", torch.device("cpu"))
    net = Architecture(ResNet18Model(), train_set.input_shape, train_set.num_classes).build()
    for rank in range(2):
        for [part] in TrainLoader(train_set, batch_size=32, rank=rank, world_size=2).remaining():
            torch.autograd.backward(loss_of(net, part.content).mean())
