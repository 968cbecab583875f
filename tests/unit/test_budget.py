"""What a run is planned to take: memory by kind, operations and checkpoints, without a GPU and without training it."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lone_runs import train, without_ray
from typer.testing import CliRunner

from raytorch.cli.main import app
from raytorch.config.file import from_data
from raytorch.errors import ConfigError, UserError
from raytorch.system.allocator import LARGEST
from raytorch.training import rehearsal
from raytorch.training.budget import Budget, advice, budget
from raytorch.training.heap import Heap
from raytorch.training.memory_meter import MemoryMeter
from raytorch.training.rehearsal import rehearse

IMAGES = {"input_shape": (1, 8, 8), "num_classes": 10}
PARAMETERS = 64 * 32 + 32 + 32 * 10 + 10
MLP: dict[str, Any] = {"epochs": 1, "model": {"name": "mlp", "hidden": [32]}, "precision": "fp32"}
GPT: dict[str, Any] = {
    "epochs": 1,
    "data": {"name": "tokens", "root": "/nowhere", "context": 16},
    "model": {"name": "gpt", "dim": 32, "heads": 2, "layers": 4},
    "precision": "fp32",
    "batch_size": 32,
}
TOKENS = {"vocabulary": 50}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The current folder; no Ray."""
    with without_ray(tmp_path, monkeypatch):
        torch.set_num_threads(1)  # small steps beside other work
        yield tmp_path


def planned(run: dict[str, Any], facts: dict[str, Any] | None = None, **changes: Any) -> Budget:
    return budget(from_data(run | changes), facts)


# -- counting memory ---------------------------------------------------------------------------------------------------


def test_memory_is_counted_while_tensors_live_and_by_what_they_are_for() -> None:
    meter, weight = MemoryMeter(), torch.ones(100, 10)
    meter.hold("weights", [weight])
    with meter:
        first = weight + 1
        second = first.t()  # of the same memory
        del first
        third = second * 2
        del second
        fourth = third.sum()
    assert meter.peak == {"weights": 4000, "activations": 8000}
    meter.hold("results", [third, fourth, None])
    assert meter.most["results"] == 4004


def test_a_heap_takes_what_was_freed_again_and_maps_what_is_large_by_itself() -> None:
    heap = Heap()
    for key in range(4):
        heap.take(key, 1000)
    full = heap.peak
    heap.free(1)
    heap.free(2)  # side by side, so that they have room for more than either
    heap.take(4, 2000)
    assert heap.peak == full
    heap.take(5, 1000)
    assert heap.peak > full
    before = heap.peak
    for key in (6, 7):  # given back each time
        heap.take(key, 2 * LARGEST)
        heap.free(key)
    assert before < heap.peak < before + 3 * LARGEST


