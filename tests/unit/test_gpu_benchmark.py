"""The benchmark for a GPU, in small on the CPU and without Ray, so that it is ready where a GPU is lent."""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from lone_runs import in_place_of_ray

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def gpu() -> ModuleType:
    spec: Any = importlib.util.spec_from_file_location("gpu_benchmark", ROOT / "benchmarks/gpu.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("part", "names"),
    [
        ("gpt", {"tokens_per_s", "peer_tokens_per_s", "ratios", "tflops_per_s", "mfu"}),
        ("resnet", {"images_per_s", "peer_images_per_s", "ratios"}),
        ("checkpoint", {"stall_s", "torch_save_s", "torch_save_bytes", "ratio"}),
    ],
)
def test_each_part_measures_raytorch_beside_its_peer(
    gpu: ModuleType,
    part: str,
    names: set[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with in_place_of_ray(tmp_path, monkeypatch):
        figures = gpu.main(["--within", "--parts", part, "--tiny"])
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == figures
    assert figures.keys() == names
    assert all(value for name, value in figures.items() if name != "mfu")


def test_the_peer_trains_the_same_gpt(gpu: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Given the same weights it has the same loss."""
    import torch

    from raytorch.config import GptModel
    from raytorch.models.networks import Architecture
    from raytorch.models.tokens import token_loss

    monkeypatch.syspath_prepend(str(ROOT / "benchmarks/peers"))
    from gpt_loop import GPT  # type: ignore[import-not-found]

    torch.manual_seed(0)
    sizes = gpu.TINY_GPT
    theirs = GPT(**sizes)
    config = GptModel(**{name: sizes[name] for name in ("dim", "heads", "layers")})
    ours = Architecture.of(config, {"vocabulary": sizes["vocabulary"], "context": sizes["context"]}, None).build()
    assert sum(each.numel() for each in ours.parameters()) == sum(each.numel() for each in theirs.parameters())
    matched = zip(ours.state_dict().values(), by_their_place(theirs.state_dict()), strict=True)
    for own, other in matched:
        own.copy_(other)
    tokens = torch.randint(sizes["vocabulary"], (3, 17))
    total, count = token_loss(ours(tokens[:, :-1]), tokens[:, 1:], 0.0)
    torch.testing.assert_close(total / count, theirs(tokens[:, :-1], tokens[:, 1:]))


def by_their_place(weights: dict[str, Any]) -> list[Any]:
    """The peer's weights in the order in which raytorch has them: in each block, by what they do."""
    order = ("norm1", "q", "k", "v", "o", "norm2", "gate", "up", "down")
    layers = sorted({int(name.split(".")[1]) for name in weights if name.startswith("blocks.")})
    blocks = [weights[f"blocks.{layer}.{part}.weight"] for layer in layers for part in order]
    return [weights["embed.weight"], *blocks, weights["norm.weight"]]


@pytest.mark.parametrize(
    ("program", "figures"),
    [
        ("print('noise'); print('{\"ratio\": 1}')", {"ratio": 1}),
        ("raise SystemExit(3)", {"error": "ended with status 3"}),
        ("import time; time.sleep(60)", {"error": "not done after 1 s"}),
    ],
)
def test_a_part_that_fails_or_hangs_ends_no_other(gpu: ModuleType, program: str, figures: dict[str, Any]) -> None:
    assert gpu.apart([sys.executable, "-c", program], 1 if "sleep" in program else 60) == figures


def test_a_figure_has_a_line(gpu: ModuleType) -> None:
    lines = gpu.shown("gpt", {"tokens_per_s": 123456.7, "ratios": [0.98123, 1.0], "mfu": None})
    assert lines == ["gpt: tokens_per_s 123,457", "gpt: ratios 0.981, 1", "gpt: mfu None"]
    assert sum(gpu.LIMITS.values()) <= 7 * 60
