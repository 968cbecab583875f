"""Tracebacks in a program's output: Python's own, and those inside the errors of Ray and Ray Train."""

import re
from itertools import takewhile

from raytorch.errors import message_of_group
from raytorch.system.safe_text import cut

HEAD = "Traceback (most recent call last):"
LONGEST = 60
"""Lines."""

_GROUP_HEAD = re.compile(rf"^([^|\n]*)  \+ Exception Group {re.escape(HEAD)}", re.MULTILINE)
"""Begins the traceback of an exception group, after what Ray puts in front of a worker's lines."""
_IN_GROUP = re.compile(r"[|+] (?:Exception Group )?$")
"""Ends what stands before the head of a traceback that is, or is in, that of an exception group."""
_SAID = re.compile(r"\|(?:   \|)? (\S.*)")
"""Text of an exception, in the margin of its group, and in a second one where Ray has copied the group of a task."""
_OF_GROUP = re.compile(r"\(\d+ sub-exceptions?\)$")
_COLOUR = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
_TASK = re.compile(r"(?:ray\.exceptions\.[\w.()]+: .*)?ray::.*\(pid=\d+, ip=")
"""Text that Ray writes for the head of a traceback of its tasks and actors."""
_GROUP = "Training failed due to worker errors:"
_SNIPPET = re.compile(r"^(.*)\[Rank (\d+)[\d,]* Error Snippet\]:\n", re.MULTILINE)
_CUT = re.compile(r"\.\.\.\n(\.\.\. \(Output truncated.*)\n(.*)")
_CUT_LENGTH = 499
"""Text that Ray Train shows after a cut, less the last line's end."""


def plain(output: str) -> str:
    """A program's output without its colours."""
    return _COLOUR.sub("", output)


def lines_of(output: str) -> list[str]:
    """The lines of an output, which newlines end; messages may hold what else ends lines of text."""
    return [line.removesuffix("\r") for line in output.removesuffix("\n").split("\n")]


def last_traceback(output: str) -> str | None:
    """The last traceback that a program wrote, to its exception; None if it wrote none."""
    start = output.rfind(HEAD)
    if start < 0:
        return None
    begin = output.rfind("\n", 0, start) + 1
    before = output[begin:start]  # Ray puts the process in front of a worker's lines
    if _IN_GROUP.search(before) and (heads := list(_GROUP_HEAD.finditer(output))):
        # All of its lines begin with a margin.
        lines = [line.removeprefix(heads[-1][1]) for line in lines_of(output[heads[-1].start() :])]
        return "\n".join(takewhile(lambda line: re.match(r" +[|+]", line), lines))
    lines = [line.removeprefix(before) for line in lines_of(output[begin:])]
    return "\n".join(lines[: _end(lines) + 1])


def _end(lines: list[str]) -> int:
    """Number of the line with the exception, which in a Ray task's error comes after the tasks' own frames."""
    heads = [n for n, line in enumerate(lines[:-1]) if _TASK.match(line) and lines[n + 1][:1].isspace()]
    first = max([0, *heads]) + 1
    return next((n for n in range(first, len(lines)) if lines[n][:1].strip()), len(lines) - 1)


def exception_of(traceback: str) -> tuple[str, str]:
    """Class and message of the exception that a traceback ends with, of a group with those of its exceptions."""
    lines = lines_of(traceback)
    first, *others = _said_by_group(lines) or [lines[-1].strip()]
    match = re.match(r"([A-Za-z_][\w.()]*)(?:: (.*))?$", first)
    kind, message = (match[1].rpartition(".")[2], match[2] or match[1]) if match else ("Error", first)
    leaves = [said for said in others if not _OF_GROUP.search(said)]
    return kind, message_of_group(message, leaves) if leaves else message


def _said_by_group(lines: list[str]) -> list[str]:
    """The last line of each traceback in that of an exception group, its own first; empty without a group."""
    if not _GROUP_HEAD.match(lines[0]):
        return []
    said: list[str] = []
    current = ""
    for line in (line.lstrip() for line in lines):
        if line.startswith("+"):
            said += filter(None, [current])
            current = ""
        elif match := _SAID.match(line):
            current = "" if line.endswith(HEAD) else current or match[1]
    return said


def shortened(traceback: str) -> str:
    """A traceback without its middle, if it is very long, in lines or in characters."""
    lines = lines_of(traceback)
    if len(lines) <= LONGEST:
        return cut(traceback)
    half = LONGEST // 2
    return cut("\n".join([*lines[:half], f"  ... {len(lines) - 2 * half} lines ...", *lines[-half:]]))


def snippets(output: str) -> list[tuple[int, str]]:
    """Find what Ray Train's last error shows of the workers that failed: the first rank with each error, and its
    text."""
    parts = _SNIPPET.split(output[max(output.rfind(_GROUP), 0) :])
    return [
        (int(rank), _without_cut("\n".join(line.removeprefix(before) for line in lines_of(text))))
        for before, rank, text in zip(parts[1::3], parts[2::3], parts[3::3], strict=True)
    ]


def _without_cut(text: str) -> str:
    """A snippet in which what Ray Train writes over its middle looks like a frame, and not like the exception."""

    def frame(cut: re.Match[str]) -> str:
        rest = cut[2] if len(cut[2]) >= _CUT_LENGTH else f"    {cut[2]}"  # a message so long is all there is
        return f" ...\n  {cut[1]}\n{rest}"

    return _CUT.sub(frame, text)
