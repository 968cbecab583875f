"""The schema of a run: one YAML file, checked in full before anything starts.

Imports neither torch nor ray, so that ``raytorch validate`` answers at once. Reading files, overrides and messages are
in :mod:`raytorch.config_file`.
"""

from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Strict,
    Tag,
    model_validator,
)

Fraction = Annotated[float, Field(ge=0, lt=1)]


class ConflictError(ValueError):
    """Values that are valid one by one but not together; ``keys`` name them, from where the error is raised."""

    def __init__(self, message: str, *keys: str) -> None:
        super().__init__(message)
        self.keys = keys


def _name_alone(value: Any) -> Any:
    """Let ``optimizer: adam`` stand for ``optimizer: {name: adam}``."""
    return {"name": value} if isinstance(value, str) else value


class Section(BaseModel):
    """A part of a run's configuration; unknown keys are refused and values are not changed after validation."""

    model_config = ConfigDict(
        strict=True, extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False
    )


# -- data --------------------------------------------------------------------------------------------------------------


class Augment(Section):
    """Random changes to training images, drawn anew for every sample of every epoch."""

    crop: NonNegativeInt = 0
    """Pixels of zero padding on each side before a random crop back to the original size; 0 turns it off."""
    flip: bool = False
    """Mirror each image left to right with probability 1/2."""


class ImageData(Section):
    """What all image data sets share."""

    name: str
    """The data set."""
    train_samples: PositiveInt | None = None
    """Samples of the training split to use, from its start; all of them by default."""
    test_samples: PositiveInt | None = None
    """Samples of the test split to use, from its start; all of them by default."""
    augment: Augment = Augment()
    """Random changes to training images."""


class StoredData(ImageData):
    """An image data set that is read from files."""

    root: str = "data"
    """Folder that holds the data set's files, in the layout that torchvision uses; ``~`` is expanded."""
    download: bool = False
    """Download missing files into ``root`` through torchvision, which verifies their checksums."""


class DigitsData(ImageData):
    """scikit-learn's bundled handwritten digits: 1,797 grey images of 8 x 8 pixels, 10 classes; needs no download."""

    name: Literal["digits"] = "digits"
    """The data set."""


class MnistData(StoredData):
    """MNIST: 60,000 + 10,000 grey images of 28 x 28 pixels, 10 classes."""

    name: Literal["mnist"] = "mnist"
    """The data set."""


class Cifar10Data(StoredData):
    """CIFAR-10: 50,000 + 10,000 colour images of 32 x 32 pixels, 10 classes; python or binary layout."""

    name: Literal["cifar10"] = "cifar10"
    """The data set."""


class MovingMnistData(StoredData):
    """Clips of one MNIST digit that drifts over a larger canvas and bounces off its walls, 10 classes."""

    name: Literal["moving_mnist"] = "moving_mnist"
    """The data set."""
    frames: Annotated[int, Field(ge=2)] = 6
    """Frames per clip."""
    canvas: Annotated[int, Field(ge=28)] = 36
    """Height and width of a frame, in pixels."""


class MnistStripsData(StoredData):
    """Strips of several MNIST digits side by side, to be written out as a sequence of digits."""

    name: Literal["mnist_strips"] = "mnist_strips"
    """The data set."""
    min_digits: PositiveInt = 2
    """Fewest digits on a strip."""
    max_digits: PositiveInt = 4
    """Most digits on a strip; shorter strips are blank at the right."""

    @model_validator(mode="after")
    def _ordered(self) -> "MnistStripsData":
        if self.min_digits > self.max_digits:
            raise ConflictError(
                f"min_digits ({self.min_digits}) must not exceed max_digits ({self.max_digits})",
                "min_digits",
                "max_digits",
            )
        return self


Data = Annotated[DigitsData | MnistData | Cifar10Data | MovingMnistData | MnistStripsData, Field(discriminator="name")]


# -- models ------------------------------------------------------------------------------------------------------------


