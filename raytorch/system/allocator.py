"""The C library's allocator, told to keep the memory that PyTorch frees on a CPU."""

import ctypes

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's <malloc.h>
KEPT = 1 << 30
"""Bytes of freed memory that are kept at most."""
LARGEST = 32 << 20
"""Bytes of a tensor from which on it has memory by itself where no freed one has room; what glibc takes at most."""
_LARGE = 1 << 20


def keep_freed_memory() -> bool:
    """Let tensors of up to 32 MB reuse memory that was freed; up to 1 GB is kept. Answers whether the C library can.

    By default glibc gives every block of a megabyte or so back to the system when it is freed. The next step of a
    training gets its activations as new pages, each of which the kernel has to map and clear: that took a sixth of the
    time of the benchmark's net. Other libraries than glibc keep their own ways.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    return bool(mallopt(_M_MMAP_THRESHOLD, LARGEST) and mallopt(_M_TRIM_THRESHOLD, KEPT))


def return_freed_memory() -> bool:
    """Let tensors of a megabyte or more be given back to the system when they are freed. Answers whether it can.

    By default, and after :func:`keep_freed_memory`, they leave gaps between those that stay, as what a sharded model
    gathers lies between what it keeps of it: a process came to twice the memory that its tensors took.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    return bool(mallopt(_M_MMAP_THRESHOLD, _LARGE))
