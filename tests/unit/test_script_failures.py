"""What the record of a submitted script says of its failure, without a cluster."""

import json
import os
from pathlib import Path

import pytest
from script_runs import start, summary

from raytorch.service import exception_at_exit, script
from raytorch.service.job import failure_raised
from raytorch.system.safe_text import LONGEST, cut


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


def test_a_script_that_raises_where_there_is_no_room_for_a_note_of_it(tmp_path: Path) -> None:
    (tmp_path / "tmp").mkdir()
    (tmp_path / "tmp" / f"raytorch-{os.getuid()}").write_text("in the way", encoding="utf-8")
    with start(tmp_path, "1 / 0", environment={"TMPDIR": str(tmp_path / "tmp")}) as process:
        output = process.communicate()[0]
    assert process.returncode == 1
    assert output.endswith("ZeroDivisionError: division by zero\n")
    assert "ZeroDivisionError: division by zero" in summary(tmp_path)["error"]["message"]


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
        ("try: 1 / 0\nexcept ArithmeticError: traceback.print_exc()\nsys.exit('no data set')", "1\nno data set"),
        ("sys.excepthook(OSError, OSError('x'), None); sys.exit('no data set')", "1\nno data set"),
        ("print('on\\n\\n10%\\r20%\\n\\x1b[31mred\\x1b[0m'); sys.exit(3)", "3\non\n20%\nred"),
    ],
)
def test_an_exception_that_a_script_coped_with_is_not_why_it_ended(tmp_path: Path, then: str, message: str) -> None:
    with start(tmp_path, CAUGHT.replace("{then}", then)) as process:
        process.communicate()
    error = summary(tmp_path)["error"]
    assert (error["kind"], error["cause"]) == ("ExitStatus", "error")
    assert error["message"].startswith(ENDS + message[0])
    assert error["message"].endswith(message[1:])


PRINTED = """
import multiprocessing, os, subprocess, sys, traceback
def work(): raise OSError(f"no {sys.argv[0]}")
BROKEN = "raise OSError('no ' + 'data')"
if __name__ == "__main__":
    print("begun", flush=True)
    {source}
"""


@pytest.mark.parametrize(
    "source",
    [
        "try: work()\n    except OSError: traceback.print_exc(); sys.exit(1)",
        "try: work()\n    except OSError: traceback.print_exc(); os._exit(1)",
        "os.execv(sys.executable, [sys.executable, '-c', BROKEN])",
        "child = multiprocessing.Process(target=work); child.start(); child.join(); sys.exit(child.exitcode)",
        "sys.exit(subprocess.run([sys.executable, '-c', BROKEN]).returncode)",
    ],
)
def test_the_last_traceback_is_kept_of_a_script_that_exits_with_a_status(tmp_path: Path, source: str) -> None:
    with start(tmp_path, PRINTED.replace("{source}", source)) as process:
        output = process.communicate()[0]
    error = summary(tmp_path)["error"]
    assert error["kind"] == "ExitStatus"
    assert error["message"].startswith("the script ended with exit status 1\n")
    traceback = error["traceback"]
    assert traceback.startswith("Traceback (most recent call last):\n")
    assert traceback.splitlines()[-1].startswith("OSError: no ")
    assert traceback in output.replace(f"{tmp_path}/", "")


def test_the_last_traceback_is_looked_for_at_the_outputs_end_alone(tmp_path: Path) -> None:
    source = "import sys, traceback\ntry: 1 / 0\nexcept ArithmeticError: traceback.print_exc()"
    with start(tmp_path, f"{source}\nprint(('x' * 99 + '\\n') * {script.TAIL // 100 + 1})\nsys.exit(1)") as process:
        process.communicate()
    assert "traceback" not in summary(tmp_path)["error"]


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
        "import sys\nsys.excepthook = lambda *_: print('rich: it broke')\nraise ValueError('one')",
        "import os\nif not os.fork(): raise KeyError('of a fork')\nos.wait()\nraise ValueError('one')",
        "try:\n  raise OSError\nexcept OSError as error:\n  raise ValueError('one') from error\n",
    ],
)
def test_an_exception_that_ended_a_script_may_have_lines_after_it(tmp_path: Path, source: str) -> None:
    with start(tmp_path, source) as process:
        process.communicate()
    error = summary(tmp_path)["error"]
    assert (error["kind"], error["message"]) == ("ValueError", "one")
    assert "\nValueError: one" in error["traceback"]


