"""The command line as a person meets it: its exit status, and what it prints."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from command_line import raytorch
from data_files import write_mnist

from raytorch.config.json_schema import schema

COMMAND = str(Path(sys.executable).parent / "raytorch")
CONFIGS = Path(__file__).resolve().parents[2] / "configs"
SHIPPED = [*sorted(CONFIGS.glob("*.yaml")), *sorted(CONFIGS.glob("sweeps/*.yaml"))]


def process(folder: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run the command in a process of its own."""
    return subprocess.run(
        [COMMAND, *map(str, arguments)], cwd=folder, capture_output=True, text=True, check=False, timeout=120
    )


def refused(folder: Path, *arguments: object, run: Any = raytorch) -> str:
    """The one message with which a command refuses its input, having written nothing."""
    there = sorted(folder.rglob("*"))
    result = run(folder, *arguments)
    assert result.returncode == 2, result
    assert result.stdout == ""
    assert result.stderr.endswith("\n")
    assert "Traceback" not in result.stderr
    assert sorted(folder.rglob("*")) == there
    return str(result.stderr).removesuffix("\n")


@pytest.fixture
def write(tmp_path: Path) -> Any:
    """Writes a configuration of the keys given, and returns its name."""

    def write(**keys: Any) -> str:
        (tmp_path / "run.yaml").write_text(yaml.safe_dump({"epochs": 1, **keys}), encoding="utf-8")
        return "run.yaml"

    return write


# -- bad input ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["train", "validate"])
@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("optimiser: adam", "run.yaml:2: optimiser: "),
        ("batch_size: many", "run.yaml:2: batch_size: "),
        ("model: {name: transformer}", "run.yaml:2: model.name: "),
        ("steps: 5", "run.yaml:1: epochs: give either epochs or steps, not both"),
    ],
    ids=["typo", "type", "model", "conflict"],
)
def test_a_bad_configuration_is_refused(tmp_path: Path, command: str, line: str, message: str) -> None:
    (tmp_path / "run.yaml").write_text(f"epochs: 1\n{line}\n", encoding="utf-8")
    told = refused(tmp_path, command, "run.yaml")
    assert told.startswith(message)
    assert "\n" not in told


def test_a_typo_is_answered_with_the_nearest_name(write: Any, tmp_path: Path) -> None:
    assert "optimizer" in refused(tmp_path, "train", write(optimiser="adam"), run=process)


def test_a_missing_configuration_is_refused(tmp_path: Path) -> None:
    assert refused(tmp_path, "train", "none.yaml") == "none.yaml: no such file"
    assert refused(tmp_path, "train") == "give a configuration file, e.g. configs/quickstart.yaml, or --resume RUN"


@pytest.mark.parametrize("name", ["mnist", "cifar10"])
def test_a_missing_data_folder_is_refused(write: Any, tmp_path: Path, name: str) -> None:
    told = refused(tmp_path, "train", write(data={"name": name, "root": "nowhere"}, model="mlp"))
    assert told.startswith(f"{tmp_path}/nowhere")
    assert "download" in told  # how to get it
    assert "\n" not in told


def test_an_idx_file_that_was_cut_short_is_refused(write: Any, tmp_path: Path, mnist_root: Path) -> None:
    raw = tmp_path / "data" / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for file in (mnist_root / "MNIST" / "raw").iterdir():
        (raw / file.name).symlink_to(file)
    cut = raw / "train-images-idx3-ubyte"
    cut.unlink()
    shutil.copy(mnist_root / "MNIST" / "raw" / cut.name, cut)
    os.truncate(cut, 1_000_000)
    told = refused(tmp_path, "train", write(data={"name": "mnist", "root": "data"}))
    assert told.startswith(f"{cut}: expected ")
    assert "47040016" in told.replace(",", "").replace("_", "")
    assert "\n" not in told


def test_data_is_checked(tmp_path: Path) -> None:
    root = write_mnist(tmp_path / "a folder", ".gz")
    result = raytorch(tmp_path, "data", "check", "mnist", "--root", root)
    assert (result.returncode, result.stdout, result.stderr) == (0, f"mnist in {root}: 7 + 3 images\n", "")
    assert refused(tmp_path, "data", "check", "cifar10", "--root", root) == (
        f"{root}/cifar-10-batches-bin/data_batch_1.bin: expected a batch of CIFAR-10 (binary or python layout), found "
        "no readable file; put the data set's files there, or set data.download=true (raytorch data prepare cifar10 "
        "--root 'a folder')"
    )
    path = root / "MNIST" / "raw" / "t10k-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:-1])
    for command in ("check", "prepare"):
        assert refused(tmp_path, "data", command, "mnist", "--root", root) == (
            f"{path}: expected an IDX file of images, found one that cannot be read (EOFError: Compressed file ended "
            "before the end-of-stream marker was reached); put an intact copy there, or delete it and download it "
            "anew: data.download=true"
        )


def test_a_name_that_is_no_folder_is_refused(write: Any, tmp_path: Path) -> None:
    assert refused(tmp_path, "train", write(), "--name", "a/b") == (
        "name 'a/b': must be 1 to 128 letters, digits, '.', '_' or '-', of which the first is a letter or digit"
    )


def test_a_run_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    told = "no run nothing in runs; give a run that is there (raytorch runs --storage runs)"
    assert refused(tmp_path, "train", "--resume", "nothing") == told
    assert refused(tmp_path, "report", "nothing") == told


