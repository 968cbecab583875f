"""A run: what to train, on what, how, and with which resources.

Example:
    >>> RunConfig(epochs=3, model=MlpModel(hidden=[64])).batch_size
    128
"""

from typing import Annotated, Any, Literal

from pydantic import (
    BeforeValidator,
    Field,
    PositiveFloat,
    PositiveInt,
    PrivateAttr,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)

from raytorch.config.code_snapshot import CodeSnapshot
from raytorch.config.data import (
    SHIPPED,
    DataPart,
    DigitsData,
    ImageData,
    Sampling,
    Shuffle,
    Validation,
    require_order,
    require_split,
)
from raytorch.config.execution import Averaging, Checkpointing, EarlyStopping, Failure, Logging, Scaling
from raytorch.config.export_formats import ExportFormat
from raytorch.config.metrics import LOSS_LABEL, OF_NUMBERS, Metric, MetricPart, OwnMetric, Ranking
from raytorch.config.models import MODELS, MlpModel, ModelPart, require_products
from raytorch.config.optimization import ConstantSchedule, Loss, LossPart, PlateauSchedule, Schedule
from raytorch.config.optimizers import AdamW, Optimizer, Rprop, peak_rates
from raytorch.config.own_parts import OwnEvaluation, OwnLoop, OwnPart
from raytorch.config.own_section import OwnSection
from raytorch.config.parallel import Parallel, require_possible
from raytorch.config.run_name import RunName
from raytorch.config.section import ConflictError, Section, name_alone
from raytorch.system.near_names import did_you_mean


def steps_per_epoch(samples: int, batch_size: int) -> int:
    """Optimizer steps of an epoch, whatever the number of workers.

    What is left after the last whole batch is one of its own, unless it is a single sample or less than a quarter of a
    batch: then it joins the batch before it, so that no worker is left a sample alone for batch normalization.
    """
    whole, rest = divmod(samples, batch_size)
    return max(1, whole + (rest >= max(2, batch_size / 4)))


def smallest_batch(samples: int, batch_size: int) -> int:
    """Samples of the smallest batch of an epoch."""
    return min(batch_size, samples - (steps_per_epoch(samples, batch_size) - 1) * batch_size)


REPLACED_BY_LOOP = (
    *("data", "validation", "sampling", "shuffle", "model", "loss", "on_evaluation"),
    *("optimizer", "schedule", "accumulate", "ema", "clip_norm"),
)
"""Keys of a run that a loop of the user's own decides."""