TESTS_ITSELF = """
import pytest, sys
if pytest.main(["-q", "-p", "no:cacheprovider", "broken.py"]) and {ends!r} == "exit":
    sys.exit(3)
raise LookupError("later")
"""


@pytest.mark.parametrize(("ends", "kind"), [("exit", "ExitStatus"), ("raise", "LookupError")])
def test_an_exception_that_a_library_has_noted_is_not_why_a_script_ended(tmp_path: Path, ends: str, kind: str) -> None:
    (tmp_path / "broken.py").write_text("def test_it(): assert 1 == 2", encoding="utf-8")
    with start(tmp_path, TESTS_ITSELF.format(ends=ends)) as process:
        output = process.communicate()[0]
    assert "assert 1 == 2" in output
    assert summary(tmp_path)["error"]["kind"] == kind


@pytest.mark.parametrize(
    "source", ["1 +", "exec('1 +')", "import runpy; runpy.run_path('other.py', run_name='__main__')"]
)
def test_a_script_that_is_no_python_says_so(tmp_path: Path, source: str) -> None:
    (tmp_path / "other.py").write_text("1 +", encoding="utf-8")
    with start(tmp_path, source) as process:
        process.communicate()
    assert summary(tmp_path)["error"]["kind"] == "SyntaxError"


# -- bounds ------------------------------------------------------------------------------------------------------------


def test_an_exception_of_any_length_leaves_a_record_that_is_read(tmp_path: Path) -> None:
    with start(tmp_path, "raise ValueError('begin' + 'x' * 9_000_000 + 'end')") as process:
        process.communicate()
    record = summary(tmp_path)
    assert (record["state"], record["error"]["kind"]) == ("failed", "ValueError")
    for text in (record["error"]["message"], record["error"]["traceback"]):
        assert "begin" in text
        assert " characters ... x" in text
        assert text.endswith("end")
        assert len(text) <= LONGEST


def test_what_is_cut_is_counted_and_cut_once() -> None:
    text = "a" * 1000 + "b" * 1000
    head, told, tail = cut(text, 200).split(" ... ")
    assert int(told.removesuffix(" characters").replace(",", "")) + len(head) + len(tail) == len(text)
    assert cut(cut(text, 200), 200) == cut(text, 200)
    assert cut(text, 2000) == text


def test_a_note_that_is_not_as_it_should_be_is_cut_or_none(tmp_path: Path) -> None:
    note = tmp_path / exception_at_exit.REPORT
    for other in ("", "[1]", "{}", "[" * 100_000, "1"):
        note.write_text(other, encoding="utf-8")
        assert script._raised(tmp_path) is None
    note.write_text(json.dumps(dict.fromkeys(exception_at_exit.KEYS, "x" * 200_000)), encoding="utf-8")
    raised = script._raised(tmp_path)
    assert raised is not None
    assert {len(text) for text in raised.values()} == {len(cut("x" * 200_000))}


def test_a_failure_of_any_length_is_shown_cut() -> None:
    failure = failure_raised("ValueError", "builtins", "x" * 200_000, "y" * 200_000)
    assert failure.traceback is not None
    assert len(failure.message) <= LONGEST
    assert len(failure.traceback) <= LONGEST


# -- exceptions that are odd -------------------------------------------------------------------------------------------


def test_an_exception_that_cannot_be_told_ends_a_script_like_any_other(tmp_path: Path) -> None:
    source = "class Odd(Exception):\n    def __str__(self): return 1 / 0\nraise Odd"
    with start(tmp_path, source) as process:
        output = process.communicate()[0]
    error = summary(tmp_path)["error"]
    assert (error["kind"], error["message"]) == ("Odd", "<exception str() failed>")
    assert output.count("Traceback") == 1


def test_a_note_that_cannot_be_written_adds_nothing_to_the_log(tmp_path: Path) -> None:
    source = "import sys\nsys.modules['json'] = None\nraise ValueError('one')"
    with start(tmp_path, source) as process:
        output = process.communicate()[0]
    assert output.endswith("ValueError: one\n")
    assert "ValueError: one" in summary(tmp_path)["error"]["message"]