def test_a_sweep_that_cannot_start_is_refused(tmp_path: Path) -> None:
    assert refused(tmp_path, "sweep") == "give a sweep's file, e.g. configs/sweeps/digits.yaml, or --resume SWEEP"
    assert refused(tmp_path, "sweep", "--resume", "nothing") == "no sweep nothing in runs: it has no sweep.yaml"
    (tmp_path / "sweep.yaml").write_text(
        "run: {epochs: 1}\nparameters:\n  optimizer.lr: {uniform: [-1, 1]}\n", encoding="utf-8"
    )
    for command in ("sweep", "validate"):
        told = refused(tmp_path, command, "sweep.yaml")
        assert told == "sweep.yaml:3: optimizer.lr: must be a number above 0, not -1.0"


def test_a_storage_of_an_unknown_kind_is_refused(write: Any, tmp_path: Path) -> None:
    told = refused(tmp_path, "train", write(storage="bogus://bucket"))
    assert told.startswith("storage 'bogus://bucket' cannot be opened: Unrecognized filesystem type")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trian"], "No such command 'trian'"),
        (["train", "--wokers", "2"], "No such option: --wokers"),
        (["train", "run.yaml", "--workers", "0"], "Invalid value for '--workers': "),
        (["train", "--resume", ""], "give a configuration file, e.g. configs/quickstart.yaml, or --resume RUN"),
        (["train", "--resume", "a", "--name", "b"], "--name does not go with --resume: a resumed run keeps its name"),
        (
            ["train", "--resume", "a", "--workers", "2"],
            "no run a in runs; ",
        ),
        (
            ["sweep", "--resume", "a", "--name", "b"],
            "--resume goes on with a sweep as it was planned; give no file, --set or --name beside it",
        ),
        (["report"], "Missing argument "),
    ],
)
def test_a_mistake_on_the_command_line_is_refused(tmp_path: Path, arguments: list[str], message: str) -> None:
    assert refused(tmp_path, *arguments).startswith(message)


# -- what needs no run -------------------------------------------------------------------------------------------------


def test_every_shipped_configuration_is_valid(tmp_path: Path) -> None:
    result = raytorch(tmp_path, "validate", *SHIPPED)
    assert (result.returncode, result.stdout, result.stderr) == (0, f"{len(SHIPPED)} valid\n", "")
    assert len(SHIPPED) >= 6


def test_validating_imports_neither_torch_nor_ray() -> None:
    code = (
        "import sys\nfrom raytorch.cli.main import main\n"
        "try: main()\nfinally: print(*sorted({'torch', 'ray', 'numpy', 'pyarrow'} & sys.modules.keys()), sep=',')"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, "validate", str(SHIPPED[0])], capture_output=True, text=True, check=True
    )
    assert result.stdout == "1 valid\n\n"


def test_the_schema_is_json(tmp_path: Path) -> None:
    result = raytorch(tmp_path, "schema")
    assert (result.returncode, result.stderr) == (0, "")
    assert json.loads(result.stdout) == schema()


def test_help_is_the_answer_to_nothing(tmp_path: Path) -> None:
    asked, nothing = raytorch(tmp_path, "--help"), raytorch(tmp_path)
    assert (asked.returncode, asked.stderr) == (0, "")
    assert (nothing.returncode, nothing.stdout) == (2, "")
    assert nothing.stderr.strip() == asked.stdout.strip()
    assert all(command in asked.stdout for command in ("train", "validate", "schema", "runs", "report"))


@pytest.fixture
def one_run(tmp_path: Path) -> dict[str, Any]:
    """The records of a run that has ended, below ``runs``."""
    folder = tmp_path / "runs" / "mine"
    folder.mkdir(parents=True)
    summary = {
        "name": "mine",
        "path": str(folder),
        "state": "finished",
        "started": "2026-01-02T03:04:05+00:00",
        "metrics": {"accuracy": 0.98765, "loss": 0.05},
        "epochs": 3.0,
        "samples_per_s": 12345.6,
        "seconds": {"total": 12.34},
    }
    (folder / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
    (folder / "config.yaml").write_text("epochs: 3\n", encoding="utf-8")
    lines = [{"step": n, "epoch": n / 5, "split": "train", "loss": 1 / n, "lr": 0.1} for n in range(1, 11)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return summary


@pytest.mark.usefixtures("one_run")
def test_runs_are_listed(tmp_path: Path) -> None:
    result = raytorch(tmp_path, "runs")
    assert (result.returncode, result.stderr) == (0, "")
    head, line = (text.split() for text in result.stdout.splitlines())
    assert dict(zip(head, line, strict=True)) == {
        "run": "mine",
        "state": "finished",
        "accuracy": "0.9877",
        "loss": "0.0500",
        "epochs": "3",
        "samples/s": "12,346",
        "seconds": "12.3",
    }
    assert raytorch(tmp_path, "runs", "--storage", "empty").stdout == "no runs in empty: there is no such folder\n"


def test_runs_are_listed_as_json(tmp_path: Path, one_run: dict[str, Any]) -> None:
    result = raytorch(tmp_path, "runs", "--json")
    assert (result.returncode, json.loads(result.stdout), result.stderr) == (0, [one_run], "")
    assert json.loads(raytorch(tmp_path, "runs", "--json", "--storage", "empty").stdout) == []


@pytest.mark.usefixtures("one_run")
def test_a_report_is_a_picture(tmp_path: Path) -> None:
    result = raytorch(tmp_path, "report", "mine")
    assert (result.returncode, result.stdout, result.stderr) == (0, f"{tmp_path}/runs/mine/report.png\n", "")
    assert (tmp_path / "runs/mine/report.png").read_bytes().startswith(b"\x89PNG")
    assert raytorch(tmp_path, "report", "runs/mine", "--out", "a/b.svg").returncode == 0
    assert "<svg" in (tmp_path / "a" / "b.svg").read_text(encoding="utf-8")
    assert refused(tmp_path, "report", "mine", "--out", "mine.xyz").startswith("mine.xyz cannot be written: Format ")
