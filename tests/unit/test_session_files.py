"""Serialization and ONNX through a session's handles: the same functions, run where the models are."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from in_process import local_session, registries
from torch import nn

from raytorch import onnx, serialization
from raytorch.config import MlpModel
from raytorch.errors import RemoteOpError
from raytorch.models.networks import Architecture
from raytorch.session.remote_objects import RemoteModule
from raytorch.session.session import Session

ARCHITECTURE = Architecture(MlpModel(hidden=[8], dropout=0.5), (1, 4, 4), 10)
IMAGES = torch.randn(3, 1, 4, 4)


@pytest.fixture
def session() -> Iterator[Session]:
    with local_session(1) as session:
        yield session


@pytest.fixture
def model() -> nn.Module:
    return Architecture(MlpModel(hidden=[8], dropout=0.5), (1, 4, 4), 10).build().eval()


@pytest.fixture
def net(session: Session, model: nn.Module) -> RemoteModule:
    """The same model on the worker."""
    net = session.module(ARCHITECTURE.build)
    net.load_state_dict(model.state_dict())
    return net.eval()


@pytest.mark.parametrize("made", ["script", "trace"])
def test_torchscript(session: Session, net: RemoteModule, model: nn.Module, tmp_path: Path, made: str) -> None:
    images = session.tensor(IMAGES)
    inputs = [images] if made == "trace" else []
    scripted = session.module(getattr(serialization, made), net, *inputs)
    scripted.call("save", str(tmp_path / "model.pt"))

    read = session.module(serialization.load_torchscript, tmp_path / "model.pt", trust=True)
    assert torch.equal(read(images).fetch(), model(IMAGES))
    read.train()
    assert read.get("training")
    if made == "script":  # traced in evaluation mode it has no dropout
        assert not torch.equal(read(images).fetch(), model(IMAGES))
    read.eval()
    assert torch.equal(read(images).fetch(), model(IMAGES))
    assert torch.equal(serialization.load_torchscript(tmp_path / "model.pt", trust=True)(IMAGES), model(IMAGES))

    (registry,) = registries(session)
    assert registry.stats()["scripted module"]["count"] == 2
    read.free()
    session.synchronize()
    assert registry.stats()["scripted module"]["count"] == 1


def test_code_is_not_run_on_a_worker_either_without_trust(session: Session, net: RemoteModule, tmp_path: Path) -> None:
    session.module(serialization.script, net).call("save", str(tmp_path / "model.pt"))
    with pytest.raises(RemoteOpError, match=r"UntrustedFileError: .* pass trust=True"):
        session.module(serialization.load_torchscript, tmp_path / "model.pt")(session.tensor(IMAGES)).fetch()


def test_models_and_state_dicts(session: Session, net: RemoteModule, model: nn.Module, tmp_path: Path) -> None:
    session.run(serialization.save_model, net, tmp_path / "model.safetensors", ARCHITECTURE)
    read = session.module(serialization.load_model, tmp_path / "model.safetensors")
    assert torch.equal(read(session.tensor(IMAGES)).fetch(), model(IMAGES))
    assert torch.equal(serialization.load_model(tmp_path / "model.safetensors")(IMAGES), model(IMAGES))

    torch.save(net.state_dict(), tmp_path / "state.pt")
    weights = session.run(serialization.load_weights, tmp_path / "state.pt")
    assert all(torch.equal(weights[name].fetch(), tensor) for name, tensor in model.state_dict().items())


def test_exported_programs(session: Session, net: RemoteModule, model: nn.Module, tmp_path: Path) -> None:
    program = session.object(serialization.capture, net, {"images": session.tensor(IMAGES)})
    session.run(torch.export.save, program, tmp_path / "model.pt2")
    read = session.object(serialization.load_program, tmp_path / "model.pt2", trust=True)
    assert torch.equal(
        session.module(torch.export.ExportedProgram.module, read)(session.tensor(IMAGES)).fetch(), model(IMAGES)
    )


def test_onnx(session: Session, net: RemoteModule, model: nn.Module, tmp_path: Path) -> None:
    inputs = {"images": session.tensor(IMAGES)}
    session.run(onnx.export, net, inputs, tmp_path / "model.onnx")
    session.run(onnx.check, tmp_path / "model.onnx")
    (difference,) = session.run(onnx.verify, net, inputs, tmp_path / "model.onnx")
    assert difference.get("relative") < 1e-4

    graph = session.object(onnx.load, tmp_path / "model.onnx")
    assert graph.get("inputs") == ["images"]
    (logits,) = graph.call("run", session.tensor(IMAGES))
    torch.testing.assert_close(torch.as_tensor(logits), model(IMAGES), rtol=1e-4, atol=1e-6)
    graph.call("free")
    with pytest.raises(RemoteOpError, match="was freed; load it again to run it"):
        graph.call("run", session.tensor(IMAGES))
