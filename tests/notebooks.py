"""A kernel for notebooks: cells run in a module ``__main__`` without a file, texts kept as by IPython."""

import ast
import json
import linecache
import sys
from itertools import count
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

_numbers = count()


class Kernel:
    """Runs cells, one after the other."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self._module = ModuleType("__main__")
        patch.setitem(sys.modules, "__main__", self._module)

    @property
    def names(self) -> dict[str, Any]:
        """What the cells have defined."""
        return vars(self._module)

    def run(self, cell: str) -> Any:
        """Run a cell; the value of its last line, if that is an expression."""
        file = f"<cell {next(_numbers)}>"
        linecache.cache[file] = len(cell), None, cell.splitlines(keepends=True), file
        *body, last = ast.parse(cell, file).body
        if not isinstance(last, ast.Expr):
            body.append(last)
        exec(compile(ast.Module(body, []), file, "exec"), self.names)
        return eval(compile(ast.Expression(last.value), file, "eval"), self.names) if last not in body else None


def cells_of(path: Path) -> list[str]:
    """The code of a notebook's cells."""
    cells = json.loads(path.read_text("utf-8"))["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
