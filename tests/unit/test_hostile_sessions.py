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
from unittest import mock

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from in_process import local_session
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from raytorch.errors import RaytorchError, RemoteOpError, SessionError
from raytorch.session import restoring

LARGE = 32 * 2**20


class WatchedMemory(TorchDispatchMode):
    """Lets no tensor of many elements be made, and notes that it would have been."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[Any] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        shape = args[0] if args and isinstance(args[0], list) else []
        on_meta = any(part.device.type == "meta" for part in tree_leaves((args, kwargs)) if isinstance(part, Tensor))
        is_large = all(isinstance(size, int) for size in shape) and torch.Size(shape).numel() > LARGE
        if is_large and not on_meta and str(kwargs.get("device")) != "meta":
            self.made.append(shape)
            raise MemoryError(f"{function} would make a tensor of {shape}")
        return function(*args, **kwargs)


@contextlib.contextmanager
def watched_memory() -> Iterator[WatchedMemory]:
    """Watches what the workers make while they restore."""
    memory, restore = WatchedMemory(), restoring.restore

    def watched(*args: Any, **options: Any) -> Any:
        with memory:
            return restore(*args, **options)

    with mock.patch.object(restoring, "restore", watched):
        yield memory


def good(folder: Path) -> dict[str, Any]:
    """Save a session; what its session.json says."""
    session = local_session()
    net = session.module(nn.Sequential, session.module(nn.Linear, 4, 3), session.module(nn.LSTM, 3, 2))
    optimizer = session.optimizer("adam", net.parameters(), lr=0.1)
    scheduler = session.scheduler(torch.optim.lr_scheduler.StepLR, optimizer, step_size=2)
    leaf = session.ones(3, requires_grad=True)
    session.save(folder)
    assert session.handles()[-1]["handle"] == leaf.handle > scheduler.handle
    return content_of(folder)


def content_of(folder: Path) -> dict[str, Any]:
    """What session.json says."""
    content: dict[str, Any] = json.loads((folder / "rank-0" / "session.json").read_text())
    return content


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
    (folder / "rank-0" / "session.json").write_text(json.dumps(content))


def refused(folder: Path, forged: Any, *, trust: bool = False) -> str:
    """The only error of restoring what session.json is made to say, with nothing large made and no handle left."""
    text = forged if isinstance(forged, str) else json.dumps(forged)
    (folder / "rank-0" / "session.json").write_text(text)
    session = local_session()
    with watched_memory() as memory, pytest.raises(RaytorchError) as caught:
        session.restore(folder, trust=trust)
    assert not memory.made
    assert "SessionError" in str(caught.value)
    assert session.handles() == []
    return str(caught.value)


def making(name: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
    """An object of session.json's."""
    return {"make": name, "args": list(args), "kwargs": kwargs, "groups": [], "state": None, "modes": {}}


