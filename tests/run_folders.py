"""What tests of runs share: their folders, as training leaves them."""

import json
from pathlib import Path
from typing import Any

from raytorch.config import RunConfig
from raytorch.config.file import dump_config
from raytorch.runs.checkpoint_manifest import READ_FORMATS
from raytorch.runs.plan import plan_run
from raytorch.runs.storage import RunFolder

WITHOUT_DIGESTS = READ_FORMATS[0]


def add_checkpoint(folder: RunFolder, step: int, files: dict[str, int]) -> Path:
    """A checkpoint whose manifest says that it has ``files`` of so many bytes; each has three."""
    path = Path(folder.path, f"checkpoint_{step:08d}")
    path.mkdir(parents=True)
    for name in files:
        (path / name).write_bytes(b"abc")
    manifest = {"format": WITHOUT_DIGESTS, "step": step, "files": files}
    (path / "checkpoint.json").write_text(json.dumps(manifest), encoding="utf-8")
    return path


def started(config: RunConfig, name: str = "mine", **saved: Any) -> RunFolder:
    """A run of which the configuration and a checkpoint are there."""
    plan = plan_run(config, name)
    plan.folder.make()
    plan.folder.write_text("config.yaml", dump_config(plan.config))
    path = add_checkpoint(plan.folder, 5, {"model.safetensors": 3}) / "checkpoint.json"
    saved |= {"config": plan.config.model_dump(mode="json")}
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | saved), encoding="utf-8")
    return plan.folder


def finished(config: RunConfig, step: int = 5) -> RunFolder:
    folder = started(config)
    write_end_of(folder, step)
    return folder


def write_end_of(folder: RunFolder, step: int = 5) -> None:
    summary = {"state": "finished", "started": "2026-01-02T03:04:05+00:00", "step": step, "metrics": {"accuracy": 0.5}}
    folder.write_text("summary.json", json.dumps(summary))
