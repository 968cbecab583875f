"""The display of a sweep: on a terminal a live table of its trials, else a line for each that begins or ends."""

import shlex
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Column, Table

from raytorch.sweeps.file import Trial
from raytorch.system.safe_text import escaped_line
from raytorch.system.terminal import cell, say, say_labelled, say_table

ENDED = ("finished", "stopped early", "stopped", "failed", "lost")
COLORS = {"training": "cyan", "finished": "green", "stopped early": "yellow", "failed": "red", "lost": "red"}


class SweepDisplay:
    """Call it with each :class:`~raytorch.sweeps.sweep.SweepStatus`; use it as a context manager."""

    def __init__(self, console: Console, trials: Sequence[Trial]) -> None:
        self._console, self._trials = console, trials
        self._live = Live(console=console, refresh_per_second=4, transient=True)
        self._states: dict[int, str] = {}
        self._stopping = False

    def __enter__(self) -> "SweepDisplay":
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def __call__(self, status: Any) -> None:
        """Show the newest news."""
        if status.stopping and not self._stopping:
            self._stopping = True
            say(self._console, "stopping the trials after a last checkpoint; press Ctrl-C again to end at once")
        if self._console.is_terminal:
            self._live.update(trial_table(self._trials, status.trials))
        else:
            self._print_changes(status.trials)

    def _print_changes(self, rows: Sequence[dict[str, Any]]) -> None:
        for trial, row in zip(self._trials, rows, strict=True):
            state = row["state"]
            if state != self._states.get(trial.number) and (state == "starting" or state in ENDED):
                numbers = [f"{name} {text}" for name, text in _numbers(row).items()]
                words = [trial.name, f"{state:<13}", *numbers, *_parameters(trial, labelled=True)]
                say(self._console, escaped_line("  ".join(filter(None, words))))
            self._states[trial.number] = state


def trial_table(trials: Sequence[Trial], rows: Sequence[dict[str, Any]], best: str | None = None) -> Table:
    """The trials with their parameters and newest numbers; ``best`` names the one to point out."""
    varied = [Column(cell(key)) for key in _headings(list(trials[0].parameters))]
    metrics = list(dict.fromkeys(name for row in rows for name in row.get("metrics", {})))
    table = Table("trial", "state", *varied, "epoch", *(Column(cell(name)) for name in metrics), box=None)
    for trial, row in zip(trials, rows, strict=True):
        state = cell(row["state"], COLORS.get(row["state"], ""))
        style = "bold" if trial.name == best else None
        numbers = [_numbers(row).get(name, "") for name in ["epoch", *metrics]]
        table.add_row(trial.name, state, *map(cell, _parameters(trial)), *numbers, style=style)
    return table


def print_sweep(
    console: Console, trials: Sequence[Trial], summary: dict[str, Any], *, resume: str = "raytorch sweep --resume"
) -> None:
    """Print what a sweep came to, by its ``sweep.json``, and where its files are.

    ``resume`` is the command that goes on with a sweep that follows it.
    """
    best, path = summary["best"], summary["path"]
    say_table(console, trial_table(trials, summary["trials"], best and best["trial"]))
    for row in summary["trials"]:
        if row["error"]:
            say(console, f"{row['trial']} failed: {row['error']}", "red")
    states = [row["state"] for row in summary["trials"]]
    counts = [f"{states.count(state)} {state}" for state in dict.fromkeys(states)]
    facts = [f"{len(trials)} trials: {', '.join(counts)}", f"{summary['seconds']:.1f} s"]
    say(console, "  ·  ".join(facts), "bold")
    lines = [("sweep", path), ("results", f"{path}/results.csv")]
    if find_spec("matplotlib"):
        lines.append(("picture", f"{path}/sweep.png"))
    if best:
        metric = summary["metric"]
        numbers = {trials[0].config.judged_split: best["metrics"]}
        if "test_metrics" in best:
            numbers["test"] = best["test_metrics"]
        told = "  ".join(f"{split} {metric} {values[metric]:.4f}" for split, values in numbers.items())
        lines.insert(0, ("best", f"{best['trial']}  {told}"))
        lines.append(("train it", f"raytorch train {shlex.quote(best['config'])}"))
    if summary["state"] == "stopped":
        lines.append(("continue", f"{resume} {shlex.quote(path)}"))
    for label, text in lines:
        say_labelled(console, label, text)


def _headings(keys: list[str]) -> list[str]:
    """The last part of each key where that tells them apart, so that a table fits into a terminal."""
    short = [key.rpartition(".")[2] for key in keys]
    return short if len(set(short)) == len(keys) else keys


def _parameters(trial: Trial, labelled: bool = False) -> list[str]:
    return [f"{key}={value}" if labelled else str(value) for key, value in trial.parameters.items()]


def _numbers(row: dict[str, Any]) -> dict[str, str]:
    """What has been measured, by name."""
    epoch = {"epoch": f"{row['epoch']:.3g}"} if row.get("epoch") is not None else {}
    return epoch | {name: f"{value:.4f}" for name, value in row.get("metrics", {}).items()}
