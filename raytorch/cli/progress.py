"""The display in the terminal: of a run one live line and a short summary at the end, of a download its bars."""

import shlex
import time
from collections.abc import Callable
from typing import Any

from rich import progress
from rich.console import Console

from raytorch.runs.skipped_list import SKIPPED_FILE
from raytorch.runs.storage import from_here, is_in_job
from raytorch.system.safe_text import escaped_line
from raytorch.system.terminal import say, say_labelled

WAITING_S = 60.0
"""Seconds without workers after which that is told."""
MUCH_WAITING = 0.05
"""Share of a run's time above which it is told that it was spent on waiting for data."""
_SPEED: dict[str, Callable[[float], str]] = {
    "samples_per_s": lambda rate: f"{rate:,.0f} samples/s",
    "tokens_per_s": lambda rate: f"{rate:,.0f} tokens/s",
    "mfu": lambda share: f"mfu {share:.1%}",
}
_EFFORT: dict[str, Callable[[float], str]] = {
    "tflops_per_s": lambda rate: f"{rate:.3g} TFLOP/s",
    "peak_memory_bytes": lambda size: f"{size / 1e9:.1f} GB",
}


class _Bars(progress.Progress):
    """Bars on a terminal while the block runs."""

    def __init__(self, console: Console, *columns: progress.ProgressColumn) -> None:
        super().__init__(*columns, console=console, transient=True, disable=not console.is_terminal)


class ProgressDisplay(_Bars):
    """A line for each evaluation and, on a terminal, a live one below them.

    Call it with each :class:`~raytorch.runs.status.RunStatus`; use it as a context manager.
    """

    def __init__(self, console: Console, name: str) -> None:
        super().__init__(
            console,
            progress.TextColumn("{task.description}", "bold", markup=False),
            progress.BarColumn(bar_width=24),
            progress.MofNCompleteColumn(),
            progress.TextColumn("{task.fields[numbers]}", markup=False),
            progress.TimeRemainingColumn(),
        )
        self._task = self.add_task(escaped_line(name), total=None, numbers="starting workers")
        self._numbers = ""
        self._evaluations = 0
        self._attempts = 0
        self._stopping = False
        self._tell_at: float | None = time.monotonic() + WAITING_S
        """When it is to be told that there are no workers yet; None when it has been."""
        self.has_news = False
        """True if a run has told anything of itself."""

    def __call__(self, status: Any) -> None:
        """Show the newest news."""
        self.has_news = True
        if self._tell_at is not None and not status.attempts and time.monotonic() >= self._tell_at:
            self._tell_at = None
            say(
                self.console,
                f"no workers after {WAITING_S:.0f} s: they are slow to start, or the cluster has no room for them yet, "
                "and 'ray status' on its head shows what is free; still waiting",
            )
        if status.attempts > max(1, self._attempts):
            say(
                self.console,
                f"workers were lost or changed; restarted from the latest checkpoint (attempt {status.attempts})",
            )
        self._attempts = status.attempts
        if status.stopping and not self._stopping:
            self._stopping = True
            say(self.console, "stopping after a last checkpoint; press Ctrl-C again to end at once")
        for evaluation in status.evaluations[self._evaluations :]:
            numbers = _metrics(evaluation.metrics, evaluation.split)
            say(self.console, f"epoch {evaluation.epoch:.4g}  step {evaluation.step}  {numbers}")
        self._evaluations = len(status.evaluations)
        if status.progress:
            self._show(status.progress)

    def _show(self, news: dict[str, Any]) -> None:
        if "samples_per_s" in news:
            rate = "  ".join(_speed(news, _SPEED | _EFFORT))
            numbers = [
                (name, value) for name, value in news.items() if "loss" in name and isinstance(value, int | float)
            ]
            losses = "".join(f"{name} {value:.4f}  " for name, value in numbers)
            self._numbers = f"epoch {news['epoch']:.1f}  {losses}{rate}{_waiting(news)}"
        text = self._numbers if news["phase"] == "training" else news["phase"]
        self.update(self._task, completed=news["step"], total=news["total_steps"], numbers=escaped_line(text))