class RunConfig(Section):
    """One training run."""

    name: RunName = "run"
    """Name of the run and of its folder; a run without ``--name`` gets this name and the time."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Seed of weights, data order, augmentation and dropout; the same seed repeats the run, on a GPU to
    the bit where it is ``deterministic``."""
    deterministic: bool = False
    """Compute on GPUs as well by algorithms alone that give the same bits each time, which may be slower; an operation
    that has none is an error. Without it, cuDNN tries which algorithms are fastest where all images have one size."""
    data: Annotated[DataPart, BeforeValidator(name_alone)] = DigitsData()
    """Data set."""
    validation: Validation | None = None
    """What the run is judged by after each epoch; null judges by the test split."""
    sampling: Sampling = "each"
    """Training samples of an epoch: each of them once, or as many that are drawn at random, with replacement: with all
    classes equally likely, by the data set's labels, or in proportion to its weights."""
    shuffle: Shuffle = "full"
    """Order of the samples of an epoch: any, or with those near each other that lie together in files, as row groups
    and shards: blocks of samples are shuffled, and so are the samples of each few that follow one another."""
    model: Annotated[ModelPart, BeforeValidator(name_alone)] = MlpModel()
    """Model."""
    loss: Annotated[LossPart, BeforeValidator(name_alone)] = Loss()
    """Loss."""
    loop: Annotated[OwnLoop | None, BeforeValidator(name_alone)] = None
    """A loop of your own, ``FILE.py:NAME``, in place of ``data``, ``model``, ``loss``, ``optimizer``, ``schedule`` and
    what goes with them; ``metrics`` names what it evaluates."""
    metrics: list[Annotated[MetricPart, BeforeValidator(name_alone, json_schema_input_type=str | MetricPart)]] = []
    """Metrics beside the loss: names, or ``{name: ..., better: lower}``; an empty list takes all that the model brings,
    which is the accuracy for those that ship, and of ``gpt`` the bits per byte before it."""
    on_evaluation: (
        Annotated[OwnEvaluation, BeforeValidator(name_alone, json_schema_input_type=str | OwnEvaluation)] | None
    ) = None
    """A function of your own that rank 0 calls after each evaluation, ``FILE.py:NAME``: for pictures and texts."""
    optimizer: Annotated[Optimizer, BeforeValidator(name_alone)] = AdamW()
    """Optimizer."""
    schedule: Annotated[Schedule, BeforeValidator(name_alone)] = ConstantSchedule()
    """Learning-rate schedule."""
    precision: Literal["auto", "fp32", "tf32", "bf16", "fp16"] = "auto"
    """Arithmetic of forward and backward: bf16 and fp16 are autocast, fp16 with a loss that is scaled; weights stay
    fp32, and so do LSTMs on CPUs that have them in fp32 alone. tf32 rounds what GPUs multiply in fp32 to 10 bits, and
    is fp32 where there is none. auto takes bf16 where the device has instructions for it, else fp32."""
    compile: bool = False
    """Compile the model with torch.compile: blocks that are alike one by one, so that one graph serves all of them."""
    epochs: PositiveInt | None = None
    """Passes over the training split; give epochs or steps."""
    steps: PositiveInt | None = None
    """Optimizer steps; give epochs or steps."""
    batch_size: PositiveInt = 128
    """Samples per optimizer step, over all workers and accumulated micro-batches. The last batch of an epoch has what
    is left; less than a quarter of a batch joins the one before it."""
    accumulate: PositiveInt = 1
    """Micro-batches whose gradients are added up before each optimizer step."""
    stop: EarlyStopping | None = None
    """Early stopping; null trains to the last epoch or step."""
    ema: Averaging | None = None
    """Moving average of the weights; null evaluates and saves the newest."""
    clip_norm: PositiveFloat | None = None
    """Largest norm of the gradient, beyond which it is scaled down; null turns clipping off."""
    scaling: Scaling = Scaling()
    """Workers and their resources."""
    parallel: Parallel = Parallel()
    """How the model is divided among the workers."""
    checkpoint: Checkpointing = Checkpointing()
    """Checkpoints."""
    failure: Failure = Failure()
    """Recovery."""
    logging: Logging = Logging()
    """Records."""
    export: list[ExportFormat] = []
    """Formats in which the finished model is left in the run's folder ``export``, each compared with the model:
    ``onnx``, ``torchscript``, ``pt2``, ``safetensors``, and of ``gpt`` ``hf``, a folder for transformers."""
    storage: str = "runs"
    """Folder or URI (s3://..., gs://...) below which the run's folder is made; all workers must reach it."""

    _code: CodeSnapshot | None = PrivateAttr(default=None)

    @property
    def code(self) -> CodeSnapshot | None:
        """The user's own code that it names, as it was when the configuration was read; no key of the file."""
        return self._code

    def with_code(self, code: CodeSnapshot | None) -> "RunConfig":
        """The same run with ``code``."""
        copy = self.model_copy()
        copy._code = code
        return copy

    @property
    def references(self) -> list[str]:
        """Names of the parts that are the user's own: ``FILE.py:NAME``."""
        shipped = (self.data, self.model, self.loss, *self.metrics, self.on_evaluation)
        parts = (self.loop,) if self.loop else shipped
        return [part.name for part in parts if isinstance(part, OwnPart)]

    @property
    def judged_split(self) -> Literal["validation", "test"]:
        """The split by which checkpoints, early stopping and trials are judged."""
        return "validation" if self.validation else "test"

    @property
    def judged_by(self) -> list[Metric | OwnMetric]:
        """The metrics of the run: those that it lists, or all that its model brings, of which an own one has none for
        own data.
        """
        if self.loop:
            return self.metrics
        is_own = isinstance(self.data, OwnPart | OwnSection) and isinstance(self.model, OwnPart | OwnSection)
        return self.metrics or [Metric(name=name) for name in (() if is_own else self.model.metrics)]

    @property
    def metric_names(self) -> tuple[str, ...]:
        """Labels of the metrics of the run, in their order, without the loss."""
        return tuple(metric.label for metric in self.judged_by)

    @property
    def ranking(self) -> Ranking:
        """The order of the run's checkpoints, by ``checkpoint.best_by``."""
        return self.ranking_by(self.checkpoint.best_by)

    def ranking_by(self, name: str | None) -> Ranking:
        """The order of evaluations by the metric of that name or label, by default by the first, or by the loss if
        there is none.

        Raises:
            ConflictError: The run has no such metric.

        Example:
            >>> RunConfig(epochs=1).ranking_by("loss")
            Ranking(label='loss', higher_is_better=False)
        """
        for metric in self.judged_by:
            if name is None or metric.is_called(name):
                return Ranking(metric.label, metric.better == "higher")
        if name in (None, LOSS_LABEL):
            return Ranking(LOSS_LABEL, higher_is_better=False)
        names = (*self.metric_names, LOSS_LABEL)
        raise ConflictError(f"no metric {name} in this run; one of {', '.join(names)}{did_you_mean(name, names)}")

    @model_validator(mode="after")
    def _epochs_or_steps(self) -> "RunConfig":
        if self.epochs is None and self.steps is None and not self.loop:
            raise ConflictError("give epochs or steps", "epochs", "steps")
        if self.epochs is not None and self.steps is not None:
            raise ConflictError("give either epochs or steps, not both", "epochs", "steps")
        return self

    @model_validator(mode="after")
    def _loop_takes_the_place_of_others(self) -> "RunConfig":
        if self.loop is None:
            return self
        for key in REPLACED_BY_LOOP:
            if key in self.model_fields_set and getattr(self, key) != RunConfig.model_fields[key].default:
                raise ConflictError(f"{key} is for raytorch's loop; {self.loop.name} decides it, leave it out", key)
        for metric in self.metrics:
            if ":" in metric.name:
                raise ConflictError(
                    f"with a loop, metrics are the names that it gives run.evaluated, not {metric.name}", "metrics"
                )
        return self

    @model_serializer(mode="wrap")
    def _without_what_the_loop_decides(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        left_out = REPLACED_BY_LOOP if self.loop else ("loop",)
        return {key: value for key, value in dump(self).items() if key not in left_out}

    @model_validator(mode="after")
    def _batch_feeds_every_worker(self) -> "RunConfig":
        workers = self.scaling.max_workers // self.parallel.tensor  # of which each has other samples
        least = workers * self.accumulate
        if self.batch_size < least:
            raise ConflictError(
                f"batch_size ({self.batch_size}) must be at least workers x accumulate "
                f"({workers} x {self.accumulate} = {least}), a sample for each",
                "batch_size",
                "scaling.workers.max",
                "scaling.workers",
                "accumulate",
            )
        return self

    @model_validator(mode="after")
    def _sharding_is_possible(self) -> "RunConfig":
        require_possible(self.parallel, self.scaling, None if self.loop else self.optimizer.name, self.precision)
        if not self.loop:
            require_products(self.model, self.parallel.tensor)
        return self

    @model_validator(mode="after")
    def _warmup_leaves_a_step(self) -> "RunConfig":
        warmup, steps = self.schedule.warmup_steps, self.most_steps
        if steps is not None and warmup >= steps:
            raise ConflictError(
                f"warmup_steps ({warmup:,}) must be below the steps of the run ({steps:,})",
                "schedule.warmup_steps",
                "steps",
                "epochs",
            )
        return self

    @model_validator(mode="after")
    def _optimizer_heeds_the_schedule(self) -> "RunConfig":
        if isinstance(self.optimizer, Rprop) and self.schedule != ConstantSchedule():
            raise ConflictError(
                "rprop finds the steps of each weight by itself, which no schedule and no warm-up changes; leave "
                "schedule out, or take another optimizer",
                "schedule.name",
                "schedule",
                "optimizer.name",
            )
        return self

    @model_validator(mode="after")
    def _plateau_lowers_a_rate(self) -> "RunConfig":
        if isinstance(self.schedule, PlateauSchedule):
            lowest, highest = self.schedule.min_lr, max(peak_rates(self.optimizer))
            if lowest >= highest:
                raise ConflictError(
                    f"min_lr ({lowest:g}) must be below the learning rate ({highest:g}), which falls to it",
                    "schedule.min_lr",
                    "optimizer.lr",
                )
        return self

    @property
    def most_steps(self) -> int | None:
        """Optimizer steps of the run; fewer where a data set's files hold less than is published.

        None for epochs of a data set of the user's own, whose length is known when it is read.
        """
        if self.steps or self.loop or not isinstance(self.data, ImageData):
            return self.steps
        samples = min(self.data.train_samples or self.data.train_size, self.data.train_size)
        samples -= self.validation.held_out(samples) if self.validation else 0
        return (self.epochs or 0) * steps_per_epoch(samples, self.batch_size)

    @model_validator(mode="after")
    def _data_has_what_is_asked_of_it(self) -> "RunConfig":
        if self.validation:
            require_split(self.data, self.validation)
        require_order(self.data, self.sampling, self.shuffle)
        return self

    @model_validator(mode="after")
    def _model_fits_data(self) -> "RunConfig":
        reads, kind = self.model.reads, self.data.kind
        if reads and kind and kind not in reads:
            data = [each.name for each in (known() for known in SHIPPED) if each.kind in (None, *reads)]
            models = [each.model_fields["name"].default for each in MODELS if kind in (each.reads or ())]
            raise ConflictError(
                f"model {self.model.name} reads {' or '.join(reads)}, data {self.data.name} has {kind}; take data "
                f"{' or '.join(data)}, or model {' or '.join(models) or 'FILE.py:NAME of your own'}",
                "model.name",
                "data.name",
            )
        return self

    @model_validator(mode="after")
    def _model_fits_input(self) -> "RunConfig":
        if self.data.input_shape is None:
            return self
        try:
            self.model.check_input(self.data.input_shape)
        except ConflictError as error:
            keys = (f"model.{key}" for key in error.keys)
            raise ConflictError(str(error), *keys, "data.canvas", "data.max_digits", "data.name") from None
        return self

    @model_validator(mode="after")
    def _loss_fits_model(self) -> "RunConfig":
        if self.model.losses is not None and isinstance(self.loss, Loss) and self.loss.name not in self.model.losses:
            raise ConflictError(
                f"model {self.model.name} needs loss {' or '.join(self.model.losses)}, not {self.loss.name}",
                "loss.name",
                "model.name",
            )
        return self

    @model_validator(mode="after")
    def _compiled_models_recompute_by_themselves(self) -> "RunConfig":
        if self.compile and self.model.checkpointing:
            raise ConflictError(
                "checkpointing does not go with compile, which decides by itself what is kept for the backward pass; "
                "leave one of them out",
                "model.checkpointing",
                "compile",
            )
        return self

    @model_validator(mode="after")
    def _metrics_fit_model(self) -> "RunConfig":
        for metric in () if self.loop else self.metrics:
            there = (*self.model.metrics, *OF_NUMBERS)
            if ":" not in metric.name and metric.name not in there:
                raise ConflictError(
                    f"model {self.model.name} has no metric {metric.name}; one of {', '.join(there)}, or FILE.py:NAME"
                    f"{did_you_mean(metric.name, there)}",
                    "metrics",
                    "model.name",
                )
        return self

    @model_validator(mode="after")
    def _metrics_have_labels_of_their_own(self) -> "RunConfig":
        names = self.metric_names
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise ConflictError(f"two metrics are called {twice}; leave one out, or rename it", "metrics")
        return self

    @model_validator(mode="after")
    def _rankings_are_there(self) -> "RunConfig":
        named = {"checkpoint.best_by": self.checkpoint.best_by}
        if self.stop:
            named["stop.metric"] = self.stop.metric
        if isinstance(self.schedule, PlateauSchedule):
            named["schedule.metric"] = self.schedule.metric
        for key, name in named.items():
            try:
                self.ranking_by(name)
            except ConflictError as error:
                raise ConflictError(str(error), key) from None
        return self
