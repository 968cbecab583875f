"""Files of torch.save that ask for more than they hold: refused before anything is built."""

import pickle
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from raytorch.errors import ModelFileError
from raytorch.serialization import load_state, load_weights
from raytorch.serialization.torch_pickles import MOST_OPERATIONS

GIB = 2**30


def archive(path: Path, content: bytes, storages: dict[str, bytes] | None = None, *more: str) -> Path:
    """A file as torch.save writes it, with a pickle of one's own."""
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("model/data.pkl", content)
        file.writestr("model/byteorder", "little")
        file.writestr("model/version", "3\n")
        for key, data in (storages or {}).items():
            file.writestr(f"model/data/{key}", data)
        for name in more:
            file.writestr(name, content)
    return path


def text(value: str) -> bytes:
    return b"X" + len(value).to_bytes(4, "little") + value.encode()


def number(value: int) -> bytes:
    return pickle.dumps(value, 2)[2:-1]


def numbers(*values: int) -> bytes:
    return b"(" + b"".join(map(number, values)) + b"t"


def storage(elements: int, kind: str = "FloatStorage") -> bytes:
    """The persistent id of a storage in ``data/0``."""
    return b"(" + text("storage") + f"ctorch\n{kind}\n".encode() + text("0") + text("cpu") + number(elements) + b"tQ"


def tensor(elements: int, size: bytes, stride: bytes) -> bytes:
    """The call that makes a tensor in it."""
    rebuild = b"ctorch._utils\n_rebuild_tensor_v2\n("
    return rebuild + storage(elements) + number(0) + size + stride + b"\x89ccollections\nOrderedDict\n)RtR"


def entry(value: bytes) -> bytes:
    """A pickle of a dictionary with ``value`` as its only one."""
    return b"\x80\x02}" + text("a") + value + b"s."


HUGE = 10**10
BOMBS: dict[str, tuple[bytes, str]] = {
    "bytearray": (
        entry(b"c__builtin__\nbytearray\n(" + number(6 * 10**9) + b"tR"),
        "names __builtin__.bytearray, which is no tensor",
    ),
    "a class of storages that is called": (
        entry(b"ctorch\nFloatStorage\n(" + number(HUGE) + b"tR"),
        "is damaged (TypeError: '_StorageType' object is not callable)",
    ),
    "a storage": (entry(storage(HUGE)), "claims 40,000,000,000 bytes for a storage of 8"),
    "a tensor of one element, repeated": (
        entry(tensor(1, numbers(HUGE), numbers(0))),
        "has a tensor of 10,000,000,000 elements in a storage of 1",
    ),
    "an empty tensor": (
        entry(b"ctorch._utils\n_rebuild_meta_tensor_no_storage\n)R"),
        "names torch._utils._rebuild_meta_tensor_no_storage, which is no tensor",
    ),
    "a bytearray of its own": (b"\x80\x05\x96" + (2**40).to_bytes(8, "little") + b".", "is damaged (ValueError"),
    "bytes": (b"\x80\x03B" + (2**31).to_bytes(4, "little") + b".", "is damaged (ValueError"),
    "a deep key": (b"\x80\x02})" + b"\x85" * 10**6 + b"Ns.", "has a key of nested tuples"),
    "many objects": (b"\x80\x02" + b"}" * (MOST_OPERATIONS + 1), "has a pickle of more than 2,097,152 operations"),
    "a state of its own": (entry(b"ctorch\nfloat32\n}b"), "has a state of something that is no dictionary"),
    "an ordered dictionary's content": (entry(b"ccollections\nOrderedDict\n]\x85R"), "is damaged (TypeError"),
}

TEXT = text("a" * 2**20) + b"q\x01" + text("latin1") + b"q\x02"
BOMBS |= {
    "bytes of one text, repeated": (
        entry(b"]c_codecs\nencode\nq\x00" + TEXT + b"\x87a" + b"h\x00h\x01h\x02\x86Ra" * 2000),
        "has bytes in another form than torch.save's, or repeats them",
    ),
    "bytes in a form that takes more": (
        entry(b"c_codecs\nencode\n" + text("a") + text("utf-32") + b"\x86R"),
        "has bytes in another form than torch.save's, or repeats them",
    ),
}

MEASURE = """
import resource, sys
from raytorch.errors import ModelFileError
from raytorch.serialization import load_state
import torch
there = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (there + 2**30, there + 2**30))
for path in sys.argv[1:]:
    try:
        load_state(path)
        print("accepted")
    except ModelFileError as error:
        print(error)
"""


def test_bombs_are_refused_before_they_go_off(tmp_path: Path) -> None:
    files = [
        archive(tmp_path / f"{number}.pt", content, {"0": bytes(8)})
        for number, (content, _) in enumerate(BOMBS.values())
    ]
    result = subprocess.run(
        [sys.executable, "-c", MEASURE, *map(str, files)], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    told = result.stdout.splitlines()
    assert len(told) == len(files)
    for line, path, (_, reason) in zip(told, files, BOMBS.values(), strict=True):
        assert line.startswith(f"{path} {reason}")


@pytest.mark.parametrize("more", ["model/data.pkl", "other/data.pkl"])
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_file_of_which_two_readers_would_read_different_parts_is_refused(tmp_path: Path, more: str) -> None:
    path = archive(tmp_path / "two.pt", entry(b"N"), None, more)
    with pytest.raises(ModelFileError, match="has several entries of the same name"):
        load_state(path)


@pytest.mark.filterwarnings("ignore:Validating sparse")
def test_what_torch_saves_comes_back(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)).to(memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(model.parameters(), amsgrad=True)
    model(torch.rand(2, 1, 4, 4)).sum().backward()
    optimizer.step()
    kinds = [torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.float16]
    kinds += [torch.bfloat16, torch.float64, torch.complex64, torch.complex128, torch.float8_e4m3fn]
    shared = torch.arange(6.0)
    state: dict[str, Any] = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "kinds": [torch.ones(3).to(kind) for kind in kinds],
        "views": [shared[2:], shared.view(2, 3).T, shared[:0], torch.zeros(0, 2**40)],
        "parameter": nn.Parameter(torch.ones(2)),
        "sparse": torch.eye(3).to_sparse(),
        "plain": {"none": None, "flag": True, "number": 1.5, "large": 2**70, "pair": (1, "b"), 3: b"bytes", (0, 1): []},
        "dtype": torch.float32,
        "size": torch.Size([1, 2]),
        "device": torch.device("cpu"),
    }
    path = tmp_path / "state.pt"
    torch.save(state, path)
    read = load_state(path)
    assert read["plain"] == state["plain"]
    assert (read["dtype"], read["size"], read["device"]) == (torch.float32, torch.Size([1, 2]), torch.device("cpu"))
    assert read["optimizer"]["param_groups"] == optimizer.state_dict()["param_groups"]
    assert torch.equal(read["optimizer"]["state"][0]["exp_avg"], optimizer.state_dict()["state"][0]["exp_avg"])
    for name in ("kinds", "views"):
        for ours, theirs in zip(read[name], state[name], strict=True):
            assert ours.dtype is theirs.dtype
            assert torch.equal(ours.to(torch.complex128), theirs.to(torch.complex128))
    assert torch.equal(read["sparse"].to_dense(), torch.eye(3))
    torch.save(model.state_dict(), path)
    assert load_weights(path).keys() == model.state_dict().keys()
