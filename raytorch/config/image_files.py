"""Data sets of images in files of the user's own: in folders, tables and tar shards."""

from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from raytorch.config.section import ConflictError, Section
from raytorch.config.sources import Name, Source

Extent = PositiveInt | Annotated[list[PositiveInt], Field(min_length=2, max_length=2)]
"""Pixels of a square's side, or height and width."""
_Area = Annotated[float, Field(gt=0, le=1)]


class ImageAugment(Section):
    """Random changes to training images, by random numbers of each sample's own."""

    crop: bool = False
    """Cut ``size`` out anywhere, in place of the centre."""
    padding: NonNegativeInt = 0
    """Pixels of black on each side of the image, before ``crop``."""
    resized_crop: Annotated[list[_Area], Field(min_length=2, max_length=2)] | None = None
    """Cut out a part of the image of any place and of 3:4 to 4:3, and resize it to ``size``: the least and the most of
    the image's area that it has, as in ``[0.08, 1]``."""
    flip: bool = False
    """Mirror left to right with probability 1/2."""
    brightness: NonNegativeFloat = 0.0
    """Multiply the brightness by a factor of up to so much below and above 1."""
    contrast: NonNegativeFloat = 0.0
    """The same with the contrast."""
    saturation: NonNegativeFloat = 0.0
    """The same with the saturation."""
    hue: Annotated[float, Field(ge=0, le=0.5)] = 0.0
    """Turn the hue by up to so much of its circle, either way."""

    @model_validator(mode="after")
    def _one_crop(self) -> Self:
        if self.crop and self.resized_crop:
            raise ConflictError("give either crop or resized_crop", "crop", "resized_crop")
        if self.padding and not self.crop:
            raise ConflictError("padding is for crop; set crop to true, or leave padding out", "padding")
        if self.resized_crop and self.resized_crop[0] > self.resized_crop[1]:
            raise ConflictError("resized_crop has the least area first, as in [0.08, 1]", "resized_crop")
        return self


class ImageFiles(Source):
    """Base of the data sets of images in files."""

    size: Extent = 224
    """Height and width of what the model sees, in pixels: a number for both, or ``[height, width]``."""
    resize: Extent | None = None
    """What each image is resized to as it is read, its proportions kept: the shorter side, or a height and width that
    it covers. By default 8/7 of ``size``; training images for ``augment.resized_crop`` are then taken as they are."""
    augment: ImageAugment = ImageAugment()
    """Random changes to training images."""
    mean: Annotated[list[float], Field(min_length=3, max_length=3)] = [0.485, 0.456, 0.406]
    """Subtracted from red, green and blue, which are 0 to 1; by default ImageNet's, as ``std`` is."""
    std: Annotated[list[PositiveFloat], Field(min_length=3, max_length=3)] = [0.229, 0.224, 0.225]
    """What they are then divided by."""
    cache: Literal["none", "memory"] = "none"
    """Keep images in memory, as decoded and resized, as far as they fit; no batch is changed by it."""

    @property
    def height_and_width(self) -> tuple[int, int]:
        """Of what the model sees.

        Example:
            >>> ImagesData(size=[96, 128]).height_and_width
            (96, 128)
        """
        return _both(self.size)

    def covered(self, *, training: bool) -> tuple[int, int] | None:
        """The height and width that each image is resized to cover; None for those that are taken as they are."""
        if self.resize is not None:
            return _both(self.resize)
        height, width = self.height_and_width
        return None if training and self.augment.resized_crop else (round(height * 8 / 7), round(width * 8 / 7))

    @model_validator(mode="after")
    def _resized_is_cut_out_of(self) -> Self:
        if self.resize is not None and any(
            there < cut for there, cut in zip(_both(self.resize), self.height_and_width, strict=True)
        ):
            raise ConflictError(
                f"resize ({self.resize}) must not be below size ({self.size}), which is cut out of it", "resize", "size"
            )
        return self


class ImagesData(ImageFiles):
    """JPEG, PNG and WebP files in a folder for each class, or named by a table with their classes."""

    kind: ClassVar[str] = "images"
    name: Literal["images"] = "images"
    """The data set."""
    classes: Annotated[list[Name], Field(min_length=1)] | None = None
    """Names of the classes in the order of their numbers; by default those of the training samples, sorted."""
    path_column: Name = "path"
    """Column of paths in tables, ``.csv`` files, from the table's own folder on."""
    label_column: Name = "label"
    """Column of classes in tables."""

    @property
    def input_shape(self) -> tuple[int, ...]:  # type: ignore[override]
        """Shape of a model's input."""
        return (3, *self.height_and_width)


IMAGE_FIELDS = ("jpg", "jpeg", "png", "webp")
"""Extensions of images."""
FIELDS = (*IMAGE_FIELDS, "cls", "json", "txt", "npy")


class ShardsData(ImageFiles):
    """Tar shards in WebDataset's layout, read by position: the files ``KEY.EXTENSION`` of a sample lie together.

    ``raytorch data index`` writes an index beside each shard, once.
    """

    name: Literal["shards"] = "shards"
    """The data set."""
    fields: Annotated[list[Name], Field(min_length=1)] = ["jpg", "cls"]
    """Extensions of the files that a batch is a tuple of, in its order: at most one of ``jpg``, ``jpeg``, ``png`` and
    ``webp``, resized and changed as the other keys say; ``cls``, a class's number; ``npy``; ``json``; ``txt``; or such
    a one behind a name, as in ``left.npy``."""
    num_classes: PositiveInt | None = None
    """How many classes there are; by default one more than the highest ``cls`` of the training samples."""

    @property
    def kind(self) -> str | None:  # type: ignore[override]
        """That of images where a batch is images and classes."""
        return "images" if [self.is_image(field) or field for field in self.fields] == [True, "cls"] else None

    @property
    def input_shape(self) -> tuple[int, ...] | None:  # type: ignore[override]
        """Shape of a model's input, if that is images."""
        return (3, *self.height_and_width) if self.kind else None

    @staticmethod
    def is_image(field: str) -> bool:
        """Tell whether a field is of images.

        Example:
            >>> ShardsData.is_image("left.png")
            True
        """
        return field.rpartition(".")[2] in IMAGE_FIELDS

    @model_validator(mode="after")
    def _fields_can_be_read(self) -> Self:
        for field in self.fields:
            if field.rpartition(".")[2] not in FIELDS:
                raise ConflictError(f"fields may end in {', '.join(FIELDS)}, not {field}", "fields")
        if len(set(self.fields)) < len(self.fields):
            raise ConflictError("fields has one twice; leave it out", "fields")
        if sum(map(self.is_image, self.fields)) > 1:
            raise ConflictError(
                "fields has more than one image, each of which would be changed at random in a way of its own", "fields"
            )
        return self


def _both(extent: int | list[int]) -> tuple[int, int]:
    return (extent, extent) if isinstance(extent, int) else (extent[0], extent[1])
