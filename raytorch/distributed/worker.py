"""A worker's place in its group; for functions that run in a Ray Train worker."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Worker:
    """One worker of the group."""

    rank: int
    world_size: int
    device: torch.device

    @classmethod
    def current(cls) -> "Worker":
        """The worker that this process is, with its GPU selected where it holds one."""
        import ray.train
        import ray.train.torch

        context = ray.train.get_context()
        device = ray.train.torch.get_device()
        if device.type == "cuda":
            torch.cuda.set_device(device)
        return cls(context.get_world_rank(), context.get_world_size(), device)


def device_name(device: torch.device) -> str:
    """The GPU's product name, or ``cpu``."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
