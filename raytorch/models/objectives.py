"""What a run minimizes and what it measures: functions of a model and a batch.

A loss or metric returns one number per sample, (B,), or their mean, (), or ``(sum, count)`` where samples are not what
is counted: tokens, say. What is reported, and what a loss is minimized as, is the sum over all batches and workers,
divided once by the count of them all. A batch is what the data set gives: ``(inputs, targets)`` of a shipped one. A
model's class may have losses and metrics of its own for the names that a run gives, as ``losses`` and ``metrics``.
Metrics that are no such mean are in :mod:`raytorch.models.stateful_metrics`.

Losses are computed in float32, also within autocast: bf16 has too few digits for logarithms, and PyTorch refuses binary
cross-entropy there.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from copy import copy, deepcopy
from functools import partial
from numbers import Real
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

from raytorch.config import CodeSnapshot, Loss, Metric, OwnLoss, OwnMetric, RunConfig
from raytorch.config.metrics import LOSS_LABEL
from raytorch.config.own_calls import own_call
from raytorch.config.run import smallest_batch
from raytorch.datasets.requests import Request, Split
from raytorch.errors import ConfigError
from raytorch.losses import LOSSES
from raytorch.models.numbers import as_numbers, of_each_sample
from raytorch.models.stateful_metrics import StatefulMetric, own_metric
from raytorch.models.tokens import IGNORED, are_tokens, token_loss

Share = tuple[Tensor, Tensor]
"""A sum, and the count of what was added up."""
LossFunction = Callable[[Any, Any], Tensor | Share]
MetricFunction = Callable[[Any, Any], Tensor | Share]
Judge = MetricFunction | StatefulMetric


def loss_function(
    config: Loss | OwnLoss, model: nn.Module, code: CodeSnapshot | None = None, *, compiled: bool = False
) -> LossFunction:
    """The loss of that name: one in the user's ``code``, the model's own, or one of classes or numbers.

    ``compiled`` has that of tokens, whose logits take more memory than the model, computed in one pass over them.
    Raises ConfigError if a loss of the user's own does not take its arguments.
    """
    if isinstance(config, OwnLoss):
        return own_call("loss", config, code)
    options = config.model_dump(exclude={"name"}, exclude_defaults=True)
    of_tokens = torch.compile(token_loss, dynamic=False) if compiled else token_loss
    shipped = partial(shipped_loss, name=config.name, of_tokens=of_tokens)
    return partial(_brought(model, "losses").get(config.name) or shipped, **options)


def metrics_of(
    metrics: Sequence[Metric | OwnMetric],
    model: nn.Module,
    code: CodeSnapshot | None = None,
    facts: Mapping[str, Any] | None = None,
) -> dict[str, Judge]:
    """What a run judges a model by beside its loss, by label, on data with these ``facts``, if they are known.

    Raises ConfigError: the model has no such metric, one in the user's ``code`` does not take its arguments, or one has
    to know more of the data.
    """
    brought: dict[str, MetricFunction] = {"accuracy": accuracy, "mae": absolute_error, **_brought(model, "metrics")}
    judges: dict[str, Judge] = {}
    for metric in metrics:
        if isinstance(metric, OwnMetric):
            judges[metric.label] = own_metric(metric, code)
        elif metric.name in brought:
            judges[metric.label] = brought[metric.name]
        else:
            raise ConfigError(f"metrics: the model has no metric {metric.name}; one of {', '.join(brought)}")
    for judge in judges.values():
        if facts is not None and not isinstance(judge, StatefulMetric):
            on_split(judge, facts)
    return judges


def on_split(judge: MetricFunction, facts: Mapping[str, Any]) -> MetricFunction:
    """A metric on a split with these ``facts``. Raises ConfigError if it has to know more of them."""
    return judge.of(facts) if isinstance(judge, BitsPerByte) else judge


def _brought(model: nn.Module, kind: str) -> Mapping[str, Callable[..., Tensor | Share]]:
    """What a model's class has as ``losses`` or ``metrics``; nothing where that is something else of its author's."""
    there = getattr(type(model), kind, None)
    return there if isinstance(there, Mapping) else {}


def checked(value: Any, samples: int, name: str) -> Tensor | Share:
    """What a loss or metric called ``name`` returned of ``samples`` samples, numbers as tensors.

    Raises TypeError for what is none of the forms that there are.
    """
    is_tuple = isinstance(value, tuple)
    numbers = [_number(part) for part in (value if is_tuple else [value])]
    shapes = [None if number is None else tuple(number.shape) for number in numbers]
    if is_tuple and shapes == [(), ()]:
        return cast(Share, tuple(numbers))
    if not is_tuple and shapes[0] in ((), (samples,)):
        return cast(Tensor, numbers[0])
    raise TypeError(
        f"{name} returned {_form(value)} for {samples} samples; return a tensor of a number for each, ({samples},), "
        "their mean, (), or a tuple (sum, count) of two numbers"
    )


def _number(value: Any) -> Tensor | None:
    if isinstance(value, Real):
        return torch.tensor(float(value), dtype=torch.float64)
    return value if isinstance(value, Tensor) else None


def _form(value: Any) -> str:
    if isinstance(value, tuple):
        return f"({', '.join(map(_form, value))})"
    return f"a tensor {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


def valid_count(count: Tensor) -> Tensor:
    """A count in float64; NaN in place of one that is negative or infinite, which :func:`ratio` refuses."""
    count = count.detach().double()
    return count.where((count >= 0) & count.isfinite(), math.nan)


def total(value: Any, samples: int, name: str) -> Tensor:
    """What a loss or metric called ``name`` returned of ``samples`` samples, as sum and count: float64 (2,).

    Raises TypeError; see :func:`checked`.
    """
    value = checked(value, samples, name)
    if isinstance(value, Tensor):
        sums = value.detach().double()
        return torch.stack([sums.sum() if sums.dim() else sums * samples, torch.full_like(sums.sum(), samples)])
    return torch.stack([value[0].detach().double(), valid_count(value[1]).to(value[0].device)])


def ratio(number: float, count: float, name: str) -> float:
    """``number`` over the count of all workers; 0 where nothing was counted.

    Raises ValueError if a count was no count.
    """
    if math.isnan(count):
        raise ValueError(f"{name} returned a negative or infinite count; return (sum, count), the count at least 0")
    return number / count if count else 0.0


def judged_ratio(number: float, count: float, name: str) -> float:
    """What an evaluation called ``name`` comes to: NaN, which ranks last, where nothing was counted.

    Raises ValueError if a count was no count, or the loss's 0.
    """
    if count == 0 and name == LOSS_LABEL:
        raise ValueError(
            f"{name}: nothing was counted in the whole split (its count is 0), so there is nothing to judge"
        )
    return ratio(number, count, name) if count else math.nan


class EachCallOnce:
    """A model in evaluation that computes a call once, however many losses and metrics of a batch make it.

    Each time where gradients are asked for, as what was computed without has none; and anew where one of them has
    changed the result in place, as ``clamp_`` does. A copy of it is one of the model.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._calls: list[tuple[tuple[Any, ...], dict[str, Any], Any, list[int]]] = []

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.is_grad_enabled():
            return self._model(*args, **kwargs)
        for given, named, result, versions in self._calls:
            same = len(given) == len(args) and all(a is b for a, b in zip(given, args, strict=True))
            same = same and named.keys() == kwargs.keys() and all(named[key] is kwargs[key] for key in kwargs)
            if same and _versions(result) == versions:
                return result
        result = self._model(*args, **kwargs)
        self._calls.append((args, kwargs, result, _versions(result)))
        return result

    def judged(self, judge: Callable[[Any, Any], Any], batch: Any) -> Any:
        """What a loss or metric says of it: with gradients if it computes some itself, as a gradient penalty does."""
        try:
            return judge(self, batch)
        except RuntimeError as error:
            if torch.is_grad_enabled() or "does not require grad" not in str(error):
                raise
        with torch.enable_grad():
            torch.clear_autocast_cache()  # of weights that were cast without gradients
            return judge(self, batch)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def __copy__(self) -> nn.Module:
        return copy(self._model)

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Module:
        return deepcopy(self._model, memo)

    def __reduce__(self) -> tuple[Any, ...]:
        return _as_it_is, (self._model,)


