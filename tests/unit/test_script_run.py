"""The record that a submitted script leaves, without a cluster."""

import json
import os
import re
import resource
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from script_runs import start, summary

from raytorch.errors import RunExistsError
from raytorch.runs.catalog import list_runs
from raytorch.runs.storage import RunFolder
from raytorch.service import script, secrets


def test_a_script_that_succeeds(tmp_path: Path) -> None:
    with start(tmp_path, "import sys\nprint(sys.argv, file=sys.stderr)", "--lr", "a b") as process:
        output, errors = process.communicate()
    assert (process.returncode, output, errors) == (0, "['job.py', '--lr', 'a b']\n", "")
    record = summary(tmp_path)
    assert (record["state"], record["exit_status"], record["kind"]) == ("finished", 0, "script")
    assert record["command"] == "python job.py --lr 'a b'"
    assert (tmp_path / "runs" / "mine" / "logs" / "driver.log").read_text(encoding="utf-8") == output
    assert list_runs(str(tmp_path / "runs")) == [record]


PLAIN = """
import inspect, json, multiprocessing, os, pickle, subprocess, sys, threading, warnings
import cloudpickle
import beside


class Own:
    pass


def work(queue):
    queue.put([__name__, Own.__module__, sys.excepthook is sys.__excepthook__])


if __name__ == "__main__":
    process = multiprocessing.get_context("spawn")
    queue = process.Queue()
    child = process.Process(target=work, args=[queue])
    child.start()
    of_child = queue.get()
    child.join()
    thread = threading.Thread(target=lambda: 1 / 0)
    thread.start()
    thread.join()
    main = sys.modules["__main__"]
    code = "import sys; print('sitecustomize' in sys.modules, sys.path)"
    told = [
        [sys.argv, sys.path, sys.orig_argv[1:], __file__, repr(__spec__), __package__, sorted(vars(main))],
        [len(inspect.stack()), sys.excepthook is sys.__excepthook__, os.environ.get("PYTHONPATH"), beside.NAME],
        [of_child, sorted(os.environ), subprocess.check_output([sys.executable, "-c", code], text=True)],
        [type(cloudpickle.loads(cloudpickle.dumps(Own()))).__module__, b"Own" in pickle.dumps(Own())],
        [sys.modules["sitecustomize"].__file__ if "sitecustomize" in sys.modules else None],
    ]
    print(json.dumps(told, indent=1))
    raise ValueError("the end") from KeyError("x")
"""


@pytest.mark.parametrize("own", [False, True])
def test_a_script_runs_as_it_would_alone(tmp_path: Path, own: bool) -> None:
    (tmp_path / "beside.py").write_text("NAME = __name__", encoding="utf-8")
    site = tmp_path / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text("import sys; sys.argv_of_site = True", encoding="utf-8")
    environment = {"PYTHONPATH": f"{site}:{tmp_path}/none"} if own else {}
    with start(tmp_path, PLAIN, "-x", "a b", environment=environment) as process:
        output = process.communicate()[0]
    alone = subprocess.run(
        [sys.executable, "job.py", "-x", "a b"],
        cwd=tmp_path,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=os.environ | {"PYTHONUNBUFFERED": "1"} | environment,
        check=False,
    )
    assert re.sub(r"Thread-\d+|0x\w+", "", output) == re.sub(r"Thread-\d+|0x\w+", "", alone.stdout)
    assert (f"{site}/sitecustomize.py" in output) is own
    assert process.returncode == alone.returncode == 1
    error = summary(tmp_path)["error"]
    assert (error["kind"], error["message"]) == ("ValueError", "the end")
    assert alone.stdout.replace(f"{tmp_path}/", "").endswith(f"{error['traceback']}\n")


@pytest.mark.parametrize("name", ["SIGINT", "SIGSEGV", "SIGTERM"])
def test_a_script_that_a_signal_ends(tmp_path: Path, name: str) -> None:
    number = signal.Signals[name]
    source = f"import os, sys\nos.kill(os.getpid(), {int(number)})\nimport time; time.sleep(60)"
    with start(tmp_path, source, preexec_fn=limit_files) as process:
        process.communicate(timeout=60)
    record = summary(tmp_path)
    assert record["exit_status"] == -number
    assert record["error"]["message"].startswith(f"the script was killed by signal {int(number)}")


def test_a_script_that_is_stopped_before_it_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Popen(subprocess.Popen[bytes]):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            os.kill(os.getpid(), signal.SIGTERM)
            super().__init__(*arguments, **options)

    (tmp_path / "job.py").write_text("import time; time.sleep(5)", encoding="utf-8")
    monkeypatch.setattr(script, "subprocess", SimpleNamespace(**(vars(subprocess) | {"Popen": Popen})))
    run = script.ScriptRun(RunFolder(f"{tmp_path}/runs", "mine"), ["python", f"{tmp_path}/job.py"])
    assert run.run() == 128 + signal.SIGTERM
    record = summary(tmp_path)
    assert (record["state"], record["exit_status"]) == ("stopped", -signal.SIGTERM)