class MlpModel(Section):
    """Fully connected layers with ReLU on the flattened image."""

    name: Literal["mlp"] = "mlp"
    """The model."""
    hidden: Annotated[list[PositiveInt], Field(min_length=1)] = [128]
    """Width of each hidden layer."""
    dropout: Fraction = 0.0
    """Probability that a hidden unit is dropped in training."""


class ConvNetModel(Section):
    """3 x 3 convolutions, each followed by ReLU and 2 x 2 max-pooling, then one linear layer."""

    name: Literal["convnet"] = "convnet"
    """The model."""
    channels: Annotated[list[PositiveInt], Field(min_length=1)] = [32, 64]
    """Output channels of each convolution; every entry halves the image's height and width."""
    dropout: Fraction = 0.0
    """Probability that a feature is dropped before the linear layer, in training."""


class ResNet18Model(Section):
    """torchvision's ResNet-18, with a 3 x 3 stem and no first pooling for images of up to 64 pixels."""

    name: Literal["resnet18"] = "resnet18"
    """The model."""


class RnnModel(Section):
    """A recurrent network that reads an image row by row and classifies its last state."""

    name: Literal["rnn"] = "rnn"
    """The model."""
    cell: Literal["rnn", "lstm", "gru"] = "lstm"
    """Kind of recurrent layer: torch.nn.RNN (tanh), LSTM or GRU."""
    hidden: PositiveInt = 128
    """Width of the hidden state."""
    layers: PositiveInt = 1
    """Stacked recurrent layers."""
    bidirectional: bool = False
    """Read the rows in both directions."""
    dropout: Fraction = 0.0
    """Probability that an output is dropped between stacked layers, in training."""


class AttentionModel(Section):
    """What the transformers share."""

    name: str
    """The model."""
    dim: PositiveInt = 64
    """Width of a token's embedding; a multiple of ``heads``."""
    heads: PositiveInt = 4
    """Attention heads."""
    feedforward: PositiveInt = 128
    """Width of the feed-forward layer inside a block."""
    dropout: Fraction = 0.0
    """Probability that an activation is dropped in training."""

    @model_validator(mode="after")
    def _heads_divide_dim(self) -> "AttentionModel":
        if self.dim % self.heads:
            raise ConflictError(f"dim ({self.dim}) must be a multiple of heads ({self.heads})", "dim", "heads")
        return self


class VitModel(AttentionModel):
    """A small vision transformer: patches, positional encoding, encoder layers, attention pooling."""

    name: Literal["vit"] = "vit"
    """The model."""
    patch: PositiveInt = 4
    """Height and width of a patch, in pixels; must divide the image's."""
    layers: PositiveInt = 4
    """Encoder layers."""


class Conv3dModel(Section):
    """3 x 3 x 3 convolutions over time and space, each with batch normalization, ReLU, pooling; then a linear layer."""

    name: Literal["conv3d"] = "conv3d"
    """The model."""
    channels: Annotated[list[PositiveInt], Field(min_length=1)] = [16, 32, 64]
    """Output channels of each convolution; every entry halves the frames' height and width."""


class Seq2SeqModel(AttentionModel):
    """An encoder-decoder transformer: reads an image as columns of pixels and writes a sequence of digits."""

    name: Literal["seq2seq"] = "seq2seq"
    """The model."""
    columns: PositiveInt = 4
    """Width of the image slice that becomes one input token, in pixels; must divide the image's width."""
    encoder_layers: PositiveInt = 2
    """Encoder layers."""
    decoder_layers: PositiveInt = 2
    """Decoder layers."""


Model = Annotated[
    MlpModel | ConvNetModel | ResNet18Model | RnnModel | VitModel | Conv3dModel | Seq2SeqModel,
    Field(discriminator="name"),
]


# -- loss, optimizer, schedule -----------------------------------------------------------------------------------------


