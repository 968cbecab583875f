"""How much of the machine's memory is free, and of the control groups (containers) that this process is in."""

from pathlib import Path
from typing import NamedTuple

_GROUPS = Path("/sys/fs/cgroup")
_V2 = ("memory.max", "memory.current", "inactive_file")
_V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


class Memory(NamedTuple):
    """Bytes of a machine or a group."""

    free: int
    """What can still be had: what files are cached in counts, as that is given up."""
    total: int


def memory() -> Memory | None:
    """That of the machine, or of a group with a limit that has less free; None where the system does not tell.

    Example:
        >>> memory()
        Memory(free=17736343552, total=25276502016)
    """
    found = [each for each in [_machine(), *_groups()] if each]
    return min(found, default=None)


def peak_resident() -> int | None:
    """Bytes that this process has had in memory at its largest; None where the system does not tell."""
    return _of_process("VmHWM")


def resident() -> int | None:
    """Bytes that this process has in memory; None where the system does not tell."""
    return _of_process("VmRSS")


def _of_process(key: str) -> int | None:
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))
    except (OSError, ValueError, StopIteration):
        return None


def _machine() -> Memory | None:
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        sizes = {key: int(value.split()[0]) * 1024 for key, _, value in (line.partition(":") for line in lines)}
        return Memory(sizes["MemAvailable"], sizes["MemTotal"])
    except (OSError, ValueError, KeyError, IndexError):
        return None


def _groups() -> list[Memory | None]:
    """Those of the process's groups and of what these are in; in a container the root is the container's own."""
    try:
        lines = Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        top, names = (_GROUPS / "memory", _V1) if controllers else (_GROUPS, _V2)
        folder = top / path.lstrip("/")
        found += [_group(each, *names) for each in [folder, *folder.parents] if each == top or top in each.parents]
    return found


def _group(folder: Path, limit: str, used: str, given_up: str) -> Memory | None:
    try:
        most = int((folder / limit).read_text(encoding="ascii"))  # "max" is no limit
        lines = (folder / "memory.stat").read_text(encoding="ascii").splitlines()
        files = next((int(line.split()[1]) for line in lines if line.split()[0] == given_up), 0)
        return Memory(max(0, most - int((folder / used).read_text(encoding="ascii")) + files), most)
    except (OSError, ValueError, IndexError):
        return None
