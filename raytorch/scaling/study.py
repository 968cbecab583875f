"""A scaling study: the same run at several numbers of workers, timed in its steady state. Imports no torch."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any, Literal

from raytorch.config import RunConfig
from raytorch.config.file import load_config
from raytorch.errors import Remedy, RunExistsError, TrainingError, UserError
from raytorch.runs.metrics import versions
from raytorch.runs.plan import RunPlan, WorkerJob, plan_run
from raytorch.runs.storage import RunFolder, join, locate, split
from raytorch.runs.weights_source import with_located_weights
from raytorch.training.driver import run_training
from raytorch.training.launch import ray_for
from raytorch.training.stopping import StatusCallback

RESULTS_FILE = "scaling.json"
WARMUP_STEPS, TIMED_STEPS = 20, 200

Mode = Literal["weak", "strong"]
Watching = Callable[[RunPlan], AbstractContextManager[StatusCallback]]
"""Makes the watcher of one run, which is closed when the run has ended."""


@dataclass(frozen=True)
class Study:
    """A study to measure; see :func:`plan_study`."""

    name: str
    mode: Mode
    plans: tuple[RunPlan, ...]
    """A run for each number of workers, the fewest first."""
    folder: RunFolder
    """Where the runs' folders and the results go."""
    warmup: int
    steps: int


def plan_study(
    file: str | Path,
    workers: Iterable[int],
    *,
    mode: Mode = "weak",
    overrides: Sequence[str] = (),
    steps: int = TIMED_STEPS,
    warmup: int = WARMUP_STEPS,
    out: Path | str | None = None,
) -> Study:
    """Plan a run of ``file`` for each number of workers.

    Args:
        file: YAML file of the run.
        workers: Numbers of workers.
        mode: ``weak`` leaves each worker the batch that it has in the file, ``batch_size / scaling.workers``, so that
            the global batch grows with the workers; ``strong`` divides the file's ``batch_size`` among them.
        overrides: Changes to the file, ``KEY=VALUE``.
        steps: Optimizer steps to time.
        warmup: Optimizer steps before them.
        out: The study's folder or URI; by default one with the run's name and the time, in the run's storage.

    Raises:
        ConfigError: The file or an override is invalid, or cannot run with one of the numbers of workers.
        RunExistsError: ``out`` exists already.
        UserError: ``workers`` holds no number.

    Example:
        >>> study = plan_study("configs/quickstart.yaml", [1, 2], mode="strong")
    """
    sizes = sorted(set(workers))
    if not sizes or sizes[0] < 1:
        raise UserError("workers: must be numbers of at least 1, such as 1,2,4,8")
    base = load_config(file, overrides)
    default = join(base.storage, f"{base.name}-scale-{datetime.now():%Y%m%d-%H%M%S}")
    folder = RunFolder(*split(locate(str(out or default))))
    _require_free(folder)
    return Study(
        name=base.name,
        mode=mode,
        plans=tuple(
            plan_run(_sized(file, overrides, base, mode, size, warmup + steps + 1, folder), f"workers-{size}")
            for size in sizes
        ),
        folder=folder,
        warmup=warmup,
        steps=steps,
    )


def run_study(
    study: Study, *, address: str | None = None, watching: Watching = lambda plan: nullcontext(lambda status: None)
) -> dict[str, Any]:
    """Run each size, one after the other on the same Ray, and return the content of the study's ``scaling.json``.

    The file is written after every size, so that a study that is stopped or fails keeps what it has measured.

    Args:
        study: What to measure.
        address: A running Ray cluster's address; see :func:`raytorch.training.driver.run_training`.
        watching: Makes the watcher of each run.

    Raises:
        ResourceError: There can be no room for the largest size; nothing has started then.
        TrainingError: A run failed.
        KeyboardInterrupt: It was stopped by Ctrl-C.

    Example:
        >>> results = run_study(plan_study("configs/quickstart.yaml", [1, 2]))
        >>> [(size["workers"], size["speedup"]) for size in results["sizes"]]
    """
    # torch is imported by the workers, which unpickle this by its name.
    work = partial(_train_timed, warmup=study.warmup, steps=study.steps)
    sizes: list[dict[str, Any]] = []
    largest = [study.plans[-1].config]
    with (
        ray_for(largest, address=address, module="raytorch.cluster.worker_group", workers_key="workers"),
        study.folder.claimed(),
    ):
        _require_free(study.folder)
        for plan in study.plans:
            with watching(plan) as watch:
                summary = run_training(plan, watch=watch, work=work)
            if summary["state"] == "stopped":
                raise KeyboardInterrupt
            sizes.append(measured(plan.config, summary))
            results = _results(study, sizes, summary)
            study.folder.write_json(RESULTS_FILE, results)
    return results