def test_a_name_that_another_script_has_taken_meanwhile_is_refused(tmp_path: Path) -> None:
    folder = RunFolder(f"{tmp_path}/runs", "mine")
    run = script.ScriptRun(folder, ["python", f"{tmp_path}/none.py"])
    with folder.claimed(), pytest.raises(RunExistsError, match="is being run by another process"):
        run.run()
    folder.make()
    folder.write_text("summary.json", "{}")
    with pytest.raises(RunExistsError, match="exists already; take another name"):
        run.run()
    assert folder.read_bytes("summary.json") == b"{}"


def test_a_record_whose_folder_is_gone_is_not_begun_anew(tmp_path: Path) -> None:
    source = f"import os; os.rename('{tmp_path}/runs', '{tmp_path}/elsewhere')"
    with start(tmp_path, source) as process:
        assert process.wait(60) == 0
    assert not (tmp_path / "runs").exists()


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
    secrets.write_secrets({"API_KEY": "s3cret"}, tmp_path)
    environment = {secrets.MARK: "1", "PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])}
    with start(tmp_path, "import os; print(len(os.environ['API_KEY']))", environment=environment) as process:
        assert process.communicate() == ("6\n", "")
    assert all(
        "s3cret" not in file.read_text(encoding="utf-8") for file in (tmp_path / "runs").rglob("*") if file.is_file()
    )


def test_secrets_that_are_not_there_are_said_in_a_line(tmp_path: Path) -> None:
    with start(tmp_path, "print('ran')", environment={secrets.MARK: "1"}) as process:
        output, errors = process.communicate()
    assert (process.returncode, output) == (1, "")
    assert errors.startswith("the secrets of this job are not on this node: ")
    assert errors.count("\n") == 1


def test_a_record_is_not_overwritten(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "mine"
    folder.mkdir(parents=True)
    (folder / "summary.json").write_text(json.dumps({"state": "finished"}), encoding="utf-8")
    with start(tmp_path, "print('ran')") as process:
        output, errors = process.communicate()
    assert (process.returncode, output, errors) == (1, "", f"{folder} exists already; take another name\n")


def limit_files() -> None:
    """Let no file grow beyond what a record takes, as a disk that is full."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (FULL, FULL))


FULL = 100_000
WRITES_MUCH = f"for _ in range(50): print('x' * {FULL // 10 - 1}, flush=True)\nprint('the end')"


def test_a_script_ends_though_its_log_takes_no_more(tmp_path: Path) -> None:
    with start(tmp_path, WRITES_MUCH, preexec_fn=limit_files) as process:
        output, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert len(output) == 5 * FULL + len("the end\n")
    record = summary(tmp_path)
    log = tmp_path / "runs" / "mine" / "logs" / "driver.log"
    assert log.stat().st_size == FULL
    assert record["state"] == "finished"
    assert record["lost_output"]["logs/driver.log"]["bytes"] == len(output) - FULL
    assert "File too large" in record["lost_output"]["logs/driver.log"]["error"]


@pytest.mark.parametrize("kind", ["a reader that has gone", "a full disk"])
def test_a_script_ends_though_nobody_takes_its_output(tmp_path: Path, kind: str) -> None:
    if kind == "a full disk" and not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    with Path("/dev/full" if kind == "a full disk" else os.devnull).open("wb") as full:
        options = {"stdout": full} if kind == "a full disk" else {}
        with start(tmp_path, f"import time\ntime.sleep(0.1)\n{WRITES_MUCH}\n1 / 0", **options) as process:
            if process.stdout:
                process.stdout.close()
            assert process.wait(60) == 1
    record = summary(tmp_path)
    assert record["error"]["kind"] == "ZeroDivisionError"
    log = (tmp_path / "runs" / "mine" / "logs" / "driver.log").read_text(encoding="utf-8")
    assert "\nthe end\nTraceback" in log
    assert record["lost_output"].keys() == {"standard output"}
    assert record["lost_output"]["standard output"]["bytes"] > 4 * FULL


LEAVES = """
import os, subprocess, sys
child = subprocess.Popen([sys.executable, "-c", {child!r}], start_new_session={alone}, stderr=subprocess.DEVNULL)
print(child.pid)
"""
IGNORES = "import signal, time; signal.signal(15, signal.SIG_IGN); print('on', flush=True); time.sleep(600)"


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not tell which processes a script left behind")
@pytest.mark.parametrize("child", ["import time; time.sleep(600)", IGNORES])
@pytest.mark.parametrize("alone", [False, True])
def test_what_a_finished_script_leaves_behind_is_ended(tmp_path: Path, child: str, alone: bool) -> None:
    short = "from raytorch.service import script; script.LEFT_WAIT_S = 1.0; script.main()"
    with start(tmp_path, LEAVES.format(child=child, alone=alone), module=["-c", short]) as process:
        output, errors = process.communicate(timeout=60)
    assert process.returncode == 0
    assert errors == "raytorch: ended 1 process that the script left behind\n"
    assert not Path("/proc", output.split()[0]).exists()
    record = summary(tmp_path)
    assert (record["state"], record["ended_processes"]) == ("finished", 1)


def test_a_helper_that_ends_soon_after_its_script_may_say_its_last_word(tmp_path: Path) -> None:
    child = "import time; time.sleep(0.5); print('uploaded')"
    with start(tmp_path, LEAVES.format(child=child, alone=False)) as process:
        output, errors = process.communicate(timeout=60)
    assert (process.returncode, output.split()[1:], errors) == (0, ["uploaded"], "")
    assert "ended_processes" not in summary(tmp_path)