class Loss(Section):
    """What training minimizes; ``bce``, ``bce_with_logits`` and ``mse`` compare with one-hot targets."""

    name: Literal["cross_entropy", "bce", "bce_with_logits", "mse"] = "cross_entropy"
    """The loss; ``bce`` and ``mse`` see the model's outputs through a sigmoid and a softmax."""
    label_smoothing: Fraction = 0.0
    """Share of each target spread evenly over all classes; for cross_entropy only."""

    @model_validator(mode="after")
    def _smoothing_needs_cross_entropy(self) -> "Loss":
        if self.label_smoothing and self.name != "cross_entropy":
            raise ConflictError(
                f"label_smoothing works with cross_entropy only, not with {self.name}; remove it",
                "label_smoothing",
                "name",
            )
        return self


class Sgd(Section):
    """torch.optim.SGD."""

    name: Literal["sgd"] = "sgd"
    """The optimizer."""
    lr: PositiveFloat = 0.1
    """Peak learning rate."""
    momentum: Fraction = 0.9
    """Momentum factor."""
    nesterov: bool = False
    """Use Nesterov momentum."""
    weight_decay: NonNegativeFloat = 0.0
    """L2 penalty."""

    @model_validator(mode="after")
    def _nesterov_needs_momentum(self) -> "Sgd":
        if self.nesterov and not self.momentum:
            raise ConflictError("nesterov needs a momentum above 0", "nesterov", "momentum")
        return self


class RmsProp(Section):
    """torch.optim.RMSprop."""

    name: Literal["rmsprop"] = "rmsprop"
    """The optimizer."""
    lr: PositiveFloat = 1e-3
    """Peak learning rate."""
    alpha: Fraction = 0.99
    """Smoothing of the squared gradients."""
    eps: PositiveFloat = 1e-8
    """Added to the denominator for stability."""
    momentum: Fraction = 0.0
    """Momentum factor."""
    centered: bool = False
    """Normalize by the gradient's variance."""
    weight_decay: NonNegativeFloat = 0.0
    """L2 penalty."""


class Adam(Section):
    """torch.optim.Adam."""

    name: Literal["adam"] = "adam"
    """The optimizer."""
    lr: PositiveFloat = 1e-3
    """Peak learning rate."""
    betas: Annotated[tuple[Fraction, Fraction], Strict(False)] = (0.9, 0.999)
    """Decay of the running means of the gradient and of its square."""
    eps: PositiveFloat = 1e-8
    """Added to the denominator for stability."""
    amsgrad: bool = False
    """Use the AMSGrad variant."""
    weight_decay: NonNegativeFloat = 0.0
    """L2 penalty."""


class AdamW(Adam):
    """torch.optim.AdamW."""

    name: Literal["adamw"] = "adamw"  # type: ignore[assignment]
    """The optimizer."""
    weight_decay: NonNegativeFloat = 0.01
    """Decoupled weight decay."""


Optimizer = Annotated[Sgd | RmsProp | Adam | AdamW, Field(discriminator="name")]


class Warmup(Section):
    """What all schedules share."""

    name: str
    """The schedule."""
    warmup_steps: NonNegativeInt = 0
    """Optimizer steps over which the learning rate rises linearly from near 0 to its first value."""


class ConstantSchedule(Warmup):
    """The same learning rate throughout."""

    name: Literal["constant"] = "constant"
    """The schedule."""


class StepSchedule(Warmup):
    """The learning rate is multiplied by ``factor`` every ``every_epochs``."""

    name: Literal["step"] = "step"
    """The schedule."""
    every_epochs: PositiveFloat = 1.0
    """Epochs between two changes; may be a fraction."""
    factor: Annotated[float, Field(gt=0, le=1)] = 0.1
    """Multiplier at each change."""


