"""Checkpoints that ranks write together: no file of theirs can run code, what is damaged is named, and all is read."""

import hashlib
import json
import os
import pickletools
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import ANOTHER, CPU, change_manifest, opened
from pyarrow import fs
from ranks import on_ranks
from safetensors import safe_open
from sharded_runs import (
    OWN,
    assert_close,
    go_on_with_the_same_bits,
    in_project,
    registered,
    run_of,
    saved,
    train,
    without_ray,
)

from raytorch.config.file import dump_config
from raytorch.distributed import Worker
from raytorch.errors import CheckpointError, ModelFileError
from raytorch.runs import storage
from raytorch.runs.storage import RunFolder
from raytorch.serialization import load_model
from raytorch.training.export import load_run

ADAMW: dict[str, Any] = {
    "optimizer": {"name": "adamw", "lr": 0.01},
    "ema": {"decay": 0.9},
    "checkpoint": {"every_steps": 2, "keep": 9},
}
LARGE = ADAMW | {"model": OWN | {"width": 512}, "steps": 1, "ema": None}
LONGER = ADAMW | {"steps": 6}
STRATEGIES = ["fsdp", "hsdp", "ddp"]


@pytest.fixture(scope="module", autouse=True)
def runs(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Two steps of each strategy on two ranks, and two more, in the current folder."""
    before = Path.cwd()
    in_project(tmp_path_factory.mktemp("sharded"))
    on_ranks(train_each, 2)
    yield
    os.chdir(before)


def train_each(worker: Worker) -> None:
    without_ray()
    for strategy in STRATEGIES:
        train(run_of(strategy, 2, strategy, **ADAMW), worker)
    for strategy in STRATEGIES:
        train(run_of(f"{strategy}-longer", 2, strategy, **LONGER), worker)
    train(run_of("large", 2, "fsdp", **LARGE), worker)
    train(run_of("skipped", 2, "fsdp", **ADAMW | {"checkpoint": {"every_steps": 1, "when_busy": "skip"}}), worker)


def read_no_more_than_its_share(worker: Worker) -> None:
    without_ray()
    _, progress = registered(run_of("large", 4, "fsdp", **LARGE), worker)
    nbytes = sum(file.stat().st_size for file in checkpoints("large")[-1].glob("*.safetensors"))
    assert progress.parts.restored
    share = progress.parts.restored.bytes_read / nbytes
    assert 0.2 < share <= 0.3, share
    progress.close()


def go_on(worker: Worker) -> None:
    """What two have saved by each strategy others have to the bit, by each, and train to its end."""
    if worker.world_size > 1:
        without_ray()
    for before in STRATEGIES:
        for strategy in ("fsdp", "ddp"):
            name = f"{before}-{strategy}-{worker.world_size}"
            if worker.rank == 0:
                shutil.copytree(f"runs/{before}", f"runs/{name}")
            run = run_of(name, worker.world_size, strategy, **LONGER)
            go_on_with_the_same_bits(worker, run)
            train(run, worker)
            if worker.rank == 0:
                assert_close(saved(name)[0], saved(f"{before}-longer")[0], 1e-5)
                if (worker.world_size, strategy) == (2, before):
                    assert_close(saved(name)[0], saved(f"{before}-longer")[0], 0)


def checkpoints(run: str) -> list[Path]:
    return sorted(Path("runs", run).glob("checkpoint_*"))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_no_file_of_a_checkpoint_can_run_code(strategy: str) -> None:
    files = [file for checkpoint in checkpoints(strategy) for file in checkpoint.iterdir()]
    assert len(checkpoints(strategy)) == 2
    assert len(files) == 2 * {"fsdp": 6, "hsdp": 4, "ddp": 4}[strategy]
    for file in files:
        content = file.read_bytes()
        with pytest.raises((ValueError, IndexError, EOFError, OverflowError)):
            [*pickletools.genops(content)]
        if file.suffix == ".json":
            assert isinstance(json.loads(content), dict)
        else:
            with safe_open(file, "pt") as tensors:
                shapes = [tensors.get_tensor(name) for name in tensors.keys()]  # noqa: SIM118 (no mapping)
            header = int.from_bytes(content[:8], "little")
            assert len(content) == 8 + header + sum(tensor.nbytes for tensor in shapes)  # and nothing beside


def test_a_model_in_pieces_is_read_whole() -> None:
    weights, _ = saved("fsdp")
    name = checkpoints("fsdp")[-1] / "model.safetensors"
    assert not name.exists()
    for model in (load_model(name, code="own.py"), load_run(RunFolder("runs", "fsdp"), "own.py")[0]):
        assert_close(model.state_dict(), weights, 0)
    assert_close(saved("fsdp")[0], saved("ddp")[0], 1e-5)


@pytest.mark.parametrize("source", ["runs/fsdp", "runs/fsdp/checkpoint_00000004", "model.safetensors"])
def test_a_run_begins_with_weights_in_pieces(monkeypatch: pytest.MonkeyPatch, source: str) -> None:
    monkeypatch.setattr("ray.get", lambda answer: answer)
    monkeypatch.setattr("raytorch.training.parts.data_parallel", lambda module: module)
    weights = str((checkpoints("fsdp")[-1] / source if source.endswith("s") else Path(source)).absolute())
    name = f"begun-{len(source)}"
    config = run_of(name, 1, "ddp", model=OWN | {"weights": weights}, optimizer={"name": "sgd", "lr": 1e-30}, steps=1)
    RunFolder("runs", name).make()
    Path("runs/fsdp/config.yaml").write_text(dump_config(run_of("fsdp", 2, "fsdp", **ADAMW)), encoding="utf-8")
    train(config, Worker(0, 1, CPU))
    assert_close(saved(name)[0], saved("fsdp")[0], 0)


def test_pieces_in_a_store_are_read_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    bucket = fs.SubTreeFileSystem(str(Path("runs").absolute()), fs.LocalFileSystem())
    monkeypatch.setattr(storage, "open_storage", lambda address: (bucket, ""))
    model, _ = load_run(RunFolder("s3://bucket", "fsdp"), "own.py")
    assert_close(
        model.state_dict(), load_model(checkpoints("fsdp")[-1] / "model.safetensors", code="own.py").state_dict(), 0
    )


def test_weights_of_another_step_are_not_exported(tmp_path: Path) -> None:
    shutil.copytree("runs/ddp", tmp_path / "ddp")
    before, last = sorted((tmp_path / "ddp").glob("checkpoint_*"))
    shutil.copy(before / "model.safetensors", last / "model.safetensors")
    with pytest.raises(ModelFileError, match=r"model.safetensors is damaged: it is another than was saved with"):
        load_run(RunFolder(str(tmp_path), "ddp"), "own.py")


def test_a_manifest_of_another_step_is_refused(tmp_path: Path) -> None:
    shutil.copytree(checkpoints("ddp")[-1], tmp_path / "checkpoint_00000004")
    change_manifest(tmp_path / "checkpoint_00000004", step=6)
    with pytest.raises(CheckpointError, match=r"checkpoint.json is damaged: it is of step 6; delete that"):
        opened(tmp_path / "checkpoint_00000004")


def test_checkpoints_are_told_in_the_summary_of_a_run() -> None:
    """How many there are follows from how long they took, but for the last one."""
    told = saved("skipped")[1]["checkpoints"]
    assert checkpoints("skipped")[-1].name == "checkpoint_00000004"
    assert told["saved"] + told["skipped"] == 3


@pytest.mark.parametrize("workers", [1, 2, 3, 4])
def test_any_number_of_workers_with_any_strategy_goes_on(workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("raytorch.training.parts.data_parallel", lambda module: module)
    monkeypatch.setattr("ray.get", lambda answer: answer)
    on_ranks(go_on, workers)


def test_of_what_two_have_written_each_of_four_reads_its_share() -> None:
    on_ranks(read_no_more_than_its_share, 4)


def flip(file: Path, at: int) -> None:
    content = bytearray(file.read_bytes())
    content[at] ^= 1 << (at % 8)
    file.write_bytes(content)


def lie(file: Path, text: str, instead: str) -> None:
    """Change a header, of as many bytes, and say in the manifest that it is right."""
    content = file.read_bytes().replace(text.encode(), instead.encode(), 1)
    file.write_bytes(content)
    manifest = json.loads((file.parent / "checkpoint.json").read_text(encoding="utf-8"))
    head = content[: 8 + int.from_bytes(content[:8], "little")]
    change_manifest(file.parent, digests=manifest["digests"] | {file.name: hashlib.sha256(head).hexdigest()})


DAMAGES: dict[str, Callable[[Path, Path], object]] = {
    "missing": lambda file, _: file.unlink(),
    "truncated": lambda file, _: os.truncate(file, file.stat().st_size - 1),
    "of another step": lambda file, other: shutil.copy(other, file),
    "a flipped bit in the header's length": lambda file, _: flip(file, 1),
    "a flipped bit in the header": lambda file, _: flip(file, 200),
    "a flipped bit in the last tensor": lambda file, _: flip(file, file.stat().st_size - 1),
}
FILES = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "state-00002-of-00002.safetensors"]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", DAMAGES)
def test_what_is_damaged_is_refused_with_the_name_of_the_file(tmp_path: Path, damage: str, name: str) -> None:
    before, last = checkpoints("fsdp")
    copy = tmp_path / last.name
    shutil.copytree(last, copy)
    assert (before / name).stat().st_size == (copy / name).stat().st_size
    DAMAGES[damage](copy / name, before / name)
    with pytest.raises(CheckpointError) as failure:
        [opened(copy).model(CPU), opened(copy).state()]
    assert str(copy / name) in str(failure.value)
    assert str(failure.value).endswith(ANOTHER)


@pytest.mark.parametrize(
    ("text", "instead", "told"),
    [
        (r"\"offsets\":[8,0]", r"\"offsets\":[7,0]", "a part of tensor '.*' is in another file as well"),
        (r"\"offsets\":[8,0]", r"\"offsets\":[9,0]", "does not say of which part tensor '.*' is, or lies"),
        (r"\"shape\":[15,64]", r"\"shape\":[16,64]", r"and shape \[16, 64\], not of .* and \[15, 64\]"),
        ("F32", "I32", "is of torch.int32 and shape .*, not of torch.float32"),
    ],
)
def test_a_header_that_lies_is_refused_though_the_manifest_agrees(
    tmp_path: Path, text: str, instead: str, told: str
) -> None:
    copy = tmp_path / "checkpoint_00000004"
    shutil.copytree(checkpoints("fsdp")[-1], copy)
    lie(copy / FILES[1], text, instead)
    with pytest.raises(CheckpointError, match=told) as failure:
        opened(copy).model(CPU)
    assert str(copy / FILES[1]) in str(failure.value)


def test_a_checkpoint_of_the_format_before_is_still_resumed(tmp_path: Path) -> None:
    """It had no digests, and tensors in the order of the state."""
    shutil.copytree(checkpoints("ddp")[-1], tmp_path / "checkpoint_00000004")
    weights, state = saved("ddp")
    change_manifest(tmp_path / "checkpoint_00000004", format=4, digests={})
    content = opened(tmp_path / "checkpoint_00000004")
    assert_close(content.model(torch.device("cpu")), weights, 0)
    assert content.state().keys() == state.keys()


def test_a_file_without_a_digest_is_refused(tmp_path: Path) -> None:
    shutil.copytree(checkpoints("ddp")[-1], tmp_path / "checkpoint_00000004")
    change_manifest(tmp_path / "checkpoint_00000004", digests={})
    with pytest.raises(CheckpointError, match=r"model.safetensors is damaged: checkpoint.json has no digest of it"):
        opened(tmp_path / "checkpoint_00000004").model(CPU)
