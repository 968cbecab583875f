"""What becomes of an image, from the bytes of a file to a batch on a device: the same for all sources of images."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from raytorch.config.image_files import ImageFiles
from raytorch.errors import DataError
from raytorch.sources.batch_room import BatchRoom
from raytorch.sources.image_changes import RandomChanges, centre, covering
from raytorch.sources.image_decoding import decoded, require_decoders
from raytorch.sources.shared_pixels import SharedPixels, share_of_machine


class ImagePipeline:
    """Decoded, resized and cut out of the middle; or, for training, changed at random.

    What no random number decides comes first, and is what ``cache: memory`` keeps.
    """

    def __init__(self, section: ImageFiles, images: int, *, training: bool) -> None:
        """For so many ``images``. Raises DataError where none can be decoded."""
        require_decoders()
        self.size = height, width = section.height_and_width
        self._covered = section.covered(training=training)
        augment = section.augment
        self._change = RandomChanges(augment, height, width) if training else None
        self._is_cut_last = training and bool(augment.crop or augment.resized_crop)
        self._kept = SharedPixels(images, share_of_machine()) if section.cache == "memory" else None
        self._room = BatchRoom(height, width)
        # For whole rows of an image: by three colours at a time it would take four times as long.
        mean, std = (torch.tensor(each * width) for each in (section.mean, section.std))
        self._scale, self._offset = 1 / (255 * std), -mean / std

    def image(
        self, number: int, read: Callable[[], bytes], place: Callable[[], str], rng: np.random.Generator | None
    ) -> Tensor:
        """An image by its number, uint8 (H, W, 3); random changes draw from ``rng``, and without it there are none.

        ``read`` reads its file, where it has not been kept, and ``place`` names that in errors. Raises DataError.
        """
        image = None if self._kept is None else self._kept.get(number)
        if image is None:
            image = self._fixed(read(), place)
            if self._kept is not None:
                self._kept.put(number, image)
        if not self._change:
            return self._room.next().copy_(image)
        return image if rng is None else self._change(image, rng, self._room.next())

    def batch(self, images: Sequence[Tensor]) -> Tensor:
        """Images as a batch, uint8 (B, 3, H, W), in which an image's colours lie together as before."""
        return self._room.batch(images).permute(0, 3, 1, 2)

    def normalized(self, images: Tensor) -> Tensor:
        """A batch as a model takes it, float32 (B, 3, H, W), on its device."""
        self._scale, self._offset = self._scale.to(images.device), self._offset.to(images.device)
        pixels = images.permute(0, 2, 3, 1).contiguous()
        normal = torch.empty(pixels.shape, dtype=torch.float32, device=images.device)
        # A CPU takes one image after the other, which stays in its cache from one operation to the next.
        parts = (normal, pixels) if images.device.type == "cpu" else (normal[None], pixels[None])
        for into, part in zip(*parts, strict=True):
            rows = into.view(-1, len(self._scale))
            torch.addcmul(self._offset, rows.copy_(part.view(rows.shape)), self._scale, out=rows)
        return normal.permute(0, 3, 1, 2)

    def _fixed(self, content: bytes, place: Callable[[], str]) -> Tensor:
        try:
            image = decoded(content)
        except ValueError as error:
            raise DataError(f"{place()}: expected a JPEG, PNG or WebP image, {error}") from error
        if self._covered:
            image = covering(image, *self._covered)
        return (image if self._is_cut_last else centre(image, *self.size)).contiguous()
