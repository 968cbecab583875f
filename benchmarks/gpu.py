"""Training on one GPU beside plain PyTorch: python benchmarks/gpu.py [--parts gpt,resnet,checkpoint,session] [--tiny]

``gpt`` trains GPT-2 small in bf16, compiled, ``resnet`` ResNet-18 on images of CIFAR-10's size, each beside the loop of
the same model in ``peers/``, in turn; ``checkpoint`` has what a checkpoint of GPT-2 small takes of a run's time beside
``torch.save`` of as much; ``session`` the operations per second of a session on the GPU beside PyTorch's own. The data
is random. Each part is a process of its own with a time limit, 7 minutes in all, and none needs another. Prints a line
for each figure, and all of them as JSON in the last. ``--tiny`` does all of it in small on the CPU, to try it out.
"""

import argparse
import importlib
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
PEERS = HERE / "peers"
LIMITS = {"gpt": 240, "resnet": 70, "checkpoint": 60, "session": 50}
"""Seconds that each part may take."""
GPT_2_SMALL = {"vocabulary": 50_257, "context": 1024, "dim": 768, "heads": 12, "layers": 12}
TINY_GPT = {"vocabulary": 300, "context": 16, "dim": 16, "heads": 2, "layers": 2}
Figures = dict[str, Any]


