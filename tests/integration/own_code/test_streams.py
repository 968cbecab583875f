"""Data sets of Ray Data: what each worker gets of the stream, and what a resume reads again."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

import raytorch

pytestmark = pytest.mark.usefixtures("local_ray")

CODE = """
import os

import ray.data
import torch
from torch import nn


def pipeline(split, *, rows: int = 41):
    numbers = ray.data.range(rows if split == "train" else 7, override_num_blocks=4)
    return numbers.map(lambda row: {"id": row["id"], "x": float(row["id"]) / rows, "name": f"row {row['id']}"})


class Net(nn.Linear):
    def __init__(self):
        super().__init__(1, 1)


def loss(model, batch, *, seen: str = ""):
    if seen and model.training:
        rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
        with open(os.path.join(seen, f"{rank}.txt"), "a") as file:
            file.write(" ".join(map(str, batch["id"].tolist())) + "\\n")
    assert batch["name"] == [f"row {number}" for number in batch["id"].tolist()]
    return ((model(batch["x"].float()[:, None]) - 1) ** 2).sum(), len(batch["id"])
"""


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / ".git").mkdir()
    (tmp_path / "flow.py").write_text(CODE, encoding="utf-8")
    (tmp_path / "seen").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(project: Path, **changes: Any) -> dict[str, Any]:
    return {
        "epochs": 2,
        "batch_size": 8,
        "data": "flow.py:pipeline",
        "model": "flow.py:Net",
        "loss": {"name": "flow.py:loss", "seen": str(project / "seen")},
        "scaling": {"workers": 2, "cpus_per_worker": 0.5},
        **changes,
    }


def steps_seen(project: Path) -> list[list[list[int]]]:
    """What each rank was given, step by step."""
    files = sorted((project / "seen").iterdir())
    return [[list(map(int, line.split())) for line in file.read_text(encoding="utf-8").splitlines()] for file in files]


def test_workers_take_equal_shares_of_the_stream_and_go_on_in_it(project: Path) -> None:
    first = raytorch.train(run(project, epochs=None, steps=3), name="flow")
    assert first.metrics.keys() == {"loss"}
    result = raytorch.resume("flow", run(project))
    ranks = steps_seen(project)
    assert [[len(step) for step in rank] for rank in ranks] == [[4] * 10] * 2  # 40 of 41 rows, in steps of 8
    epochs = [Counter(row for rank in ranks for step in rank[begin : begin + 5] for row in step) for begin in (0, 5)]
    assert [max(epoch.values()) for epoch in epochs] == [1, 1]
    summary = json.loads((Path(result.path) / "summary.json").read_text(encoding="utf-8"))
    assert summary["stream_restarts"] == [{"epoch": 0, "rows_passed_over": 24}]
