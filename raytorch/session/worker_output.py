"""Output of programs on the workers, on its way to the client that sent them."""

import io
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress

from raytorch.system.safe_text import escaped_log

Printed = tuple[tuple[int, str, str], ...]
"""For each of a program's streams in which there is something: the rank, ``stdout`` or ``stderr``, and the text."""

MOST_PRINTED = 1 << 20
"""Characters of a stream that one program may print to the client."""


class Printing:
    """Output of a worker's programs: Python's standard output and errors, its warnings among them."""

    def __init__(self, rank: int) -> None:
        self._rank = rank
        self._streams = {"stdout": _Stream(), "stderr": _Stream()}

    @contextmanager
    def caught(self) -> Iterator[None]:
        """Keep what is printed in the block, by whichever thread, from where the process prints otherwise."""
        with redirect_stdout(self._streams["stdout"]), redirect_stderr(self._streams["stderr"]):
            yield

    def take(self) -> Printed:
        """Take what was printed since this was asked last."""
        taken = ((self._rank, name, stream.take()) for name, stream in self._streams.items())
        return tuple([(rank, name, text) for rank, name, text in taken if text])


class _Stream(io.StringIO):
    """A text stream of bounded length."""

    def __init__(self) -> None:
        super().__init__()
        self._left_out = 0

    def write(self, text: str) -> int:
        kept = text[: max(0, MOST_PRINTED - self.tell())]
        self._left_out += len(text) - len(kept)
        super().write(kept)
        return len(text)

    def take(self) -> str:
        """The content, which is forgotten."""
        if not self.tell():
            return ""
        text = self.getvalue()
        if self._left_out:
            text = f"{text}\n... and {self._left_out:,} characters more"
        self._left_out = 0
        self.seek(0)
        self.truncate()
        return text


def show(printed: Printed) -> None:
    """Print on the client what a worker has printed, each line with the rank."""
    for rank, name, text in printed:
        lines = "".join(f"(rank {rank}) {line}\n" for line in escaped_log(text.removesuffix("\n")).split("\n"))
        stream = getattr(sys, name)
        if stream is None:  # as in a process that has no terminal
            continue
        with suppress(Exception):  # the client may have closed its own, or have one that raises what it likes
            stream.write(lines)
            stream.flush()
