"""The record that a driver keeps of what it runs: that it is alive, and what it came to. Without torch and ray."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from datetime import datetime
from typing import Any

from raytorch.errors import Cause, StorageError, UserError, is_storage_fault, message_of
from raytorch.runs.catalog import HEARTBEAT_S, SUMMARY_FILE
from raytorch.runs.records import write_end
from raytorch.runs.storage import RunFolder
from raytorch.system.processes import Process


class LiveRecord:
    """A JSON file with a sign of life while its driver is at work, and with its end by all means.

    Attributes:
        content: What was written last.
        started: When the command began, in seconds since 1970.
    """

    def __init__(self, folder: RunFolder, file: str = SUMMARY_FILE, **values: Any) -> None:
        self.started = time.time()
        self.folder, self._file, self._lock = folder, file, threading.Lock()
        self.content: dict[str, Any] = {
            "name": folder.name,
            "path": str(folder),
            "state": "running",
            "started": timestamp(self.started),
            "driver": asdict(Process.current()),
            **values,
        }
        self._end: dict[str, Any] | None = None

    @property
    def is_running(self) -> bool:
        """True if no end has been written down."""
        return bool(self.content["state"] == "running")

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Write the record, a sign of life every half a minute while the block runs, and an error that ends it."""
        self.write()
        ended = threading.Event()
        threading.Thread(target=self._renew_until, args=[ended], daemon=True).start()
        try:
            yield
        except KeyboardInterrupt:
            self.close("stopped")
            raise
        except BaseException as error:
            failed = isinstance(error, StorageError) or is_storage_fault(error)
            cause = Cause.STORAGE if failed else Cause.ERROR
            self.close("failed", error={"cause": cause, "kind": type(error).__name__, "message": message_of(error)})
            raise
        finally:
            ended.set()

    def write(self, **values: Any) -> None:
        """Write down that the driver is alive, and what else is known, unless an end has been. Raises StorageError."""
        with self._lock:
            if self.is_running:
                self.content |= {**values, "seen": timestamp()}
                self.folder.write_json(self._file, self.content)

    def update(self, **values: Any) -> None:
        """Have what is written next say so, unless an end has been."""
        with self._lock:
            if self.is_running:
                self.content |= values

    def close(self, state: str, **values: Any) -> bool:
        """Write down an end by all means, unless one has been; answers whether that worked."""
        with self._lock:
            if self.is_running:
                self._end = self._end or {**self.content, **self.at_the_end(), **values, "state": state}
                written = write_end(self.folder, self._file, self._end)  # which Ctrl-C may break off
                self.content = self._end
                return written
        return True

    def require_written(self, is_written: bool) -> dict[str, Any]:
        """The record, of which :meth:`close` has said whether it is there. Raises StorageError if it is not."""
        if not is_written:
            raise StorageError(
                f"{self.folder.name} has {self.content['state']}, but {self.folder} does not say so, as it could not "
                "be written; make room or mend the access to it, and read its logs"
            )
        return self.content

    def at_the_end(self) -> dict[str, Any]:
        """Values that every end has."""
        return {"seconds": {"total": self.seconds()}}

    def seconds(self) -> float:
        """Since the command began."""
        return round(time.time() - self.started, 2)

    def _renew_until(self, ended: threading.Event) -> None:
        while not ended.wait(HEARTBEAT_S):
            with suppress(UserError, OSError):  # the storage may be out of reach for a while
                self.write()


def timestamp(seconds: float | None = None) -> str:
    """A time, by default now, with the zone's offset, so that other hosts can read it."""
    moment = datetime.now() if seconds is None else datetime.fromtimestamp(seconds)
    return moment.astimezone().isoformat(timespec="seconds")
