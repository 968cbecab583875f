"""A GPT trained by a plain PyTorch loop on one device: python gpt_loop.py SETTINGS, which is JSON."""

import json
import sys
import time
from contextlib import nullcontext

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F


class Norm(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x):
        return F.rms_norm(x, (x.shape[-1],), self.weight, 1e-5)


class Block(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        hidden = -(-8 * dim // (3 * 64)) * 64
        self.heads = heads
        self.norm1, self.norm2 = Norm(dim), Norm(dim)
        self.q, self.k, self.v, self.o = (nn.Linear(dim, dim, bias=False) for _ in range(4))
        self.gate, self.up = (nn.Linear(dim, hidden, bias=False) for _ in range(2))
        self.down = nn.Linear(hidden, dim, bias=False)

    def forward(self, x, cos, sin):
        b, t, c = x.shape
        y = self.norm1(x)
        q, k, v = (f(y).view(b, t, self.heads, -1).transpose(1, 2) for f in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(rotate(q, cos, sin), rotate(k, cos, sin), v, is_causal=True)
        x = x + self.o(y.transpose(1, 2).reshape(b, t, c))
        y = self.norm2(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


def rotate(x, cos, sin):
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)


class GPT(nn.Module):
    def __init__(self, vocabulary, context, dim, heads, layers):
        super().__init__()
        self.embed = nn.Embedding(vocabulary, dim)
        self.blocks = nn.ModuleList(Block(dim, heads) for _ in range(layers))
        self.norm = Norm(dim)
        rates = 1.0 / 10_000 ** (torch.arange(0, dim // heads, 2).float() / (dim // heads))
        angles = torch.arange(context).float()[:, None] * rates
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)
        for weight in self.parameters():
            if weight.dim() > 1:
                nn.init.normal_(weight, std=0.02)

    def forward(self, tokens, targets):
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x, self.cos, self.sin)
        logits = F.linear(self.norm(x), self.embed.weight)
        return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())


def batch(tokens, rows, context, device):
    starts = torch.randint(len(tokens) - context - 1, (rows,)).tolist()
    both = torch.from_numpy(np.stack([tokens[i : i + context + 1] for i in starts]).astype(np.int64))
    if device == "cuda":
        both = both.pin_memory().to(device, non_blocking=True)
    return both[:, :-1], both[:, 1:]


def train(*, tokens, offset, dtype, model, batch_size, accumulate, steps, every, precision, compiled, device):
    """Tokens per second between the first and the last step whose loss is read, which is each of ``every`` steps."""
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    data = np.memmap(tokens, dtype, "r", offset)
    gpt = GPT(**model).to(device)
    net = torch.compile(gpt) if compiled else gpt
    decayed = [weight for weight in gpt.parameters() if weight.dim() > 1]
    rest = [weight for weight in gpt.parameters() if weight.dim() == 1]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=6e-4, betas=(0.9, 0.95), fused=True)
    cast = torch.autocast(device, torch.bfloat16) if precision == "bf16" else nullcontext()
    rows = batch_size // accumulate
    following = batch(data, rows, model["context"], device)
    read = []
    for step in range(1, steps + 1):
        optimizer.zero_grad(set_to_none=True)
        for _ in range(accumulate):
            inputs, targets = following
            with cast:
                loss = net(inputs, targets) / accumulate
            following = batch(data, rows, model["context"], device)  # while the device computes
            loss.backward()
        torch.nn.utils.clip_grad_norm_(gpt.parameters(), 1.0)
        optimizer.step()
        if step % every == 0:
            loss.item()
            read.append(time.perf_counter())
    seconds = read[-1] - read[0]
    return {
        "tokens_per_s": (len(read) - 1) * every * batch_size * model["context"] / seconds,
        "parameters": sum(weight.numel() for weight in gpt.parameters()),
        "loss": loss.item() * accumulate,
    }


if __name__ == "__main__":
    print(json.dumps(train(**json.loads(sys.argv[1]))))