class CosineSchedule(Warmup):
    """Half a cosine from the peak to ``final`` times the peak (SGDR, arXiv:1608.03983, without restarts)."""

    name: Literal["cosine"] = "cosine"
    """The schedule."""
    final: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Last learning rate, as a share of the peak."""


class OneCycleSchedule(Warmup):
    """Up to the peak and down again along cosines (Smith and Topin, arXiv:1708.07120)."""

    name: Literal["one_cycle"] = "one_cycle"
    """The schedule."""
    rise: Annotated[float, Field(gt=0, lt=1)] = 0.3
    """Share of the steps spent rising."""
    initial: Annotated[float, Field(gt=0, le=1)] = 0.04
    """First learning rate, as a share of the peak."""
    final: Annotated[float, Field(ge=0, le=1)] = 4e-6
    """Last learning rate, as a share of the peak."""


Schedule = Annotated[ConstantSchedule | StepSchedule | CosineSchedule | OneCycleSchedule, Field(discriminator="name")]


# -- running -----------------------------------------------------------------------------------------------------------


class WorkerRange(Section):
    """How few and how many workers an elastic run may have."""

    min: PositiveInt
    """Fewest workers to go on with."""
    max: PositiveInt
    """Most workers to use when the cluster has room."""

    @model_validator(mode="after")
    def _ordered(self) -> "WorkerRange":
        if self.min > self.max:
            raise ConflictError(f"min ({self.min}) must not exceed max ({self.max})", "min", "max")
        return self


def _workers_kind(value: Any) -> str:
    """Choose by form, so that a mistake is reported against the form that was meant."""
    return "range" if isinstance(value, dict | WorkerRange) else "number"


class Scaling(Section):
    """How many workers, and what each of them holds."""

    workers: Annotated[
        Annotated[PositiveInt, Tag("number")] | Annotated[WorkerRange, Tag("range")], Discriminator(_workers_kind)
    ] = 1
    """Worker processes; ``{min: 1, max: 4}`` makes the run elastic."""
    cpus_per_worker: PositiveFloat = 1
    """CPU cores reserved for each worker, and its number of threads."""
    gpus_per_worker: Annotated[float, Field(ge=0, le=1)] = 0
    """GPUs for each worker: 0 trains on CPUs, a fraction shares one GPU."""
    backend: Literal["auto", "nccl", "gloo"] = "auto"
    """Collective communication: auto takes NCCL where each worker holds a GPU of its own, else gloo."""
    timeout_s: PositiveInt = 1800
    """Seconds after which a collective operation that makes no progress fails."""

    @property
    def min_workers(self) -> int:
        """Fewest workers that the run may have."""
        return self.workers.min if isinstance(self.workers, WorkerRange) else self.workers

    @property
    def max_workers(self) -> int:
        """Most workers that the run may have."""
        return self.workers.max if isinstance(self.workers, WorkerRange) else self.workers

    @property
    def resolved_backend(self) -> Literal["nccl", "gloo"]:
        """The backend that ``auto`` stands for."""
        if self.backend != "auto":
            return self.backend
        return "nccl" if self.gpus_per_worker == 1 else "gloo"

    @model_validator(mode="after")
    def _backend_fits_devices(self) -> "Scaling":
        if self.backend == "nccl" and self.gpus_per_worker < 1:
            raise ConflictError(
                "backend nccl needs gpus_per_worker: 1 (a GPU of its own for each worker); use gloo or auto",
                "backend",
                "gpus_per_worker",
            )
        return self


class Checkpointing(Section):
    """When the run's state is saved, and what is kept."""

    every_epochs: PositiveInt | None = 1
    """Epochs between two checkpoints; null saves only by steps. The end of a run always saves."""
    every_steps: PositiveInt | None = None
    """Optimizer steps between two checkpoints within an epoch; null saves only by epochs."""
    keep: PositiveInt = 2
    """Checkpoints to keep: the best, and always the latest."""
    best_by: Literal["accuracy", "loss"] = "accuracy"
    """Test metric by which checkpoints are ranked; checkpoints within an epoch rank below all evaluated ones."""


class Failure(Section):
    """What happens when a worker is lost."""

    max_restarts: Annotated[int, Field(ge=-1)] = 3
    """Restarts from the latest checkpoint after lost workers; -1 for no limit. Errors in code are not retried."""


class Logging(Section):
    """What a run records while it trains."""

    every_steps: PositiveInt = 20
    """Optimizer steps between two lines of metrics; the loss is reduced over all workers at each."""
    tensorboard: bool = True
    """Write TensorBoard events into the run's folder."""


