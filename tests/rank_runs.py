"""Whole runs of two ranks in processes of their own, without Ray, which makes them and a kill cheap."""

from contextlib import closing
from multiprocessing.connection import wait
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from forked import CONTEXT
from killing import Killer, tell_steps

from raytorch.config import RunConfig
from raytorch.runs.plan import RunPlan, WorkerJob

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


def train(run: RunPlan, meetings: Path, killer: Killer | None = None, kills: int = 0) -> int:
    """Train on two ranks and, when one of them was killed, anew; answers how often that was."""
    run.folder.make()
    for attempt in range(kills + 1):
        arguments = [(run.config, rank, str(meetings / f"{run.config.name}-{attempt}")) for rank in range(2)]
        ranks = [CONTEXT.Process(target=take_part, args=each) for each in arguments]
        for process in ranks:
            process.start()
        if killer:
            killer.pids = {rank: process.pid for rank, process in enumerate(ranks) if process.pid}
        wait([process.sentinel for process in ranks], END_S)
        if killer and len(killer.kills) > attempt:
            for process in ranks:
                process.kill()
        for process in ranks:
            process.join(END_S)
        if all(process.exitcode == 0 for process in ranks):
            return attempt
    raise AssertionError("the run does not end")
