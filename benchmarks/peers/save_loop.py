"""Seconds of torch.save of a model and its AdamW, written to the disk: python save_loop.py SETTINGS, which is JSON."""

import json
import os
import statistics
import sys
import time

import torch

from gpt_loop import GPT


def measure(*, model, folder, times, device):
    gpt = GPT(**model).to(device)
    optimizer = torch.optim.AdamW(gpt.parameters())
    for weight in gpt.parameters():
        weight.grad = torch.zeros_like(weight)
    optimizer.step()
    path = os.path.join(folder, "saved.pt")
    taken = []
    for _ in range(times):
        if device == "cuda":
            torch.cuda.synchronize()
        begun = time.perf_counter()
        with open(path, "wb") as file:
            torch.save({"model": gpt.state_dict(), "optimizer": optimizer.state_dict()}, file)
            file.flush()
            os.fsync(file.fileno())
        taken.append(time.perf_counter() - begun)
    size = os.path.getsize(path)
    os.unlink(path)
    return {"seconds": statistics.median(taken), "bytes": size}


if __name__ == "__main__":
    print(json.dumps(measure(**json.loads(sys.argv[1]))))
