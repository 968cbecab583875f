"""Runs a script on a cluster and keeps a record of it: ``python -m raytorch.service.script FOLDER -- SCRIPT [ARGS]``.

The script runs as it would alone. In FOLDER are then ``summary.json``, listed by ``raytorch runs``, and
``logs/driver.log``. Exit status: the script's own. Imports neither torch nor ray.
"""

import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Collection, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path
from select import select
from typing import Any

from raytorch.errors import Cause, Remedy, RunExistsError, StorageError, UserError
from raytorch.runs.catalog import HEARTBEAT_S, SUMMARY_FILE
from raytorch.runs.live_record import LiveRecord, timestamp
from raytorch.runs.storage import LARGEST_RECORD, LiveFiles, RunFolder, split
from raytorch.service import exception_at_exit, secrets
from raytorch.service.job import JobFailure, failure_raised, failure_told
from raytorch.service.tracebacks import last_traceback, plain, shortened
from raytorch.system.processes import POLL_S, adopt_orphans, children, end_children, living_children, set_handlers
from raytorch.system.safe_text import cut, escaped
from raytorch.system.temporary_folders import temporary_folder

LOG = "logs/driver.log"
TAIL = 64 * 1024
"""Bytes of the output's end that are kept for its last lines."""
LAST_LINES = 5
"""Shown of the output where no exception ended the script."""
LEFT_WAIT_S = 10.0
"""Seconds that processes which the script left behind have for ending by themselves, and then once more when asked."""


class ScriptRun:
    """One run of a script, from its start to its record's last line."""

    def __init__(self, folder: RunFolder, command: list[str]) -> None:
        self._folder, self._command = folder, command
        self._stopping, self._tail = False, b""
        self._noted: dict[str, Any] = {}
        """Values for the record's end."""
        self._record = LiveRecord(folder, kind="script", command=shlex.join(command))

    def run(self) -> int:
        """Run the script; answers the exit status to end with. Raises RunExistsError if another has its folder."""
        status: int | None = None
        with self._noting_stops(), self._folder.claimed():
            if self._folder.exists(SUMMARY_FILE):
                raise RunExistsError(f"{self._folder} exists already; take another name", remedies=[Remedy("name")])
            try:
                with closing(LiveFiles(self._folder)) as files, self._record.writing():
                    with files.extend(LOG) as written, _noting_exceptions() as own:
                        status = self._follow(Output(LOG, written.raw), files, own)
                        raised = _raised(own) if own else None
                    state = "stopped" if self._stopping else "failed" if status else "finished"
                    if state == "failed":
                        self._noted["error"] = self._error(status, raised)
                    self._record.close(state, exit_status=status, ended=timestamp(), **self._noted)
            except StorageError as error:
                if status is None:  # nothing has been run
                    raise
                _tell(f"the end of {LOG} could not be kept: {error}")
        return 128 - status if status < 0 else status

    @contextmanager
    def _noting_stops(self) -> Iterator[None]:
        """Note requests to stop, which reach the script as well: its end decides what is written down."""
        before = set_handlers(dict.fromkeys((signal.SIGTERM, signal.SIGINT), self._note_stop))
        try:
            yield
        finally:
            set_handlers(before)

    def _follow(self, log: "Output", files: LiveFiles, own: Path | None) -> int:
        """Start the script, pass its output on, and wait for its end; ``own`` is that of :func:`_noting_exceptions`."""
        adopt_orphans()
        others = children()
        path = os.pathsep.join(filter(None, [str(own or ""), os.environ.get("PYTHONPATH")]))
        process = subprocess.Popen(  # noqa: S603 - what the user submitted
            [sys.executable, *self._command[1:]],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=os.environ | ({"PYTHONPATH": path} if own else {}),
        )
        if self._stopping:
            process.terminate()  # the request came before there was a script that it could reach
        terminal = Output("standard output", sys.stdout and getattr(sys.stdout.buffer, "raw", sys.stdout.buffer))
        copying = threading.Thread(target=self._copy, args=[process.stdout, terminal, log], daemon=True)
        copying.start()
        while True:
            try:
                status = process.wait(HEARTBEAT_S)
                break
            except subprocess.TimeoutExpired:
                with suppress(UserError, OSError):  # the storage may be out of reach for a while
                    files.sync()
        self._end_what_is_left(others, copying)
        lost = {each.name: {"bytes": each.lost, "error": each.error} for each in (terminal, log) if each.lost}
        self._noted |= {"lost_output": lost} if lost else {}
        return status

    def _end_what_is_left(self, others: Collection[int], copying: threading.Thread) -> None:
        """Wait for the rest of the output, and end what the script left behind, which may hold it open."""
        deadline = time.monotonic() + LEFT_WAIT_S
        while (living_children(others) or copying.is_alive()) and time.monotonic() < deadline:
            time.sleep(POLL_S)
        if ended := end_children(LEFT_WAIT_S, others):
            self._noted["ended_processes"] = ended
            _tell(f"ended {ended} {'process' if ended == 1 else 'processes'} that the script left behind")
        copying.join(LEFT_WAIT_S)
        if copying.is_alive():
            _tell("a process that the script left behind holds its output open; what it writes is not kept")

    def _copy(self, output: Any, *receivers: "Output") -> None:
        """Pass the script's output on to its end: a script that nobody reads would stand still."""
        while block := output.read1(TAIL):
            self._tail = (self._tail + block)[-TAIL:]
            for receiver in receivers:
                receiver.write(block)

    def _error(self, status: int, raised: dict[str, str] | None) -> dict[str, Any]:
        output = plain(self._tail.decode(errors="replace"))
        told = failure_raised(**raised) if raised else _ended_with_status(output, status)
        # Files of the project as its author knows them, not where Ray has unpacked them.
        traceback = told.traceback and told.traceback.replace(f"{Path.cwd()}/", "")
        error = {"cause": told.cause, "message": told.message, "rank": told.rank, "kind": told.kind}
        return {key: value for key, value in (error | {"traceback": traceback}).items() if value is not None}

    def _note_stop(self, *_: object) -> None:
        self._stopping = True


