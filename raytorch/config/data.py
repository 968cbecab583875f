"""Data sets."""

from typing import Annotated, Any, ClassVar, Literal, Self, get_args

from pydantic import Discriminator, Field, NonNegativeInt, PositiveInt, Tag, model_validator

from raytorch.config.image_files import ImagesData, ShardsData
from raytorch.config.own_parts import OwnData, own_or_shipped
from raytorch.config.section import ConflictError, Section
from raytorch.config.sources import ArraysData, Source, TableData, TextData, TokensData

Sampling = Literal["each", "balanced", "weighted"]
Shuffle = Literal["full", "blocks"]


class Augment(Section):
    """Random changes to training images, drawn anew for every sample of every epoch."""

    crop: NonNegativeInt = 0
    """Pixels of zero padding on each side before a random crop back to the original size; 0 turns it off."""
    flip: bool = False
    """Mirror each image left to right with probability 1/2."""


class Validation(Section):
    """Samples beside the test split, by which a run is judged after each epoch; give a share or a split."""

    share: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Share of the training samples, drawn by the seed, which is judged by and not trained on."""
    split: Annotated[str, Field(min_length=1)] | None = None
    """Split of an own data set, which is called with this name, as with ``train`` and ``test``."""
    test: bool = True
    """Evaluate the test split as well, once, when the run has finished; false for a data set that has none."""

    @model_validator(mode="after")
    def _share_or_split(self) -> Self:
        if (self.share is None) == (self.split is None):
            raise ConflictError("give either a share, as in {share: 0.1}, or a split", "share", "split")
        if self.split in ("train", "test"):
            raise ConflictError(f"must be a split apart from train and test, not {self.split!r}", "split")
        return self

    def held_out(self, samples: int) -> int:
        """How many of so many training samples are judged by.

        Example:
            >>> Validation(share=0.1).held_out(1500)
            150
        """
        return round((self.share or 0) * samples)


class ImageData(Section):
    """Base of all image data sets."""

    train_size: ClassVar[int]
    """Samples of the whole training split, as it is published."""
    kind: ClassVar[str] = "images"
    """The kind of a model's input."""
    image_shape: ClassVar[tuple[int, int, int]] = (1, 28, 28)
    """Channels, height and width of the images, as they are published."""

    name: str
    """The data set."""
    train_samples: PositiveInt | None = None
    """Samples of the training split to use, from its start; all of them by default."""
    test_samples: PositiveInt | None = None
    """Samples of the test split to use, from its start; all of them by default."""
    augment: Augment = Augment()
    """Random changes to training images."""

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of a model's input: (channels, height, width), of clips (channels, frames, height, width)."""
        return self.image_shape

    @model_validator(mode="after")
    def _crop_shows_the_image(self) -> Self:
        height, width = self.input_shape[-2:]
        if self.augment.crop >= min(height, width):
            raise ConflictError(
                f"augment.crop ({self.augment.crop}) must be below the image's height and width ({height} x {width})",
                "augment.crop",
            )
        return self


class StoredData(ImageData):
    """An image data set that is read from files."""

    root: str = "data"
    """Folder that holds the data set's files, in the layout that torchvision uses; ``~`` is expanded."""
    download: bool = False
    """Download missing files into ``root`` and verify their checksums; once for all ranks that share the folder."""


class DigitsData(ImageData):
    """Handwritten digits that raytorch brings along: 1,797 grey images of 8 x 8 pixels, 10 classes."""

    train_size = 1_500
    image_shape = (1, 8, 8)
    name: Literal["digits"] = "digits"
    """The data set."""


class MnistData(StoredData):
    """MNIST: 60,000 + 10,000 grey images of 28 x 28 pixels, 10 classes."""

    train_size = 60_000
    name: Literal["mnist"] = "mnist"
    """The data set."""


class Cifar10Data(StoredData):
    """CIFAR-10: 50,000 + 10,000 colour images of 32 x 32 pixels, 10 classes; python or binary layout."""

    train_size = 50_000
    image_shape = (3, 32, 32)
    name: Literal["cifar10"] = "cifar10"
    """The data set."""


