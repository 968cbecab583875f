"""The ranks of a run are killed at random: what their checkpoints promise, without Ray, which makes a kill cheap."""

import multiprocessing
import os
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from killing import Killer, often_saved, tell_steps
from whole_runs import assert_bitwise_equal, plan, weights

from raytorch.config import RunConfig
from raytorch.runs.plan import RunPlan, WorkerJob

KILLS = int(os.environ.get("RAYTORCH_KILLS", "4"))
"""How often the run is killed; the suite is content with few."""
END_S = 120
"""Longest wait for processes, on whatever machine."""


class Silent:
    """A monitor that listens to nothing."""

    def __getattr__(self, name: str) -> Any:
        return SimpleNamespace(remote=lambda *arguments: None)


def take_part(config: RunConfig, rank: int, meeting: str) -> None:
    """Train as one of two ranks."""
    import ray
    import torch
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    from raytorch.distributed import Worker
    from raytorch.runs.metrics import log_to_file
    from raytorch.runs.storage import LiveFiles, RunFolder
    from raytorch.training import parts, progress
    from raytorch.training import worker as training

    ray.get = lambda answer: answer  # type: ignore[assignment]
    parts.data_parallel = lambda net: DistributedDataParallel(net, broadcast_buffers=False)
    tell_steps()
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    worker = Worker(rank, 2, torch.device("cpu"))
    log = f"logs/rank-{rank}.log"
    with closing(LiveFiles(RunFolder(config.storage, config.name))) as files, log_to_file(files.extend(log)):
        training.prepare(config, worker)
        part = progress.RunProgress(WorkerJob(RunPlan(config), Silent()), worker, files)
        try:
            training.follow_loop(part)
        except Exception:
            progress.logger.exception("failed, as its peer was killed")
            raise SystemExit(1) from None
        finally:
            part.close()
    dist.destroy_process_group()


def train(run: RunPlan, meetings: Path, killer: Killer | None = None) -> int:
    """Train on two ranks and, when one has died, anew; answers how often that was."""
    run.folder.make()
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["raytorch.training.worker", "torch.distributed"])
    for attempt in range(KILLS + 1 if killer else 1):
        arguments = [(run.config, rank, str(meetings / f"{run.config.name}-{attempt}")) for rank in range(2)]
        ranks = [context.Process(target=take_part, args=each) for each in arguments]
        for process in ranks:
            process.start()
        if killer:
            killer.pids = {rank: process.pid for rank, process in enumerate(ranks) if process.pid}
        multiprocessing.connection.wait([process.sentinel for process in ranks], END_S)
        if killer and len(killer.kills) > attempt:
            for process in ranks:
                process.kill()
        for process in ranks:
            process.join(END_S)
        if all(process.exitcode == 0 for process in ranks):
            return attempt
    raise AssertionError("the run does not end")


@pytest.mark.timeout(600 + 120 * KILLS)
def test_a_run_whose_ranks_are_killed_again_and_again_ends_with_the_same_bits(
    small_run: dict[str, Any], tmp_path: Path
) -> None:
    whole, broken = (plan(small_run | often_saved(KILLS), name) for name in ("whole", "broken"))
    assert train(whole, tmp_path) == 0
    with Killer(broken.folder, KILLS) as killer:
        assert train(broken, tmp_path, killer) == KILLS
    killer.check()
    assert_bitwise_equal(weights(whole.folder), weights(broken.folder))
