"""What a step of a run takes: operations counted while it trains, what devices could do, and how both are told."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lone_runs import final, train, without_ray
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode
from whole_runs import assert_bitwise_equal

from raytorch.config import MlpModel
from raytorch.config.file import from_data
from raytorch.datasets import MicroBatch
from raytorch.distributed import Worker
from raytorch.models.networks import Architecture
from raytorch.runs.catalog import read_history
from raytorch.runs.metrics import Pace, Work
from raytorch.runs.storage import RunFolder
from raytorch.training import work
from raytorch.training.flops import FlopCounter, counted, not_counted
from raytorch.training.peaks import peak_flops
from raytorch.training.precision import Precision
from raytorch.training.recomputation import recompute

OF_SAMPLE = 3 * 2 * (64 * 32 + 32 * 10) - 2 * 64 * 32
"""Operations of the small run's net: three products for each layer, and none for the gradient of the images."""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The current folder; no Ray."""
    with without_ray(tmp_path, monkeypatch):
        yield tmp_path


def trained(folder: RunFolder) -> list[dict[str, Any]]:
    return [line for line in read_history(folder) if line["split"] == "train"]


# -- counting ----------------------------------------------------------------------------------------------------------


def transformer() -> tuple[nn.Module, Tensor]:
    return nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), torch.randn(3, 5, 16)


def convolutions() -> tuple[nn.Module, Tensor]:
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3, stride=2), nn.Flatten())
    return net, torch.randn(2, 3, 9, 9)


@pytest.mark.parametrize("build", [transformer, convolutions])
def test_it_counts_what_pytorchs_own_counter_does_and_changes_no_number(
    build: Callable[[], tuple[nn.Module, Tensor]],
) -> None:
    net, inputs = build()

    def gradients() -> list[Tensor]:
        torch.manual_seed(0)
        net.zero_grad()
        torch.autograd.backward(net(inputs).square().sum())
        return [each.grad.clone() for each in net.parameters() if each.grad is not None]

    plain = gradients()
    with FlopCounter() as counter:
        seen = gradients()
    with FlopCounterMode(display=False) as theirs:
        gradients()
    assert counter.total == theirs.get_total_flops() > 0
    assert all(map(torch.equal, plain, seen))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in net.modules())


def test_recurrent_layers_are_counted_by_their_matrices() -> None:
    net, places = nn.LSTM(5, 7), 4 * 3
    forward = 2 * places * (4 * 7 * 5 + 4 * 7 * 7)
    assert counted(lambda: net(torch.randn(4, 3, 5))) == forward
    assert counted(lambda: torch.autograd.backward(net(torch.randn(4, 3, 5))[0].sum())) == 3 * forward


def test_what_is_computed_twice_counts_once() -> None:
    net, inputs = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2)), torch.ones(3, 4)
    once = counted(lambda: torch.autograd.backward(net(inputs).sum()))
    recompute(net, ["0"])
    assert counted(lambda: torch.autograd.backward(net(inputs).sum())) == once
    assert counted(lambda: None) is None
    with FlopCounter() as counter:
        with not_counted():
            net(inputs)
        assert counter.total == 0


def test_a_copy_without_memory_takes_as_many_and_leaves_all_as_it_was() -> None:
    model = Architecture(MlpModel(hidden=[32]), (1, 8, 8), 10).build()
    before = [each.clone() for each in model.parameters()], torch.get_rng_state()

    def loss(net: Any, batch: Any) -> tuple[Tensor, Tensor]:
        losses = F.cross_entropy(F.dropout(net(batch[0])), batch[1], reduction="sum")
        return losses, torch.tensor(len(batch[1]))

    content = (torch.zeros(6, 1, 8, 8), torch.zeros(6, dtype=torch.int64))
    assert work.apart(model, loss, content) == 6 * OF_SAMPLE
    assert all(map(torch.equal, before[0], model.parameters()))
    assert torch.equal(before[1], torch.get_rng_state())
    assert all(each.grad is None for each in model.parameters())
    assert work.apart(model, lambda net, batch: loss(net, batch)[0].item(), content) is None


