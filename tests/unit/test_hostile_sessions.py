"""Saved sessions that somebody forged or damaged: nothing runs, nothing large is made, one error says what is wrong."""

import contextlib
import copy
import io
import json
import os
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from forged_sessions import good, making, refused, watched_memory
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from in_process import local_session
from safetensors.torch import save_file
from torch import nn

from raytorch.errors import RaytorchError, RemoteOpError, SessionError
from raytorch.session import restore


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sessions") / "saved"


@pytest.fixture(scope="module")
def content(folder: Path) -> dict[str, Any]:
    return good(folder)


@pytest.fixture
def forged(content: dict[str, Any], folder: Path) -> Iterator[dict[str, Any]]:
    """A copy of what session.json says, to be changed and written with :func:`refused`."""
    yield copy.deepcopy(content)
    (folder / "rank-0" / "session.json").write_text(json.dumps(content), encoding="utf-8")


PLACES = [
    *("os.system", "posix.system", "subprocess.Popen", "builtins.eval", "builtins.exec", "builtins.getattr"),
    *("importlib.import_module", "torch.load", "torch.hub.load", "torch.jit.load", "torch.nn.Module"),
    *("torch.nn.Linear.__init__", "torch.nn.Linear.get_submodule", "torch.nn.Linear.__init__.__globals__"),
    *("torch.nn.modules.linear.Linear", "torch.nn.functional.relu", "torch.nn.init.ones_", "torch.nn.DataParallel"),
    *("torch.optim.Optimizer", "raytorch.session.restore.restore", "raytorch.models.torch.hub.load", "antigravity"),
    *("", "object/0", "in/0/get_submodule", "in/0/forward.__globals__", "__builtins__", "torch.nn.Linear\u0000"),
]


@pytest.mark.parametrize("name", PLACES)
def test_nothing_but_the_listed_classes_is_made(folder: Path, forged: dict[str, Any], name: str, capfd: Any) -> None:
    forged["objects"].append(making(name, "echo ran"))
    assert "is not among the classes" in refused(folder, forged)
    assert "ran" not in capfd.readouterr().out


@pytest.mark.parametrize(
    "value",
    [
        {"class": "torch.nn.Linear"},
        {"object": 99},
        {"object": -1},
        {"object": 4},
        {"object": True},
        {"object": "0"},
        {"own": 0},
        {"device": "cpu:" + "9" * 400},
        {"size": [-1]},
        {"size": ["4"]},
        {"complex": ["1", "1" * 5000]},
        {"complex": ["1"]},
        {"float": "ten"},
        {"dict": [[1]]},
        {"dict": [[[1], 2]]},
        {"tuple": {"list": []}},
        {"tuple": [], "size": []},
        {},
    ],
    ids=str,
)
def test_a_value_of_another_kind_is_refused(folder: Path, forged: dict[str, Any], value: Any) -> None:
    forged["objects"].append(making("torch.nn.Linear", 2, value))
    refused(folder, forged)


@pytest.mark.parametrize(
    ("kind", "name", "told"),
    [
        ("function", "os.system", "is no function that a saved session may name"),
        ("function", "torch.nn.functional.__builtins__", "is no function that a saved session may name"),
        ("function", "torch.nn.Linear", "is no function that a saved session may name"),
        ("dtype", "load", "is no dtype that a saved session may name"),
        ("dtype", "nn", "is no dtype that a saved session may name"),
        ("tensor", "in/0/get_submodule", "names no tensor"),
        ("tensor", "in/0/weight.grad_fn", "names no tensor"),
        ("tensor", "in/0/__class__", "names no tensor"),
        ("tensor", "grad/tensor/0", "names no tensor"),
        ("tensor", "generator/cpu", "names no tensor"),
        ("tensor", "../../x", "names no tensor"),
    ],
)
def test_a_name_stands_for_nothing_but_what_is_listed(
    folder: Path, forged: dict[str, Any], kind: str, name: str, told: str
) -> None:
    """It is refused as a name: a layer would refuse what it led to as well."""
    forged["objects"].append(making("torch.nn.Linear", 2, {kind: name}))
    assert f"{name!r} {told}" in refused(folder, forged)


def test_sizes_that_are_not_the_files_are_refused(folder: Path, forged: dict[str, Any]) -> None:
    forged["objects"][0]["args"] = [4, 5]
    assert "'in/0/bias' is of shape (3,), not (5,)" in refused(folder, forged)


