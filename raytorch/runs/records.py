"""Schemas of raytorch's records: one for each kind, by which a file is checked before anything relies on it.

A record may be damaged, or have come from somebody else. What it names is a name of the form that raytorch gives, never
a path; keys that it has besides are kept.
"""

import json
import logging
from collections.abc import Iterator
from contextlib import suppress
from datetime import datetime
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    NonNegativeInt,
    ValidationError,
    model_validator,
)

from raytorch.errors import RecordError, UserError
from raytorch.runs.storage import RunFolder
from raytorch.system.safe_text import escaped
from raytorch.system.strict_json import number, to_json

logger = logging.getLogger("raytorch")

SHORT = 500
"""Characters of an error's message in a record that has little room."""

DEEPEST = 40
"""Mappings and lists in each other at most."""


def moment(text: str) -> datetime:
    """The time that a record tells, with this host's zone where it has none. Raises ValueError."""
    try:
        return datetime.fromisoformat(text).astimezone()
    except OverflowError:
        raise ValueError("before the first or after the last year") from None


def _is_time(text: str) -> str:
    if text:
        moment(text)
    return text


Time = Annotated[str, AfterValidator(_is_time)]
Count = Annotated[int, Field(ge=0, lt=2**53)]
Number = Annotated[float, BeforeValidator(number)]
"""A number, which need not be finite."""
Seconds = dict[str, float | None]
FileName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}$")]
"""A file of a checkpoint: a name, not a path."""


class _Record(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow", use_attribute_docstrings=True)


class Driver(_Record):
    """The process that started a run."""

    host: str
    pid: Annotated[int, Field(ge=1, lt=2**31)]
    began: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    boot: str | None = None
    namespace: str | None = None


class FailureNote(_Record):
    """Why a run failed."""

    cause: str = "error"
    message: str = ""
    rank: Count | None = None
    traceback: str | None = None
    kind: str | None = None


class ExportNote(_Record):
    """A file that a finished run has exported its model to."""

    file: Annotated[str, Field(pattern=r"^export/[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}$")]


class CheckpointNote(_Record):
    """What a run's checkpoints took."""

    saved: Count = 0
    skipped: Count = 0
    """Those that were due while the one before was still being written."""
    blocked_s: float = 0.0
    """Seconds for which the training stood still."""
    written_s: float = 0.0
    """Seconds in which they were written, and sent to their storage, most of them while the training went on."""


class Summary(_Record):
    """A run's ``summary.json``."""

    state: Annotated[str, Field(pattern=r"^[a-z_ ]{1,40}$")]
    started: Time
    seen: Time | None = None
    driver: Driver | None = None
    error: FailureNote | None = None
    exports: list[ExportNote] = []
    seconds: Seconds = {}
    metrics: dict[str, Number] = {}
    """Of the newest evaluation."""
    split: Literal["validation", "test"] = "test"
    """The split of that."""
    test_metrics: dict[str, Number] = {}
    """Of the finished model on the test split, where the run was judged by another."""
    ended_early: str | None = None
    epochs: float | None = None
    step: Count | None = None
    samples_per_s: float | None = None
    data_wait: float | None = None
    tokens_per_s: float | None = None
    tflops_per_s: float | None = None
    mfu: float | None = None
    peak_memory_bytes: Count | None = None
    skipped: Count | None = None
    """Samples that could not be read."""
    checkpoints: CheckpointNote | None = None

    @model_validator(mode="before")
    @classmethod
    def _of_older_versions(cls, content: Any) -> Any:
        """Metrics stood beside the rest before they had a place of their own."""
        if not isinstance(content, dict) or "metrics" in content:
            return content
        older = {name: content[name] for name in ("accuracy", "loss") if isinstance(content.get(name), float)}
        return {key: value for key, value in content.items() if key not in older} | (
            {"metrics": older} if older else {}
        )


class CheckpointManifest(_Record):
    """A checkpoint's ``checkpoint.json``."""

    format: int
    files: dict[FileName, NonNegativeInt]
    """The size of each."""
    digests: dict[FileName, Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]] = {}
    """The SHA-256 of each, of a safetensors file that of its header, which has checksums of the rest."""
    step: Annotated[int, Field(ge=0, lt=10**12)]
    epoch: float = 0.0
    metrics: dict[str, Number] = {}
    """The outcome of the newest evaluation."""
    evaluated: bool = False
    """True if that was of this very model."""
    seconds: dict[str, float] = {}
    """Spent until then, by phase."""
    config: dict[str, Any] = {}
    code: dict[str, str] = {}
    """The SHA-256 of each file of the user's own code, by its path in the project."""


class SweepRecord(_Record):
    """A sweep's ``sweep.json``, as far as a resumed sweep relies on it."""

    started: Time = ""
    seconds: Annotated[float, Field(ge=0)] = 0.0
    stopped: dict[Annotated[str, Field(pattern=r"^[0-9]{1,9}$")], float] = {}

    def stopped_after(self) -> dict[int, float]:
        """By number of a trial that was to be stopped early, the epoch after which it was."""
        return {int(number): epoch for number, epoch in self.stopped.items()}


Record = TypeVar("Record", bound=_Record)


def read_record(folder: RunFolder, name: str, kind: type[Record]) -> Record:
    """Read a record of a run or sweep; see :meth:`RunFolder.open`. Raises RecordError if it is damaged."""
    text = folder.read_bytes(name)
    try:
        return kind.model_validate(_plain_json(text))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(map(str, first["loc"])) or "the whole"
        reason = f"{key:.80}: {first['msg']}"
    except (ValueError, OverflowError) as error:
        reason = str(error)
    raise RecordError(f"{folder.file(name)} is damaged, or none of raytorch's: {escaped(reason)}")


def _plain_json(text: bytes) -> Any:
    """The content of a JSON text. Raises ValueError."""
    try:
        content = json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"no JSON: {error}") from None
    if _is_deeper(content, DEEPEST):
        raise ValueError("nested too deeply")
    return content


def _is_deeper(content: Any, levels: int) -> bool:
    layer = [content]
    for _ in range(levels):
        layer = [
            inner
            for each in layer
            if isinstance(each, dict | list)
            for inner in (each.values() if isinstance(each, dict) else each)
        ]
    return any(isinstance(each, dict | list) for each in layer)


def write_end(folder: RunFolder, file: str, record: dict[str, Any]) -> bool:
    """Write a record for the last time; answers whether that worked, and warns where it did not.

    A full disk has no room for a new file, but what fits into the blocks of the old one is written over it.
    """
    try:
        folder.write_json(file, record)
    except (UserError, OSError) as error:
        with suppress(UserError, OSError):
            if folder.write_over(file, _shorter_and_shorter(record)):
                return True
        logger.warning("the end of %s could not be written down: %s", folder, error)
        return False
    return True


def _shorter_and_shorter(record: dict[str, Any]) -> Iterator[bytes]:
    """A record as JSON, whole, without the traceback, and with no more than the beginning of what went wrong."""
    error = record.get("error", {})
    brief = {key: value for key, value in error.items() if key != "traceback"}
    shortest = brief | {"message": str(error.get("message", ""))[:SHORT]}
    for each in [error, brief, shortest] if error else [{}]:
        yield (to_json(record | ({"error": each} if each else {}), indent=2) + "\n").encode()
