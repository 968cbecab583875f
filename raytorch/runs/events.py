"""TensorBoard's events of a run, without TensorFlow and PyTorch."""

import time
from pathlib import Path
from secrets import token_hex
from typing import Any

EVENTS_FLUSH_S = 30.0
"""Seconds between two times that TensorBoard's events reach the disk."""


class EventFile:
    """TensorBoard events, written by the thread that calls, which a full disk is told: tensorboardX's own would hang.

    It begins with a mark of where it goes on: what was written of later steps counts no more.
    """

    def __init__(self, folder: Path, resume_step: int) -> None:
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog
        from tensorboardX.summary import scalar

        # By its suffix nobody can guess the file's name, and put a link there.
        self._folder = folder
        self._file = EventsWriter(str(folder / "events"), f".{token_hex(8)}")
        self._event, self._scalar = Event, scalar
        start = SessionLog(status=SessionLog.START)
        self._file.write_event(Event(wall_time=time.time(), step=resume_step + 1, session_log=start))
        self._flush_at = 0.0

    def write(self, name: str, value: float, step: int) -> None:
        """Record a number of an optimizer step."""
        self.add_event(self._event(wall_time=time.time(), step=step, summary=self._scalar(name, value)))

    def add_event(self, event: Any) -> None:
        """Record an event of tensorboardX's."""
        self._file.write_event(event)
        if time.monotonic() >= self._flush_at:
            self._file.flush()
            self._flush_at = time.monotonic() + EVENTS_FLUSH_S

    def summary_writer(self) -> Any:
        """A ``SummaryWriter`` into this file, in which the thread that calls writes; closing it changes nothing."""
        from tensorboardX.writer import FileWriter, SummaryWriter

        into = self

        class Records(FileWriter):
            def __init__(self) -> None:
                self.event_writer = into
                self._default_metadata: dict[str, Any] = {}

            def get_logdir(self) -> str:
                return str(into._folder)

            def flush(self) -> None:
                into._file.flush()

            def close(self) -> None:
                self.flush()

        class Writer(SummaryWriter):
            def _get_file_writer(self) -> Any:
                self.file_writer: Any = getattr(self, "file_writer", None) or Records()
                self.all_writers = {self.file_writer.get_logdir(): self.file_writer}
                return self.file_writer

        return Writer(str(self._folder))

    def close(self) -> None:
        """Flush and close the file."""
        self._file.close()
