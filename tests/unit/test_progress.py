"""What a person sees of a run, and of a download."""

import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from raytorch.cli import progress
from raytorch.cli.main import app
from raytorch.cli.progress import DownloadDisplay, ProgressDisplay, print_summary
from raytorch.runs.status import Evaluation, RunStatus
from raytorch.runs.storage import BASE
from raytorch.training.api import Result

NEWS = {
    "phase": "training",
    "step": 20,
    "total_steps": 200,
    "epoch": 1.25,
    "loss": 0.51234,
    "samples_per_s": 12345.6,
}


def status(progress: dict[str, Any] | None = None, **changes: Any) -> RunStatus:
    nothing = {"evaluations": (), "pids": {}, "failures": (), "attempts": 1, "begun_at": 1.0, "stopping": False}
    return RunStatus(progress=progress, **(nothing | changes))


def shown(*news: RunStatus, terminal: bool = False) -> str:
    """What is printed when these arrive in turn, on a terminal without its control characters' effect."""
    console = Console(file=io.StringIO(), force_terminal=terminal, width=160, color_system=None)
    with ProgressDisplay(console, "mine") as display:
        for each in news:
            display(each)
            display(each)  # the driver asks many times for the same
            display.refresh()
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_a_terminal_shows_one_live_line() -> None:
    text = shown(status(), status(NEWS), terminal=True)
    assert "starting workers" in text
    assert "20/200" in text
    assert "epoch 1.2  loss 0.5123  12,346 samples/s" in text
    assert text.count("\n") == 1  # one line, drawn again and again
    assert text.endswith("\x1b[1A\x1b[2K")  # and wiped away in the end


@pytest.mark.parametrize(
    ("news", "told"),
    [
        ({"data_wait": 0.234, "data_advice": "set data.readers"}, "  waiting for data 23% (set data.readers)"),
        ({"data_wait": 0.234, "data_advice": ""}, "  waiting for data 23%"),
        ({"data_wait": 0.05, "data_advice": "set data.readers"}, ""),
        ({"data_wait": None, "data_advice": "set data.readers"}, ""),
        ({"data_wait": "a loop's own"}, ""),
    ],
)
def test_much_waiting_for_data_is_told_with_what_to_do(news: dict[str, Any], told: str) -> None:
    [line] = [line for line in shown(status(NEWS | news), terminal=True).split("\r") if "20/200" in line][-1:]
    assert line.partition("samples/s")[2].startswith(f"{told} -:--:--")


def test_speed_and_memory_are_told_as_far_as_they_are_known() -> None:
    known = {"tokens_per_s": 3160473.6, "tflops_per_s": 312.4, "mfu": 0.40625, "peak_memory_bytes": 23_400_000_000}
    [line] = [line for line in shown(status(NEWS | known), terminal=True).split("\r") if "20/200" in line][-1:]
    assert "12,346 samples/s  3,160,474 tokens/s  mfu 40.6%  312 TFLOP/s  23.4 GB" in " ".join(line.split("\n"))
    unknown = dict.fromkeys(known)
    assert "12,346 samples/s -:--:--" in shown(status(NEWS | unknown), terminal=True)
    assert "  ·  12,346 samples/s  ·  3,160,474 tokens/s  ·  mfu 40.6%  ·  12.3 s" in summary_lines(160, **known)[0]


def test_what_a_loop_tells_of_its_loss_may_be_no_number() -> None:
    text = shown(status(NEWS | {"loss_kind": "huber", "lossless": None, "loss_d": 0.25}), terminal=True)
    assert "loss 0.5123  loss_d 0.2500  12,346 samples/s" in text


def test_it_is_told_once_that_workers_do_not_come(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "WAITING_S", 0.0)
    text = shown(status(attempts=0), status(attempts=0), status())
    assert text.startswith("no workers after 0 s: they are slow to start, or the cluster has no room for them yet")
    assert text.count("\n") == 1
    assert shown(status(), status(NEWS)) == ""
    monkeypatch.undo()
    assert shown(status(attempts=0)) == ""


def test_without_a_terminal_only_lasting_news_are_printed() -> None:
    first, second = (Evaluation(24 * n, float(n), {"accuracy": 0.9, "loss": 0.25}) for n in (1, 2))
    text = shown(
        status(),
        status(NEWS),
        status(NEWS, evaluations=(first,)),
        status(NEWS, evaluations=(first, second)),
    )
    assert text == (
        "epoch 1  step 24  test accuracy 0.9000  test loss 0.2500\n"
        "epoch 2  step 48  test accuracy 0.9000  test loss 0.2500\n"
    )


def test_evaluating_is_said_and_then_the_numbers_return() -> None:
    # Between two lines of metrics there is news without a loss, and no rate before the second step.
    early = {**NEWS, "samples_per_s": None}
    position = {key: NEWS[key] for key in ("step", "total_steps", "epoch")}
    text = shown(
        status(early),
        status({**position, "phase": "evaluating"}),
        status({**position, "phase": "training"}),
        terminal=True,
    )
    assert text.index("loss 0.5123") < text.index("evaluating") < text.rindex("loss 0.5123")
    assert "samples/s" not in text


def test_a_restart_is_said_once() -> None:
    text = shown(status(attempts=0), status(), status(attempts=2), status(attempts=3))
    assert text.splitlines() == [
        f"workers were lost or changed; restarted from the latest checkpoint (attempt {attempt})" for attempt in (2, 3)
    ]


