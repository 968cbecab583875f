"""Draws the images of this example, 16 x 16 pixels, as PNG files in a folder for each class: images/train/ring/000.png

python examples/image_folder/draw_images.py
"""

from pathlib import Path

import torch
from torch import Tensor
from torchvision.io import write_png

FOLDER = Path(__file__).parent / "images"
SIZE, TRAIN, TEST = 16, 80, 20


def shapes(x: Tensor, y: Tensor, size: Tensor) -> dict[str, Tensor]:
    """Where each shape is, by class: coordinates from its middle (H, W), and its size."""
    far, near = (x**2 + y**2).sqrt(), torch.minimum(x.abs(), y.abs())
    inside = torch.maximum(x.abs(), y.abs()) < size
    return {
        "cross": inside & (near < 1),
        "disc": far < size,
        "frame": inside & (torch.maximum(x.abs(), y.abs()) > size - 1.5),
        "ring": (far < size) & (far > size - 2),
        "saltire": inside & ((x.abs() - y.abs()).abs() < 1),
        "square": inside,
    }


def draw(kind: str, generator: torch.Generator) -> Tensor:
    """A noisy image of a shape at a random place, uint8 (1, H, W)."""
    middle = 6 + 4 * torch.rand(2, generator=generator)
    size = 3.5 + 2 * torch.rand((), generator=generator)
    rows, columns = torch.meshgrid(torch.arange(SIZE) - middle[0], torch.arange(SIZE) - middle[1], indexing="ij")
    image = 0.7 * shapes(columns, rows, size)[kind] + 0.3 * torch.rand(SIZE, SIZE, generator=generator)
    return (255 * image).to(torch.uint8)[None]


def main() -> None:
    generator = torch.Generator().manual_seed(0)
    kinds = shapes(torch.zeros(1), torch.zeros(1), torch.ones(()))
    for split, count in (("train", TRAIN), ("test", TEST)):
        for kind in kinds:
            folder = FOLDER / split / kind
            folder.mkdir(parents=True, exist_ok=True)
            for number in range(count):
                write_png(draw(kind, generator), str(folder / f"{number:03}.png"))


if __name__ == "__main__":
    main()