class Machine:
    """Where the parts run, and in what size."""

    def __init__(self, *, tiny: bool, folder: Path, limit: float) -> None:
        self.tiny, self.folder, self.limit = tiny, folder, limit
        self.device = "cpu" if tiny else "cuda"
        self.precision = "fp32" if tiny else "bf16"
        self.gpt = TINY_GPT if tiny else GPT_2_SMALL

    def rounds(self) -> Iterator[int]:
        """The numbers of two pairs of measurements; of one alone where the first takes half of the time or more."""
        begun = time.monotonic()
        yield 0
        if not self.tiny and time.monotonic() - begun < 0.5 * self.limit:
            yield 1

    def peer(self, name: str, call: str, **settings: Any) -> Figures:
        """What a program of ``peers/`` measures, in a process of its own unless it is tiny."""
        settings["device"] = self.device
        if self.tiny:
            sys.path.insert(0, str(PEERS))
            try:
                return getattr(importlib.import_module(name), call)(**settings)  # type: ignore[no-any-return]
            finally:
                sys.path.remove(str(PEERS))
        command = [sys.executable, str(PEERS / f"{name}.py"), json.dumps(settings)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        return json.loads(done.stdout.splitlines()[-1])  # type: ignore[no-any-return]

    def run(self, name: str, **keys: Any) -> tuple[Figures, list[Figures]]:
        """Train, and give the run's summary and the lines of its metrics of training."""
        import raytorch

        scaling = {"workers": 1, "gpus_per_worker": 0 if self.tiny else 1}
        logging = {"every_steps": keys.pop("every"), "tensorboard": False}
        common = {"scaling": scaling, "logging": logging, "precision": self.precision, "storage": str(self.folder)}
        result = raytorch.train({"checkpoint": {"every_epochs": None}} | keys | common, name=name)
        lines = [json.loads(line) for line in (Path(result.path) / "metrics.jsonl").read_text("utf-8").splitlines()]
        return result.summary, [line for line in lines if line["split"] == "train"]


def per_second(lines: list[Figures], batch_size: int) -> float:
    """Samples per second between the first and the last line, each of which has waited for the device."""
    first, last = lines[0], lines[-1]
    return (last["step"] - first["step"]) * batch_size / (last["time"] - first["time"])


# -- parts -------------------------------------------------------------------------------------------------------------


def tokens_file(machine: Machine) -> Path:
    """Random tokens in a file of raytorch's form."""
    from types import SimpleNamespace

    import numpy as np

    from raytorch.sources.token_files import TokenWriter

    vocabulary, path = machine.gpt["vocabulary"], machine.folder / "train.tokens"
    kind: Any = SimpleNamespace(vocabulary=vocabulary, end_token=vocabulary - 1, name="random", sha256="0" * 64)
    with TokenWriter(path, kind) as writer:
        count = 20_000 if machine.tiny else 20_000_000
        writer.add(np.random.default_rng(0).integers(0, vocabulary - 1, count), text_bytes=count)
        writer.end_document()
    return path


def gpt_keys(machine: Machine) -> Figures:
    model = {name: value for name, value in machine.gpt.items() if name not in ("vocabulary", "context")}
    return {
        "data": {"name": "tokens", "root": str(machine.folder), "test": 0.01, "context": machine.gpt["context"]},
        "model": {"name": "gpt", **model},
        "optimizer": {
            "name": "adamw",
            "lr": 6e-4,
            "betas": [0.9, 0.95],
            "weight_decay": 0.1,
            "groups": [{"match": "*norm.weight", "weight_decay": 0}],
        },
        "clip_norm": 1.0,
    }


def gpt(machine: Machine) -> Figures:
    from raytorch.sources.token_files import HEADER_BYTES

    path = tokens_file(machine)
    sizes = {"batch_size": 8, "accumulate": 2} if machine.tiny else {"batch_size": 128, "accumulate": 4}
    steps, every = (4, 1) if machine.tiny else (60, 10)
    settings = {"tokens": str(path), "offset": HEADER_BYTES, "dtype": "<u2", "model": machine.gpt, "every": every}
    own, peers = list[float](), list[Figures]()
    summary: Figures = {}
    for number in machine.rounds():
        rest = {"steps": steps, "precision": machine.precision, "compiled": not machine.tiny}
        peers.append(machine.peer("gpt_loop", "train", **settings, **sizes, **rest))
        keys = gpt_keys(machine) | sizes | {"steps": steps, "compile": not machine.tiny, "every": every}
        keys["data"] |= {} if machine.tiny else {"readers": 2}
        summary, lines = machine.run(f"gpt-{number}", **keys)
        own.append(per_second(lines, sizes["batch_size"]) * machine.gpt["context"])
    flops = 6 * peers[0]["parameters"] + 6 * machine.gpt["layers"] * machine.gpt["dim"] * machine.gpt["context"]
    return {
        "tokens_per_s": statistics.median(own),
        "peer_tokens_per_s": statistics.median(each["tokens_per_s"] for each in peers),
        "ratios": [mine / other["tokens_per_s"] for mine, other in zip(own, peers, strict=True)],
        "tflops_per_s": statistics.median(own) * flops / 1e12,  # with half of the attention's, which is causal
        "mfu": summary.get("mfu"),
    }


def resnet(machine: Machine) -> Figures:
    shape, samples, name = ((1, 8, 8), 1_500, "digits") if machine.tiny else ((3, 32, 32), 50_000, "cifar10")
    data: Figures = {"name": name}
    if not machine.tiny:
        data["root"] = str(cifar10_files(machine.folder))
    batch_size, steps, every = (8, 3, 1) if machine.tiny else (512, 400, 50)
    optimizer = {"name": "sgd", "lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 5e-4}
    own, peers = list[float](), list[float]()
    for number in machine.rounds():
        settings = {"shape": shape, "samples": samples, "precision": machine.precision}
        peer = machine.peer("resnet_loop", "train", **settings, batch_size=batch_size, steps=steps, every=every)
        peers.append(peer["images_per_s"])
        keys = {"data": data, "model": "resnet18", "optimizer": optimizer, "batch_size": batch_size, "steps": steps}
        own.append(per_second(machine.run(f"resnet-{number}", **keys, every=every)[1], batch_size))
    return {
        "images_per_s": statistics.median(own),
        "peer_images_per_s": statistics.median(peers),
        "ratios": [mine / other for mine, other in zip(own, peers, strict=True)],
    }


def cifar10_files(folder: Path) -> Path:
    """Random images in the files of CIFAR-10's binary layout."""
    import numpy as np

    below, generator = folder / "cifar-10-batches-bin", np.random.default_rng(0)
    below.mkdir()
    for name in (*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"):
        rows = generator.integers(0, 256, (10_000, 3_073), dtype=np.uint8)
        rows[:, 0] %= 10
        (below / f"{name}.bin").write_bytes(rows.tobytes())
    return folder


def checkpoint(machine: Machine) -> Figures:
    tokens_file(machine)
    steps, every = (4, 2) if machine.tiny else (20, 5)
    keys = gpt_keys(machine) | {"batch_size": 8, "steps": steps, "every": every}
    summary, _ = machine.run("checkpoint", **keys, checkpoint={"every_epochs": None, "every_steps": every})
    saved = machine.peer("save_loop", "measure", model=machine.gpt, folder=str(machine.folder), times=3)
    stall = summary["checkpoints"]["blocked_s"] / summary["checkpoints"]["saved"]
    ratio = stall / saved["seconds"]
    return {"stall_s": stall, "torch_save_s": saved["seconds"], "torch_save_bytes": saved["bytes"], "ratio": ratio}


def session(machine: Machine) -> Figures:
    command = [sys.executable, str(HERE / "sessions.py"), "--session", *(["--tiny"] if machine.tiny else ["--gpu"])]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])  # type: ignore[no-any-return]


PARTS: dict[str, Callable[[Machine], Figures]] = {
    "gpt": gpt,
    "resnet": resnet,
    "checkpoint": checkpoint,
    "session": session,
}


# -- all of them -------------------------------------------------------------------------------------------------------


def measured(part: str, *, tiny: bool) -> Figures:
    """What a part comes to, in this process."""
    with tempfile.TemporaryDirectory() as folder:
        return PARTS[part](Machine(tiny=tiny, folder=Path(folder), limit=LIMITS[part]))


def apart(command: list[str], limit: float) -> Figures:
    """The JSON that a program prints last; ``error`` if it fails, or is not done in so many seconds and is ended."""
    with tempfile.TemporaryFile("w+", encoding="utf-8") as output:
        process = subprocess.Popen(command, stdout=output, start_new_session=True)
        try:
            status = process.wait(limit)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        if status != 0:
            return {"error": f"not done after {limit:.0f} s" if status is None else f"ended with status {status}"}
        output.seek(0)
        return json.loads(output.read().splitlines()[-1])  # type: ignore[no-any-return]


def shown(part: str, figures: Figures) -> list[str]:
    """A line for each figure."""

    def written(value: Any) -> str:
        if isinstance(value, list):
            return ", ".join(map(written, value))
        if isinstance(value, int | float):
            return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
        return str(value)

    return [f"{part}: {name} {written(value)}" for name, value in figures.items()]


def main(arguments: list[str] | None = None) -> Figures:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--within", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    tiny = ["--tiny"] if options.tiny else []
    every: Figures
    if options.within:
        every = measured(options.parts, tiny=options.tiny)
    else:
        import torch

        every = {"device": "cpu" if options.tiny else torch.cuda.get_device_name(0), "torch": torch.__version__}
        for part in options.parts.split(","):
            begun = time.monotonic()
            command = [sys.executable, __file__, "--within", "--parts", part, *tiny]
            every[part] = apart(command, LIMITS[part])
            print(*shown(part, every[part]), f"{part}: took {time.monotonic() - begun:.0f} s", sep="\n", flush=True)
    print(json.dumps(every), flush=True)
    return every


if __name__ == "__main__":
    main()
