"""Freed memory is reused: counted in the page faults of a process of its own."""

import subprocess
import sys

import pytest

from raytorch.allocator import keep_freed_memory

FAULTS = """
import resource, sys
import torch
from raytorch.allocator import keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory()
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def work():
    kept = [torch.zeros(1 << 20) for _ in range(16)]  # 4 MB each, as activations that live until the backward pass
for _ in range(5):
    work()
before = faults()
for _ in range(40):
    work()
print(faults() - before)
"""


def page_faults(mode: str) -> int:
    done = subprocess.run([sys.executable, "-c", FAULTS, mode], capture_output=True, text=True, check=True)
    return int(done.stdout)


@pytest.mark.skipif(not keep_freed_memory(), reason="needs glibc's mallopt")
def test_what_is_freed_is_used_again() -> None:
    assert page_faults("keep") < page_faults("default") / 10
