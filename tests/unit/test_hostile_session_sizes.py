"""Saved sessions that would make something large of a few bytes: refused before any memory is taken."""

from pathlib import Path
from typing import Any

import pytest
import torch
from forged_sessions import content_of, making, refused
from in_process import local_session
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

SMALL = {"patch": 2, "dim": 4, "heads": 2, "feedforward": 8, "dropout": 0.0}
GPT = {"dim": 4, "heads": 2, "kv_heads": None, "activation": "relu2", "feedforward": 8, "tied": True, "dropout": 0.0}
GPT |= {"rope_theta": 100.0}
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
    "blocks": making("raytorch.models.gpt", 9, 9, layers=10**9, **GPT),
    "vocabulary": making("raytorch.models.gpt", 10**9, 9, layers=1, **GPT),
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
