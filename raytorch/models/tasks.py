"""Tasks, which say what a run minimizes and how it is judged: classifying an input, or writing a strip of digits out
as a sequence."""

from copy import deepcopy
from typing import Protocol, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from raytorch.config import Loss, RunConfig
from raytorch.config.run import smallest_batch
from raytorch.datasets.in_memory import END, PAD, Dataset
from raytorch.errors import ConfigError
from raytorch.losses import LOSSES
from raytorch.models.networks import Seq2Seq


class Task(Protocol):
    """How a model is trained and judged on a batch.

    Losses are computed in float32, also within autocast: bf16 has too few digits for logarithms, and PyTorch refuses
    binary cross-entropy there.
    """

    def loss(self, model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
        """Return the mean of the samples' losses, a float32 scalar; ``model`` may be wrapped in DDP."""

    def evaluate(self, model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
        """Return what adds up over batches and workers, float64 (4,), without gradients.

        The four are the sum of the samples' losses, the number of samples, the correct answers and the answers counted.
        ``model`` is the bare module in evaluation mode.
        """


def build_task(config: RunConfig, num_classes: int) -> Task:
    """Build the task that a run's model and loss stand for."""
    if config.model.name == "seq2seq":
        return Transcription(config.loss)
    return Classification(config.loss, num_classes)


def require_enough_samples(config: RunConfig, task: Task, model: nn.Module, dataset: Dataset) -> None:
    """Refuse a split of batches that leaves a worker a single sample, for a model that cannot be trained on one.

    Batch normalization has nothing to compare it with; PyTorch says so when it comes to it, after a whole epoch. Raises
    ConfigError, whose message has a batch size that goes.
    """
    parts, samples = config.scaling.max_workers * config.accumulate, len(dataset)
    if smallest_batch(samples, config.batch_size) >= 2 * parts or _takes_one(task, model, dataset):
        return
    sizes = range(config.batch_size + 1, max(4 * parts, 8 * config.batch_size))
    better = next((size for size in sizes if smallest_batch(samples, size) >= 2 * parts), None)
    advice = f"take batch_size: {better}" if better else "take more samples"
    raise ConfigError(
        f"batch_size ({config.batch_size}): the {samples:,} training samples leave a batch of "
        f"{smallest_batch(samples, config.batch_size)} for {config.scaling.max_workers} workers x {config.accumulate} "
        f"micro-batches, and batch normalization needs two for each; {advice}, fewer workers, or a lower accumulate"
    )


def _takes_one(task: Task, model: nn.Module, dataset: Dataset) -> bool:
    """Tell whether the model can be trained on a single sample; leaves it as it is."""
    inputs, targets = dataset.batch(torch.zeros(1, dtype=torch.int64, device=dataset.device))
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            task.loss(deepcopy(model).train(), inputs, targets)
    except ValueError as error:
        return "more than 1 value per channel" not in str(error)
    return True


class Classification(Task):
    """One class per input: ``targets`` int64 (B,), model outputs (B, num_classes); every sample counts once."""

    def __init__(self, loss: Loss, num_classes: int) -> None:
        self._loss = loss
        self._num_classes = num_classes

    def loss(self, model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
        return self._sample_losses(model(inputs), targets).mean()

    @torch.no_grad()
    def evaluate(self, model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
        outputs = model(inputs)
        correct = outputs.argmax(dim=1) == targets
        return _totals(self._sample_losses(outputs, targets), correct, torch.ones_like(correct))

    def _sample_losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return each sample's loss, float32 (B,); the mean over classes where the targets are one-hot."""
        function = LOSSES[self._loss.name]
        with torch.autocast(outputs.device.type, enabled=False):
            outputs = outputs.float()
            if self._loss.name == "cross_entropy":
                return function(outputs, targets, reduction="none", label_smoothing=self._loss.label_smoothing)
            if self._loss.name == "bce":
                outputs = outputs.sigmoid()
            elif self._loss.name == "mse":
                outputs = outputs.softmax(dim=1)
            one_hot = F.one_hot(targets, self._num_classes).float()
            return function(outputs, one_hot, reduction="none").mean(dim=1)


class Transcription(Task):
    """A sequence of digits per input, for :class:`raytorch.models.networks.Seq2Seq` and its ``targets``.

    A strip's loss is the cross-entropy with teacher forcing, averaged over its digits and END. The digits are judged
    one by one on greedy decoding; END and padding do not count.
    """

    def __init__(self, loss: Loss) -> None:
        self._label_smoothing = loss.label_smoothing

    def loss(self, model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
        return self._sample_losses(model(inputs, targets), targets).mean()

    @torch.no_grad()
    def evaluate(self, model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
        losses = self._sample_losses(model(inputs, targets), targets)
        written = cast(Seq2Seq, model).greedy(inputs, targets.shape[1])
        is_digit = (targets != END) & (targets != PAD)
        return _totals(losses, (written == targets) & is_digit, is_digit)

    def _sample_losses(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Return each strip's loss, float32 (B,)."""
        with torch.autocast(logits.device.type, enabled=False):
            losses = F.cross_entropy(
                logits.float().transpose(1, 2),
                targets,
                reduction="none",
                ignore_index=PAD,
                label_smoothing=self._label_smoothing,
            )
            return losses.sum(dim=1) / (targets != PAD).sum(dim=1)


def _totals(losses: Tensor, correct: Tensor, counted: Tensor) -> Tensor:
    samples = torch.ones_like(losses)
    return torch.stack([part.sum(dtype=torch.float64) for part in (losses, samples, correct, counted)])
