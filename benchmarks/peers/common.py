"""The work that every training peer does: MNIST, a small conv net, SGD, batch 64 per worker, float32."""

import time

import torch
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler
from torchvision import datasets, transforms

BATCH = 64
STEPS = 150


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 32, 3, padding=1)
        self.conv2 = nn.Conv2d(32, 64, 3, padding=1)
        self.head = nn.Linear(64 * 7 * 7, 10)

    def forward(self, x):
        x = torch.max_pool2d(torch.relu(self.conv1(x)), 2)
        x = torch.max_pool2d(torch.relu(self.conv2(x)), 2)
        return self.head(x.flatten(1))


def loader(root: str, rank: int, world: int) -> DataLoader:
    to_tensor = transforms.Compose([transforms.ToTensor(), transforms.Normalize((0.1307,), (0.3081,))])
    data = datasets.MNIST(root, train=True, download=False, transform=to_tensor)
    return DataLoader(data, batch_size=BATCH, sampler=DistributedSampler(data, world, rank))


def train(model: nn.Module, batches: DataLoader, started: float) -> dict:
    """Returns seconds from `started` to the end of the first step, and samples/s of this worker after it."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    first = None
    for step, (images, labels) in enumerate(batches):
        if step == STEPS + 1:
            break
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        if first is None:
            first, begun = time.time() - started, time.perf_counter()
    seconds = time.perf_counter() - begun
    return {
        "first_step_s": round(first, 2),
        "samples_per_s_per_worker": round(STEPS * BATCH / seconds, 1),
        "loss": loss.item(),
    }
