"""A run's folder on a local disk and on storage that is not local, where files cannot grow."""

import json
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from pyarrow import fs

from raytorch.errors import RunNotFoundError, StorageError, UserError
from raytorch.runs import storage
from raytorch.runs.storage import BASE, LiveFiles, RunFolder, absolute, join, locate, open_storage, split
from raytorch.service.client import _runtime_environment


@pytest.fixture
def remote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunFolder:
    """A run's folder on a file system that is not pyarrow's local one; its files are to be seen below ``tmp_path``."""
    bucket = fs.SubTreeFileSystem(str(tmp_path), fs.LocalFileSystem())
    monkeypatch.setattr(storage, "open_storage", lambda address: (bucket, "bucket/runs"))
    return RunFolder("s3://bucket/runs", "far")


# -- addresses ---------------------------------------------------------------------------------------------------------


def test_paths_become_absolute_and_uris_stay(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/me")
    assert absolute("runs") == f"{tmp_path}/runs"
    assert absolute("~/runs") == "/home/me/runs"
    assert absolute("s3://bucket/runs") == "s3://bucket/runs"


def test_the_home_of_nobody_is_the_users_to_change() -> None:
    with pytest.raises(UserError) as failure:
        absolute("~no_such_user/runs")
    assert str(failure.value) == "~no_such_user/runs: there is no such user; give the folder in full"


@pytest.mark.parametrize(
    ("base", "store", "address"),
    [
        ("/mnt/raytorch", "runs", "/mnt/raytorch/runs"),
        ("/mnt/raytorch", "./runs/", "/mnt/raytorch/runs"),
        ("/mnt/raytorch", "a/b", "/mnt/raytorch/a/b"),
        ("/home/me/runs", "runs", "/home/me/runs"),
        ("/home/me/runs", "runs/a", "/home/me/runs/a"),
        ("/home/me/runs", "runs/runs", "/home/me/runs/runs"),
        ("/home/me/runs", "a/runs", "/home/me/runs/a/runs"),
        ("/shared", "shared2", "/shared/shared2"),
        ("/shared", ".", "/shared"),
        ("/shared", "a/../b", "/shared/b"),
        ("/shared", "../../runs", "/shared/runs"),
        ("/shared", "..", "/shared"),
        ("/", "../runs", "/runs"),
        ("s3://b/runs", "runs", "s3://b/runs"),
        ("s3://b/me", "runs", "s3://b/me/runs"),
        ("s3://b/me", "./a/b", "s3://b/me/a/b"),
        ("s3://b", "runs", "s3://b/runs"),
        ("s3://b/team?region=eu", "runs", "s3://b/team/runs?region=eu"),
        ("s3://b/runs?region=eu", "runs/a", "s3://b/runs/a?region=eu"),
        ("s3://b/runs", "/data/runs", "/data/runs"),
        ("/shared", "s3://b/runs", "s3://b/runs"),
    ],
)
def test_a_relative_storage_of_a_job_is_in_its_base(
    monkeypatch: pytest.MonkeyPatch, base: str, store: str, address: str
) -> None:
    monkeypatch.setenv(BASE, base)
    assert locate(store) == address


def test_only_storages_are_in_the_base_of_a_job(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert locate("runs") == f"{tmp_path}/runs"
    monkeypatch.setenv(BASE, "/shared")
    assert [RunFolder("runs", "mine").storage, RunFolder("runs", "mine").path] == ["/shared/runs", "/shared/runs/mine"]
    assert locate("~/runs") == absolute("~/runs")
    assert absolute("data") == f"{tmp_path}/data"  # what is read lies where the program runs


@pytest.mark.parametrize("store", ["../runs", "a/..", ".."])
def test_a_way_up_is_refused_in_a_uri(monkeypatch: pytest.MonkeyPatch, store: str) -> None:
    monkeypatch.setenv(BASE, "s3://b/me")
    with pytest.raises(UserError) as failure:
        locate(store)
    assert str(failure.value) == (
        f"storage '{store}': there is no '..' in s3://b/me; give the storage in full, or without it"
    )


@pytest.mark.parametrize("storage", ["/mnt/raytorch", "/shared", "s3://b/me", "s3://b", "s3://b/runs?region=eu"])
def test_the_base_of_a_job_is_the_storage_of_its_record(storage: str, tmp_path: Path) -> None:
    environment = _runtime_environment(join(storage, "first"), {}, tmp_path)
    assert environment["env_vars"][BASE] == storage


@pytest.mark.parametrize(
    ("store", "address"),
    [
        ("/data/runs", "/data/runs/mine"),
        ("/", "/mine"),
        ("s3://bucket/runs", "s3://bucket/runs/mine"),
        ("s3://bucket/runs?region=eu", "s3://bucket/runs/mine?region=eu"),
    ],
)
def test_join_and_split_are_each_others_reverse(store: str, address: str) -> None:
    assert join(store, "mine") == address
    assert split(address) == (store, "mine")


def test_a_trailing_slash_does_not_count() -> None:
    assert join("/data/runs/", "mine") == "/data/runs/mine"
    assert split("/data/runs/mine/") == ("/data/runs", "mine")


def test_an_unknown_scheme_is_refused_in_one_line() -> None:
    with pytest.raises(UserError) as failure:
        open_storage("bogus://bucket/runs")
    assert str(failure.value) == (
        "storage 'bogus://bucket/runs' cannot be opened: Unrecognized filesystem type in URI: bogus://bucket/runs; "
        "give a folder or a URI such as s3://bucket/runs"
    )


def test_a_reason_of_many_lines_is_cut_to_its_first() -> None:
    with pytest.raises(UserError) as failure:
        open_storage("hdfs://nowhere:1/runs")  # pyarrow lists all places where it looked for Java
    assert "\n" not in str(failure.value)


# -- a local folder ----------------------------------------------------------------------------------------------------


def test_a_local_folder_prints_as_its_path(tmp_path: Path) -> None:
    folder = RunFolder(str(tmp_path / "runs"), "mine")
    assert folder.is_local
    assert str(folder) == folder.path == f"{tmp_path}/runs/mine"
    assert RunFolder(f"file://{tmp_path}/runs", "mine").path == folder.path


def test_files_are_written_read_and_deleted(tmp_path: Path) -> None:
    folder = RunFolder(str(tmp_path), "mine")
    assert not folder.exists()
    assert folder.folders() == []
    folder.make()
    folder.write_json("summary.json", {"state": "running", "name": "größer"})
    folder.write_text("logs.txt", "one")
    assert folder.exists()
    assert folder.exists("summary.json")
    assert json.loads(folder.read_bytes("summary.json")) == {"state": "running", "name": "größer"}
    (tmp_path / "mine" / "b" / "deep").mkdir(parents=True)
    (tmp_path / "mine" / "a").mkdir()
    assert folder.folders() == ["a", "b"]
    folder.delete("b")
    folder.delete("summary.json")
    folder.delete("was never there")
    assert sorted(path.name for path in (tmp_path / "mine").iterdir()) == ["a", "logs.txt"]


def test_a_reader_never_sees_half_a_file(tmp_path: Path) -> None:
    folder = RunFolder(str(tmp_path), "mine")
    folder.make()
    folder.write_text("summary.json", "old")
    with (tmp_path / "mine" / "summary.json").open() as reader:
        folder.write_text("summary.json", "new")
        assert reader.read() == "old"  # the old file was replaced, not written over
    assert folder.read_bytes("summary.json").decode() == "new"
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["summary.json"]


def test_a_missing_file_says_where_to_look(tmp_path: Path) -> None:
    with pytest.raises(RunNotFoundError) as failure:
        RunFolder(str(tmp_path), "mine").read_bytes("config.yaml").decode()
    assert str(failure.value) == f"{tmp_path}/mine/config.yaml does not exist; give a run that is there"


def test_a_storage_that_is_a_file_is_the_users_to_change(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("not a folder", encoding="utf-8")
    with pytest.raises(UserError, match=rf"^{tmp_path}/runs/mine cannot be used: .*[Nn]ot a directory"):
        RunFolder(str(tmp_path / "runs"), "mine").make()


@pytest.mark.parametrize(
    "write",
    [
        lambda folder: folder.write_json("summary.json", {}),
        lambda folder: folder.write_text("logs/rank-0.log", ""),
        lambda folder: folder.make("export"),
        lambda folder: LiveFiles(folder).extend("metrics.jsonl"),
        lambda folder: LiveFiles(folder).make("export"),
    ],
)
def test_a_folder_that_is_gone_is_not_made_anew(tmp_path: Path, write: Any) -> None:
    folder = RunFolder(str(tmp_path / "runs"), "mine")
    with folder.claimed():
        folder.write_json("summary.json", {})
        (tmp_path / "runs").rename(tmp_path / "elsewhere")
        with pytest.raises(StorageError) as failure:
            write(folder)
    assert str(failure.value) == (
        f"{tmp_path}/runs/mine is gone: it was deleted, or its storage is not mounted here; mend that before you go on"
    )
    assert not (tmp_path / "runs").exists()


def test_live_files_of_a_local_run_are_its_own(tmp_path: Path) -> None:
    folder = RunFolder(str(tmp_path), "mine")
    folder.make()
    with closing(LiveFiles(folder)) as files:
        assert str(files.path) == folder.path
        folder.write_text("metrics.jsonl", "{}\n")
        with files.extend("metrics.jsonl") as metrics:
            metrics.write(b"more\n")
        files.sync()
    assert folder.read_bytes("metrics.jsonl").decode() == "{}\nmore\n"


# -- storage that is not local -----------------------------------------------------------------------------------------


def test_pyarrows_own_mock_is_not_local() -> None:
    folder = RunFolder("mock:///runs", "far")
    assert not folder.is_local
    folder.write_json("summary.json", {"state": "running"})
    folder.write_json("summary.json", {"state": "finished"})
    assert json.loads(folder.read_bytes("summary.json")) == {"state": "finished"}
    assert folder.exists("summary.json")
    assert not folder.exists("summary.json.partial")
    folder.delete("summary.json")
    assert not folder.exists("summary.json")


def test_a_folder_elsewhere_prints_as_a_uri_that_finds_it_again(remote: RunFolder) -> None:
    assert not remote.is_local
    assert str(remote) == "s3://bucket/runs/far"
    assert remote.file("logs") == "bucket/runs/far/logs"


def test_live_files_are_sent_and_their_copy_removed(remote: RunFolder, tmp_path: Path) -> None:
    with closing(LiveFiles(remote)) as files:
        copy = files.path
        with files.extend("logs/rank-0.log") as log:
            log.write(b"one\n")
            log.flush()
            files.sync()
            assert remote.read_bytes("logs/rank-0.log").decode() == "one\n"
            log.write(b"two\n")
    assert (tmp_path / "bucket/runs/far/logs/rank-0.log").read_text(encoding="utf-8") == "one\ntwo\n"
    assert not copy.exists()


def test_the_next_attempt_extends_what_was_sent(remote: RunFolder) -> None:
    remote.write_text("metrics.jsonl", '{"step": 1}\n')
    with closing(LiveFiles(remote)) as files, files.extend("metrics.jsonl") as metrics:
        metrics.write(b'{"step": 2}\n')
    assert remote.read_bytes("metrics.jsonl").decode() == '{"step": 1}\n{"step": 2}\n'


def test_a_worker_never_sends_a_file_that_another_writes(remote: RunFolder) -> None:
    remote.write_text("metrics.jsonl", "of the attempt before\n")
    with closing(LiveFiles(remote)) as of_rank_1, closing(LiveFiles(remote)) as of_rank_0:
        with of_rank_0.extend("metrics.jsonl") as metrics:
            metrics.write(b"newest\n")
        of_rank_0.sync()
        (of_rank_1.path / "rank-1.log").write_text("", encoding="utf-8")
        of_rank_1.sync()
        assert remote.read_bytes("metrics.jsonl").decode() == "of the attempt before\nnewest\n"


def test_live_files_are_sent_when_the_run_fails(remote: RunFolder) -> None:
    with pytest.raises(ZeroDivisionError), closing(LiveFiles(remote)) as files:  # noqa: PT012
        (files.path / "rank-0.log").write_text("why\n", encoding="utf-8")
        raise ZeroDivisionError
    assert remote.read_bytes("rank-0.log").decode() == "why\n"
