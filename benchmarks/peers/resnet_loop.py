"""ResNet-18 trained on small images by a plain PyTorch loop on one device: python resnet_loop.py SETTINGS, as JSON."""

import json
import sys
import time
from contextlib import nullcontext

import torch
from torch import nn
from torch.nn import functional as F
from torchvision.models import resnet18


def train(*, shape, samples, batch_size, steps, every, precision, device):
    """Images per second between the first and the last step whose loss is read, which is each of ``every`` steps."""
    torch.manual_seed(0)
    torch.backends.cudnn.benchmark = True
    images = torch.randint(256, (samples, *shape), dtype=torch.uint8, device=device)
    labels = torch.randint(10, (samples,), device=device)
    model = resnet18(num_classes=10)
    model.conv1 = nn.Conv2d(shape[0], 64, 3, padding=1, bias=False)
    model.maxpool = nn.Identity()
    model = model.to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4)
    cast = torch.autocast(device, torch.bfloat16) if precision == "bf16" else nullcontext()
    read = []
    order = torch.randperm(samples, device=device)
    begin = 0
    for step in range(1, steps + 1):
        if begin + batch_size > samples:
            order, begin = torch.randperm(samples, device=device), 0
        chosen = order[begin : begin + batch_size]
        begin += batch_size
        inputs = images[chosen].float().sub_(127.5).div_(64).contiguous(memory_format=torch.channels_last)
        optimizer.zero_grad(set_to_none=True)
        with cast:
            outputs = model(inputs)
        loss = F.cross_entropy(outputs.float(), labels[chosen])
        loss.backward()
        optimizer.step()
        if step % every == 0:
            loss.item()
            read.append(time.perf_counter())
    return {"images_per_s": (len(read) - 1) * every * batch_size / (read[-1] - read[0]), "loss": loss.item()}


if __name__ == "__main__":
    print(json.dumps(train(**json.loads(sys.argv[1]))))
