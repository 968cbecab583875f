"""A small network learns from a large one: raytorch train examples/distillation/distillation.yaml

First the teacher is trained, then the student on what the teacher says of the same images (Hinton et al., Distilling
the Knowledge in a Neural Network, 2015). A run that is killed goes on in the pass over the data in which it was.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div, log_softmax

from raytorch import Run


class Net(nn.Sequential):
    """Images (B, 1, 8, 8) to logits (B, 10)."""

    def __init__(self, *, width: int) -> None:
        super().__init__(
            nn.Flatten(), nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10)
        )

    def example_inputs(self) -> dict[str, Tensor]:
        """What it is exported with."""
        return {"input": torch.randn(2, 1, 8, 8)}


def main(
    run: Run,
    *,
    width: int = 16,
    teacher_width: int = 256,
    teacher_epochs: int = 10,
    temperature: float = 4.0,
    lr: float = 2e-3,
) -> None:
    train, test = run.data("digits", "train"), run.data("digits", "test")
    teacher = run.model("teacher", Net, width=teacher_width)
    student = run.model("model", Net, width=width)
    learn = run.optimizer("learn", torch.optim.AdamW(teacher.parameters(), lr))
    imitate = run.optimizer("imitate", torch.optim.AdamW(student.parameters(), lr))

    for images, targets in run.batches(train, epochs=teacher_epochs):
        learn.zero_grad()
        loss = cross_entropy(teacher(images), targets)
        run.backward(loss)
        learn.step()
        run.log(teacher_loss=loss)

    teacher.eval()
    for images, _ in run.batches(train):
        imitate.zero_grad()
        with torch.no_grad():
            told = log_softmax(teacher(images) / temperature, dim=1)
        loss = kl_div(log_softmax(student(images) / temperature, dim=1), told, reduction="batchmean", log_target=True)
        run.backward(loss * temperature**2)
        imitate.step()
        run.log(loss=loss)
        if run.ends_epoch:
            with run.evaluating():
                right = [accuracy(run, student, test), accuracy(run, teacher, test)]
            run.evaluated(accuracy=right[0], teacher_accuracy=right[1])


def accuracy(run: Run, net: nn.Module, data: Any) -> tuple[Tensor, float]:
    """How many of this worker's share of the images the network gets right, and how many there are."""
    right = [(net(images).argmax(1) == targets).double() for images, targets in run.share(data)]
    counted = torch.cat(right) if right else torch.zeros(0, device=run.worker.device)
    return counted.sum(), len(counted)
