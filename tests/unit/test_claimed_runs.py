"""Runs that are planned, and claimed when others have been there meanwhile."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from run_folders import finished, started, write_end_of

from raytorch.config import RunConfig
from raytorch.errors import ConfigError, RunExistsError, RunNotFoundError
from raytorch.runs.plan import plan_resume, plan_run
from raytorch.runs.storage import RunFolder
from raytorch.training.driver import run_training


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    return RunConfig(name="digits", epochs=1, storage=str(tmp_path / "runs"))


@pytest.fixture
def meanwhile(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Calls that are made while Ray starts, as by another process; no run may begin after them."""
    calls: list[Any] = []

    @contextmanager
    def starting(*_: object, **__: object) -> Iterator[None]:
        for call in calls:
            call()
        yield

    monkeypatch.setattr("raytorch.training.driver.ray_for", starting)
    monkeypatch.setattr("raytorch.training.driver._supervise", lambda *_: pytest.fail("it was run"))
    return calls


def files(folder: RunFolder) -> dict[str, bytes]:
    return {
        path.name: path.read_bytes() for path in Path(folder.path).rglob("*") if path.name != ".lock" and path.is_file()
    }


def test_a_name_that_another_run_has_taken_meanwhile_is_refused(config: RunConfig, meanwhile: list[Any]) -> None:
    plan = plan_run(config.model_copy(update={"seed": 8}), "mine")
    meanwhile.append(lambda: there.update(files(finished(config))))
    there: dict[str, bytes] = {}
    with pytest.raises(RunExistsError, match=r"/mine exists already; take another name, or resume it$"):
        run_training(plan)
    assert files(plan.folder) == there != {}


def test_a_resumed_run_that_has_finished_meanwhile_has_nothing_left_to_do(
    config: RunConfig, meanwhile: list[Any]
) -> None:
    plan = plan_resume(started(config).path)
    meanwhile.append(lambda: write_end_of(plan.folder))
    summary = run_training(plan)
    assert (plan.finished, summary["state"], summary["step"]) == (None, "finished", 5)


def test_a_resumed_run_that_has_gone_further_meanwhile_is_not_cut_back(config: RunConfig, meanwhile: list[Any]) -> None:
    plan = plan_resume(started(config).path)
    meanwhile.append(lambda: shutil.rmtree(plan.folder.path))
    meanwhile.append(lambda: started(config.model_copy(update={"epochs": 5}), epoch=3.0))
    with pytest.raises(ConfigError, match=r"^epochs is 1, but the run that is resumed has done 3 already"):
        run_training(plan)


def test_a_resumed_run_that_is_gone_meanwhile_is_not_begun_anew(config: RunConfig, meanwhile: list[Any]) -> None:
    plan = plan_resume(started(config).path)
    meanwhile.append(lambda: shutil.rmtree(plan.folder.path))
    with pytest.raises(RunNotFoundError, match="no run mine in"):
        run_training(plan)