def _versions(result: Any) -> list[int]:
    """How often each tensor of a result was changed in place."""
    tensors = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor) and not leaf.is_inference()]
    return [tensor._version for tensor in tensors]


def _as_it_is(model: nn.Module) -> nn.Module:
    return model


# -- classes: targets int64 (B,), outputs (B, classes); or of tokens (B, T) and (B, T, classes); see also numbers.py ---

FOR_NUMBERS = "for numbers set loss: mse and metrics: [mae]"


def shipped_loss(
    model: Any,
    batch: Any,
    *,
    name: str,
    label_smoothing: float = 0.0,
    of_tokens: Callable[[Tensor, Tensor, float], Share] = token_loss,
) -> Tensor | Share:
    """Each sample's loss, float32 (B,); the mean over classes where the targets are one-hot.

    The targets of ``cross_entropy`` may be probabilities of classes as well, (B, classes), or those of tokens, of which
    the loss is their sum and count, and those of ``mse`` numbers. Raises ConfigError for a batch of something else.
    """
    is_entropy = name == "cross_entropy"
    others = {"or_probabilities": is_entropy, "or_tokens": is_entropy, "or_numbers": name == "mse"}
    outputs, targets = _of_classes(f"loss: {name}", model, batch, **others)
    if name == "mse" and (numbers := as_numbers(outputs, targets)):
        return of_each_sample((numbers[0] - numbers[1]).square())
    # Of an outline a step is counted: autocast does not know its device, and nothing is compiled for it.
    is_outline = outputs.is_meta
    with torch.autocast("cpu" if is_outline else outputs.device.type, enabled=False):
        if is_entropy and are_tokens(outputs, targets):
            return (token_loss if is_outline else of_tokens)(outputs, targets, label_smoothing)
        outputs = outputs.float()
        if is_entropy:
            return F.cross_entropy(outputs, targets, reduction="none", label_smoothing=label_smoothing)
        if name == "bce":
            outputs = outputs.sigmoid()
        elif name == "mse":
            outputs = outputs.softmax(dim=1)
        one_hot = F.one_hot(targets, outputs.shape[1]).float()
        return LOSSES[name](outputs, one_hot, reduction="none").mean(dim=1)


