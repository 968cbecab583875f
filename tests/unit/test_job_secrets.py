"""Secrets on their way from the submitter's environment into that of a job's processes."""

import json
import os
import stat
import sys
from pathlib import Path

import pytest

from raytorch.errors import UserError
from raytorch.service import secrets


@pytest.fixture
def on_a_node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package of one secret, unpacked as Ray does, in a process of the job."""
    package = secrets.write_secrets({"API_KEY": "s3cret"}, tmp_path)
    monkeypatch.setattr(os, "environ", {secrets.MARK: "1"})
    monkeypatch.setattr(sys, "path", ["/nowhere", str(tmp_path), *sys.path])
    return package / secrets.FILE


def test_values_are_those_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("API_KEY", "s3cret")
    assert secrets.collect_secrets(["API_KEY"]) == {"API_KEY": "s3cret"}
    assert secrets.collect_secrets([]) == {}


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("NOT_SET_AT_ALL", "env NOT_SET_AT_ALL: not set here; export NOT_SET_AT_ALL first"),
        ("A B", "env A B: not a name of an environment variable"),
        ("", "env : not a name of an environment variable"),
    ],
)
def test_what_is_not_there_is_refused(key: str, message: str) -> None:
    with pytest.raises(UserError) as refusal:
        secrets.collect_secrets([key])
    assert str(refusal.value) == message


def test_a_value_on_the_command_line_is_refused_and_not_repeated() -> None:
    with pytest.raises(UserError, match="give the name alone") as refusal:
        secrets.collect_secrets(["API_KEY=s3cret"])
    assert "s3cret" not in str(refusal.value)


def test_a_package_is_its_owners_alone_and_cannot_be_guessed_from_its_digest(tmp_path: Path) -> None:
    contents = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        file = secrets.write_secrets({"PIN": "1234"}, tmp_path / name) / secrets.FILE
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
        contents.append(json.loads(file.read_text(encoding="utf-8")))
    assert contents[0]["values"] == contents[1]["values"]
    assert contents[0]["salt"] != contents[1]["salt"]


def test_a_process_of_the_job_has_them(on_a_node: Path) -> None:
    on_a_node.chmod(0o644)
    secrets.load_secrets()
    assert os.environ["API_KEY"] == "s3cret"
    assert stat.S_IMODE(on_a_node.stat().st_mode) == 0o600


def test_another_process_looks_for_none(on_a_node: Path) -> None:
    del os.environ[secrets.MARK]
    secrets.load_secrets()
    assert "API_KEY" not in os.environ


def test_a_job_does_not_go_on_without_them(on_a_node: Path) -> None:
    on_a_node.unlink()
    with pytest.raises(UserError, match="not on this node"):
        secrets.load_secrets()
