"""The README and the pages of docs/ say what is so: keys, commands, names and links that they show are there."""

import ast
import importlib.util
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import typer.main

from raytorch.cli.main import app
from raytorch.config import file as config_file
from raytorch.sweeps.file import load_sweep

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = sorted([*ROOT.glob("*.md"), *DOCS.glob("*.md"), ROOT / "benchmarks/README.md"])


def blocks(language: str) -> list[Any]:
    """The blocks of code in one language of all pages, each a parameter that is named after its page and number."""
    return [
        pytest.param(text, id=f"{page.relative_to(ROOT)}-{number}")
        for page in PAGES
        for number, text in enumerate(
            re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
        )
    ]


def test_the_configuration_page_says_what_the_schema_says() -> None:
    page = runpy.run_path(str(DOCS / "configuration.py"))["page"]()
    assert (DOCS / "configuration.md").read_text(encoding="utf-8") == page, "run: python docs/configuration.py"


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 180


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files_that_are_there(page: Path) -> None:
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8"))
    assert [link for link in links if not (page.parent / link).exists()] == []


@pytest.mark.parametrize("text", blocks("yaml"))
def test_configurations_are_valid(text: str, tmp_path: Path) -> None:
    shutil.copy(ROOT / "configs/quickstart.yaml", tmp_path)
    shown = tmp_path / "sweeps/shown.yaml"  # `run: ../quickstart.yaml`
    shown.parent.mkdir()
    shown.write_text(text, encoding="utf-8")
    for block in blocks("python"):  # '# nets.py', which it names
        if name := re.match(r"# (\w+\.py)\n", block.values[0]):
            (shown.parent / name[1]).write_text(block.values[0], encoding="utf-8")
    (load_sweep if text.startswith("run:") else config_file.load_config)(shown)


@pytest.mark.parametrize("text", blocks("console"))
def test_commands_have_the_options_that_are_shown(text: str) -> None:
    lines = re.sub(r"\\\n", "", text).splitlines()
    for line in (line[2:] for line in lines if line.startswith("$ raytorch ") and "--help" not in line):
        command: Any = typer.main.get_command(app)
        words = shlex.split(line.partition(">")[0], comments=True)[1:]
        while hasattr(command, "resolve_command"):
            name, command, words = command.resolve_command(command.make_context("raytorch", list(words)), words)
        context = command.context_class(command, info_name=name)
        command.make_parser(context).parse_args(words)  # raises for an option that is none, or lacks its value


@pytest.mark.parametrize("text", blocks("python"))
def test_what_examples_import_of_raytorch_is_there(text: str) -> None:
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("raytorch"):
            exec(ast.unparse(node))
        elif isinstance(node, ast.Attribute) and ast.unparse(node).startswith("raytorch."):
            found: Any = import_module("raytorch")
            for name in ast.unparse(node).split(".")[1:]:
                found = getattr(found, name)


@pytest.mark.skipif(
    not (importlib.util.find_spec("material") and importlib.util.find_spec("mkdocstrings")),
    reason="mkdocs-material and mkdocstrings are not installed: the extra 'docs' has them",
)
def test_the_site_builds_without_a_warning_and_needs_no_other(tmp_path: Path) -> None:
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
    )
    assert built.returncode == 0, built.stdout
    reference = (tmp_path / "api/index.html").read_text(encoding="utf-8")
    for name in ("raytorch.connect", "raytorch.Client", "raytorch.errors.RaytorchError"):
        assert f'id="{name}"' in reference, name
    loaded = re.compile(r"<(?:link|script|img)\b[^>]*\b(?:href|src)=\"?https?://[^\s>]*")
    assert [match for page in tmp_path.rglob("*.html") for match in loaded.findall(page.read_text("utf-8"))] == []
