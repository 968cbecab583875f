"""Meters and run records: what a run measures and the files it leaves. Imports neither torch nor ray."""

import json
import logging
import platform
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib import metadata
from io import TextIOWrapper
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeVar

from raytorch import __version__
from raytorch.runs.events import EventFile
from raytorch.runs.local_folder import LocalFolder
from raytorch.system.safe_text import escaped
from raytorch.system.strict_json import number, to_json

T = TypeVar("T")

METRICS_FILE = "metrics.jsonl"
PACE_KEYS = ("samples_per_s", "data_wait", "tokens_per_s", "tflops_per_s", "mfu", "peak_memory_bytes")
"""Keys of a line of it that say how fast the run is, and what memory it takes."""
LONGEST_LINE = 2**16
"""Bytes of a line in it at most."""
LONGEST_VALUES = LONGEST_LINE - 2**12
"""Bytes of the values in it at most."""
LONGEST_GAP = 2**24
"""Bytes of a line that is too long, at most, before the rest of the file is given up."""
_SPLITS = ("train", "validation", "test")
_NEEDED = ("step", "epoch")
"""Keys that each line has to have."""
_PLACE = ("step", "epoch", "split", "time")

logger = logging.getLogger("raytorch")


IsUnderWay = Callable[[], bool]


class PhaseClock:
    """Seconds spent per phase of a run; time outside every named phase counts as ``training``."""

    def __init__(self, seconds: dict[str, float] | None = None) -> None:
        self.seconds = {"training": 0.0, "data": 0.0, "evaluating": 0.0, "checkpointing": 0.0, **(seconds or {})}
        self.hidden = 0.0
        """Of those of ``data`` since now, the seconds in which the device was at work all the same."""
        self._phase = "training"
        self._since = time.perf_counter()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the time of the block for ``name``."""
        outer = self._switch(name)
        try:
            yield
        finally:
            self._switch(outer)

    def waiting(self, items: Iterable[T], mark: Callable[[], IsUnderWay] = lambda: lambda: False) -> Iterator[T]:
        """Iterate, counting the time that ``items`` takes to yield for ``data``.

        ``mark`` is called before each wait, and its answer behind it, which tells whether what the device was given
        before is still under way.
        """
        iterator = iter(items)
        while True:
            with self.phase("data"):
                is_under_way, since = mark(), time.perf_counter()
                try:
                    item = next(iterator)
                except StopIteration:
                    return
                if is_under_way():
                    self.hidden += time.perf_counter() - since
            yield item

    def read(self) -> dict[str, float]:
        """Seconds per phase until now."""
        self._switch(self._phase)
        return {phase: round(seconds, 3) for phase, seconds in self.seconds.items()}

    def working_seconds(self) -> float:
        """Seconds spent training and waiting for data until now."""
        self._switch(self._phase)
        return self.seconds["training"] + self.seconds["data"]

    def _switch(self, phase: str) -> str:
        now = time.perf_counter()
        self.seconds[self._phase] = self.seconds.get(self._phase, 0.0) + now - self._since
        previous, self._phase, self._since = self._phase, phase, now
        return previous


class Pace(NamedTuple):
    """How fast a run was over a number of steps; None where there was none."""

    samples_per_s: float | None = None
    """Over all workers, while training or waiting for data."""
    data_wait: float | None = None
    """The share of that time in which the next batch was waited for, and the device had nothing to do."""

    tokens_per_s: float | None = None
    """Of data that is cut into windows of tokens."""
    tflops_per_s: float | None = None
    """Floating-point operations of the model, over all workers, in units of 10^12 a second."""
    mfu: float | None = None
    """The share of what the workers' devices could compute at most."""


class Work(NamedTuple):
    """What a sample takes, as far as it is known."""

    flops: float | None = None
    """Floating-point operations, forward and backward."""
    tokens: int | None = None
    peak: float | None = None
    """Operations that all workers' devices can do in a second at most."""

    def pace(self, samples_per_s: float, data_wait: float) -> Pace:
        """That of a run that trains on so many samples a second.

        Example:
            >>> Work(flops=2e9, tokens=256, peak=4e12).pace(500.0, 0.0)
            Pace(samples_per_s=500.0, data_wait=0.0, tokens_per_s=128000.0, tflops_per_s=1.0, mfu=0.25)
        """
        tokens = None if self.tokens is None else round(self.tokens * samples_per_s, 1)
        flops = None if self.flops is None else self.flops * samples_per_s
        mfu = flops / self.peak if flops is not None and self.peak else None
        return Pace(
            round(samples_per_s, 1),
            round(data_wait, 4),
            tokens,
            None if flops is None else float(f"{flops / 1e12:.4g}"),
            None if mfu is None else round(mfu, 4),
        )


