"""Images in a folder for each class, and a net that is fine-tuned on classes which it has never seen:

python examples/image_folder/draw_images.py
raytorch train examples/image_folder/image_folder.yaml

pretrained.safetensors has the weights of a run on the other four classes:

raytorch train examples/image_folder/image_folder.yaml --name pretrained --set model.weights=null \\
    --set "data.classes=[cross, disc, frame, square]" --set "model.freeze=[]" --set epochs=30
raytorch export pretrained --format safetensors --code examples/image_folder
"""

from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torchvision.io import decode_image

HERE = Path(__file__).parent


class ImageFolder:
    """PNG files below ``FOLDER/train/CLASS`` and ``FOLDER/test/CLASS``, read when they are asked for.

    Training images are mirrored at random: ``rng`` is the sample's own generator, the same after a restart.
    """

    def __init__(self, split: str, *, folder: str = "images", classes: list[str] | None = None) -> None:
        place = HERE / folder / split
        if not place.is_dir():
            raise FileNotFoundError(f"{place} is not there; run draw_images.py first")
        self.is_training = split == "train"
        self.classes = classes or sorted(each.name for each in place.iterdir())
        self.files = [(file, kind) for kind in self.classes for file in sorted((place / kind).glob("*.png"))]

    @property
    def facts(self) -> dict[str, Any]:
        """What the model is told: the parameters of these names."""
        return {"num_classes": len(self.classes), "input_shape": list(self[0][0].shape)}

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int, rng: Any = None) -> tuple[Tensor, int]:
        file, kind = self.files[index]
        image = decode_image(str(file)).float() / 255 - 0.5
        if self.is_training and rng is not None and rng.random() < 0.5:
            image = image.flip(-1)
        return image, self.classes.index(kind)


class Block(nn.Module):
    """Two convolutions, whose result is added to what they read, as in ResNet-v2 (He et al., 2016)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            *(nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, width, 3, padding=1)),
            *(nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, width, 3, padding=1)),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


class Net(nn.Module):
    """Images (B, C, H, W) to logits (B, num_classes): a stem, blocks and a head, as timm's models have them."""

    def __init__(self, input_shape: list[int], num_classes: int, *, width: int = 16, depth: int = 2) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(input_shape[0], width, 3, stride=2, padding=1), nn.BatchNorm2d(width))
        self.blocks = nn.Sequential(*(Block(width) for _ in range(depth)))
        self.head = nn.Linear(width, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(images)).amax((2, 3)))


def create_net(input_shape: list[int], num_classes: int, *, width: int = 16, depth: int = 2) -> nn.Module:
    """Make the net. For one of timm's: ``return timm.create_model("resnet18", num_classes=num_classes)``."""
    net = Net(input_shape, num_classes, width=width, depth=depth)
    nn.init.zeros_(net.head.bias)
    return net


def error_rate(model: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, int]:
    images, labels = batch
    return (model(images).argmax(1) != labels).sum(), len(labels)
