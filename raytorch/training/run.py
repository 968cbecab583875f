"""A run as its loop sees it, on each worker: what it registers is saved and restored, and its batches carry it on.

Every worker calls the loop with a :class:`Run` of its own. All of them take the same decisions (stop, save, give up),
as these follow from numbers that are reduced over all workers. The shipped loop, :mod:`raytorch.training.loop`, and
those that users write have the same means.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from raytorch.config import Augment, RunConfig
from raytorch.config.data import Shuffle
from raytorch.config.reading_keys import ReadingKeys
from raytorch.datasets import TrainLoader, evaluation_batches
from raytorch.datasets.own import OwnDataset, is_stream
from raytorch.datasets.requests import Split
from raytorch.datasets.sampling import blocks_of
from raytorch.datasets.skipping import SkippedSamples
from raytorch.datasets.splits import shipped_split
from raytorch.distributed.worker import Worker
from raytorch.errors import ConfigError, UserError
from raytorch.training.batches import Batches
from raytorch.training.evaluation import EVALUATION_BATCH
from raytorch.training.precision import Precision
from raytorch.training.progress import RunProgress
from raytorch.training.run_state import Kept, OptimizerState
from raytorch.training.step_log import Number, require_names
from raytorch.training.streams import stream_of


class Run:
    """A run, in the hands of its loop on one worker.

    Register models, optimizers and what else has a state, then iterate over :meth:`batches`. Between two batches the
    run saves when a checkpoint is due, hears whether it should stop, and writes its metrics; after a restart it goes on
    at the exact next batch. The loop is called from its beginning then: what is registered is given the state that the
    checkpoint has of it.

    Example:
        >>> def main(run: Run, *, lr: float = 1e-3) -> None:
        ...     net = run.model("model", Net, width=64)
        ...     optimizer = run.optimizer("adam", torch.optim.Adam(net.parameters(), lr))
        ...     for images, labels in run.batches(Digits("train"), epochs=10):
        ...         loss = cross_entropy(net(images), labels)
        ...         optimizer.zero_grad()
        ...         run.backward(loss)
        ...         optimizer.step()
        ...         run.log(loss=loss)
    """

    def __init__(self, progress: RunProgress) -> None:
        self._progress = progress

    @property
    def config(self) -> RunConfig:
        """The run's configuration."""
        return self._progress.config

    @property
    def worker(self) -> Worker:
        """This worker: its ``rank``, the ``world_size`` and its ``device``."""
        return self._progress.worker

    @property
    def precision(self) -> Precision:
        """How the configuration's ``precision`` computes on this worker's device."""
        return self._progress.precision

    @property
    def step(self) -> int:
        """Number of the optimizer step that is worked on, from 1; after the batches, of those that were taken."""
        return self._progress.step

    @property
    def epoch(self) -> float:
        """Epochs of the newest batches until now, 2.5 say, with the batch that is worked on."""
        return self._progress.place.epochs_done

    @property
    def ends_epoch(self) -> bool:
        """True in the last step of an epoch, and of the batches: when to evaluate."""
        return self._progress.ends_epoch

    def model(
        self,
        name: str,
        module: nn.Module | Callable[..., nn.Module],
        prepare: Callable[[nn.Module], object] | None = None,
        /,
        **arguments: Any,
    ) -> nn.Module:
        """Put a model on this worker's device, and average its gradients over the workers.

        Args:
            name: Its name in checkpoints; ``model`` is what is exported and loaded unless another is named.
            module: The class, or a function that makes the model, with its ``arguments``, of texts, numbers, lists and
                mappings: then it can be built again when it is loaded or exported. Or the module itself, whose weights
                alone are saved.
            prepare: Called with the module before ``DistributedDataParallel`` has it: to freeze parameters, say.
            arguments: What the class is called with.

        Returns:
            The model, with several workers within ``DistributedDataParallel``; see :meth:`bare`.

        Raises:
            UserError: The name is taken, or the arguments cannot be written down.
            CheckpointError: The checkpoint that the run goes on from has no such model, or of other weights.
        """
        return self._progress.parts.add_model(name, module, arguments, prepare)

    @property
    def is_resumed(self) -> bool:
        """True if it goes on from a checkpoint, of which what is registered has the state."""
        return self._progress.is_resumed

    @property
    def writer(self) -> Any:
        """TensorBoard's ``SummaryWriter`` on rank 0, for pictures and texts; None on others, or if it is not wanted."""
        records = self._progress.records
        return records.summary_writer() if records else None

    @property
    def skipped_samples(self) -> SkippedSamples:
        """What takes the samples of the run that cannot be read, of splits that are loaded for it."""
        return self._progress.skipped_samples

    def report(self, **values: Any) -> None:
        """Tell the driver, whose ``watch`` sees it as progress. Raises UserError for what a run says of itself."""
        if taken := sorted(values.keys() & self._progress.position().keys()):
            raise UserError(f"run.report: {', '.join(taken)}: the run tells that itself; take another name")
        self._progress.report(values)

    def bare(self, name: str) -> nn.Module:
        """A registered model itself, without ``DistributedDataParallel`` around it: its own methods and attributes."""
        return self._progress.parts.model(name).bare

    def average(self, name: str, decay: float = 0.999) -> nn.Module:
        """Keep the exponential moving average of a model's weights and buffers.

        It is saved, loaded and exported in the model's place. Evaluate it within :meth:`evaluating`; it takes each
        optimizer step into account when the next batch is asked for, or there.

        Args:
            name: The model's name.
            decay: Share of the average that a step leaves, as for the key ``ema``.
        """
        return self._progress.parts.add_average(name, decay)

    def optimizer(self, name: str, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
        """Save an optimizer's state and settings with each checkpoint, and write down the rate of its last group."""
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise UserError(f"run.optimizer: {name} must be a torch.optim.Optimizer, not a {type(optimizer).__name__}")
        self._progress.parts.keep(name, OptimizerState(optimizer), "run.optimizer")
        self.gauge(f"lr_{name}", lambda: float(optimizer.param_groups[-1]["lr"]))
        return optimizer

    def keep(self, name: str, part: Kept) -> Kept:
        """Save whatever has ``state_dict`` and ``load_state_dict`` with each checkpoint: a schedule, a running mean.

        What rank 0 has is saved, and given to all workers after a restart: let it be the same on all of them.

        Raises:
            TypeError: Its state is of something else than tensors, numbers, texts, lists and mappings.
        """
        return self._progress.parts.keep(name, part)

    def gauge(self, name: str, read: Callable[[], float]) -> None:
        """Write down a number with each line of metrics, as rank 0 reads it then."""
        require_names("run.gauge", [name])
        self._progress.gauges[name] = read

    def batches(
        self,
        data: Any,
        *,
        batch_size: int | None = None,
        epochs: int | None = None,
        steps: int | None = None,
        readers: int = 0,
        max_skipped: int = 0,
        shuffle: Shuffle = "full",
    ) -> Iterator[Any]:
        """This worker's share of shuffled batches, one for each optimizer step.

        Args:
            data: Of your own, with a length and ``__getitem__`` or ``batch``, as for the key ``data``; or :meth:`data`.
            batch_size: Samples per optimizer step over all workers; by default the configuration's.
            epochs: Passes over the data; by default the configuration's ``epochs`` or ``steps``.
            steps: Optimizer steps, in place of epochs.
            readers: Processes that read ahead.
            max_skipped: How many samples of the run may be skipped, as they cannot be read, before it ends; see the
                key ``data.max_skipped``. With 0 the first ends it.
            shuffle: As the key of a configuration.

        Raises:
            ConfigError: A batch would have no sample for one of the workers, or nothing says how many there are.
        """
        taken = self.steps(
            data,
            batch_size=batch_size,
            epochs=epochs,
            steps=steps,
            readers=readers,
            max_skipped=max_skipped,
            shuffle=shuffle,
        )
        workers = self.worker.data_workers
        if taken.smallest < workers:
            raise ConfigError(
                f"batch_size: {taken.samples:,} samples leave a batch of {taken.smallest} for {workers} workers; "
                "take another batch_size, or run.steps, which weighs what each worker has"
            )
        return (batch.content for [batch] in taken)

    def steps(
        self,
        data: Any,
        *,
        batch_size: int | None = None,
        accumulate: int = 1,
        epochs: int | None = None,
        steps: int | None = None,
        readers: int = 0,
        max_skipped: int = 0,
        shuffle: Shuffle = "full",
        augment: Augment = Augment(),  # noqa: B008 (frozen)
        weights: Tensor | None = None,
    ) -> Batches:
        """As :meth:`batches`, with a list of micro-batches for each optimizer step, each with its weight.

        Multiplied by it, means of losses add up to the gradient of the whole batch's mean, however it is divided.

        Args:
            data: As for :meth:`batches`.
            batch_size: As for :meth:`batches`.
            accumulate: Micro-batches of each worker in a step.
            epochs: As for :meth:`batches`.
            steps: As for :meth:`batches`.
            readers: As for :meth:`batches`.
            max_skipped: As for :meth:`batches`.
            shuffle: As for :meth:`batches`.
            augment: How images of a shipped data set are changed at random; by default they are not.
            weights: float64 (N,), in proportion to which the N samples are drawn, with replacement.

        Returns:
            An iterable, to be used once, which knows ``steps_per_epoch`` and the ``total`` of steps.

        Raises:
            ConfigError: A number is none of at least 1, or nothing says how many steps there are.

        Example:
            >>> for micro_batches in run.steps(data, accumulate=4):
            ...     optimizer.zero_grad()
            ...     for batch in micro_batches:
            ...         run.backward(loss_of(net, batch.content) * batch.weight)
            ...     optimizer.step()
        """
        config = self.config
        given = {"batch_size": batch_size, "accumulate": accumulate, "epochs": epochs, "steps": steps}
        for key, value in given.items():
            if value is not None and (type(value) is not int or value < 1):
                raise ConfigError(f"{key}: run.batches takes a whole number of at least 1, not {value!r:.99}")
        if epochs is not None and steps is not None:
            raise ConfigError("epochs: give run.batches either epochs or steps, not both")
        split = self._split(data, readers, max_skipped)
        loader = TrainLoader(
            split,
            batch_size=batch_size or config.batch_size,
            micro_batches=accumulate,
            rank=self.worker.data_rank,
            world_size=self.worker.data_workers,
            seed=config.seed,
            augment=augment,
            weights=weights,
            blocks=blocks_of(split) if shuffle == "blocks" else None,
        )
        if epochs is None and steps is None:
            epochs, steps = config.epochs, config.steps
        if epochs is None and steps is None:
            raise ConfigError("epochs: say how many, or how many steps, in the configuration or to run.batches")
        return Batches(
            self._progress.take, loader, steps if steps is not None else (epochs or 0) * loader.steps_per_epoch
        )

    def data(self, name: str | Mapping[str, Any], split: Literal["train", "test"]) -> Split:
        """A split of a shipped data set, for :meth:`batches`, :meth:`share` and :meth:`read`.

        Args:
            name: As the key ``data`` of a configuration: ``digits``, or a mapping such as ``{"name": "mnist", "root":
                "/data"}``.
            split: Which.

        Raises:
            ConfigError: There is no such data set, or its folder is not given in full.
            DataError: Its files are not in order.
        """
        return shipped_split(name, split, self.worker.device, self.config.seed, self.skipped_samples)

    def read(self, data: Any, batch_size: int = EVALUATION_BATCH, *, max_skipped: int = 0) -> Iterator[Any]:
        """All batches of a data set in its order, the same on all workers; ``max_skipped`` as for :meth:`batches`."""
        if is_stream(data):
            raise ConfigError("run.read: each worker has a share of a stream alone; take run.share")
        split = self._split(data, 0, max_skipped)
        return (batch.content for batch in evaluation_batches(split, batch_size=batch_size))

    def share(self, data: Any, batch_size: int = EVALUATION_BATCH, *, max_skipped: int = 0) -> Iterator[Any]:
        """This worker's share of a data set in its order, each sample once over all workers, for evaluation.

        Workers may get different numbers of batches: call no collective operation between them. Where models are
        sharded, so that their calls are such operations, each gets as many. ``max_skipped`` is as for :meth:`batches`.

        Raises:
            ConfigError: Models are sharded, and there are fewer samples than workers.
        """
        rank, world_size, in_step = self.worker.data_rank, self.worker.data_workers, self._progress.parts.are_sharded
        split = self._split(data, 0, max_skipped)
        if in_step and len(split) < world_size:
            raise ConfigError(
                f"run.share: {len(split)} samples are too few for {world_size} workers that call a sharded model "
                "together; take run.read"
            )
        batches = evaluation_batches(split, batch_size=batch_size, rank=rank, world_size=world_size, in_step=in_step)
        return (batch.content for batch in batches)

    def autocast(self) -> AbstractContextManager[None]:
        """The context for forward passes in the configuration's ``precision``."""
        return self._progress.precision.autocast()

    def backward(self, loss: Tensor) -> None:
        """``loss.backward()``; a scaling study times how long it waits for other workers."""
        self._progress.backward(loss)

    def skipped(self) -> None:
        """Say that this step left the weights as they were, so that averages take no note of it."""
        self._progress.parts.skip_averages(self.step)

    def log(self, **values: Number) -> None:
        """Write down numbers of this step; a line of metrics has their means since the line before, over all workers.

        Call it alike on all workers. No number is waited for: give tensors as they are.

        Raises:
            DivergedError: When the line is written, one of them is not finite.
        """
        if not self._progress.place.is_replaying:  # a line from before the checkpoint is there already
            self._progress.log.add(self.step, values)

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Put all models into evaluation mode in the block, with gradients off; its time counts as evaluation.

        Evaluate a step's weights after its optimizer has changed them.
        """
        with self._progress.evaluating():
            yield

    def evaluated(self, **metrics: Number | tuple[Number, Number]) -> dict[str, float]:
        """Write down an evaluation, which ranks checkpoints, feeds sweeps and early stopping.

        Args:
            metrics: Each a number, of which the mean over the workers is taken, or ``(sum, count)``, of which all sums
                are divided by all counts.

        Returns:
            The same numbers on all workers.

        Raises:
            ConfigError: The metric that checkpoints are ranked by is not among them.
        """
        return self._progress.evaluated(metrics)

    def tested(self, **metrics: Number | tuple[Number, Number]) -> dict[str, float]:
        """Write down what the finished models come to on a split that has decided nothing, as ``test_metrics``."""
        return self._progress.tested(metrics)

    def _split(self, data: Any, readers: int, max_skipped: int) -> Split:
        if isinstance(data, Split):
            return data
        keys = ReadingKeys(readers=readers, on_error="skip" if max_skipped else "stop")
        if (stream := stream_of(data, self.worker, self.report, keys)) is not None:
            return stream
        told = getattr(data, "split", None)
        return OwnDataset(
            data,
            self.worker.device,
            seed=self.config.seed,
            readers=readers,
            name=told if isinstance(told, str) else "",
            most_skipped=max_skipped,
            skipped=self.skipped_samples,
        )