class Throughput:
    """The pace of a run, without its first step."""

    def __init__(self) -> None:
        self.work = Work()
        self.first_step_at: float | None = None
        """When this attempt's first optimizer step ended, in seconds since 1970."""
        self._first = self._last = self._now = (0, 0.0, 0.0)

    def count(self, samples_seen: int, clock: PhaseClock) -> None:
        """An optimizer step has ended, ``samples_seen`` samples after the run's beginning."""
        self._now = (samples_seen, clock.working_seconds(), clock.seconds["data"] - clock.hidden)
        if self.first_step_at is None:
            self.first_step_at = time.time()
            self._first = self._last = self._now

    def tell(self, work: Work) -> None:
        """Take note of what a sample takes."""
        self.work = work

    def overall(self) -> Pace:
        """That since the first step."""
        return self._pace(self._first)

    def recent(self) -> Pace:
        """That since the last call."""
        pace = self._pace(self._last)
        self._last = self._now
        return pace

    def _pace(self, begin: tuple[int, float, float]) -> Pace:
        samples, seconds, waited = (now - before for now, before in zip(self._now, begin, strict=True))
        return self.work.pace(samples / seconds, waited / seconds) if seconds > 0 else Pace()


class MetricsLog:
    """Appends a run's metrics to ``metrics.jsonl`` and, if wanted, to TensorBoard events below ``tensorboard/``.

    A line is ``{"step": int, "epoch": float, "split": "train" | "validation" | "test", "time": seconds since 1970,
    ...}``.

    Args:
        folder: The run's folder.
        resume_step: The step of the checkpoint that the run goes on from; what is there of later ones is forgotten.
        lines: How many lines of that step there were when the checkpoint was saved; later ones are forgotten.
        tensorboard: Whether there are events.
    """

    def __init__(self, folder: Path, *, resume_step: int = 0, lines: int = 0, tensorboard: bool = True) -> None:
        files = LocalFolder(str(folder))
        if files.exists(METRICS_FILE):
            _drop_after(files, resume_step, lines)
        events = files.make("tensorboard") if tensorboard else None
        self._file = TextIOWrapper(files.append(METRICS_FILE), "utf-8", line_buffering=True)
        self._events = EventFile(events, resume_step) if events else None
        self._written = resume_step, lines

    def write(self, split: str, step: int, epoch: float, values: Mapping[str, float | None]) -> None:
        """Record ``values`` (plain numbers) of an optimizer step."""
        place = {"step": step, "epoch": round(epoch, 4), "split": split, "time": round(time.time(), 3)}
        for part in _short_enough(values):
            self._file.write(to_json({**place, **part}) + "\n")
            self._written = step, self.lines_of(step) + 1
        if self._events:
            for name, value in values.items():
                if value is not None:
                    self._events.write(f"{split}/{name}", value, step)

    def lines_of(self, step: int) -> int:
        """How many lines there are of a step, none of which is older than the newest line's."""
        return self._written[1] if self._written[0] == step else 0

    def summary_writer(self) -> Any:
        """TensorBoard's ``SummaryWriter`` into the run's events; None where none are wanted."""
        return self._events.summary_writer() if self._events else None

    def close(self) -> None:
        """Flush and close the files. That the disk takes no more was raised when it was written to."""
        with suppress(OSError):
            self._file.close()
        with suppress(OSError):
            if self._events:
                self._events.close()


def read_metrics(stream: BinaryIO, name: str) -> Iterator[dict[str, Any]]:
    """Read a ``metrics.jsonl``; a last line that is still being written is left out, and so is what is no such line.

    How many are damaged is warned of, by the file's ``name``.
    """
    odd = 0
    for line in _whole_lines(stream):
        values = _parsed(line)
        if values is not None:
            yield values
        elif line.strip():
            odd += 1
    if odd:
        logger.warning("%s: %d lines are damaged, or none of raytorch's, and left out", escaped(name), odd)


