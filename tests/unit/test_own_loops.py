"""Loops of a user's own, on one worker and without Ray: what they are given, what is saved, and how they go on."""

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lone_runs import Monitor, follow, without_ray
from whole_runs import assert_bitwise_equal

from raytorch.config.file import dump_config, from_data
from raytorch.errors import CheckpointError, ConfigError, DivergedError, UserError
from raytorch.export import load_run
from raytorch.runs.catalog import read_history
from raytorch.runs.checkpoint_manifest import checkpoint_names, latest_checkpoint, read_manifest
from raytorch.runs.plan import RunPlan
from raytorch.runs.storage import RunFolder
from raytorch.training import monitor
from raytorch.training.checkpoints import open_checkpoint
from raytorch.training.stopping import DriverRequest

CPU = torch.device("cpu")
CODE = """
import pathlib

import torch
from torch import nn


class Points:
    def __init__(self, split):
        self.x = torch.linspace(-1, 1, 40 if split == "train" else 10)[:, None]

    def __len__(self):
        return len(self.x)

    def batch(self, indices):
        return self.x[indices], self.x[indices] ** 2


class Net(nn.Module):
    def __init__(self, *, width: int = 8):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(1, width), nn.Tanh(), nn.Dropout(0.1), nn.Linear(width, 1))

    def forward(self, x):
        return self.layers(x)

    @staticmethod
    def example_inputs(input_shape):
        return {"x": torch.randn(2, 1)}


def main(run, *, width: int = 8, lr: float = 0.01, stop_at: int = 0):
    net = run.model("student", Net, width=width)
    teacher = run.model("teacher", nn.Linear(1, 1))
    average = run.average("student", 0.9)
    first = run.optimizer("first", torch.optim.Adam(net.parameters(), lr))
    second = run.optimizer("second", torch.optim.SGD(teacher.parameters(), 0.1, momentum=0.9))
    schedule = run.keep("schedule", torch.optim.lr_scheduler.MultiStepLR(first, [7, 11], 0.5))
    for x, y in run.batches(Points("train"), epochs=4):
        loss = (net(x) - y).square().mean() + (teacher(x) - net(x).detach()).square().mean()
        for optimizer in (first, second):
            optimizer.zero_grad()
        run.backward(loss)
        for optimizer in (first, second):
            optimizer.step()
        schedule.step()
        run.log(loss=loss)
        if run.step == stop_at:
            raise KeyError("here")
        if run.ends_epoch:
            with run.evaluating():
                errors = [(average(x) - y).square().sum() for x, y in run.share(Points("test"))]
            run.evaluated(error=(sum(errors), 10))
"""
RUN: dict[str, Any] = {
    "name": "own",
    "loop": "loops.py:main",
    "metrics": [{"name": "error", "better": "lower"}],
    "batch_size": 10,
    "checkpoint": {"every_steps": 3, "keep": 99},
    "logging": {"every_steps": 2},
}


@pytest.fixture(autouse=True)
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with loops in it, the current one; no Ray."""
    write(tmp_path, CODE)
    with without_ray(tmp_path, monkeypatch):
        yield tmp_path


def write(folder: Path, code: str) -> None:
    (folder / "loops.py").write_text(code, encoding="utf-8")


def train(name: str, *, changed_code: bool = False, **changes: Any) -> tuple[RunFolder, dict[str, Any]]:
    """Follow the loop on one worker, from the newest checkpoint on, and return the run's folder and outcome."""
    config = from_data(RUN | changes | {"name": name, "storage": str(Path.cwd() / "runs")})
    folder = RunFolder(config.storage, config.name)
    folder.make()
    return folder, follow(RunPlan(config, changed_code=changed_code), Monitor())


def saved(folder: RunFolder) -> tuple[dict[str, Any], dict[str, Any], Any]:
    """The models of the newest checkpoint, and what else it has."""
    with open_checkpoint(folder, str(latest_checkpoint(folder))) as content:
        state = content.state()
        kept = state["kept"] | {"averages": state["averages"]}
        return content.model(CPU, "student"), content.model(CPU, "teacher"), kept


def lines(folder: RunFolder) -> list[dict[str, Any]]:
    """The run's metrics, but for what takes time."""
    return [
        {key: it for key, it in line.items() if key not in ("time", "samples_per_s")} for line in read_history(folder)
    ]


