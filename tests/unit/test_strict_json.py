"""Numbers that are not finite in what a run writes: every reader of JSON takes it, and raytorch reads them again."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from saved_states import load_saved_state, save_state

from raytorch.cli.common import print_json
from raytorch.errors import ModelFileError
from raytorch.runs.catalog import read_evaluations, read_history, read_summary
from raytorch.runs.metrics import MetricsLog
from raytorch.runs.records import write_end
from raytorch.runs.storage import RunFolder
from raytorch.system.strict_json import number, to_json

ODD = {"f1": math.nan, "worst": math.inf, "least": -math.inf, "loss": 0.5}


def strict(text: str) -> Any:
    """JSON as a reader has it that knows nothing of Python's."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    return json.loads(text, parse_constant=refuse)


def same(found: dict[str, Any]) -> bool:
    return math.isnan(found["f1"]) and {**found, "f1": 0} == {**ODD, "f1": 0}


def test_texts_stand_for_them_and_nothing_else() -> None:
    content = {"deep": [{"pair": (math.nan, 1)}], "text": "NaN", "none": None, "yes": True, **ODD}
    read = strict(to_json(content))
    assert read["deep"] == [{"pair": ["NaN", 1]}]
    assert (read["text"], read["none"], read["yes"], read["loss"]) == ("NaN", None, True, 0.5)
    assert same({name: number(read[name]) for name in ODD})
    assert [number(value) for value in ("nan", "1.0", 1, None)] == ["nan", "1.0", 1, None]


def test_a_runs_records_are_read_as_they_were_written(tmp_path: Path) -> None:
    folder = RunFolder(str(tmp_path), "odd")
    folder.make()
    log = MetricsLog(Path(folder.path), tensorboard=False)
    log.write("test", 3, 1.0, ODD)
    log.close()
    MetricsLog(Path(folder.path), resume_step=3, lines=1, tensorboard=False).close()
    ended = {"state": "finished", "started": "", "metrics": ODD, "split": "validation", "test_metrics": ODD}
    assert write_end(folder, "summary.json", ended)
    for file in Path(folder.path).iterdir():
        for line in (
            file.read_text(encoding="utf-8").splitlines() if file.suffix == ".jsonl" else [file.read_text("utf-8")]
        ):
            strict(line)
    assert same(read_evaluations(folder)[0].metrics)
    summary = read_summary(folder)
    assert same(summary["metrics"])
    assert same(summary["test_metrics"])


def test_records_of_before_are_read_too(tmp_path: Path) -> None:
    folder = RunFolder(str(tmp_path), "old")
    folder.make()
    line = {"step": 1, "epoch": 1.0, "split": "test", "time": 1.0, **ODD}
    folder.write_text("metrics.jsonl", json.dumps(line) + "\n")
    folder.write_text("summary.json", json.dumps({"state": "finished", "started": "", "metrics": ODD}))
    assert same(read_evaluations(folder)[0].metrics)
    assert same(read_summary(folder)["metrics"])


def test_a_text_that_is_no_number_is_damage(tmp_path: Path) -> None:
    folder = RunFolder(str(tmp_path), "damaged")
    folder.make()
    folder.write_text("metrics.jsonl", to_json({"step": 1, "epoch": 1.0, "split": "test", "loss": "low"}) + "\n")
    assert read_history(folder) == []


def test_the_command_line_prints_them_so(capsys: pytest.CaptureFixture[str]) -> None:
    print_json({"metrics": ODD})
    assert strict(capsys.readouterr().out)["metrics"]["worst"] == "Infinity"


def test_a_checkpoints_state_has_them_beside_texts_of_the_same_words(tmp_path: Path) -> None:
    save_state({"best": math.inf, "rows": [math.nan, torch.zeros(1)], "word": "NaN"}, tmp_path)
    strict((tmp_path / "state.json").read_text(encoding="utf-8"))
    state = load_saved_state(tmp_path)
    assert (state["best"], state["word"]) == (math.inf, "NaN")
    assert math.isnan(state["rows"][0])
    (tmp_path / "state.json").write_text('{"best": {"$number": "much"}}', encoding="utf-8")
    with pytest.raises(ModelFileError, match="is damaged"):
        load_saved_state(tmp_path)
    with pytest.raises(TypeError):
        save_state({"a": {"$number": 1}}, tmp_path)