class MovingMnistData(StoredData):
    """Clips of one MNIST digit that drifts over a larger canvas and bounces off its walls, 10 classes."""

    kind = "clips"
    train_size = 60_000
    name: Literal["moving_mnist"] = "moving_mnist"
    """The data set."""
    frames: Annotated[int, Field(ge=2)] = 6
    """Frames per clip."""
    canvas: Annotated[int, Field(ge=28)] = 36
    """Height and width of a frame, in pixels."""

    @property
    def input_shape(self) -> tuple[int, ...]:
        return (1, self.frames, self.canvas, self.canvas)


class MnistStripsData(StoredData):
    """Strips of several MNIST digits side by side, to be written out as a sequence of digits."""

    kind = "strips"
    train_size = 60_000
    name: Literal["mnist_strips"] = "mnist_strips"
    """The data set."""
    min_digits: PositiveInt = 2
    """Fewest digits on a strip."""
    max_digits: PositiveInt = 4
    """Most digits on a strip; shorter strips are blank at the right."""

    @property
    def input_shape(self) -> tuple[int, ...]:
        channels, height, width = self.image_shape
        return (channels, height, width * self.max_digits)

    @model_validator(mode="after")
    def _can_be_written_out(self) -> "MnistStripsData":
        if self.min_digits > self.max_digits:
            raise ConflictError(
                f"min_digits ({self.min_digits}) must not exceed max_digits ({self.max_digits})",
                "min_digits",
                "max_digits",
            )
        if self.augment.flip:
            raise ConflictError("a mirrored strip reads backwards; set augment.flip to false", "augment.flip")
        return self


Data = Annotated[DigitsData | MnistData | Cifar10Data | MovingMnistData | MnistStripsData, Field(discriminator="name")]
"""A data set that is published, and held in memory."""
ShippedData = Annotated[
    DigitsData
    | MnistData
    | Cifar10Data
    | MovingMnistData
    | MnistStripsData
    | ArraysData
    | ImagesData
    | ShardsData
    | TableData
    | TextData
    | TokensData,
    Field(discriminator="name"),
]
SHIPPED: tuple[Any, ...] = get_args(get_args(ShippedData)[0])
SOURCE_NAMES = frozenset(each.model_fields["name"].default for each in SHIPPED if issubclass(each, Source))
DataPart = Annotated[
    Annotated[ShippedData, Tag("shipped")] | Annotated[OwnData, Tag("own")],
    Discriminator(own_or_shipped),
]
"""What the key ``data`` takes; a section of an own data set's known signature stands for OwnData."""


def data_root(data: Any) -> str | None:
    """The folder or URI that a data set reads files below, as its section has it; None if it reads none there.

    Example:
        >>> data_root(MnistData(root="/data"))
        '/data'
    """
    root = getattr(data, "root", None)
    if not isinstance(root, str) or (isinstance(data, Source) and not data.has_root):
        return None
    return root if isinstance(data, StoredData | Source | OwnData) else None


def require_split(data: Any, validation: Validation) -> None:
    """Refuse a validation split that a data set does not have. Raises ConflictError."""
    if validation.split and isinstance(data, ImageData):
        raise ConflictError(
            f"data {data.name} has no split {validation.split}, but train and test; take a share of its training "
            "samples, as in validation: {share: 0.1}",
            "validation.split",
            "data.name",
        )
    if validation.split and isinstance(data, Source):
        try:
            data.files_of(validation.split)
        except ConflictError as error:
            raise ConflictError(str(error), "validation.split", "data.name") from None


def require_order(data: Any, sampling: Sampling, shuffle: Shuffle) -> None:
    """Refuse an order of the training samples that a data set is known not to have. Raises ConflictError."""
    if sampling != "each" and shuffle != "full":
        raise ConflictError(
            f"shuffle: {shuffle} goes with sampling: each; leave one of them out", "shuffle", "sampling"
        )
    if not isinstance(data, ImageData):
        return
    if shuffle == "blocks":
        raise ConflictError(f"data {data.name} is in memory, where all of it is near; leave shuffle out", "shuffle")
    has_classes = data.kind != "strips"
    missing = {"weighted": "weights", "balanced": None if has_classes else "classes"}.get(sampling)
    if missing:
        raise ConflictError(
            f"data {data.name} has no {missing} to draw samples by; take sampling: each"
            f"{' or balanced' if has_classes else ''}",
            "sampling",
            "data.name",
        )
