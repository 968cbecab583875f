"""Steps of optimizers, fused and not, on one core: python benchmarks/optimizers.py [--runs 30]

Takes steps of PyTorch's default, of its foreach and of its fused implementation in turn, with the same parameters and
gradients, and prints the least milliseconds of each.
"""

import argparse
import time
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from torchvision.models import resnet18

KINDS: dict[str, dict[str, Any]] = {
    "default": {"foreach": False, "fused": False},
    "foreach": {"foreach": True},
    "fused": {"fused": True},
}
OPTIMIZERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "AdamW": (torch.optim.AdamW, {}),
    "SGD with momentum": (torch.optim.SGD, {"lr": 0.01, "momentum": 0.9}),
}


def models() -> dict[str, nn.Module]:
    layer = nn.TransformerEncoderLayer(256, 4, 1024, batch_first=True)
    return {
        "two layers": nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 10)),
        "transformer, 6 layers": nn.TransformerEncoder(layer, 6, enable_nested_tensor=False),
        "ResNet-18": resnet18().to(memory_format=torch.channels_last),
    }


def least_ms(parameters: list[nn.Parameter], optimizer: str, runs: int) -> dict[str, float]:
    kind, settings = OPTIMIZERS[optimizer]
    steps = {name: kind(parameters, **settings, **how).step for name, how in KINDS.items()}
    taken: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(runs):
        for name, step in steps.items():
            begun = time.perf_counter()
            step()
            taken[name].append(time.perf_counter() - begun)
    return {name: min(seconds) * 1e3 for name, seconds in taken.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=30)
    runs = parser.parse_args().runs
    torch.set_num_threads(1)
    table = Table("ms per step", *KINDS, "fused / default", title=f"torch {torch.__version__}, 1 core")
    for optimizer in OPTIMIZERS:
        for name, model in models().items():
            parameters = list(model.parameters())
            for parameter in parameters:
                parameter.grad = torch.randn_like(parameter) * 1e-3
            taken = least_ms(parameters, optimizer, runs)
            ratio = taken["fused"] / taken["default"]
            table.add_row(f"{optimizer}, {name}", *(f"{each:.2f}" for each in taken.values()), f"{ratio:.2f}")
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