class DownloadDisplay(_Bars):
    """On a terminal, a bar for each file that is downloaded. A :data:`~raytorch.datasets.download.DownloadCallback`."""

    def __init__(self, console: Console) -> None:
        super().__init__(
            console,
            progress.TextColumn("{task.description}", markup=False),
            progress.BarColumn(bar_width=24),
            progress.DownloadColumn(),
            progress.TransferSpeedColumn(),
        )
        self._files: dict[str, progress.TaskID] = {}

    def __call__(self, name: str, there: int, size: int) -> None:
        if name not in self._files:
            self._files[name] = self.add_task(escaped_line(name), total=size)
        self.update(self._files[name], completed=there)


class CheckDisplay(_Bars):
    """On a terminal, a bar for each split that is read. A :data:`~raytorch.datasets.checking.Watch`."""

    def __init__(self, console: Console) -> None:
        super().__init__(
            console,
            progress.TextColumn("{task.description}", markup=False),
            progress.BarColumn(bar_width=24),
            progress.MofNCompleteColumn(),
            progress.TimeRemainingColumn(),
        )
        self._splits: dict[str, progress.TaskID] = {}

    def __call__(self, name: str, done: int, samples: int) -> None:
        if name not in self._splits:
            self._splits[name] = self.add_task(escaped_line(name), total=samples)
        self.update(self._splits[name], completed=done)


def print_summary(console: Console, summary: dict[str, Any], *, resume: str | None = None) -> None:
    """Print what a run came to, by its ``summary.json``, and where its files are.

    ``resume`` is the command that goes on with a run that follows it; by default that of where this process runs.
    """
    resume = resume or f"raytorch {'submit' if is_in_job() else 'train'} --resume"
    seconds = summary.get("seconds", {}).get("total")
    metrics = summary.get("metrics")
    facts = [
        "" if metrics and summary["state"] in ("finished", "stopped") else summary["state"],
        _metrics(metrics or {}, summary.get("split", "test")),
        _metrics(summary.get("test_metrics") or {}),
        summary.get("ended_early") or "",
        f"{_counted(format(summary['epochs'], '.4g'), 'epoch')}, {_counted(str(summary['step']), 'step')}"
        if _has(summary, "epochs", "step")
        else "",
        *_speed(summary, _SPEED),
        f"{seconds:.1f} s" if seconds else "",
    ]
    say(console, "  ·  ".join(fact for fact in facts if fact), "bold")
    path = from_here(summary["path"])
    quoted = shlex.quote(path)  # what is copied into a shell is a name there, and nothing else
    lines = [("run", path), ("curves", f"raytorch report {quoted}")]
    lines += [("export", f"{path}/{export['file']}") for export in summary.get("exports", ())]
    if skipped := summary.get("skipped"):
        lines.append(("skipped", f"{_counted(f'{skipped:,}', 'sample')} that cannot be read: {path}/{SKIPPED_FILE}"))
    if summary["state"] == "stopped":
        lines.append(("continue", f"{resume} {quoted}"))
    for label, text in lines:
        say_labelled(console, label, text)


def _speed(values: dict[str, Any], forms: dict[str, Callable[[float], str]]) -> list[str]:
    """How fast a run is, as far as it is known."""
    known = [(form, values.get(key)) for key, form in forms.items()] if values.get("samples_per_s") else []
    return [form(value) for form, value in known if isinstance(value, int | float) and value]


def _waiting(news: dict[str, Any]) -> str:
    """What a run says of waiting for data, if that takes much of its time, and what to do about it."""
    share, advice = news.get("data_wait"), news.get("data_advice")
    if not isinstance(share, int | float) or share <= MUCH_WAITING:
        return ""
    return f"  waiting for data {share:.0%}{f' ({advice})' if advice else ''}"


def _has(summary: dict[str, Any], *keys: str) -> bool:
    return all(summary.get(key) is not None for key in keys)


def _counted(number: str, noun: str) -> str:
    return f"{number} {noun}" if number == "1" else f"{number} {noun}s"


def _metrics(values: dict[str, float], split: str = "test") -> str:
    return escaped_line("  ".join(f"{split} {name} {value:.4f}" for name, value in values.items()))
