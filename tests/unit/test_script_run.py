"""The record that a submitted script leaves, without a cluster."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from raytorch.runs import list_runs, read_summary
from raytorch.service import script, secrets
from raytorch.storage import RunFolder


def start(tmp_path: Path, source: str, *arguments: str, **environment: str) -> subprocess.Popen[str]:
    (tmp_path / "job.py").write_text(source)
    command = [
        sys.executable,
        "-u",
        "-m",
        "raytorch.service.script",
        f"{tmp_path}/runs/mine",
        "--",
        "job.py",
        *arguments,
    ]
    return subprocess.Popen(
        command,
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONUNBUFFERED": "1"} | environment,
    )


def summary(tmp_path: Path) -> dict[str, Any]:
    return read_summary(RunFolder(f"{tmp_path}/runs", "mine"))


def test_a_script_that_succeeds(tmp_path: Path) -> None:
    with start(tmp_path, "import sys\nprint(sys.argv, file=sys.stderr)", "--lr", "a b") as process:
        output, errors = process.communicate()
    assert (process.returncode, output, errors) == (0, "['job.py', '--lr', 'a b']\n", "")
    record = summary(tmp_path)
    assert (record["state"], record["exit_status"], record["kind"]) == ("finished", 0, "script")
    assert record["command"] == "python job.py --lr 'a b'"
    assert (tmp_path / "runs" / "mine" / "logs" / "driver.log").read_text() == output
    assert list_runs(str(tmp_path / "runs")) == [record]


def test_a_script_that_raises(tmp_path: Path) -> None:
    with start(tmp_path, "print('begun')\ntry: 1 / 0\nexcept ArithmeticError: raise KeyError('x')") as process:
        output = process.communicate()[0]
    assert process.returncode == 1
    record = summary(tmp_path)
    assert (record["state"], record["exit_status"]) == ("failed", 1)
    error = record["error"]
    assert (error["cause"], error["kind"], error["message"]) == ("error", "KeyError", "'x'")
    assert error["traceback"].startswith("Traceback (most recent call last):")
    assert output.rstrip().replace(f"{tmp_path}/", "").endswith(error["traceback"])
    assert 'File "job.py", line 3' in error["traceback"]


@pytest.mark.parametrize(
    ("source", "status", "message"),
    [
        ("raise SystemExit(3)", 3, "the script ended with exit status 3"),
        ("import os; os.kill(os.getpid(), 9)", 137, "the script was killed by signal 9"),
    ],
)
def test_a_script_that_ends_without_a_traceback(tmp_path: Path, source: str, status: int, message: str) -> None:
    with start(tmp_path, source) as process:
        process.communicate()
    assert process.returncode == status
    assert summary(tmp_path)["error"]["message"] == message


CAUGHT = """
import sys, traceback
def load():
    try:
        open("missing")
    except OSError:
        traceback.print_exc()
load()
{then}
"""
ENDS = "the script ended with exit status "


@pytest.mark.parametrize(
    ("then", "message"),
    [
        ("sys.exit('no data set')", "1\nno data set"),
        ("print('on\\n\\n10%\\r20%\\n\\x1b[31mred\\x1b[0m'); sys.exit(3)", "3\non\n20%\nred"),
    ],
)
def test_an_exception_that_a_script_coped_with_is_not_why_it_ended(tmp_path: Path, then: str, message: str) -> None:
    with start(tmp_path, CAUGHT.replace("{then}", then)) as process:
        process.communicate()
    error = summary(tmp_path)["error"]
    assert (error["kind"], error["cause"], "traceback" in error) == ("ExitStatus", "error", False)
    assert error["message"].startswith(ENDS + message[0])
    assert error["message"].endswith(message[1:])


AT_EXIT = """
import atexit
def end():
    print("wandb: see the run at https://example.org")
atexit.register(end)
"""
RAYS = """
import atexit
def end():
    print("\\x1b[36m(square pid=7)\\x1b[0m a worker's last word")
    print("2026-11-22 21:39:27,677\\tWARNING exceptions.py:307 -- Ray's")
    print("[W1122 21:39:27.1 ProcessGroup.cpp:1] Warning: PyTorch's\\n")
atexit.register(end)
"""


@pytest.mark.parametrize(
    "source",
    [
        "print('before')\nraise ValueError('one\\ntwo\\nthree')",
        f"{AT_EXIT}raise ValueError('one')",
        f"{RAYS}try: raise ValueError('one')\nexcept LookupError: pass",
        f"{RAYS}import traceback\ntry: raise ValueError('one')\nexcept ValueError: traceback.print_exc(); exit(3)",
        "try:\n  raise OSError\nexcept OSError as error:\n  raise ValueError('one') from error\n",
    ],
)
def test_an_exception_that_ended_a_script_may_have_lines_after_it(tmp_path: Path, source: str) -> None:
    with start(tmp_path, source) as process:
        process.communicate()
    error = summary(tmp_path)["error"]
    assert (error["kind"], error["message"]) == ("ValueError", "one")
    assert error["traceback"].endswith("\nValueError: one")


@pytest.fixture
def handlers() -> Iterator[None]:
    """Sets the signals' handlers back."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("handlers")
def test_a_script_that_is_stopped_before_it_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Popen(subprocess.Popen[bytes]):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            os.kill(os.getpid(), signal.SIGTERM)
            super().__init__(*arguments, **options)

    (tmp_path / "job.py").write_text("import time; time.sleep(5)")
    monkeypatch.setattr(script.subprocess, "Popen", Popen)
    run = script.ScriptRun(RunFolder(f"{tmp_path}/runs", "mine"), ["python", f"{tmp_path}/job.py"])
    assert run.run() == 128 + signal.SIGTERM
    record = summary(tmp_path)
    assert (record["state"], record["exit_status"]) == ("stopped", -signal.SIGTERM)


def test_a_script_that_is_stopped_may_finish_what_it_does(tmp_path: Path) -> None:
    source = """
import os, signal
def end(*_):
    print("cleaning up")
    raise SystemExit(1)
signal.signal(signal.SIGTERM, end)
print(os.getpid())
while True:
    signal.pause()
"""
    with start(tmp_path, source) as process:
        assert process.stdout
        script = int(process.stdout.readline())
        for pid in (process.pid, script):  # as Ray does
            os.kill(pid, signal.SIGTERM)
        assert process.communicate()[0] == "cleaning up\n"
    record = summary(tmp_path)
    assert (record["state"], record["exit_status"]) == ("stopped", 1)
    assert "error" not in record


def test_a_script_has_its_secrets_and_the_record_has_not(tmp_path: Path) -> None:
    secrets.write({"API_KEY": "s3cret"}, tmp_path)
    environment = {secrets.MARK: "1", "PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])}
    with start(tmp_path, "import os; print(len(os.environ['API_KEY']))", **environment) as process:
        assert process.communicate() == ("6\n", "")
    assert all("s3cret" not in file.read_text() for file in (tmp_path / "runs").rglob("*") if file.is_file())


def test_a_record_is_not_overwritten(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "mine"
    folder.mkdir(parents=True)
    (folder / "summary.json").write_text(json.dumps({"state": "finished"}))
    with start(tmp_path, "print('ran')") as process:
        output, errors = process.communicate()
    assert (process.returncode, output, errors) == (1, "", f"{folder} exists already; take another --name\n")
