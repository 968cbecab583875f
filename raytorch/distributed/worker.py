"""A worker's place in its group; for functions that run in a Ray Train worker."""

from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True)
class Worker:
    """One worker of the group."""

    rank: int
    world_size: int
    device: torch.device
    tensor: int = 1
    """How many that follow one another have the same samples, of each of which they compute a part."""

    def in_groups_of(self, workers: int) -> "Worker":
        """This worker, where so many that follow one another have the same samples.

        Example:
            >>> Worker(2, 4, torch.device("cpu")).in_groups_of(2).data_rank
            1
        """
        return replace(self, tensor=workers)

    @property
    def data_rank(self) -> int:
        """The number of the workers with its samples, from 0."""
        return self.rank // self.tensor

    @property
    def data_workers(self) -> int:
        """How many workers, or groups of them, have samples of their own."""
        return self.world_size // self.tensor

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