def accuracy(model: Any, batch: Any) -> Share:
    """The samples, or tokens, whose largest output is that of their class.

    Raises ConfigError if a batch has no classes.
    """
    outputs, targets = _of_classes("metrics: accuracy", model, batch)
    if are_tokens(outputs, targets):
        return count_of(outputs.argmax(dim=2) == targets, targets != IGNORED)
    correct = outputs.argmax(dim=1) == targets
    return count_of(correct, torch.ones_like(correct))


class BitsPerByte:
    """How many bits a model needs for a byte of text, by the probabilities of its tokens; it takes batches of tokens.

    The bytes are those of the tokens themselves if these are bytes, so that the ends of documents have none. Of other
    tokens each counts as many as one of the split's text has on average, which adds up to the bytes of its text.
    """

    def __init__(self, bytes_per_token: float = 1.0, end_token: int | None = None) -> None:
        self._bytes_per_token, self._end_token = bytes_per_token, end_token

    def of(self, facts: Mapping[str, Any]) -> "BitsPerByte":
        """The same on a split with these facts. Raises ConfigError if they do not say how long its text is."""
        if facts.get("tokenizer") == "bytes":
            return BitsPerByte(end_token=facts.get("end_token"))
        known = facts.get("bytes_per_token")
        if isinstance(known, bool) or not isinstance(known, int | float) or not known > 0:
            raise ConfigError(
                "metrics: bits_per_byte has to know how many bytes of text a token has; let the data set have "
                "bytes_per_token in its facts, or take metrics: [accuracy]"
            )
        return BitsPerByte(known)

    def __call__(self, model: Any, batch: Any) -> Share:
        """The bits, and the bytes."""
        outputs, targets = _of_classes("metrics: bits_per_byte", model, batch)
        with torch.autocast(outputs.device.type, enabled=False):
            logits = outputs.flatten(0, -2).float()
            nats = F.cross_entropy(logits, targets.flatten(), reduction="none", ignore_index=IGNORED)
        counted = targets != IGNORED
        if self._end_token is not None:
            counted &= targets != self._end_token
        return nats.sum(dtype=torch.float64) / math.log(2), counted.sum(dtype=torch.float64) * self._bytes_per_token


