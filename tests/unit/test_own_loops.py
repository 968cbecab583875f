"""Loops of a user's own, on one worker and without Ray: what they are given, what is saved, and how they go on."""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lone_runs import Monitor
from own_loops import CODE, CPU, RUN, lines, project_with_loops, saved, train, write
from whole_runs import assert_bitwise_equal

from raytorch.config.file import dump_config, from_data
from raytorch.datasets import TrainLoader
from raytorch.errors import CheckpointError, ConfigError, DivergedError, UserError
from raytorch.runs import metrics
from raytorch.runs.catalog import read_history
from raytorch.runs.checkpoint_manifest import checkpoint_names, latest_checkpoint, read_manifest
from raytorch.runs.storage import RunFolder
from raytorch.training import run_state
from raytorch.training.export import load_run
from raytorch.training.saved_state import open_checkpoint


@pytest.fixture(autouse=True)
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with loops in it, the current one; no Ray."""
    with project_with_loops(tmp_path, monkeypatch) as folder:
        yield folder


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


@pytest.mark.parametrize(
    ("data", "readers", "advice"),
    [
        ("Points('train')", 0, "give run.batches readers"),
        ("Points('train')", 1, "give run.batches more readers"),
        ("run.data('digits', 'train')", 0, ""),
    ],
)
def test_it_is_told_how_much_of_its_time_it_waits_for_data(
    project: Path, monkeypatch: pytest.MonkeyPatch, data: str, readers: int, advice: str
) -> None:
    """On a clock that goes on by a second with each read of a batch, and by three with each step on it."""
    clock = SimpleNamespace(now=0.0, perf_counter=lambda: clock.now, time=time.time)
    monkeypatch.setattr(metrics, "time", clock)
    remaining = TrainLoader.remaining

    def slowly(self: TrainLoader) -> Iterator[Any]:
        for batches in remaining(self):
            clock.now += 1
            yield batches

    monkeypatch.setattr(TrainLoader, "remaining", slowly)
    write(
        project,
        CODE + "\ndef wait(run):\n    from raytorch.runs.metrics import time\n"
        f"    for batch in run.batches({data}, readers={readers}, steps=7):\n"
        "        time.now += 3\n        run.log(loss=0.5)\n",
    )
    told = Monitor()
    folder, outcome = train("waiting", told=told, loop="loops.py:wait", metrics=[], logging={"every_steps": 2})
    assert outcome["data_wait"] == 0.25
    assert {line["data_wait"] for line in read_history(folder)} == {0.25}
    assert (told.told["progress"][0]["data_wait"], told.told["progress"][0]["data_advice"]) == (0.25, advice)


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


def test_a_data_set_may_have_a_method_read_of_its_own(project: Path) -> None:
    write(project, CODE.replace("    def batch(", "    def read(self, file):\n        raise OSError\n\n    def batch("))
    assert train("reads")[1]["step"] == 16


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


@pytest.mark.parametrize("optimizer", ["Adam", "Adafactor", "Rprop"])
def test_an_optimizer_has_its_settings_again(project: Path, optimizer: str) -> None:
    code = CODE.replace("torch.optim.Adam(net.parameters(), lr)", f"torch.optim.{optimizer}(net.parameters())")
    code = code.replace("        schedule.step()\n", "")
    shown = 'str(sorted((first.param_groups[0] | {"params": 0}).items()))'
    settings = f'    pathlib.Path("settings.txt").write_text({shown})\n'
    write(project, code + settings)
    train("whole")
    before = (project / "settings.txt").read_text("utf-8")
    train("whole")
    assert (project / "settings.txt").read_text("utf-8") == before


def test_the_checkpoint_is_let_go_of_where_a_loop_fails_before_its_batches(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train("open")
    held: list[str] = []

    @contextmanager
    def noted(folder: RunFolder, name: str, **how: bool) -> Iterator[Any]:
        with open_checkpoint(folder, name, **how) as content:
            held.append(name)
            yield content
            held.remove(name)

    monkeypatch.setattr(run_state, "open_checkpoint", noted)
    write(
        project, CODE.replace('    teacher = run.model("teacher"', '    raise KeyError("here") or run.model("teacher"')
    )
    with pytest.raises(KeyError, match="here") as failure:
        train("open", changed_code=True)
    assert failure.tb  # which holds all that the loop had
    assert not held


def test_a_run_that_is_resumed_at_its_end_leaves_the_average_as_it_is() -> None:
    folder, _ = train("ended")
    before = saved(folder)
    train("ended")
    for ours, theirs in zip(saved(folder), before, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("body", "error", "told"),
    [
        ("run.model('a b', Net)", UserError, "a name is of up to 64 letters"),
        (
            "run.model('a', Net); run.keep('a', torch.optim.SGD(Net().parameters(), 1))",
            UserError,
            "run.keep: a is registered already, as a model; give each",
        ),
        (
            "run.optimizer('a', torch.optim.SGD(run.model('a', Net).parameters(), 1))",
            UserError,
            "run.optimizer: a is registered already, as a model; .* a name of its own, such as optimizer_a",
        ),
        ("run.model('a', Net(), width=3)", UserError, "takes no width; give its class"),
        ("run.model('a', Net, width=torch.ones(1))", UserError, "no form for, so that it could not be built again"),
        ("run.model('a', Net, name='b')", UserError, "a is given name, a key that raytorch has for models"),
        ("run.model('a', Net, width=3, weights='b')", UserError, "a is given weights, a key that raytorch has for"),
        ("run.model('a', dict)", UserError, "must be a torch.nn.Module, or make one, not a dict"),
        ("run.optimizer('a', Net())", UserError, "must be a torch.optim.Optimizer, not a Net"),
        ("run.keep('a', {})", UserError, "must have state_dict and load_state_dict, which a dict lacks"),
        ("run.batches(Points('train'), batch_size=0)", ConfigError, "batch_size: run.batches takes a whole number"),
        ("run.steps(Points('train'), epochs=1, steps=1)", ConfigError, "either epochs or steps, not both"),
        ("run.log(step=1.0)", UserError, "a number cannot be called step, which metrics.jsonl has"),
        ("run.log(**{'x' * 251: 1.0})", UserError, "a number's name has at most 250 characters, not 'xxx"),
        ("run.report(step='x')", UserError, "run.report: step: the run tells that itself; take another name"),
        ("run.evaluated(epoch=1.0)", UserError, "a number cannot be called epoch"),
        (
            "[run.model('a', Net) for _ in run.batches(Points('train'), steps=2)]",
            UserError,
            "register a before the batches",
        ),
        (
            "run.model('a', Net); [run.average('a') for _ in run.batches(Points('train'), steps=2)]",
            UserError,
            "run.average: register a before the batches",
        ),
        ("run.model('a', Net); run.average('a'); run.average('a')", UserError, "a has an average already"),
        ("run.bare('a')", UserError, "no model a in this run: none yet"),
        (
            "run.keep('a', type('T', (), {'state_dict': lambda self: {'x': set()}, 'load_state_dict': None})())",
            TypeError,
            "a: its state_dict.. cannot be",
        ),
        ("next(iter(run.batches(Points('train'))))", ConfigError, "epochs: say how many"),
        (
            "run.log(loss=torch.ones(2))",
            TypeError,
            r"loss must be .* one element, not a tensor of shape \(2,\); give its mean",
        ),
        ("run.evaluated(other=1.0)", ConfigError, "has no error, by which checkpoints are ranked"),
        ("run.evaluated(error=(1.0, -1.0, 2))", TypeError, "a number or .sum, count."),
        ("run.evaluated(loss=(0.0, 0), error=1.0)", ValueError, "loss: nothing was counted in the whole split"),
        (
            "run.model('a', Net); [run.log(loss=1.0) for _ in run.batches(Points('train'), steps=2)]",
            UserError,
            "loops.py:wrong has ended without run.evaluated, which metrics of the configuration need: call it",
        ),
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


def test_a_loop_that_leaves_out_its_evaluations_has_lost_nothing(project: Path) -> None:
    write(project, CODE.replace("run.evaluated(", "dict("))
    with pytest.raises(UserError, match=r"ended without run\.evaluated, .*what this one trained is saved"):
        train("unjudged")
    assert latest_checkpoint(RunFolder(str(project / "runs"), "unjudged")) == "checkpoint_00000016"


def test_an_evaluation_that_counts_nothing_is_no_number_and_ranks_last(project: Path) -> None:
    write(project, CODE.replace("(error=(sum(errors), 10))", "(error=(0, 0) if run.step > 12 else (sum(errors), 10))"))
    folder, outcome = train("uncounted", checkpoint={"every_steps": 3, "keep": 1})
    assert math.isnan(outcome["metrics"]["error"])
    errors = [float(line["error"]) for line in lines(folder) if "error" in line]
    assert [math.isnan(error) for error in errors] == [False, False, False, True]


def test_what_cannot_be_exported_is_told_before_it_is_trained(project: Path) -> None:
    write(project, CODE.replace("    def example_inputs(input_shape):", "    def other(input_shape):"))
    with pytest.raises(UserError, match=r"export: nothing says what loops.py:Net reads: let its class have a method"):
        train("unknown", export=["onnx"])
    assert latest_checkpoint(RunFolder(str(project / "runs"), "unknown")) is None


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


def test_a_loop_tests_what_it_has_trained(project: Path) -> None:
    write(project, CODE + '    assert run.tested(error=(6.0, 3)) == {"error": 2.0}\n')
    folder, outcome = train("tested")
    assert outcome["test_metrics"] == {"error": 2.0}
    assert outcome["metrics"]["error"] != 2.0
    assert (lines(folder)[-1]["split"], lines(folder)[-1]["error"]) == ("test", 2.0)
