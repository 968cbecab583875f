"""Digits out of noise, by two networks that are trained against each other: raytorch train examples/gan/gan.yaml

The losses are the non-saturating ones of Goodfellow et al., Generative Adversarial Nets, 2014. What is evaluated is a
moving average of the generator, by the Fréchet distance of its images' pixels to the test images' (Heusel et al., GANs
Trained by a Two Time-Scale Update Rule, 2017, who take an Inception network's features in their place).
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from raytorch import Run

PIXELS = 64
DRAWN = 1_000


class Generator(nn.Module):
    """Noise (B, latent) to images (B, 64)."""

    def __init__(self, *, latent: int = 16, width: int = 128) -> None:
        super().__init__()
        self.latent = latent
        self.layers = nn.Sequential(
            nn.Linear(latent, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, PIXELS)
        )

    def forward(self, noise: Tensor) -> Tensor:
        return self.layers(noise)

    def example_inputs(self) -> dict[str, Tensor]:
        """What it is exported with."""
        return {"noise": torch.randn(2, self.latent)}


class Discriminator(nn.Module):
    """Images (B, 64) to a number each: the higher, the more real (B, 1)."""

    def __init__(self, *, width: int = 128) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(PIXELS, width), nn.LeakyReLU(0.2), nn.Dropout(0.2), nn.Linear(width, 1))

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images)

    def example_inputs(self) -> dict[str, Tensor]:
        """What it is exported with."""
        return {"images": torch.randn(2, PIXELS)}


def main(run: Run, *, latent: int = 16, width: int = 128, lr: float = 1e-3) -> None:
    generator = run.model("generator", Generator, latent=latent, width=width)
    discriminator = run.model("discriminator", Discriminator, width=width)
    average = run.average("generator", decay=0.99)
    improve = run.optimizer("improve", torch.optim.Adam(generator.parameters(), lr, betas=(0.5, 0.99)))
    judge = run.optimizer("judge", torch.optim.Adam(discriminator.parameters(), lr, betas=(0.5, 0.99)))
    test = torch.cat([images.flatten(1) for images, _ in run.read(run.data("digits", "test"))])

    for images, _ in run.batches(run.data("digits", "train")):
        real = images.flatten(1)
        fake = generator(torch.randn(len(real), latent, device=real.device))

        judge.zero_grad()
        loss_d = softplus(-discriminator(real)).mean() + softplus(discriminator(fake.detach())).mean()
        run.backward(loss_d)
        judge.step()

        improve.zero_grad()
        discriminator.requires_grad_(False)
        loss_g = softplus(-discriminator(fake)).mean()
        run.backward(loss_g)
        discriminator.requires_grad_(True)
        improve.step()

        run.log(loss_d=loss_d, loss_g=loss_g)
        if run.ends_epoch:
            with run.evaluating():
                noise = torch.randn(DRAWN, latent, generator=torch.Generator().manual_seed(0))
                drawn = average(noise.to(real.device))
            run.evaluated(distance=frechet_distance(test, drawn))


def frechet_distance(one: Tensor, other: Tensor) -> Tensor:
    """The distance of the normal distributions that two sets of vectors, (N, D) and (M, D), have the moments of."""
    means = one.mean(0), other.mean(0)
    first, second = torch.cov(one.T), torch.cov(other.T)
    root = _root(first)
    return (means[0] - means[1]).square().sum() + (first + second - 2 * _root(root @ second @ root)).trace()


def _root(matrix: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return vectors * values.clamp_min(0).sqrt() @ vectors.T