def _short_enough(values: Mapping[str, float | None]) -> Iterator[dict[str, float | None]]:
    """Values in as many parts as lines that can be read again take; one, if there are none."""
    part: dict[str, float | None] = {}
    size = 0
    for name, value in values.items():
        size += len(to_json({name: value}))
        if part and size > LONGEST_VALUES:
            yield part
            part, size = {}, len(to_json({name: value}))
        part[name] = value
    yield part


def measured(line: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a line that say how the model does, by name."""
    return {key: value for key, value in line.items() if key not in _PLACE and value is not None}


def _whole_lines(stream: BinaryIO) -> Iterator[bytes]:
    """The lines that end; one that is too long is no line, and behind one that does not end nothing is looked for."""
    while line := stream.readline(LONGEST_LINE):
        if line.endswith(b"\n"):
            yield line
        elif len(line) == LONGEST_LINE:
            yield b"?"
            for _ in range(LONGEST_GAP // LONGEST_LINE):
                if not (rest := stream.readline(LONGEST_LINE)) or rest.endswith(b"\n"):
                    break
            else:
                return


def _parsed(line: bytes) -> dict[str, Any] | None:
    """Return what a line says; None if it is not as :class:`MetricsLog` writes it."""
    try:
        values = json.loads(line)
    except (ValueError, RecursionError):
        return None
    split = values.pop("split", None) if isinstance(values, dict) else None
    if not isinstance(split, str) or split not in _SPLITS:
        return None
    values = {key: number(value) for key, value in values.items()}
    needed = all(_is_number(values.get(key)) for key in _NEEDED)
    numbers = all(value is None or _is_number(value) for value in values.values())
    return {**values, "split": split} if needed and numbers and type(values["step"]) is int else None


def _is_number(value: object) -> bool:
    return isinstance(value, float) or (type(value) is int and abs(value) < 2**53)


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide a run's numbers."""
    packages = ("torch", "torchvision", "ray", "numpy")
    own = {"python": platform.python_version(), "raytorch": __version__}  # a job brings raytorch along, uninstalled
    return own | {package: metadata.version(package) for package in packages}


def _drop_after(files: LocalFolder, step: int, of_step: int) -> None:
    """Forget the steps that a resumed run will take again, and of ``step`` all but the first lines."""
    with files.open(METRICS_FILE) as stream:
        lines = read_metrics(stream, f"{files.path}/{METRICS_FILE}")
        files.write(METRICS_FILE, ((to_json(line) + "\n").encode() for line in _kept(lines, step, of_step)))


def _kept(lines: Iterable[dict[str, Any]], step: int, of_step: int) -> Iterator[dict[str, Any]]:
    for line in lines:
        of_step -= line["step"] == step
        if line["step"] < step or (line["step"] == step and of_step >= 0):
            yield line


class _LogHandler(logging.StreamHandler[TextIOWrapper]):
    """A log that never ends what it is about: that its disk takes no more is told once, on standard error."""

    is_broken = False

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - logging's name
        """Tell the first line that could not be written, and why."""
        if not self.is_broken:
            self.is_broken = True
            super().handleError(record)


@contextmanager
def log_to_file(file: BinaryIO) -> Iterator[logging.Logger]:
    """Send the ``raytorch`` logger and Python warnings to a file while the block runs, and close it."""
    text = TextIOWrapper(file, "utf-8", errors="backslashreplace", write_through=True)
    handler = _LogHandler(text)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    loggers = [logging.getLogger("raytorch"), logging.getLogger("py.warnings")]
    before = [(logger, logger.level, logger.propagate) for logger in loggers]
    logging.captureWarnings(True)
    for logger in loggers:
        logger.setLevel(logging.INFO)
        logger.propagate = False
        logger.addHandler(handler)
    try:
        yield loggers[0]
    finally:
        logging.captureWarnings(False)
        for logger, level, propagate in before:
            logger.setLevel(level)
            logger.propagate = propagate
            logger.removeHandler(handler)
        with suppress(OSError):
            handler.close()
        with suppress(OSError):
            text.close()