def measured(config: RunConfig, summary: Mapping[str, Any]) -> dict[str, Any]:
    """Result of a timed run: seconds per step, samples per second over all workers, and the shares of time.

    Workers wait for each other in every step, so that all of them take the same time; the shares are means over them,
    and sum to 1. What communication takes is None, and among computing, of a loop whose backward pass is not
    ``run.backward``.

    Raises:
        TrainingError: The run has timed no step.
    """
    times = summary["step_times"]
    ranks = times["ranks"]
    seconds = sum(rank["seconds"] for rank in ranks)
    if not seconds:
        raise TrainingError(
            f"{summary['path']} ended before a step was timed; lower warmup", remedies=[Remedy("warmup")]
        )
    shares: dict[str, float | None] = {"data": sum(rank["data"] for rank in ranks) / seconds}
    waits = [rank["communication"] for rank in ranks]
    shares["communication"] = None if None in waits else sum(waits) / seconds
    return {
        "workers": len(ranks),
        "batch_size": config.batch_size,
        "steps": times["steps"],
        "step_s": seconds / len(ranks) / times["steps"],
        "samples_per_s": sum(rank["samples"] for rank in ranks) / (seconds / len(ranks)),
        "shares": {"compute": 1 - sum(share or 0.0 for share in shares.values()), **shares},
        "ranks": ranks,
        "path": summary["path"],
    }


def compared(sizes: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """``sizes`` with their ``speedup`` over the first, and ``efficiency``: the speed-up as a share of the ideal one."""
    first = sizes[0]
    return [
        size
        | {
            "speedup": (speedup := size["samples_per_s"] / first["samples_per_s"]),
            "efficiency": speedup * first["workers"] / size["workers"],
        }
        for size in sizes
    ]


def _train_timed(job: WorkerJob, *, warmup: int, steps: int) -> None:
    from raytorch.scaling.timed_training import train_timed

    train_timed(job, warmup=warmup, steps=steps)


def _sized(
    file: str | Path, overrides: Sequence[str], base: RunConfig, mode: Mode, workers: int, steps: int, folder: RunFolder
) -> RunConfig:
    """The run at one number of workers.

    It has as many steps as it had, so that a schedule by steps stays as it is, or more if they would be too few.
    """
    batch = max(1, round(base.batch_size * workers / base.scaling.max_workers)) if mode == "weak" else base.batch_size
    changes = [
        f"scaling.workers={workers}",
        f"batch_size={batch}",
        "epochs=null",
        f"steps={max(base.most_steps or 0, steps)}",
    ]
    config = with_located_weights(load_config(file, [*overrides, *changes]))
    return config.model_copy(update={"storage": join(folder.storage, folder.name)})


def _require_free(folder: RunFolder) -> None:
    if folder.exists(RESULTS_FILE) or folder.folders():
        raise RunExistsError(f"{folder} exists already; give another folder", remedies=[Remedy("out")])


def _results(study: Study, sizes: Sequence[dict[str, Any]], summary: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "name": study.name,
        "path": str(study.folder),
        "mode": study.mode,
        "steps": study.steps,
        "warmup": study.warmup,
        **{key: summary[key] for key in ("device", "precision", "backend")},
        "versions": versions(),
        "sizes": compared(sizes),
    }