def test_stopping_is_said_once() -> None:
    text = shown(status(NEWS), status(NEWS, stopping=True))
    assert text == "stopping after a last checkpoint; press Ctrl-C again to end at once\n"


SUMMARY = {
    "path": "/data/runs/mine",
    "state": "finished",
    "metrics": {"accuracy": 0.98765, "loss": 0.0456},
    "epochs": 3.0,
    "step": 72,
    "samples_per_s": 12345.6,
    "seconds": {"total": 12.34},
}


def summary_lines(width: int = 120, **changes: Any) -> list[str]:
    console = Console(file=io.StringIO(), width=width)
    print_summary(console, {key: value for key, value in (SUMMARY | changes).items() if value is not None})
    return console.file.getvalue().splitlines()  # type: ignore[attr-defined]


def test_a_finished_run_is_summed_up() -> None:
    assert summary_lines() == [
        "test accuracy 0.9877  test loss 0.0456  ·  3 epochs, 72 steps  ·  12,346 samples/s  ·  12.3 s",
        "run       /data/runs/mine",
        "curves    raytorch report /data/runs/mine",
    ]


def test_what_a_summary_does_not_have_is_left_out() -> None:
    assert summary_lines(metrics=None, seconds=None, step=None)[0] == "finished  ·  12,346 samples/s"
    assert summary_lines(seconds={"total": None}, samples_per_s=None, state="failed")[0] == (
        "failed  ·  test accuracy 0.9877  test loss 0.0456  ·  3 epochs, 72 steps"
    )


def test_a_run_that_ended_early_says_why() -> None:
    assert (
        "  ·  no better loss in 3 evaluations  ·  3 epochs"
        in summary_lines(ended_early="no better loss in 3 evaluations")[0]
    )


def test_one_epoch_is_one() -> None:
    assert "  ·  1 epoch, 1 step  ·  " in summary_lines(epochs=1.0, step=1)[0]


def test_a_run_below_the_current_folder_is_named_from_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert summary_lines(path=str(tmp_path / "runs" / "mine"))[1:] == [
        "run       runs/mine",
        "curves    raytorch report runs/mine",
    ]
    for name in ("-x", "~x"):  # which the shell or the command would take for something else
        path = f"{tmp_path}/{name}/mine"
        assert summary_lines(path=path)[1] == f"run       {path}"


def test_every_export_is_named() -> None:
    exports = [{"file": "export/model.onnx"}, {"file": "export/model.pt2"}]
    assert summary_lines(exports=exports)[3:] == [
        "export    /data/runs/mine/export/model.onnx",
        "export    /data/runs/mine/export/model.pt2",
    ]


def test_a_stopped_run_says_how_to_go_on() -> None:
    lines = summary_lines(state="stopped", metrics=None, samples_per_s=None, epochs=0.5)
    assert lines[0] == "stopped  ·  0.5 epochs, 72 steps  ·  12.3 s"
    assert lines[-1] == "continue  raytorch train --resume /data/runs/mine"


def test_a_stopped_job_says_how_to_submit_what_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    console = Console(file=io.StringIO(), width=120)
    print_summary(console, SUMMARY | {"state": "stopped"}, resume="raytorch submit --resume")
    told = console.file.getvalue()  # type: ignore[attr-defined]
    assert told.endswith("\ncontinue  raytorch submit --resume /data/runs/mine\n")
    monkeypatch.setenv(BASE, "/data/runs")  # in the job itself
    assert summary_lines(state="stopped")[-1] == "continue  raytorch submit --resume /data/runs/mine"


@pytest.mark.parametrize(
    ("path", "quoted"),
    [(long := "/data/" + "long/" * 40 + "mine", long), ("/data/[old]/mine", "'/data/[old]/mine'")],
)
def test_paths_are_whole_on_a_narrow_terminal(path: str, quoted: str) -> None:
    assert summary_lines(width=40, path=path, state="stopped")[1:] == [
        f"run       {path}",
        f"curves    raytorch report {quoted}",
        f"continue  raytorch train --resume {quoted}",
    ]


@pytest.mark.parametrize("terminal", [True, False])
def test_a_download_is_a_bar_on_a_terminal(terminal: bool) -> None:
    console = Console(file=io.StringIO(), force_terminal=terminal, width=160, color_system=None)
    with DownloadDisplay(console) as display:
        for there in (10, 1_500_000):
            display("images.gz", there, 3_000_000)
        display.refresh()
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert ("images.gz" in text and "1.5/3.0 MB" in text) if terminal else text == ""


def test_the_line_of_a_resumed_run_shows_its_name_and_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    labels: list[str] = []

    def display(console: Console, name: str) -> ProgressDisplay:
        labels.append(name)
        return ProgressDisplay(console, name)

    def resume(*_: object, **__: object) -> Result:
        return Result("slow", "/runs/slow", "finished", {}, SUMMARY)

    monkeypatch.setattr("raytorch.cli.progress.ProgressDisplay", display)
    monkeypatch.setattr("raytorch.training.api.resume", resume)
    told = CliRunner().invoke(app, ["train", "--resume", "abfs://runs@account.host/slow?client_secret=S"])
    assert (told.exit_code, labels) == (0, ["slow"])
    assert "slow has finished and nothing is left to do" in told.stderr