PLACES = [
    *("os.system", "posix.system", "subprocess.Popen", "builtins.eval", "builtins.exec", "builtins.getattr"),
    *("importlib.import_module", "torch.load", "torch.hub.load", "torch.jit.load", "torch.nn.Module"),
    *("torch.nn.Linear.__init__", "torch.nn.Linear.get_submodule", "torch.nn.Linear.__init__.__globals__"),
    *("torch.nn.modules.linear.Linear", "torch.nn.functional.relu", "torch.nn.init.ones_", "torch.nn.DataParallel"),
    *("torch.optim.Optimizer", "raytorch.session.restoring.restore", "raytorch.models.torch.hub.load", "antigravity"),
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
        {"function": "os.system"},
        {"function": "torch.nn.functional.__builtins__"},
        {"function": "torch.nn.Linear"},
        {"class": "torch.nn.Linear"},
        {"object": 99},
        {"object": -1},
        {"object": 4},
        {"object": True},
        {"object": "0"},
        {"own": 0},
        {"tensor": "in/0/get_submodule"},
        {"tensor": "in/0/weight.grad_fn"},
        {"tensor": "in/0/__class__"},
        {"tensor": "grad/tensor/0"},
        {"tensor": "generator/cpu"},
        {"tensor": "../../x"},
        {"dtype": "load"},
        {"dtype": "nn"},
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


SMALL = {"patch": 2, "dim": 4, "heads": 2, "feedforward": 8, "dropout": 0.0}
BOMBS = {
    "linear": making("torch.nn.Linear", 60_000, 60_000),
    "linear_on_a_device": making("torch.nn.Linear", 60_000, 60_000, device="cpu"),
    "overflowing": making("torch.nn.Linear", 2**62, 2**62),
    "buffer": making("raytorch.layers.PositionalEncoding", 1024, 0.0, 10**9),
    "deep": making("torch.nn.LSTM", 1, 1, num_layers=10**9),
    "transformer": making("torch.nn.Transformer", 4, 2, 10**9),
    "copies": making("torch.nn.TransformerEncoder", {"object": 0}, 10**9),
    "copies_by_name": making("torch.nn.TransformerDecoder", num_layers=10**9, decoder_layer={"object": 0}),
    "model": making("raytorch.models.mlp", {"tuple": [1, 4, 4]}, 3, hidden=[10**6, 10**6], dropout=0.0),
    "layers": making("raytorch.models.vit", {"tuple": [1, 4, 4]}, 3, layers=10**9, **SMALL),
    "convolution": making("torch.nn.Conv3d", 10_000, 10_000, 99),
    "channels": making("torch.nn.BatchNorm1d", 10**11),
    "a_number_of_a_thousand_digits": making("torch.nn.Linear", 1, int("9" * 1000)),
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved session of one module, which has no tensors."""
    folder = tmp_path_factory.mktemp("plain") / "saved"
    session = local_session()
    net = session.module(nn.ReLU)
    session.save(folder)
    assert len(content_of(folder)["objects"]) == net.handle == 1
    return folder


@pytest.mark.parametrize("name", BOMBS)
def test_some_bytes_make_nothing_large(plain: Path, name: str) -> None:
    forged = content_of(plain)
    forged["objects"][1:] = [BOMBS[name]]
    message = refused(plain, forged)
    assert any(reason in message for reason in REASONS), message


REASONS = (
    "far more memory than its file",
    "is missing",
    "layers are more than the 0 modules",
    "overflowed",
    "out of range",
)


def test_layers_are_copied_no_oftener_than_the_file_lists_them(plain: Path) -> None:
    forged = content_of(plain)
    copies = making("torch.nn.TransformerEncoder", {"object": 0}, 1000, enable_nested_tensor=False)
    forged["objects"][1:] = [copies | {"modes": {str(number): True for number in range(999)}}]
    assert "more than the 999 modules" in refused(plain, forged)


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
    forged = json.loads(file.read_text())
    forged["objects"].append(making("raytorch.distributed.data_parallel", {"object": 0}))
    file.write_text(json.dumps(forged))
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
    monkeypatch.setattr(restoring, "read_own_code", lambda folder: opened.append(folder))
    local_session().restore(tmp_path / "saved")  # its session.json needs none
    content = json.loads((part / "session.json").read_text())
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
    (part / "manifest.json").write_text(json.dumps({"format": 1, "tensors": {}, "leaves": []}))
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
    (folder / "rank-0" / "session.json").write_text(json.dumps(damaged))
    decoy = folder.parent / "decoy"
    decoy.write_text("precious")
    session = local_session()
    with watched_memory() as memory, contextlib.suppress(RaytorchError):
        session.restore(folder)
    assert not memory.made
    assert decoy.read_text() == "precious"
    assert sorted(file.name for file in folder.parent.iterdir()) == ["decoy", "saved"]
    assert sorted(file.name for file in (folder / "rank-0").iterdir()) == ["session.json", "tensors.safetensors"]


def forged_of(folder: Path, objects: list[dict[str, Any]], **tensors: Tensor) -> str:
    """The only error of restoring a session of these objects and tensors."""
    session = local_session()
    session.save(folder)
    leaves = {f"tensor/{name}": content.is_floating_point() for name, content in tensors.items()}
    said = content_of(folder) | {"objects": objects, "leaves": leaves}
    path = folder / "rank-0" / "tensors.safetensors"
    save_file(load_file(path) | {f"tensor/{name}": content for name, content in tensors.items()}, path)
    return refused(folder, said)


def sgd_state(**entries: Any) -> dict[str, Any]:
    """The state of an SGD with these entries for its only parameter."""
    group = [["params", [0]], ["lr", 0.1], ["momentum", 0], ["dampening", 0], ["weight_decay", 0], ["nesterov", False]]
    group += [["maximize", False], ["foreach", None], ["differentiable", False], ["fused", None]]
    state = {"dict": [[0, {"dict": [[key, value] for key, value in entries.items()]}]]}
    return {"dict": [["state", state], ["param_groups", [{"dict": group}]]]}


MUCH = "it would take far more memory than its file has tensors for"


def test_many_objects_with_a_state_for_the_same_tensor_are_refused(tmp_path: Path) -> None:
    objects = [making("torch.optim.Adagrad", [{"tensor": "tensor/a"}]) for _ in range(100)]
    assert MUCH in forged_of(tmp_path / "saved", objects, a=torch.zeros(2**18))


def test_a_state_that_makes_many_of_one_tensor_is_refused(tmp_path: Path) -> None:
    state = sgd_state(**{f"k{number}": {"tensor": "tensor/b"} for number in range(100)})
    objects = [making("torch.optim.SGD", [{"tensor": "tensor/a"}]) | {"state": state}]
    told = forged_of(
        tmp_path / "saved", objects, a=torch.zeros(1, dtype=torch.float64), b=torch.zeros(2**18, dtype=torch.int8)
    )
    assert MUCH in told


@pytest.mark.parametrize("state", [None, {"dict": []}])
def test_modules_that_share_modules_without_end_are_refused(tmp_path: Path, state: Any) -> None:
    objects = [making("torch.nn.ReLU")]
    for number in range(0, 60, 2):  # each has the one before it in two places
        objects.append(making("torch.nn.Sequential", {"object": number}))
        objects.append(making("torch.nn.Sequential", {"object": number}, {"object": number + 1}))
    objects[-1]["state"] = state
    assert "places and" in forged_of(tmp_path / "saved", objects)


def test_modules_in_more_levels_than_any_has_are_refused(tmp_path: Path) -> None:
    objects = [making("torch.nn.ReLU"), *(making("torch.nn.Sequential", {"object": n}) for n in range(200))]
    assert "101 levels" in forged_of(tmp_path / "saved", objects)


def test_a_schedule_takes_no_powers_of_whole_numbers(tmp_path: Path) -> None:
    """Of which the least here has a hundred million digits."""
    endless = making("torch.optim.lr_scheduler.MultiStepLR", {"object": 0}, {"counter": [[0, 10**9]]}, gamma=2**62 - 1)
    objects = [making("torch.optim.SGD", [{"tensor": "tensor/a"}]), endless]
    assert "OverflowError" in forged_of(tmp_path / "saved", objects, a=torch.zeros(1))