# -- devices -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("device", "precision", "tera"),
    [
        ("NVIDIA A100-SXM4-80GB", "bf16", 312),
        ("NVIDIA A100-SXM4-80GB", "fp32", 19.5),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", "bf16", None),
        ("NVIDIA H100 80GB HBM3", "bf16", 989.4),
        ("NVIDIA H100 PCIe", "fp16", 756),
        ("NVIDIA H200", "bf16", 989.4),
        ("NVIDIA B200", "bf16", 2250),
        ("NVIDIA GB200", "bf16", None),
        ("NVIDIA L4", "bf16", 121),
        ("NVIDIA L40S", "bf16", 362),
        ("NVIDIA A10", "bf16", 125),
        ("NVIDIA A10G", "bf16", 70),
        ("Tesla T4", "fp16", 65),
        ("Tesla T4", "bf16", None),
        ("Tesla V100-SXM2-16GB", "fp16", 125),
        ("NVIDIA GeForce RTX 3090", "bf16", 71),
        ("NVIDIA GeForce RTX 4090", "bf16", 165.2),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "bf16", None),
        ("cpu", "fp32", None),
    ],
)
def test_devices_have_the_peaks_of_their_data_sheets(device: str, precision: str, tera: float | None) -> None:
    found = peak_flops(device, precision)
    assert found == (None if tera is None else pytest.approx(tera * 1e12))


def test_products_of_fp32_numbers_may_be_in_tf32() -> None:
    assert peak_flops("NVIDIA A100-SXM4-80GB", "fp32", tf32=True) == 156e12
    assert peak_flops("Tesla V100-SXM2-16GB", "fp32", tf32=True) == 15.7e12


# -- telling -----------------------------------------------------------------------------------------------------------


def test_a_pace_has_what_is_known() -> None:
    assert Work(flops=3e9, tokens=256, peak=2e12).pace(100.0, 0.25) == Pace(100.0, 0.25, 25600.0, 0.3, 0.15)
    assert Work(flops=3e9).pace(100.0, 0.25) == Pace(100.0, 0.25, None, 0.3, None)
    assert Work().pace(100.0, 0.25) == Pace(100.0, 0.25)


def test_a_run_says_what_its_samples_take(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[Work] = []
    pace = Work.pace
    monkeypatch.setattr(work, "peak_flops", lambda *given, **named: 1e9)
    monkeypatch.setattr(Work, "pace", lambda self, *given: told.append(self) or pace(self, *given))
    folder = train("plain")
    assert set(told) == {Work(OF_SAMPLE, None, 1e9)}
    for line in trained(folder)[1:]:
        assert line["tflops_per_s"] == pytest.approx(line["samples_per_s"] * OF_SAMPLE / 1e12, rel=1e-3)
        assert line["mfu"] == pytest.approx(line["samples_per_s"] * OF_SAMPLE / 1e9, abs=1e-4)
        assert line["tokens_per_s"] is None
        assert line["peak_memory_bytes"] > 2**26


def test_a_run_is_the_same_to_the_bit_when_it_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    counted = final(train("counted"))
    monkeypatch.setattr(FlopCounter, "__enter__", lambda self: self)
    monkeypatch.setattr(FlopCounter, "__exit__", lambda self, *error: None)
    assert_bitwise_equal(final(train("uncounted")), counted)


def test_a_compiled_model_is_counted_apart_and_one_of_ones_own_is_not(folder: Path) -> None:
    (folder / "mine.py").write_text("def loss(model, batch):\n    return model(batch[0]).sum()\n", encoding="utf-8")
    told: list[Work] = []
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    batch = MicroBatch((torch.zeros(4, 1, 8, 8), torch.zeros(4, dtype=torch.int64)), 4, 1.0)
    for changes in ({}, {"loss": "mine.py:loss"}):
        config = from_data({"epochs": 1, "compile": True} | changes)
        worker = Worker(0, 1, torch.device("cpu"))
        meter = work.WorkMeter(config, worker, Precision("fp32", "cpu"), {"context": 5}, told.append)
        with meter.counting(model, lambda net, batch: F.cross_entropy(net(batch[0]), batch[1]), [batch]):
            model(batch.content[0])
    assert told == [Work(4 * 64 * 10, 5), Work(None, 5)]