RunName = Annotated[
    str,
    Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$",
        max_length=128,
        # Editors show this keyword in place of the pattern, and so does config_file.
        json_schema_extra={
            "patternErrorMessage": "1 to 128 letters, digits, '.', '_' or '-', of which the first is a letter or digit"
        },
    ),
]


class RunConfig(Section):
    """One training run."""

    name: RunName = "run"
    """Name of the run and of its folder; a run without ``--name`` gets this name and the time."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Seed of weights, data order, augmentation and dropout; the same seed repeats the run."""
    data: Annotated[Data, BeforeValidator(_name_alone)] = DigitsData()
    """Data set."""
    model: Annotated[Model, BeforeValidator(_name_alone)] = MlpModel()
    """Model."""
    loss: Annotated[Loss, BeforeValidator(_name_alone)] = Loss()
    """Loss."""
    optimizer: Annotated[Optimizer, BeforeValidator(_name_alone)] = AdamW()
    """Optimizer."""
    schedule: Annotated[Schedule, BeforeValidator(_name_alone)] = ConstantSchedule()
    """Learning-rate schedule."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Arithmetic of forward and backward: bf16 is autocast with channels_last, weights stay fp32; auto takes bf16 where
    the device has instructions for it."""
    compile: bool = False
    """Compile the model with torch.compile."""
    epochs: PositiveInt | None = None
    """Passes over the training split; give epochs or steps."""
    steps: PositiveInt | None = None
    """Optimizer steps; give epochs or steps."""
    batch_size: PositiveInt = 128
    """Samples per optimizer step, over all workers and accumulated micro-batches."""
    accumulate: PositiveInt = 1
    """Micro-batches whose gradients are added up before each optimizer step."""
    clip_norm: PositiveFloat | None = None
    """Largest norm of the gradient, beyond which it is scaled down; null turns clipping off."""
    scaling: Scaling = Scaling()
    """Workers and their resources."""
    checkpoint: Checkpointing = Checkpointing()
    """Checkpoints."""
    failure: Failure = Failure()
    """Recovery."""
    logging: Logging = Logging()
    """Records."""
    storage: str = "runs"
    """Folder or URI (s3://..., gs://...) below which the run's folder is made; all workers must reach it."""

    @model_validator(mode="after")
    def _epochs_or_steps(self) -> "RunConfig":
        if self.epochs is None and self.steps is None:
            raise ConflictError("give epochs or steps", "epochs", "steps")
        if self.epochs is not None and self.steps is not None:
            raise ConflictError("give either epochs or steps, not both", "epochs", "steps")
        return self

    @model_validator(mode="after")
    def _batch_feeds_every_worker(self) -> "RunConfig":
        least = self.scaling.max_workers * self.accumulate
        if self.batch_size < least:
            raise ConflictError(
                f"batch_size ({self.batch_size}) must be at least workers x accumulate "
                f"({self.scaling.max_workers} x {self.accumulate} = {least}), a sample for each",
                "batch_size",
                "scaling.workers.max",
                "scaling.workers",
                "accumulate",
            )
        return self

    @model_validator(mode="after")
    def _model_fits_data(self) -> "RunConfig":
        model, data = self.model.name, self.data.name
        reads = {"conv3d": "moving_mnist", "seq2seq": "mnist_strips"}
        if model in reads and data != reads[model]:
            raise ConflictError(f"model {model} needs data {reads[model]}, not {data}", "model.name", "data.name")
        for reader, readable in reads.items():
            if data == readable and model != reader:
                raise ConflictError(f"data {data} needs model {reader}, not {model}", "model.name", "data.name")
        return self

    @model_validator(mode="after")
    def _loss_fits_model(self) -> "RunConfig":
        if self.model.name == "seq2seq" and self.loss.name != "cross_entropy":
            raise ConflictError(
                f"model seq2seq needs loss cross_entropy, not {self.loss.name}", "loss.name", "model.name"
            )
        return self