TEXTS = {
    "lists": '{"format": 2, "objects": ' + "[" * 100_000 + "]" * 100_000 + "}",
    "objects": '{"a":' * 100_000 + "1" + "}" * 100_000,
    "no_json": "{",
    "empty": "",
    "null": "null",
    "list": "[]",
    "a_number_without_end": '{"format": ' + "9" * 10_000 + "}",
    "twice": '{"format": 2, "format": 2}',
}


@pytest.mark.parametrize("name", TEXTS)
def test_a_text_that_is_no_session_is_refused(folder: Path, forged: dict[str, Any], name: str) -> None:
    refused(folder, TEXTS[name])


def test_values_nested_too_deep_are_refused(folder: Path, forged: dict[str, Any]) -> None:
    value: Any = 1
    for _ in range(100):
        value = {"tuple": [value]}
    forged["objects"].append(making("torch.nn.Linear", value))
    assert "nested in more than 50 levels" in refused(folder, forged)


def test_a_handle_is_there_once(folder: Path, forged: dict[str, Any]) -> None:
    text = json.dumps(forged).replace('"handles": {', '"handles": {"77": {"object": 0}, "77": {"object": 1}, ')
    assert "'77' is there twice" in refused(folder, text)


@pytest.mark.parametrize("handle", ["0", "-1", "01", "1.5", "x", "9" * 40, "\u0661"])
def test_a_handle_is_a_number(folder: Path, forged: dict[str, Any], handle: str) -> None:
    forged["handles"][handle] = {"object": 0}
    assert "handles" in refused(folder, forged)


def test_ranks_that_would_wait_for_each_other_are_refused(tmp_path: Path) -> None:
    session = local_session(workers=2)
    net = session.module(nn.Linear, 2, 2)
    session.save(tmp_path / "saved")
    assert net.handle == 1
    file = tmp_path / "saved" / "rank-1" / "session.json"
    forged = json.loads(file.read_text(encoding="utf-8"))
    forged["objects"].append(making("raytorch.distributed.data_parallel", {"object": 0}))
    file.write_text(json.dumps(forged), encoding="utf-8")
    with pytest.raises(SessionError, match="do not belong together"):
        local_session(workers=2).restore(tmp_path / "saved")


def test_another_format_is_told(folder: Path, forged: dict[str, Any]) -> None:
    assert "of format '3', and this raytorch reads 2" in refused(folder, forged | {"format": 3})


def test_a_schedulers_state_sets_nothing_but_its_state(folder: Path, forged: dict[str, Any]) -> None:
    (scheduler,) = [part for part in forged["objects"] if part["make"].startswith("torch.optim.lr_scheduler")]
    scheduler["state"]["dict"].append(["step", {"function": "torch.nn.functional.relu"}])
    assert "has no 'step' in its state" in refused(folder, forged)


@pytest.mark.parametrize("name", ["session.json", "tensors.safetensors"])
@pytest.mark.parametrize("kind", ["link", "fifo", "folder", "missing"])
def test_a_file_is_a_plain_file(tmp_path: Path, name: str, kind: str) -> None:
    good(tmp_path / "saved")
    file = tmp_path / "saved" / "rank-0" / name
    file.rename(tmp_path / "elsewhere")
    makers: dict[str, Callable[[], Any]] = {
        "link": lambda: file.symlink_to(tmp_path / "elsewhere"),
        "fifo": lambda: os.mkfifo(file),
        "folder": file.mkdir,
        "missing": lambda: None,
    }
    makers[kind]()
    with pytest.raises(RemoteOpError, match=name):
        local_session().restore(tmp_path / "saved")


def test_a_large_file_is_not_read(folder: Path, forged: dict[str, Any]) -> None:
    assert "is the most" in refused(folder, " " * (16 * 2**20 + 1))


