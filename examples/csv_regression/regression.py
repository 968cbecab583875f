"""An own network on the rows of an own CSV: raytorch train examples/csv_regression/regression.yaml

friedman.csv has 600 rows of y = 10 sin(pi a b) + 20 (c - 1/2)^2 + 10 d + 5 e with noise of standard deviation 0.5
(Friedman, Multivariate Adaptive Regression Splines, 1991).
"""

import csv
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

TEST_EVERY = 5


class Table:
    """Rows of a CSV; every fifth is a test row. Columns are scaled by the training rows' mean and deviation."""

    def __init__(self, split: str, *, file: str = "friedman.csv", target: str = "y") -> None:
        with (Path(__file__).parent / file).open(newline="", encoding="utf-8") as text:
            rows = list(csv.DictReader(text))
        columns = [name for name in rows[0] if name != target]
        inputs = torch.tensor([[float(row[name]) for name in columns] for row in rows])
        targets = torch.tensor([float(row[target]) for row in rows])
        is_test = torch.arange(len(rows)) % TEST_EVERY == 0
        mean, deviation = inputs[~is_test].mean(0), inputs[~is_test].std(0)
        chosen = is_test if split == "test" else ~is_test
        self.inputs, self.targets = ((inputs - mean) / deviation)[chosen], targets[chosen]

    @property
    def facts(self) -> dict[str, Any]:
        """What the model is told: the parameters of these names."""
        return {"columns": self.inputs.shape[1]}

    def __len__(self) -> int:
        return len(self.targets)

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        return self.inputs[indices], self.targets[indices]


class Net(nn.Module):
    """Residual blocks on the columns."""

    def __init__(self, columns: int, *, width: int = 64, blocks: int = 2) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(columns, width), nn.Linear(width, 1)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width)) for _ in range(blocks)
        )

    def forward(self, rows: Tensor) -> Tensor:
        hidden = self.first(rows)
        for block in self.blocks:
            hidden = hidden + block(hidden)
        return self.last(hidden).squeeze(1)

    def example_inputs(self) -> dict[str, Tensor]:
        """What it is exported with."""
        return {"rows": torch.randn(2, self.first.in_features)}


def squared_error(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    rows, targets = batch
    return (model(rows) - targets) ** 2


def mean_absolute_error(model: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, int]:
    rows, targets = batch
    return (model(rows) - targets).abs().sum(), len(targets)
