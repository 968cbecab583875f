"""Examples in docstrings: those that need no Ray and no file of the reader's are run, the others are read."""

import ast
import doctest
import inspect
from dataclasses import is_dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from in_process import local_session
from torch import nn

import raytorch

RUN = """
    autograd config.run distributed.collectives layers.attention onnx optimizers serialization session.session
    system.near_names tensor_ops
"""
PUBLIC = """
    autograd distributed.collectives scaling.study sweeps.sweep training.api
"""
"""Modules in which every function and class that a user calls has an example."""
NOT_CALLED = "Agreement Context agree_through agreement barrier compared measured plan_sweep"
"""By users, or with nothing to show; what is a dataclass is returned to them."""


def examples(module: str) -> list[doctest.DocTest]:
    found = doctest.DocTestFinder(exclude_empty=True).find(import_module(f"raytorch.{module}"), globs={})
    return [test for test in found if test.examples]


@pytest.mark.parametrize("module", RUN.split())
def test_an_example_does_what_it_says(module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # for the files that it writes
    names: dict[str, Any] = {"torch": torch, "nn": nn, "Path": Path, **vars(import_module(f"raytorch.{module}"))}
    if module == "session.session":
        names["session"] = local_session()
    for test in examples(module):
        test.globs = dict(names)
        report: list[str] = []
        doctest.DocTestRunner().run(test, out=report.append)
        assert not report, "".join(report)


@pytest.mark.parametrize("path", sorted(Path(raytorch.__file__).parent.rglob("*.py")), ids=lambda path: path.stem)
def test_an_example_is_python(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Module) and (text := ast.get_docstring(node)):
            for example in doctest.DocTestParser().get_examples(text):
                ast.parse(example.source)


def test_the_front_door_has_examples() -> None:
    named = {name: getattr(raytorch, name) for name in raytorch.__all__}
    shown = ("Result", "RunConfig", *(name for name in named if name.endswith("Error")))  # and not called
    called = {name: value for name, value in named.items() if callable(value) and name not in shown}
    assert len(called) == 8
    assert not [name for name, value in called.items() if ">>>" not in (inspect.getdoc(value) or "")]


@pytest.mark.parametrize("module", PUBLIC.split())
def test_what_a_user_calls_has_an_example(module: str) -> None:
    place = import_module(f"raytorch.{module}")
    called = {
        name
        for name, value in vars(place).items()
        if callable(value)
        and getattr(value, "__module__", "") == place.__name__
        and name[0] != "_"
        and not is_dataclass(value)
    }
    lacking = {name for name in called if ">>>" not in (inspect.getdoc(getattr(place, name)) or "")}
    assert lacking <= set(NOT_CALLED.split())