# -- two steps without memory ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("run", "facts"),
    [
        (MLP, IMAGES),
        (MLP | {"model": {"name": "convnet", "channels": [4]}, "optimizer": "adafactor", "ema": {}}, IMAGES),
        (GPT | {"optimizer": "muon", "accumulate": 3, "clip_norm": 1.0}, TOKENS | {"context": 16}),
        (GPT | {"model": GPT["model"] | {"checkpointing": ["blocks.*"], "freeze": ["blocks.0.*"]}}, TOKENS),
    ],
)
def test_steps_without_memory_take_what_steps_with_it_do(
    run: dict[str, Any], facts: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    config, facts = from_data(run), {"context": 16} | facts if "vocabulary" in facts else facts
    is_text = "vocabulary" in facts
    batch = (
        (torch.zeros(4, 16, dtype=torch.int64),) * 2
        if is_text
        else (torch.zeros(4, 1, 8, 8), torch.zeros(4, dtype=torch.int64))
    )
    without = rehearse(config, facts, batch, "fp32", on_gpu=False)

    class Refused:
        def __init__(self, **options: Any) -> None:
            raise RuntimeError("as if code had asked for a number")

    monkeypatch.setattr(rehearsal, "FakeTensorMode", Refused)
    real = rehearse(config, facts, batch, "fp32", on_gpu=False)
    assert (without.is_real, real.is_real) == (False, True)
    for kind in ("weights", "gradients", "optimizer", "average"):
        assert without.most[kind] == real.most[kind]
    assert without.peak.total() == pytest.approx(real.peak.total(), rel=0.02)
    assert (without.flops, without.saved) == (real.flops, real.saved)


# -- what a run takes --------------------------------------------------------------------------------------------------


def test_a_run_on_data_that_is_here_is_told_whole() -> None:
    found = planned(MLP, batch_size=100, accumulate=2, ema={}, model=MLP["model"] | {"freeze": ["1.*"]})
    trained = 32 * 10 + 10
    assert (found.parameters, found.trained, found.samples) == (PARAMETERS, trained, 50)
    assert found.memory["weights"] == found.memory["average"] == 4 * PARAMETERS
    assert found.memory["optimizer"] == 4 * (2 * trained + 2)
    assert found.flops == 100 * 2 * (64 * 32 + 2 * 32 * 10)  # no gradients of the first layer
    assert found.memory["data in memory"] > 1500 * 64
    assert found.total == sum(found.memory.values())


def test_what_the_optimizer_remembers_is_told_as_that_where_its_step_takes_most() -> None:
    run = MLP | {"model": {"name": "mlp", "hidden": [256, 256, 256]}, "batch_size": 4, "scaling": {"workers": 2}}
    found = planned(run)
    largest = 4 * 256 * 256
    assert found.memory["optimizer"] == pytest.approx(2 * found.memory["weights"], rel=0.01)
    assert found.memory["activations"] < 3 * largest  # of a parameter at a time


def test_a_checkpoint_is_as_large_as_it_is_said_to_be() -> None:
    folder = train("sized", {"hidden": [64]}, ema={})
    files = Path(folder.path) / "checkpoint_00000024"
    written = sum((files / name).stat().st_size for name in ("model.safetensors", "state.safetensors"))
    found = planned(MLP, model={"name": "mlp", "hidden": [64]}, ema={})
    assert found.checkpoint == pytest.approx(written, rel=0.15)


def test_the_copy_that_a_checkpoint_takes_counts_where_it_is_in_the_same_memory() -> None:
    checkpoint = planned(MLP, IMAGES).checkpoint
    assert planned(MLP, IMAGES).memory["copy for checkpoints"] == checkpoint
    assert "copy for checkpoints" not in planned(MLP, IMAGES, checkpoint={"background": False}).memory
    shared = planned(GPT, TOKENS, scaling={"workers": 4}, parallel={"strategy": "fsdp"})
    assert shared.memory["copy for checkpoints"] == shared.checkpoint // 4
    assert "copy for checkpoints" not in budget(from_data(MLP), IMAGES, on_gpu=True).memory


def test_workers_that_compute_together_have_one_batch() -> None:
    together = planned(GPT, TOKENS, scaling={"workers": 4}, parallel={"strategy": "fsdp", "tensor": 2})
    assert (together.samples, planned(GPT, TOKENS, scaling={"workers": 4}).samples) == (16, 8)
    assert any(note.startswith("tensor is not taken into account") for note in together.notes)


def test_the_largest_batch_of_an_epoch_counts() -> None:
    assert planned(MLP, batch_size=1000, scaling={"workers": 2}).samples == 500
    assert planned(MLP, batch_size=700, scaling={"workers": 2}).samples == 400  # 1,500 are 700 and 800


def test_shards_of_a_model_take_their_share_and_what_is_gathered() -> None:
    run = GPT | {"scaling": {"workers": 4}}
    whole, shared = planned(run, TOKENS), planned(run, TOKENS, parallel={"strategy": "fsdp"})
    for kind in ("weights", "optimizer", "gradients"):
        assert shared.memory[kind] == pytest.approx(whole.memory[kind] / 4, abs=4)
    assert 0 < shared.memory["gathered modules"] < 5 * whole.memory["weights"]
    groups = planned(run, TOKENS, parallel={"strategy": "hsdp", "shard": 2})
    assert groups.memory["weights"] == pytest.approx(whole.memory["weights"] / 2, abs=4)


def test_recomputing_takes_less_memory_and_no_more_operations() -> None:
    plain = planned(GPT, TOKENS)
    again = planned(GPT, TOKENS, model=GPT["model"] | {"checkpointing": ["blocks.*"]})
    assert again.memory["activations"] < 0.7 * plain.memory["activations"]
    assert again.flops == plain.flops


def test_gpus_are_taken_to_compute_in_bf16() -> None:
    found = planned(GPT, TOKENS, precision="auto", scaling={"gpus_per_worker": 1})
    assert found.precision == "bf16"
    assert found.memory["weights in 16 bits"] > 0
    assert "precision: auto is taken to be bf16" in found.notes


def test_code_of_ones_own_that_asks_for_numbers_is_called_with_memory(folder: Path) -> None:
    own = "from torch import nn\n\nclass Net(nn.Linear):\n    def __init__(self, num_classes):\n"
    own += "        super().__init__(64, num_classes)\n    def forward(self, x):\n"
    own += "        return super().forward(x.flatten(1)) * (1 if x.sum().item() > 0 else 2)\n"
    (folder / "own.py").write_text(own, encoding="utf-8")
    found = planned(MLP, model="own.py:Net")
    assert found.parameters == 650
    assert any("asks for numbers" in note for note in found.notes)


def test_data_that_is_not_here_is_told_or_asked_for(folder: Path) -> None:
    found = planned(MLP, data={"name": "cifar10", "root": str(folder)})
    assert found.parameters == 3072 * 32 + 32 + 330
    assert "the data is not here; its shapes are those that it is published with" in found.notes
    with pytest.raises(ConfigError, match=r"tell its facts: --fact vocabulary=50257 of tokens"):
        planned(GPT)
    with pytest.raises(ConfigError, match=r"^--fact: tell vocabulary of tokens, or input_shape"):
        planned(GPT, {"num_classes": 3})


@pytest.mark.parametrize(
    ("facts", "told"),
    [
        ({"vocabulary": "many"}, "vocabulary must be a whole number of at least 1, not 'many'"),
        ({"vocabulary": -1}, "vocabulary must be"),
        (
            {"input_shape": "3,32,32", "num_classes": 10},
            r"input_shape must be a list such as \[3,224,224\], not '3,32,32'",
        ),
        ({"input_shape": [3, 0], "num_classes": 10}, "input_shape must be a list"),
    ],
)
def test_facts_that_are_none_are_refused(facts: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=f"--fact: {told}"):
        planned(GPT, facts)


def test_a_step_has_no_more_samples_than_there_are() -> None:
    whole, larger = (planned(MLP, data="digits", batch_size=size).flops for size in (1500, 100_000))
    assert whole == larger


def test_a_loop_of_ones_own_is_refused(folder: Path) -> None:
    (folder / "own.py").write_text("def main(run):\n    pass\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"^own.py:main makes its models itself"):
        budget(from_data({"loop": "own.py:main"}))


def test_what_does_not_fit_says_what_to_do() -> None:
    config = from_data(GPT | {"scaling": {"workers": 2}})
    many = Budget(1, 1, {"weights": 10, "activations": 90}, 16, None, 1, 2, "fp32", "ddp", [])
    assert advice(config, many).startswith("most of it the activations; set accumulate: 2 or model.checkpointing")
    large = Budget(1, 1, {"weights": 90, "activations": 10}, 16, None, 1, 2, "fp32", "ddp", [])
    assert "set parallel: {strategy: fsdp} or" in advice(config, large)


def test_the_command_prints_it_and_refuses_what_does_not_fit(folder: Path) -> None:
    (folder / "run.yaml").write_text("epochs: 1\nmodel: {name: mlp, hidden: [32]}\n", encoding="utf-8")
    run = CliRunner().invoke(app, ["plan", "run.yaml", "--set", "precision=fp32"])
    assert run.exit_code == 0
    assert "parameters  2,410" in run.stdout
    for kind in ("weights", "gradients", "optimizer", "activations", "inputs", "in all"):
        assert kind in run.stdout
    as_json = CliRunner().invoke(app, ["plan", "run.yaml", "--workers", "2", "--json"])
    told = json.loads(as_json.stdout)
    assert (told["parameters"], told["workers"], told["total"]) == (PARAMETERS, 2, sum(told["memory"].values()))
    fits = CliRunner().invoke(app, ["plan", "run.yaml", "--gpu-memory", "1 MiB"])
    assert fits.exit_code == 0
    refused = CliRunner().invoke(app, ["plan", "run.yaml", "--gpu-memory", "0.1MB"])
    assert isinstance(refused.exception, UserError)
    assert str(refused.exception).startswith("run.yaml: a worker takes ")
    for wrong in ("80 pounds", "0GB"):
        with pytest.raises(UserError, match=r"--gpu-memory .*: must be a size such as 80GB"):
            CliRunner().invoke(app, ["plan", "run.yaml", "--gpu-memory", wrong], catch_exceptions=False)
    with pytest.raises(UserError, match="--fact vocabulary: must be NAME=VALUE"):
        CliRunner().invoke(app, ["plan", "run.yaml", "--fact", "vocabulary"], catch_exceptions=False)
