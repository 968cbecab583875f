"""The key and secret of an address are in no error, no record and nothing that is printed."""

import json
import os
import pickle
import subprocess
import sys
import time
from pathlib import Path

import pytest
from pyarrow import fs

from raytorch import errors
from raytorch.runs.storage import RunFolder, join
from raytorch.system.safe_text import escaped, escaped_line, without_secrets

SECRETS = {
    "s3://AKIAKEY:SECRETWORD@bucket/runs": "s3://***@bucket/runs",
    "s3://AKIAKEY:SEC/RETWORD+x=@bucket/runs?region=eu": "s3://***@bucket/runs?region=eu",
    "s3://AKIAKEY:7/SECRETWORD@bucket/runs": "s3://***@bucket/runs",  # buckets have no ports
    "S3://AKIAKEY:7?SECRETWORD@bucket": "S3://***@bucket",
    "gs://key:443#SECRETWORD@bucket": "gs://***@bucket",
    "abfss://key:0/SECRETWORD@account/x": "abfss://***@account/x",
    "s3://AKIAKEY@bucket/runs": "s3://***@bucket/runs",
    "gs://bucket/runs?access_token=SECRETWORD&retry_limit_seconds=5": (
        "gs://bucket/runs?access_token=***&retry_limit_seconds=5"
    ),
    "abfs://bucket@account/x?account_key=SECRETWORD": "abfs://***@account/x?account_key=***",
    "http://me:SECRETWORD@proxy:3128": "http://***@proxy:3128",
}
PLAIN = [
    *("s3://bucket/me@home/runs", "http://127.0.0.1:8265/#/jobs/a@b", "http://[::1]:8265", "s3://bucket/a:b/c"),
    *("mail me@home: key=value", "/data/me:x@home/runs", "hdfs://host:9000/me@home"),
    *("s3://bucket/runs?endpoint_override=localhost:9000", "ray://head:10001/a@b", "http://s3:9000/a@b"),
]


@pytest.mark.parametrize("address", SECRETS)
@pytest.mark.parametrize("frame", ["{}", "cannot read '{}': no such bucket", '{{"path": "{}", "x": "a@b"}}', "{}\n{}"])
def test_secrets_are_replaced_wherever_the_address_stands(address: str, frame: str) -> None:
    text = frame.format(address, address)
    expected = frame.format(SECRETS[address], SECRETS[address])
    assert without_secrets(text) == escaped(text) == expected
    assert without_secrets(expected) == expected
    assert "SECRETWORD" not in escaped_line(text)


@pytest.mark.parametrize("text", PLAIN)
def test_other_text_stays_as_it_is(text: str) -> None:
    assert without_secrets(text) == text


LONG = 10**6
MADE_TO_LAST = {
    "addresses without an @": "a://b:" * LONG,
    "addresses behind an @": "a://k:s@" + "a://b:" * LONG,
    "addresses before an @": "a://b:1/" * LONG + "@",
    "buckets before an @": "s3://b:1/" * LONG + "@",
    "schemes": "://" + "a." * LONG,
    "options": "a://?" + "key" * LONG,
    "questions": "a://" + "?key" * LONG,
}


@pytest.mark.parametrize("text", MADE_TO_LAST.values(), ids=MADE_TO_LAST)
def test_text_that_is_made_to_take_long_is_read_once(text: str) -> None:
    began = time.process_time()
    escaped(text)
    assert time.process_time() - began < 60  # hours, where each part is compared with all behind it


ERRORS = [
    found for found in vars(errors).values() if isinstance(found, type) and issubclass(found, errors.RaytorchError)
]


@pytest.mark.parametrize("kind", ERRORS, ids=lambda kind: kind.__name__)
def test_no_error_of_raytorchs_tells_a_secret(kind: type[errors.RaytorchError]) -> None:
    error = kind("s3://AKIAKEY:SECRETWORD@bucket cannot be used")
    for told in (error, pickle.loads(pickle.dumps(error))):
        assert str(told) == "s3://***@bucket cannot be used"
        assert "SECRETWORD" not in repr(told)


def test_a_storage_that_cannot_be_opened_is_told_without_its_secret() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "raytorch", "runs", "--storage", "s3://AKIAKEY:SECRET/WORD@bucket"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "WORD" not in done.stdout + done.stderr
    assert "'s3://***@bucket' cannot be opened" in done.stderr


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunFolder:
    """A run's folder in an object store, whose address has a secret in it."""
    store = fs.SubTreeFileSystem(str(tmp_path), fs.LocalFileSystem())
    monkeypatch.setattr("raytorch.runs.storage.open_storage", lambda storage: (store, "bucket/runs"))
    return RunFolder("s3://AKIAKEY:SECRETWORD@bucket/runs", "one")


def test_a_runs_folder_is_named_without_its_secret_and_still_found(folder: RunFolder) -> None:
    assert str(folder) == "s3://***@bucket/runs/one"
    assert folder.address == join(folder.storage, "one") == "s3://AKIAKEY:SECRETWORD@bucket/runs/one"


def test_records_hold_no_secret(folder: RunFolder, tmp_path: Path) -> None:
    (tmp_path / "bucket" / "runs" / "one").mkdir(parents=True)
    folder.write_text("config.yaml", f"storage: {folder.storage}\nname: one\n")
    folder.write_json("summary.json", {"path": folder.address, "message": f"{folder.address}: access denied"})
    written = "".join(file.read_text(encoding="utf-8") for file in tmp_path.rglob("*") if file.is_file())
    assert "SECRETWORD" not in written
    assert json.loads(folder.read_bytes("summary.json"))["message"] == "s3://***@bucket/runs/one: access denied"


# -- telemetry ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chosen", [None, "0", "1"])
def test_onnxruntime_reports_to_nobody_unless_the_user_says_so(chosen: str | None) -> None:
    """What it reads is set when it is imported, not merely afterwards."""
    code = (
        "import os, sys\n"
        "class Watching:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'onnxruntime':\n"
        "            print(os.environ.get('ORT_DISABLE_TELEMETRY'), flush=True)\n"
        "            os._exit(0)\n"
        "sys.meta_path.insert(0, Watching())\n"
        "import raytorch.onnx"
    )
    environment = {name: value for name, value in os.environ.items() if name != "ORT_DISABLE_TELEMETRY"}
    environment |= {"ORT_DISABLE_TELEMETRY": chosen} if chosen else {}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [chosen or "1"]


def test_onnxruntime_is_imported_in_one_place() -> None:
    package = Path(errors.__file__).parent
    found = [
        file.name
        for file in package.rglob("*.py")
        if any(
            line.strip().startswith(("import onnxruntime", "from onnxruntime"))
            for line in file.read_text(encoding="utf-8").splitlines()
        )
    ]
    assert found == ["onnx.py"]
