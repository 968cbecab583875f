"""Freed memory is reused, or given back: counted in processes of their own."""

import subprocess
import sys

import pytest

from raytorch.system.allocator import keep_freed_memory, return_freed_memory

FAULTS = """
import resource
import torch
from raytorch.system.allocator import keep_freed_memory
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


@pytest.mark.skipif(not keep_freed_memory(), reason="needs glibc's mallopt")
def test_what_is_freed_is_used_again() -> None:
    done = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 1000  # of 655,360 pages; by default it is none or all of them, as the heap happens to lie


GROWN = r"""
import re
import torch
from raytorch.system.allocator import keep_freed_memory, return_freed_memory
def in_memory():
    with open("/proc/self/status", encoding="utf-8") as status:
        return int(re.search(r"VmRSS:\s+(\d+)", status.read())[1])
keep_freed_memory()
return_freed_memory()
kept, before = [], in_memory()
for _ in range(16):
    gathered = torch.ones(1 << 20)
    kept.append(torch.ones(1 << 18))  # a megabyte that stays behind each four
    del gathered
print((in_memory() - before) // 1024)
"""


@pytest.mark.skipif(not return_freed_memory(), reason="needs glibc's mallopt")
def test_what_is_freed_between_what_stays_is_given_back() -> None:
    done = subprocess.run([sys.executable, "-c", GROWN], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 32  # of 16 megabytes that stay; with freed memory kept it is some more
