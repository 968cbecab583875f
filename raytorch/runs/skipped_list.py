"""The list of the samples that a run has skipped, as they could not be read. Imports neither torch nor ray."""

import json
from collections.abc import Sequence
from contextlib import closing

from raytorch.runs.storage import LiveFiles, RunFolder
from raytorch.system.safe_text import without_secrets
from raytorch.system.strict_json import to_json

SKIPPED_FILE = "skipped.jsonl"
SkippedSample = tuple[str, int, str]
"""Split, index in it, and the error in one line."""


class SkippedList:
    """A line ``{"split": str, "index": int, "error": str}`` for each sample, in ``skipped.jsonl`` of the run's folder.

    Attributes:
        count: How many there are.
    """

    def __init__(self, folder: RunFolder) -> None:
        self._folder, self.count = folder, 0

    def read(self) -> list[SkippedSample]:
        """Those that were listed before; what is no such line is left out."""
        if not self._folder.exists(SKIPPED_FILE):
            return []
        with self._folder.open(SKIPPED_FILE) as stream:
            samples = {sample[:2]: sample for line in stream if (sample := _parsed(line))}
        self.count = len(samples)
        return list(samples.values())

    def append(self, samples: Sequence[SkippedSample]) -> None:
        """List some more."""
        lines = (to_json({"split": split, "index": index, "error": error}) for split, index, error in samples)
        with closing(LiveFiles(self._folder)) as files, files.extend(SKIPPED_FILE) as out:
            text = without_secrets("".join(f"{line}\n" for line in lines))
            out.write(text.encode(errors="backslashreplace"))
        self.count += len(samples)


def _parsed(line: bytes) -> SkippedSample | None:
    try:
        content = json.loads(line)
        split, index, error = (content[key] for key in ("split", "index", "error"))
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    is_right = isinstance(split, str) and type(index) is int and isinstance(error, str)
    return (split, index, error) if is_right else None
