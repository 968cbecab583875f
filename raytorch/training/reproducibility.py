"""Seeds, algorithms that repeat what they compute, and the state of PyTorch's random-number generators."""

import os
import random

import numpy as np
import torch
from torch import Tensor

from raytorch.distributed import Worker


def seed_everything(seed: int) -> None:
    """Seed Python, numpy and torch."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # user code may draw from numpy's global generator
    torch.manual_seed(seed)


def choose_algorithms(deterministic: bool, *, fixed_shapes: bool) -> None:
    """Let this process compute by algorithms alone that give the same bits each time, or by the fastest.

    Operations that have none raise a RuntimeError then, which names them. For the fastest cuDNN tries what it has, once
    for each shape of its inputs, if these are ``fixed_shapes``. Called before the first product of matrices.
    """
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read with the first product on a GPU
    if deterministic != torch.are_deterministic_algorithms_enabled():  # a call loads PyTorch's compiler
        torch.use_deterministic_algorithms(deterministic)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # slow, for finding faults
    torch.backends.cudnn.deterministic = deterministic
    torch.backends.cudnn.benchmark = fixed_shapes and not deterministic


def generator_states(device: torch.device) -> dict[str, Tensor]:
    """State (uint8) of the CPU's default generator and, on a GPU, of the device's."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def restore_generators(states: dict[str, Tensor], worker: Worker, *, seed: int) -> None:
    """Continue this worker's generators from ``states``, which hold one row per rank of those with other samples.

    A group of another size has no rows to continue from: its generators start anew from ``seed`` and the rank.
    """
    if len(states["cpu"]) != worker.data_workers:
        torch.manual_seed(seed + 1 + worker.data_rank)
        return
    set_generator_states({name: rows[worker.data_rank] for name, rows in states.items()}, worker.device)


def set_generator_states(states: dict[str, Tensor], device: torch.device) -> None:
    """Continue the generators from what :func:`generator_states` gave."""
    torch.set_rng_state(states["cpu"].clone())  # torch reads past the storage offset of a view
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"].clone(), device)
