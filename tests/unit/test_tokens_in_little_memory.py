"""A file of tokens that does not fit in memory trains: RLIMIT_DATA bounds all that is not a file's own pages.

RAYTORCH_TEST_TOKENS_MIB is the size of the file, by default 128; a run has a quarter of it beside what Python,
PyTorch and raytorch take. 4096 needs 4 GiB of disk.
"""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np

from raytorch.sources.token_files import TokenWriter
from raytorch.sources.tokenizer import ByteTokenizer

MIB = int(os.environ.get("RAYTORCH_TEST_TOKENS_MIB", "128"))
TESTS = Path(__file__).resolve().parents[1]
DOCUMENT = 1_000
TRAIN = """
import re, resource, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
import pytest, torch
from lone_runs import final, train, without_ray

Path("lm.py").write_text('''
from torch import nn

def lm(vocabulary: int):
    return nn.Sequential(nn.Embedding(vocabulary, 32), nn.Linear(32, vocabulary))
''', encoding="utf-8")
data = {{"name": "tokens", "root": ".", "context": 64}}
run = {{"schedule": "constant", "epochs": None, "batch_size": 16}}
with pytest.MonkeyPatch.context() as patch, without_ray(Path(), patch):
    train("first", {{"name": "lm.py:lm"}}, data=data | {{"train": "test.tokens"}}, steps=2, **run)  # imports the rest
    taken = int(re.search(r"VmData:\\s+(\\d+)", Path("/proc/self/status").read_text("ascii"))[1]) * 1024
    resource.setrlimit(resource.RLIMIT_DATA, (taken + {bound}, taken + {bound}))
    for documents in ("packed", "apart"):
        train(documents, {{"name": "lm.py:lm"}}, data=data | {{"documents": documents}}, steps=20, **run)
    try:
        bytes(taken + {bound})
    except MemoryError:
        print("trained, in no more")
"""


def write(path: Path, documents: int) -> None:
    tokens = np.random.default_rng(0).integers(0, 256, DOCUMENT - 1).astype(np.uint16)
    with TokenWriter(path, ByteTokenizer()) as writer:
        for _ in range(documents):
            writer.add(tokens, len(tokens))
            writer.end_document()


def test_a_run_takes_a_fraction_of_the_memory_that_its_tokens_would(tmp_path: Path) -> None:
    write(tmp_path / "test.tokens", 20)
    write(tmp_path / "train.tokens", MIB * 2**20 // (2 * DOCUMENT))
    code = TRAIN.format(tests=str(TESTS), bound=MIB * 2**20 // 4)
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.stdout.splitlines()[-1:] == ["trained, in no more"], done.stderr
