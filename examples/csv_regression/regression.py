"""An own network, loss and metric on the rows of a CSV: raytorch train examples/csv_regression/regression.yaml

friedman.csv has 600 rows of y = 10 sin(pi a b) + 20 (c - 1/2)^2 + 10 d + 5 e with noise of standard deviation 0.5
(Friedman, Multivariate Adaptive Regression Splines, 1991).
"""

import torch
from torch import Tensor, nn


class Net(nn.Module):
    """Residual blocks on the columns; their number is what the data tells of itself, as ``input_shape``."""

    def __init__(self, input_shape: list[int], *, width: int = 64, blocks: int = 2) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(input_shape[0], width), nn.Linear(width, 1)
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
