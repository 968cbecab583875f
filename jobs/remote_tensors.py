"""Train a small net on MNIST by handles, on two workers: python jobs/remote_tensors.py DATA [--workers 2] [--epochs 1]

DATA is a folder with MNIST/raw/*-ubyte; without it, the handwritten digits are used. Copy and change.
"""

import argparse

import torch
from rich.progress import track
from torch import Tensor, nn
from torch.nn import functional as F

import raytorch
from raytorch.config import DigitsData, MnistData
from raytorch.datasets import load_dataset


def inputs_and_targets(data: str | None, split: str) -> tuple[Tensor, Tensor]:
    """Images (N, 1, H, W), normalized, and their digits."""
    source = MnistData(name="mnist", root=data) if data else DigitsData(name="digits")
    dataset = load_dataset(source, split, torch.device("cpu"))
    return dataset.batch(torch.arange(len(dataset)))


def conv_net(side: int) -> nn.Module:
    """Made on every worker; DDP gives all of them rank 0's weights."""
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(32 * (side // 2) ** 2, 10)
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="?")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--batch", type=int, default=64, help="samples per worker and step")
    options = parser.parse_args()

    images, digits = inputs_and_targets(options.data, "train")
    test_images, test_digits = inputs_and_targets(options.data, "test")
    with raytorch.connect(workers=options.workers) as session:
        session.manual_seed(0)
        x, y = session.scatter(images), session.scatter(digits)  # each worker holds its shard
        net = session.module(conv_net, images.shape[-1])
        ddp = session.ddp(net)
        optimizer = session.optimizer("rmsprop", net.parameters(), lr=1e-3)

        steps = len(images) // options.workers // options.batch
        for epoch in range(options.epochs):
            order = session.randperm(len(images) // options.workers)
            for step in track(range(steps), f"epoch {epoch + 1}"):
                batch = order[step * options.batch : (step + 1) * options.batch]
                loss = F.cross_entropy(ddp(x[batch]), y[batch])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                if step % 100 == 99:  # asking waits for the workers; recording does not
                    print(f"step {step + 1}: loss {loss.item():.4f}")

            net.eval()
            with torch.no_grad():
                test_x, test_y = session.scatter(test_images), session.scatter(test_digits)
                correct = (net(test_x).argmax(1) == test_y).sum()
            raytorch.distributed.all_reduce(correct)
            print(f"epoch {epoch + 1}: test accuracy {correct.item() / len(test_digits):.4f}")
            net.train()


if __name__ == "__main__":
    main()
