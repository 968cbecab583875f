"""What the first step of a decoder takes, by what of it is compiled: python benchmarks/compiling.py [--layers 6]

``blocks`` compiles them one by one, as ``compile: true`` does, ``whole`` the model at once, each in a process of its
own without a cache, that compiles one thing at a time. Prints seconds of the clock and of the CPU for the first step,
and the least milliseconds of one that follows.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time

STEPS = 20


def first_and_next(what: str, layers: int, device: str) -> tuple[float, float, float]:
    """Seconds of the first forward and backward pass, by the clock and of the CPU, and of the fastest that follows."""
    import torch

    from raytorch.config import GptModel
    from raytorch.models.networks import Architecture
    from raytorch.training.compilation import compiled

    config = GptModel(dim=128, heads=4, layers=layers)
    model = Architecture.of(config, {"vocabulary": 256, "context": 128}, None).build().to(device)
    net = {"none": lambda: model, "blocks": lambda: compiled(model), "whole": lambda: torch.compile(model)}[what]()
    tokens = torch.randint(256, (4, 128), device=device)
    taken: list[float] = []
    busy = before = 0.0
    for _ in range(1 + STEPS):
        if len(taken) == 1:
            busy = sum(os.times()[:4]) - before
        before = sum(os.times()[:4])
        begun = time.perf_counter()
        net(tokens).square().mean().backward()
        if device == "cuda":
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - begun)
    return taken[0], busy, min(taken[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--only", choices=["none", "blocks", "whole"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.only:
        print(json.dumps(first_and_next(options.only, options.layers, options.device)))
        return
    for what in ("none", "blocks", "whole"):
        with tempfile.TemporaryDirectory() as cache:
            command = [sys.executable, __file__, "--only", what, "--layers", str(options.layers)]
            environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": cache, "TORCHINDUCTOR_COMPILE_THREADS": "1"}
            done = subprocess.run(
                [*command, "--device", options.device], env=environment, capture_output=True, text=True, check=True
            )
        first, busy, following = json.loads(done.stdout)
        print(
            f"{what:>6}: first step {first:6.1f} s, {busy:6.1f} s of the CPU; then {1000 * following:6.1f} ms",
            flush=True,
        )


if __name__ == "__main__":
    main()