class Output:
    """A file that a script's output is passed on to; for an ``error`` it may not have taken ``lost`` bytes of it."""

    def __init__(self, name: str, file: Any) -> None:
        self.name, self._file = name, file
        self.lost, self.error = 0, ""

    def write(self, block: bytes) -> None:
        """Write a piece, or count it as lost: the disk is full, or the reader has gone. The next is tried again."""
        rest = memoryview(block)
        try:
            while rest and self._file:
                written = self._file.write(rest)
                if written is None:  # it does not block, and has no room at the moment
                    select([], [self._file], [])
                rest = rest[written or 0 :]
        except OSError as error:
            self.error = str(error)
        self.lost += len(rest)


def main() -> None:
    """Run what the command line says."""
    if len(sys.argv) < 4 or sys.argv[2] != "--":
        sys.exit(__doc__)
    try:
        secrets.load_secrets()
        status = ScriptRun(RunFolder(*split(sys.argv[1])), ["python", *sys.argv[3:]]).run()
    except UserError as error:
        sys.exit(escaped(error))
    sys.exit(status)


@contextmanager
def _noting_exceptions() -> Iterator[Path | None]:
    """A folder with what notes the exception that ends a script; None if there is no room for it."""
    with ExitStack() as stack:
        own = None
        with suppress(OSError):
            folder = stack.enter_context(temporary_folder())
            (folder / exception_at_exit.NAME).write_bytes(Path(exception_at_exit.__file__).read_bytes())
            own = folder
        yield own


def _raised(own: Path) -> dict[str, str] | None:
    """The exception that ended the script, as its process has noted it; None if none did."""
    with suppress(OSError, ValueError, RecursionError, LookupError, TypeError):
        with (own / exception_at_exit.REPORT).open("rb") as file:
            told = json.loads(file.read(LARGEST_RECORD))
        return {key: cut(str(told[key])) for key in exception_at_exit.KEYS}
    return None


def _ended_with_status(output: str, status: int) -> JobFailure:
    """The failure of a script that no exception is known to have ended. It may have printed one before it exited, or a
    program that it has run may have: the last traceback in its output is shown, and taken for no more than that."""
    told = failure_told(output)
    if told and told.rank is not None:  # of a run that the script has started as a command
        return told
    traceback = last_traceback(output)
    how = f"was killed by signal {-status}" if status < 0 else f"ended with exit status {status}"
    # A progress bar writes over its own line.
    lines = [shown for line in output.split("\n") if (shown := line.rstrip().rpartition("\r")[2])]
    message = "\n".join([f"the script {how}", *lines[-LAST_LINES:]])
    return JobFailure(Cause.ERROR, message, None, shortened(traceback) if traceback else None, "ExitStatus")


def _tell(text: str) -> None:
    """Say something in the job's own output."""
    with suppress(OSError):  # nobody is there to read it
        print(f"raytorch: {text}", file=sys.stderr, flush=True)  # noqa: T201


if __name__ == "__main__":
    main()
