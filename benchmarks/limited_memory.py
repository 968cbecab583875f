"""Models for benchmarks/data_memory.py, whose worker may take so much memory beside PyTorch's own.

What a configuration names is imported in the worker before its data is read: there a first step is taken, so that all
of PyTorch is there, and what the process has then is the measure. RLIMIT_DATA bounds all memory of its own that can be
written to, whether it is touched or not. It does not count files that are memory-mapped to be read, whose pages the
system takes back when it needs them.
"""

import json
import os
import re
import resource
from pathlib import Path
from threading import Thread
from time import sleep

import torch
from torch import nn


def table_model(input_shape: list[int], num_classes: int) -> nn.Module:
    """For rows of a table."""
    return nn.Sequential(nn.Linear(input_shape[0], 32), nn.ReLU(), nn.Linear(32, num_classes))


def token_model(vocabulary: int) -> nn.Module:
    """For tokens."""
    return nn.Sequential(nn.Embedding(vocabulary, 32), nn.Linear(32, vocabulary))


def tell(model: nn.Module, *, out: str) -> None:
    """Write down what has been taken at most. The evaluation is over, and a checkpoint is still to be saved."""
    try:
        bytes(_bound + 2**20)
        holds = False
    except MemoryError:
        holds = True
    Path(out).write_text(json.dumps(_most | {"holds": holds}), encoding="utf-8")


def _memory(key: str) -> int:
    """Bytes of this process: ``VmData`` is what is limited, ``RssAnon`` what of it is in memory."""
    [kilobytes] = re.findall(rf"^{key}:\s+(\d+) kB$", Path("/proc/self/status").read_text(encoding="utf-8"), re.M)
    return int(kilobytes) * 1024


def _take_a_step() -> None:
    model = table_model([32], 4)
    optimizer = torch.optim.AdamW(model.parameters())
    nn.functional.cross_entropy(model(torch.zeros(4096, 32)), torch.zeros(4096, dtype=torch.int64)).backward()
    optimizer.step()


def _watch(before: dict[str, int]) -> None:
    while True:
        for key, value in before.items():
            _most[key] = max(_most[key], _memory(key) - value)
        sleep(0.01)


_most = dict.fromkeys(("VmData", "RssAnon"), 0)
_bound = int(os.environ.get("DATA_MEMORY_LIMIT", "0"))
if _bound:
    _take_a_step()
    Thread(target=_watch, args=({key: _memory(key) for key in _most},), daemon=True).start()
    resource.setrlimit(resource.RLIMIT_DATA, (_memory("VmData") + _bound,) * 2)