def test_a_loop_is_saved_with_all_that_it_registers_and_goes_on_with_the_same_bits() -> None:
    whole, outcome = train("whole")
    assert (outcome["state"], outcome["step"], outcome["epochs"]) == ("finished", 16, 4)
    assert set(outcome["metrics"]) == {"error"}
    names = checkpoint_names(whole)
    assert names == [f"checkpoint_{step:08d}" for step in (3, 4, 6, 8, 9, 12, 15, 16)]
    with pytest.raises(KeyError, match="here"):
        train("parted", loop={"name": "loops.py:main", "stop_at": 11})
    parted, _ = train("parted")
    for ours, theirs in zip(saved(parted), saved(whole), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    assert lines(parted) == lines(whole)


def test_its_lines_have_what_it_logs_and_the_learning_rates() -> None:
    folder, _ = train("logged", checkpoint={"every_epochs": 1})
    trained = [line for line in lines(folder) if line["split"] == "train"]
    assert [line["step"] for line in trained] == [2, 4, 6, 8, 10, 12, 14, 16]
    assert set(trained[0]) == {"step", "epoch", "split", "loss", "lr_first", "lr_second"}
    assert [line["lr_first"] for line in trained] == pytest.approx([0.01] * 3 + [0.005] * 2 + [0.0025] * 3)
    tests = [line for line in lines(folder) if line["split"] == "test"]
    assert [(line["step"], line["epoch"]) for line in tests] == [(4, 1.0), (8, 2.0), (12, 3.0), (16, 4.0)]


def test_checkpoints_are_ranked_by_what_it_evaluates() -> None:
    folder, _ = train("ranked", checkpoint={"keep": 1})
    errors = {line["step"]: line["error"] for line in lines(folder) if line["split"] == "test"}
    best = min(errors, key=errors.__getitem__)
    assert set(checkpoint_names(folder)) == {f"checkpoint_{step:08d}" for step in (best, 16)}


def test_a_run_of_a_loop_ends_early() -> None:
    _, outcome = train("early", stop={"patience": 1, "min_change": 100.0})
    assert outcome["step"] == 8
    assert "error" in outcome["ended_early"]


def test_a_model_that_was_given_as_a_class_is_built_again(project: Path) -> None:
    folder, _ = train("built", loop={"name": "loops.py:main", "width": 5})
    net, architecture = load_run(folder, project, "student")
    assert architecture.config.name == "loops.py:Net"
    assert_bitwise_equal(net.state_dict(), saved(folder)[0])
    with pytest.raises(UserError, match=r"no model generator; give one of student, teacher"):
        load_run(folder, project, "generator")
    with pytest.raises(UserError, match=r"no model model; give one of student, teacher"):
        load_run(folder, project)


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


SCHEDULED = (
    CODE
    + """
from torch.optim import lr_scheduler as schedules


def scheduled(run, *, kind: str, stop_at: int = 0):
    net = run.model("student", Net)
    adam = run.optimizer("adam", torch.optim.Adam(net.parameters(), 0.1))
    schedule = run.keep("schedule", {
        "linear": lambda: schedules.LinearLR(adam, 0.1, total_iters=4),
        "one_cycle": lambda: schedules.OneCycleLR(adam, 0.1, total_steps=20),
        "lambda": lambda: schedules.LambdaLR(adam, lambda step: 0.5**step),
    }[kind]())
    for x, y in run.batches(Points("train"), steps=12):
        adam.zero_grad()
        run.backward((net(x) - y).square().mean())
        adam.step()
        schedule.step()
        if run.step == stop_at:
            raise KeyError("here")
"""
)


@pytest.mark.parametrize("kind", ["linear", "one_cycle", "lambda"])
def test_a_schedule_goes_on_with_its_rate(project: Path, kind: str) -> None:
    write(project, SCHEDULED)
    changes: dict[str, Any] = {"metrics": []}
    whole, _ = train("whole", loop={"name": "loops.py:scheduled", "kind": kind}, **changes)
    with pytest.raises(KeyError, match="here"):
        train("parted", loop={"name": "loops.py:scheduled", "kind": kind, "stop_at": 8}, **changes)
    parted, _ = train("parted", loop={"name": "loops.py:scheduled", "kind": kind}, **changes)
    with open_checkpoint(whole, "checkpoint_00000012") as a, open_checkpoint(parted, "checkpoint_00000012") as b:
        assert_bitwise_equal(a.model(CPU, "student"), b.model(CPU, "student"))


def test_a_run_that_is_resumed_at_its_end_leaves_the_average_as_it_is() -> None:
    folder, _ = train("ended")
    before = saved(folder)
    train("ended")
    for ours, theirs in zip(saved(folder), before, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


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


@pytest.mark.parametrize(
    ("body", "error", "told"),
    [
        ("run.model('a b', Net)", UserError, "a name is of up to 64 letters"),
        (
            "run.model('a', Net); run.keep('a', torch.optim.SGD(Net().parameters(), 1))",
            UserError,
            "a is registered already",
        ),
        ("run.model('a', Net(), width=3)", UserError, "takes no width; give its class"),
        ("run.model('a', Net, width=torch.ones(1))", UserError, "no form for, so that it could not be built again"),
        ("run.model('a', dict)", UserError, "must be a torch.nn.Module, or make one, not a dict"),
        ("run.optimizer('a', Net())", UserError, "must be a torch.optim.Optimizer, not a Net"),
        ("run.keep('a', {})", UserError, "must have state_dict and load_state_dict, which a dict lacks"),
        ("run.batches(Points('train'), batch_size=0)", ConfigError, "batch_size: run.batches takes a whole number"),
        ("run.steps(Points('train'), epochs=1, steps=1)", ConfigError, "either epochs or steps, not both"),
        ("run.log(step=1.0)", UserError, "a number cannot be called step, which metrics.jsonl has"),
        ("run.report(step='x')", UserError, "run.report: step: the run tells that itself; take another name"),
        ("run.evaluated(epoch=1.0)", UserError, "a number cannot be called epoch"),
        (
            "[run.model('a', Net) for _ in run.batches(Points('train'), steps=2)]",
            UserError,
            "register a before the batches",
        ),
        ("run.model('a', Net); run.average('a'); run.average('a')", UserError, "a has an average already"),
        ("run.bare('a')", UserError, "no model a in this run: none yet"),
        (
            "run.keep('a', type('T', (), {'state_dict': lambda self: {'x': set()}, 'load_state_dict': None})())",
            TypeError,
            "a: its state_dict.. cannot be",
        ),
        ("next(iter(run.batches(Points('train'))))", ConfigError, "epochs: say how many"),
        ("run.log(loss=torch.ones(2))", TypeError, "loss must be a number or a tensor of one element"),
        ("run.evaluated(other=1.0)", ConfigError, "has no error, by which checkpoints are ranked"),
        ("run.evaluated(error=(1.0, -1.0, 2))", TypeError, "a number or .sum, count."),
        (
            "[list(run.batches(Points('train'), steps=2)) for _ in run.batches(Points('train'), steps=2)]",
            UserError,
            "one at a time",
        ),
        (
            "[run.log(loss=1e999) for _ in run.batches(Points('train'), steps=2)]",
            DivergedError,
            "loss became inf at step 1 of 2",
        ),
    ],
)
def test_what_a_loop_does_wrong_is_told(project: Path, body: str, error: type[Exception], told: str) -> None:
    write(project, f"{CODE}\ndef wrong(run):\n    {body}\n")
    with pytest.raises(error, match=told):
        train("wrong", loop="loops.py:wrong")


def test_a_checkpoint_of_other_parts_is_refused_unless_the_code_may_have_changed(project: Path) -> None:
    train("parts")
    write(project, CODE.replace('"second"', '"renamed"'))
    with pytest.raises(CheckpointError, match=r"has no renamed, though the loop registers it"):
        train("parts")
    write(project, CODE.replace('    schedule = run.keep("schedule", ', "    schedule = ("))
    with pytest.raises(CheckpointError, match=r"has schedule, which the loop has not registered"):
        train("parts")
    _, outcome = train("parts", changed_code=True)
    assert outcome["step"] == 16


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"model": "convnet"}, r"model is for raytorch's loop; loops.py:main decides it, leave it out"),
        ({"optimizer": {"name": "sgd", "lr": 0.1}}, "optimizer is for raytorch's loop"),
        ({"metrics": ["loops.py:main"]}, "the names that it gives run.evaluated"),
        ({"loop": {"name": "loops.py:main", "widht": 3}}, r"loop.widht: unknown key; .*did you mean 'width'"),
        ({"loop": {"name": "loops.py:main", "width": "x"}}, r"loop.width: "),
        ({"loop": "loops.py:Mian"}, r"loop.name: .*did you mean 'main'"),
        ({"loop": "os:system"}, "loop"),
    ],
)
def test_a_configuration_that_does_not_fit_a_loop_is_refused(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        from_data(RUN | changes)


def test_the_record_of_a_run_has_what_its_loop_takes_and_nothing_that_it_decides() -> None:
    config = from_data(RUN)
    text = dump_config(config)
    assert "loop:\n  name: loops.py:main\n  width: 8\n  lr: 0.01\n" in text
    assert not {"model", "data", "loss", "optimizer", "schedule"} & set(config.model_dump())
    folder, _ = train("recorded")
    manifest = read_manifest(folder, str(latest_checkpoint(folder)))
    assert manifest.config["loop"]["name"] == "loops.py:main"
    assert list(manifest.code) == ["loops.py"]
