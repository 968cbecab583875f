"""Scripts of users that tests send to a cluster."""

# As in Ray's own guide, "Get Started with Distributed Training using PyTorch".
RAY_TRAIN_SCRIPT = """
import os
import sys
from pathlib import Path

import ray.train
import torch
from ray.train import ScalingConfig
from ray.train.torch import TorchTrainer

from settings import STEPS


def train_func(config):
    model = ray.train.torch.prepare_model(torch.nn.Linear(4, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for step in range(STEPS):
        loss = model(torch.ones(8, 4)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    ray.train.report({"loss": loss.item()})
    context = ray.train.get_context()
    done = f"{context.get_world_size()} workers, key {len(os.environ['API_KEY'])}"
    Path(config["out"], f"rank-{context.get_world_rank()}").write_text(done)


if __name__ == "__main__":
    print("arguments", sys.argv[1:], "key", len(os.environ["API_KEY"]))
    scaling_config = ScalingConfig(num_workers=2, use_gpu=False)
    TorchTrainer(train_func, train_loop_config={"out": sys.argv[1]}, scaling_config=scaling_config).fit()
"""


# What a user who changes raytorch's own training adds to it.
FAILING_STEP = """
train_step = Trainer.train_step


def fail_on_rank_1(self, micro_batches):
    if self.run.step == 6 and self.run.worker.rank == 1:
        raise ArithmeticError("the user's own mistake")
    train_step(self, micro_batches)


Trainer.train_step = fail_on_rank_1
"""


STORING_SCRIPT = """
import ray

from raytorch.runs.storage import RunFolder


@ray.remote(num_cpus=0)
def folder():
    return str(RunFolder("runs", "kept"))


RunFolder("runs", "kept").make()
RunFolder("runs", "kept").write_text("note", ray.get(folder.remote()))
"""


SQUARE_SCRIPT = """
import sys

import ray


@ray.remote(num_cpus=1)
def square(number):
    return number**2


print("the square is", ray.get(square.remote(int(sys.argv[1]))))
"""


# What no text that ends in lines is: a very long line, a byte that is no UTF-8, a separator, and no newline at the end.
ODD_SCRIPT = """
import sys

sys.stdout.buffer.write(b"x" * 5_000_000 + b"\\ncaf\\xe9\\xe2\\x80\\xa8end\\nthe last words")
sys.exit(3)
"""


OWN_MODEL = """
from pathlib import Path

from .layers import LINEAR
from torch import nn

WIDTH = int((Path(__file__).parents[1] / "width.txt").read_text())


class Net(nn.Module):
    def __init__(self, num_classes: int, *, bias: bool = True):
        super().__init__()
        self.first, self.layer = LINEAR(64, WIDTH), LINEAR(WIDTH, num_classes, bias=bias)

    def forward(self, images):
        return self.layer(self.first(images.flatten(1)).relu())
"""