def absolute_error(model: Any, batch: Any) -> Tensor:
    """Each sample's mean absolute error, float32 (B,). Raises ConfigError if a batch has no numbers to compare."""
    outputs, targets = model(batch[0]), batch[1]
    numbers = as_numbers(outputs, targets)
    if numbers is None:
        raise ConfigError(
            "metrics: mae is for numbers: outputs and targets of one shape and of a floating dtype. Here the model "
            f"returns {_typed(outputs)}, and the targets are {_typed(targets)}; for classes take accuracy"
        )
    return of_each_sample((numbers[0] - numbers[1]).abs())


def _of_classes(
    asked: str,
    model: Any,
    batch: Any,
    *,
    or_probabilities: bool = False,
    or_tokens: bool = True,
    or_numbers: bool = False,
) -> tuple[Tensor, Tensor]:
    """The model's outputs and a batch's targets, which PyTorch would compare with each other whatever they are."""
    advice = ""
    if not (isinstance(batch, tuple | list) and len(batch) == 2):
        found = f"a batch is {_form(batch)}"
    else:
        outputs, targets = model(batch[0]), batch[1]
        are_numbers = as_numbers(outputs, targets) is not None
        if _are_classes(outputs, targets, or_probabilities=or_probabilities, or_tokens=or_tokens):
            return outputs, targets
        if are_numbers and or_numbers:
            return outputs, targets
        found = f"the model returns {_form(outputs)}, and the targets are {_typed(targets)}"
        advice = f"{FOR_NUMBERS}, or " if are_numbers else ""
    raise ConfigError(
        f"{asked} is for classes: outputs (samples, classes) and targets (samples,) of whole numbers, or of tokens "
        f"(samples, tokens, classes) and (samples, tokens). Here {found}; {advice}name one of your own, FILE.py:NAME"
    )


def _typed(value: Any) -> str:
    kind = f" of {str(value.dtype).removeprefix('torch.')}" if isinstance(value, Tensor) else ""
    return f"{_form(value)}{kind}"


def _are_classes(outputs: Any, targets: Any, *, or_probabilities: bool, or_tokens: bool) -> bool:
    if not (isinstance(outputs, Tensor) and isinstance(targets, Tensor) and outputs.dim() > 1):
        return False
    if targets.is_floating_point():
        return or_probabilities and outputs.shape == targets.shape and outputs.shape[1] > 1
    is_token = or_tokens and are_tokens(outputs, targets)
    return is_token or targets.shape == (outputs.shape[0], *outputs.shape[2:])


def count_of(right: Tensor, counted: Tensor) -> Share:
    """How many are right, and how many were counted."""
    return right.sum(dtype=torch.float64), counted.sum(dtype=torch.float64)


# -- batch normalization -----------------------------------------------------------------------------------------------


def require_enough_samples(config: RunConfig, loss: LossFunction, model: nn.Module, dataset: Split) -> None:
    """Refuse a split of batches that leaves a worker a single sample, for a model that cannot be trained on one.

    Batch normalization has nothing to compare it with; PyTorch says so when it comes to it, after a whole epoch. Raises
    ConfigError, whose message has a batch size that goes.
    """
    workers, samples = config.scaling.max_workers // config.parallel.tensor, len(dataset)
    parts = workers * config.accumulate
    if smallest_batch(samples, config.batch_size) >= 2 * parts or _takes_one(loss, model, dataset):
        return
    sizes = range(config.batch_size + 1, max(4 * parts, 8 * config.batch_size))
    better = next((size for size in sizes if smallest_batch(samples, size) >= 2 * parts), None)
    advice = f"take batch_size: {better}" if better else "take more samples"
    raise ConfigError(
        f"batch_size ({config.batch_size}): the {samples:,} training samples leave a batch of "
        f"{smallest_batch(samples, config.batch_size)} for {workers} workers x {config.accumulate} "
        f"micro-batches, and batch normalization needs two for each; {advice}, fewer workers, or a lower accumulate"
    )


def _takes_one(loss: LossFunction, model: nn.Module, dataset: Split) -> bool:
    """Tell whether the model can be trained on a single sample; leaves it as it is."""
    [batch] = dataset.read([Request(torch.zeros(1, dtype=torch.int64, device=dataset.device), 0, epoch=0)])
    try:
        with torch.random.fork_rng(devices=[]):  # and with gradients, as a loss may compute some itself
            loss(deepcopy(model).train(), batch)
    except ValueError as error:
        return "more than 1 value per channel" not in str(error)
    return True
