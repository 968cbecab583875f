"""Loops of a user's own that do more than register their parts and train: with whatever they do, they go on as one."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lone_runs import without_ray
from test_own_loops import CODE, lines, train, write
from whole_runs import assert_bitwise_equal

from raytorch.runs.checkpoint_manifest import latest_checkpoint
from raytorch.runs.storage import RunFolder
from raytorch.training.saved_state import open_checkpoint

LOOPS = (
    CODE
    + """
def initial(module):
    if isinstance(module, nn.Linear):
        nn.init.normal_(module.weight.data, 0, 0.1)


def initialized(run, *, stop_at: int = 0):
    net = run.model("student", Net)
    run.bare("student").apply(initial)
    average = run.average("student", 0.9)
    adam = run.optimizer("adam", torch.optim.Adam(net.parameters(), 0.05))
    average.apply(initial)
    group = adam.param_groups[0]
    group["weight_decay"] = 0.1
    for x, y in run.batches(Points("train"), epochs=3):
        group["lr"] = 0.05 / run.step
        step(run, net, adam, x, y, stop_at)


def step(run, net, adam, x, y, stop_at):
    adam.zero_grad()
    run.backward((net(x) - y).square().mean())
    adam.step()
    if run.step == stop_at:
        raise KeyError("here")


def between(run, *, stop_at: int = 0):
    net, target = run.model("student", Net), run.model("target", Net)
    adam = run.optimizer("adam", torch.optim.Adam(net.parameters(), 0.05))
    schedule = run.keep("schedule", torch.optim.lr_scheduler.MultiplicativeLR(adam, lambda number: 0.5))
    for number in range(3):
        target.load_state_dict(net.state_dict())
        for x, y in run.batches(Points("train"), steps=4):
            step(run, net, adam, x, y - target(x).detach(), stop_at)
        step(run, net, adam, torch.ones(2, 1), torch.zeros(2, 1), 0)
        schedule.step()


def longer(run, *, epochs: int = 0, stop_at: int = 0):
    net = run.model("student", Net)
    adam = run.optimizer("adam", torch.optim.Adam(net.parameters(), 0.05))
    for x, y in run.batches(Points("train"), epochs=epochs or None):
        step(run, net, adam, x, y, stop_at)
        if run.ends_epoch:
            run.log(loss=run.epoch)
            run.evaluated(error=1.0)


def finishing(run):
    net = run.model("student", Net)
    adam = run.optimizer("adam", torch.optim.Adam(net.parameters(), 0.05))
    for x, y in run.batches(Points("train"), epochs=2):
        step(run, net, adam, x, y, 0)
    head = run.model("head", nn.Linear(1, 1))
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(0.5)
    run.log(loss=1.0)
    run.evaluated(error=2.0)
    run.tested(error=3.0)


def told(run, *, stop_at: int = 0):
    net = run.model("student", Net)
    adam = run.optimizer("adam", torch.optim.Adam(net.parameters(), 0.05))
    run.evaluated(error=9.0)
    for number in range(3):
        for x, y in run.batches(Points("train"), epochs=1):
            step(run, net, adam, x, y, stop_at)
        run.evaluated(error=float(number))


def elsewhere(run, *, stop_at: int = 0):
    torch.set_default_device(None)
    net = run.model("student", Net)
    adam = run.optimizer("adam", torch.optim.Adam(net.parameters(), 0.05))
    points = Points("train")
    torch.set_default_device("meta")  # as "cuda" would be, of no use to a generator of the CPU
    for x, y in run.batches(points, epochs=3):
        step(run, net, adam, x, y, stop_at)
        run.log(loss=float(run.step))
"""
)


@pytest.fixture(autouse=True)
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with these loops in it, the current one; no Ray."""
    write(tmp_path, LOOPS)
    with without_ray(tmp_path, monkeypatch):
        yield tmp_path


def called(name: str, **arguments: Any) -> dict[str, Any]:
    return {"name": f"loops.py:{name}", **arguments}


def weights(folder: RunFolder) -> dict[str, torch.Tensor]:
    """All models of the newest checkpoint."""
    with open_checkpoint(folder, str(latest_checkpoint(folder))) as content:
        models = {name: content.model(torch.device("cpu"), name) for name in content.models}
    return {f"{name}.{key}": tensor for name, model in models.items() for key, tensor in model.items()}


def assert_ends_alike_when_stopped(loop: str, *stops: int) -> None:
    """Whatever its step, a run that is stopped after it and goes on ends with the weights of one that is not."""
    whole, _ = train("whole", loop=called(loop), metrics=[])
    for stop_at in stops:
        with pytest.raises(KeyError, match="here"):
            train(f"parted-{stop_at}", loop=called(loop, stop_at=stop_at), metrics=[])
        parted, _ = train(f"parted-{stop_at}", loop=called(loop), metrics=[])
        assert_bitwise_equal(weights(parted), weights(whole))


def test_initial_weights_after_a_model_is_registered_are_of_its_beginning_alone() -> None:
    assert_ends_alike_when_stopped("initialized", 5, 11)


def test_what_a_loop_does_between_passes_is_done_once() -> None:
    assert_ends_alike_when_stopped("between", 3, 5, 8, 11)


@pytest.mark.parametrize("stop_at", [2, 5, 9])
def test_what_was_told_after_a_checkpoint_is_told_once(stop_at: int) -> None:
    changes: dict[str, Any] = {"checkpoint": {"every_epochs": 1}}
    whole, _ = train("whole", loop=called("told"), **changes)
    with pytest.raises(KeyError, match="here"):
        train("parted", loop=called("told", stop_at=stop_at), **changes)
    parted, _ = train("parted", loop=called("told"), **changes)
    assert [line["error"] for line in lines(whole)] == [9, 0, 1, 2]
    assert lines(parted) == lines(whole)


def test_a_default_device_is_not_where_the_order_of_samples_is_drawn() -> None:
    try:
        assert_ends_alike_when_stopped("elsewhere", 5)
    finally:
        torch.set_default_device(None)


@pytest.mark.parametrize("by", ["configuration", "argument"])
def test_a_loop_that_has_finished_goes_on_for_more_epochs(by: str) -> None:
    def epochs(count: int) -> dict[str, Any]:
        is_own = by == "argument"
        return {"epochs": 1 if is_own else count, "loop": called("longer", epochs=count if is_own else 0)}

    whole, _ = train("whole", **epochs(4))
    parted, outcome = train("parted", **epochs(2))
    assert (outcome["state"], outcome["step"]) == ("finished", 8)
    parted, outcome = train("parted", **epochs(4))
    assert (outcome["state"], outcome["step"], outcome["epochs"]) == ("finished", 16, 4)
    assert_bitwise_equal(weights(parted), weights(whole))
    assert lines(parted) == lines(whole)


def test_a_loop_that_has_ended_early_goes_on_with_more_patience() -> None:
    _, outcome = train("early", loop=called("longer"), epochs=6, stop={"patience": 1})
    assert outcome["step"] == 8
    _, outcome = train("early", loop=called("longer"), epochs=6, stop={"patience": 3})
    assert outcome["step"] == 16


def test_what_follows_the_last_batches_is_done_once_also_where_the_run_ends_twice() -> None:
    folder, _ = train("ended", loop=called("finishing"))
    before, told = weights(folder), lines(folder)
    _, outcome = train("ended", loop=called("finishing"))
    assert (outcome["state"], outcome["step"]) == ("finished", 8)
    assert (outcome["metrics"], outcome["test_metrics"]) == ({"error": 2.0}, {"error": 3.0})
    assert_bitwise_equal(weights(folder), before)
    assert lines(folder) == told
