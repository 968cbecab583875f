"""Loops of a user's own that go over data several times, or leave a pass before its end."""

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from own_loops import CODE, CPU, lines, project_with_loops, train, write
from whole_runs import assert_bitwise_equal

from raytorch.training import monitor
from raytorch.training.saved_state import open_checkpoint
from raytorch.training.stopping import DriverRequest


@pytest.fixture(autouse=True)
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with loops in it, the current one; no Ray."""
    with project_with_loops(tmp_path, monkeypatch) as folder:
        yield folder


def test_several_passes_over_data_go_on_in_the_one_that_was_left(project: Path) -> None:
    two = (
        CODE
        + """
def pretrained(run, *, stop_at: int = 0):
    net = run.model("student", Net)
    for phase in range(3):
        head = run.model(f"head_{phase}", nn.Linear(1, 1))
        optimizer = run.optimizer(f"adam_{phase}", torch.optim.Adam([*net.parameters(), *head.parameters()]))
        for x, y in run.batches(Points("train"), steps=5):
            optimizer.zero_grad()
            (head(net(x)) - y).square().mean().backward()
            optimizer.step()
            if run.step == stop_at:
                raise KeyError("here")
"""
    )
    write(project, two)
    changes: dict[str, Any] = {"metrics": [], "checkpoint": {"every_steps": 2, "keep": 99}}
    whole, outcome = train("whole", loop="loops.py:pretrained", **changes)
    assert outcome["step"] == 15
    for stop_at in (1, 5, 6, 9, 13):
        name = f"parted-{stop_at}"
        with pytest.raises(KeyError):
            train(name, loop={"name": "loops.py:pretrained", "stop_at": stop_at}, **changes)
        parted, _ = train(name, loop="loops.py:pretrained", **changes)
        with open_checkpoint(whole, "checkpoint_00000015") as a, open_checkpoint(parted, "checkpoint_00000015") as b:
            assert a.models == ["head_0", "head_1", "head_2", "student"] == b.models
            for model in a.models:
                assert_bitwise_equal(a.model(CPU, model), b.model(CPU, model))


PASSES = (
    CODE
    + """
def passes(run, *, stop_at: int = 0, leave_at: int = 0):
    net = run.model("student", Net)
    adam = run.optimizer("adam", torch.optim.Adam(net.parameters(), 0.1))
    seen = []
    for number in range(3):
        for x, y in run.batches(Points("train"), epochs=2):
            seen.append(x.flatten().tolist())
            adam.zero_grad()
            run.backward((net(x) - y).square().mean())
            adam.step()
            if run.step == stop_at:
                raise KeyError("here")
            if run.step == leave_at:
                break
        run.log(passed=number)
        run.evaluated(error=float(number))
    pathlib.Path(f"seen-{stop_at}.txt").write_text(str(seen), "utf-8")
"""
)


def test_each_pass_has_an_order_of_its_own_and_what_lies_between_them_is_told_once(project: Path) -> None:
    write(project, PASSES)
    changes: dict[str, Any] = {"stop": {"patience": 9}, "checkpoint": {"every_steps": 3, "keep": 99}}
    whole, outcome = train("whole", loop="loops.py:passes", **changes)
    assert outcome["step"] == 24
    seen = ast.literal_eval((project / "seen-0.txt").read_text("utf-8"))
    assert len({str(seen[first]) for first in (0, 8, 16)}) == 3
    with pytest.raises(KeyError, match="here"):
        train("parted", loop={"name": "loops.py:passes", "stop_at": 20}, **changes)
    parted, _ = train("parted", loop="loops.py:passes", **changes)
    assert lines(parted) == lines(whole)
    assert ast.literal_eval((project / "seen-0.txt").read_text("utf-8")) == seen[18:]
    with open_checkpoint(whole, "checkpoint_00000024") as a, open_checkpoint(parted, "checkpoint_00000024") as b:
        assert_bitwise_equal(a.model(CPU, "student"), b.model(CPU, "student"))


@pytest.mark.parametrize("body", ["raise", "swallow"])
def test_a_loop_stops_between_passes_and_cannot_go_on(
    project: Path, monkeypatch: pytest.MonkeyPatch, body: str
) -> None:
    loop = (
        CODE
        + """
def short(run, *, body: str):
    net = run.model("student", Net)
    for number in range(30):
        try:
            for x, y in run.batches(Points("train"), steps=1):
                pass
        except BaseException:
            if body != "swallow":
                raise
"""
    )
    write(project, loop)
    monkeypatch.setattr(monitor.DriverLink, "take_request", lambda self: DriverRequest.STOP)
    _, outcome = train("short", loop={"name": "loops.py:short", "body": body}, metrics=[])
    assert (outcome["state"], outcome["step"]) == ("stopped", 1)


@pytest.mark.parametrize("leave_at", [7, 8])
def test_a_pass_that_is_left_by_break_stays_left(project: Path, leave_at: int) -> None:
    write(project, PASSES.replace("range(3)", "range(1)"))
    loop = {"name": "loops.py:passes", "leave_at": leave_at}
    _, outcome = train("left", loop=loop)
    assert (outcome["state"], outcome["step"]) == ("finished", leave_at)
    assert train("left", loop=loop)[1]["step"] == leave_at


def test_an_evaluation_behind_the_last_checkpoint_is_told_once(project: Path) -> None:
    changes: dict[str, Any] = {"loop": "loops.py:passes", "stop": {"patience": 9}}
    write(project, PASSES)
    whole, _ = train("whole", **changes)
    evaluated = "        run.evaluated(error=float(number))\n"
    write(project, PASSES.replace(evaluated, f"{evaluated}        raise KeyError('here')\n"))
    with pytest.raises(KeyError, match="here"):
        train("parted", **changes)
    write(project, PASSES)
    parted, _ = train("parted", changed_code=True, **changes)
    assert lines(parted) == lines(whole)