class Marking:
    """Leaves a file where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self._path),)


def test_own_code_is_not_touched_without_trust(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good(tmp_path / "saved")
    part = tmp_path / "saved" / "rank-0"
    (part / "own_code.pickle").write_bytes(pickle.dumps([Marking(tmp_path / "ran")]))
    for name in ("recipes.pkl", "states.pt"):
        (part / name).write_bytes(pickle.dumps(Marking(tmp_path / "ran")))
    opened: list[str] = []
    monkeypatch.setattr(restore, "read_own_code", lambda folder: opened.append(folder))
    local_session().restore(tmp_path / "saved")  # its session.json needs none
    content = json.loads((part / "session.json").read_text(encoding="utf-8"))
    message = refused(tmp_path / "saved", content | {"own_code": ["__main__.Net"]})
    assert "'__main__.Net' in own_code.pickle" in message
    assert "trust=True" in message
    content["objects"].append(making("torch.nn.Linear") | {"make": 0})
    assert "own value 0 is not there" in refused(tmp_path / "saved", content)
    assert not opened
    assert not (tmp_path / "ran").exists()


class _Name:
    """Stands in a pickle for what a persistent id names."""

    def __init__(self, name: str) -> None:
        self.name = name


class _Pickler(pickle.Pickler):
    def persistent_id(self, value: Any) -> Any:
        return value.name if isinstance(value, _Name) else None


def _pickled(*recipe: Any) -> bytes:
    buffer = io.BytesIO()
    _Pickler(buffer).dump(recipe)
    return buffer.getvalue()


def _reaching(name: str) -> nn.Module:
    """A module whose ``get_submodule`` is something else."""
    module = nn.Identity.__new__(nn.Identity)
    module.__dict__ = {"get_submodule": _Name(name)}
    return module


def test_a_forged_session_of_the_old_format_runs_nothing(tmp_path: Path) -> None:
    """From a module's method to its globals, to ``eval``: the old format resolved names by ``getattr``."""
    part = tmp_path / "saved" / "rank-0"
    part.mkdir(parents=True)
    ran = tmp_path / "ran"
    recipes = {
        "0": _pickled(nn.Identity, (), {}),
        "1": _pickled(_Name("object/0"), (_reaching("in/0/__getattribute__"),), {}),
        "2": _pickled(_Name("object/0"), (_reaching("in/1/get_submodule.__getattribute__"),), {}),
        "3": _pickled(_Name("object/0"), (_reaching("in/2/__globals__.get"),), {}),
        "4": _pickled(_Name("in/3/__builtins__.get"), ("eval",), {}),
        "5": _pickled(_Name("object/4"), (f"__import__('os').mkdir({str(ran)!r})",), {}),
    }
    (part / "recipes.pkl").write_bytes(pickle.dumps(recipes))
    (part / "manifest.json").write_text(json.dumps({"format": 1, "tensors": {}, "leaves": []}), encoding="utf-8")
    save_file({}, part / "tensors.safetensors")
    torch.save({"objects": {}, "generators": {"cpu": torch.get_rng_state()}}, part / "states.pt")
    with pytest.raises(RemoteOpError, match=r"format of an older raytorch.*save the state dicts"):
        local_session().restore(tmp_path / "saved")
    assert not ran.exists()


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.sampled_from(PLACES),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["tuple", "dict", "size", "tensor", "object", "own", "function"]), inner, max_size=1
        )
    ),
    max_leaves=5,
)


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every container in a JSON value, with each of its keys."""
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else []
    for key in keys:
        yield value, key
        yield from places(value[key])


@settings(
    max_examples=int(os.environ.get("RAYTORCH_TEST_EXAMPLES", "150")),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(data=st.data())
def test_a_damaged_session_is_restored_or_refused(folder: Path, content: dict[str, Any], data: st.DataObject) -> None:
    damaged = copy.deepcopy(content)
    for _ in range(data.draw(st.integers(1, 3))):
        parent, key = data.draw(st.sampled_from(list(places(damaged))))
        match data.draw(st.sampled_from(["replace", "delete", "other's"])):
            case "delete":
                del parent[key]
            case "replace":
                parent[key] = data.draw(VALUES)
            case _:
                other, place = data.draw(st.sampled_from(list(places(damaged))))
                parent[key] = copy.deepcopy(other[place])
    (folder / "rank-0" / "session.json").write_text(json.dumps(damaged), encoding="utf-8")
    decoy = folder.parent / "decoy"
    decoy.write_text("precious", encoding="utf-8")
    session = local_session()
    with watched_memory() as memory, contextlib.suppress(RaytorchError):
        session.restore(folder)
    assert not memory.made
    assert decoy.read_text(encoding="utf-8") == "precious"
    assert sorted(file.name for file in folder.parent.iterdir()) == ["decoy", "saved"]
    assert sorted(file.name for file in (folder / "rank-0").iterdir()) == ["session.json", "tensors.safetensors"]
