"""What users may rely on: a change here is a change for them, and belongs into the release notes."""

import pickle
from collections.abc import Iterator
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

import pytest
import typer.main

import raytorch
from raytorch import errors
from raytorch.cli.main import app

COMMANDS = {
    "train": [
        "config",
        "--set",
        "--workers",
        "--name",
        "--resume",
        "--storage",
        "--changed-code",
        "--address",
        "--json",
    ],
    "validate": ["files", "--set"],
    "plan": ["config", "--set", "--workers", "--gpu-memory", "--fact", "--json"],
    "schema": [],
    "scale": ["config", "--workers", "--mode", "--set", "--steps", "--warmup", "--out", "--address", "--json"],
    "sweep": ["file", "--set", "--name", "--resume", "--storage", "--address", "--json"],
    "runs": ["--storage", "--json"],
    "report": ["run", "--storage", "--out"],
    "export": ["run", "--format", "--out", "--verify", "--code", "--model", "--storage"],
    "generate": [
        "run",
        "--prompt",
        "--tokens",
        "--samples",
        "--temperature",
        "--top-k",
        "--seed",
        "--tokenizer",
        "--code",
        "--storage",
        "--json",
    ],
    "submit": [
        "target",
        "arguments",
        "--set",
        "--workers",
        "--name",
        "--resume",
        "--changed-code",
        "--env",
        "--storage",
        "--entrypoint-cpus",
        "--entrypoint-gpus",
        "--entrypoint-memory",
        "--wait",
        "--address",
        "--json",
    ],
    "jobs": ["--address", "--json"],
    "status": ["job_id", "--address", "--json"],
    "logs": ["job_id", "-f", "--rank", "--address", "--json"],
    "stop": ["job_id", "--address", "--json"],
    "result": ["job_id", "--address", "--json"],
    "data prepare": ["name", "--root"],
    "data check": ["what", "--root", "--set", "--all"],
    "data index": ["shards"],
    "data tokenize": [
        "files",
        "--out",
        "--tokenizer",
        "--validation",
        "--test",
        "--seed",
        "--document-per",
        "--key",
        "--end-token",
    ],
    "data show": ["config", "--set", "--split", "--samples", "--out"],
}

EXPORTS = {
    "raytorch": """
        CheckpointError ClusterError ConfigError DataError DivergedError ExportError HandleError JobError
        JobNotFoundError MissingPackageError ModelFileError PackageError QuotaError RaytorchError
        ReaderDiedError RecordError RemoteOpError ResourceError RunExistsError RunNotFoundError SessionError
        SessionLostError StorageError TrainingError UnknownFunctionError UntrustedFileError UserError
        Client Result Run RunConfig __version__ autograd connect distributed errors find_run layers list_runs load
        losses optimizers registry resume tensor_ops train
    """,
    "raytorch.cluster": "joined_ray",
    "raytorch.config": """
        Adadelta Adafactor Adagrad Adam AdamW Adamax ArraysData Asgd Asha AttentionModel Augment Averaging
        Checkpointing Cifar10Data CodeSnapshot ConflictError ConstantSchedule Conv3dModel ConvNetModel
        CosineSchedule Data DigitsData EarlyStopping Failure GptModel ImageAugment ImageData ImageFiles ImagesData
        Logging Loss Metric MlpModel MnistData MnistStripsData Model ModelKeys MovingMnistData Muon MuonOthers
        NAdam OneCycleSchedule Optimizer OwnData OwnEvaluation OwnLoss OwnMetric OwnModel OwnPart Parallel Parameter
        ParameterGroup PlateauSchedule RAdam Ranking ResNet18Model RmsProp RnnModel Rprop RunConfig RunName
        Scaling Schedule Section Seq2SeqModel Sgd ShardsData Source StepSchedule StoredData SweepConfig
        TableData TextData TokensData Validation VitModel Warmup WorkerRange data_root
    """,
    "raytorch.datasets": """
        END PAD Dataset MicroBatch TrainLoader check_dataset count evaluation_batches load_dataset load_split
        load_splits prepare
    """,
    "raytorch.distributed": """
        Worker all_gather all_reduce barrier broadcast broadcast_buffers data_parallel destroy_process_group device_name
        failure_cause gradient_sync init_process_group is_available leaving_process_group reduce_scatter
    """,
    "raytorch.layers": """
        LAYERS attention conv rnn transformer
        AdaptiveAvgPool1d AdaptiveAvgPool2d AdaptiveAvgPool3d AdaptiveMaxPool1d AdaptiveMaxPool2d
        AdaptiveMaxPool3d AvgPool1d AvgPool2d AvgPool3d BatchNorm1d BatchNorm2d BatchNorm3d Conv1d Conv2d
        Conv3d ConvTranspose1d ConvTranspose2d ConvTranspose3d MaxPool1d MaxPool2d MaxPool3d
        GRU LSTM MultiheadAttention PositionalEncoding RNN TransformerDecoderLayer TransformerEncoderLayer
    """,
    "raytorch.layers.attention": "MultiheadAttention PositionalEncoding",
    "raytorch.layers.conv": """
        AdaptiveAvgPool1d AdaptiveAvgPool2d AdaptiveAvgPool3d AdaptiveMaxPool1d AdaptiveMaxPool2d
        AdaptiveMaxPool3d AvgPool1d AvgPool2d AvgPool3d BatchNorm1d BatchNorm2d BatchNorm3d Conv1d Conv2d
        Conv3d ConvTranspose1d ConvTranspose2d ConvTranspose3d MaxPool1d MaxPool2d MaxPool3d
    """,
    "raytorch.layers.rnn": "GRU LSTM RNN",
    "raytorch.layers.transformer": "TransformerDecoderLayer TransformerEncoderLayer",
    "raytorch.serialization": """
        capture load_model load_program load_state load_tensors load_torchscript load_weights read_architecture
        save_model save_tensors script trace
    """,
    "raytorch.scaling": "plan_study results_table run_study write_picture",
    "raytorch.sweeps": "SweepDisplay SweepPlan load_sweep plan_resumed_sweep plan_sweep print_sweep run_sweep",
}

ERRORS = {
    "RaytorchError": "Exception",
    "UserError": "RaytorchError",
    "ClusterError": "UserError",
    "ConfigError": "UserError",
    "DataError": "UserError",
    "ResourceError": "UserError",
    "JobNotFoundError": "UserError",
    "PackageError": "UserError",
    "StorageError": "UserError",
    "RunExistsError": "UserError",
    "RunNotFoundError": "UserError",
    "RecordError": "UserError",
    "MissingPackageError": "UserError",
    "ModelFileError": "UserError",
    "UntrustedFileError": "ModelFileError",
    "CheckpointError": "RaytorchError",
    "DivergedError": "RaytorchError",
    "ReaderDiedError": "RaytorchError",
    "ExportError": "RaytorchError",
    "JobError": "RaytorchError",
    "TrainingError": "RaytorchError",
    "SessionError": "RaytorchError",
    "HandleError": "SessionError",
    "QuotaError": "SessionError",
    "RemoteOpError": "SessionError",
    "SessionLostError": "SessionError",
    "UnknownFunctionError": "SessionError",
}


def commands(group: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The commands of a group and of the groups in it."""
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, f"{prefix}{name} ")
        else:
            yield f"{prefix}{name}", command


def test_commands_and_their_options() -> None:
    group = typer.main.get_command(app)
    assert {name: [parameter.opts[0] for parameter in command.params] for name, command in commands(group)} == COMMANDS


def test_every_command_and_option_is_explained() -> None:
    for name, command in commands(typer.main.get_command(app)):
        assert command.help, name
        unexplained = [parameter.name for parameter in command.params if not getattr(parameter, "help", None)]
        assert not unexplained, f"{name}: {unexplained}"


def test_the_version_is_the_packages() -> None:
    assert raytorch.__version__ == metadata.version("raytorch")


def test_exported_names() -> None:
    package = Path(raytorch.__file__).parent
    named = [
        ".".join(("raytorch", *path.relative_to(package).with_suffix("").parts)).removesuffix(".__init__")
        for path in package.rglob("*.py")
        if "\n__all__ = " in path.read_text(encoding="utf-8")
    ]
    assert {name: set(import_module(name).__all__) for name in named} == {
        name: set(exports.split()) for name, exports in EXPORTS.items()
    }
    for name, exports in EXPORTS.items():
        assert all(hasattr(import_module(name), export) for export in exports.split())


def test_every_error_is_at_the_front_door() -> None:
    assert {name: getattr(raytorch, name) for name in ERRORS} == {name: getattr(errors, name) for name in ERRORS}
    assert {name for name in raytorch.__all__ if name.endswith("Error")} == set(ERRORS)


def test_the_tree_of_errors() -> None:
    tree = {
        name: error.__base__.__name__
        for name, error in vars(errors).items()
        if isinstance(error, type) and issubclass(error, Exception)
    }
    assert tree == ERRORS


@pytest.mark.parametrize("name", ERRORS)
def test_errors_survive_pickling(name: str) -> None:
    error = getattr(errors, name)("what to do")
    copy = pickle.loads(pickle.dumps(error))
    assert (type(copy), str(copy)) == (type(error), "what to do")


@pytest.mark.parametrize("package", ["raytorch.config", "raytorch.datasets", "raytorch.scaling", "raytorch.sweeps"])
def test_no_name_is_shadowed_by_the_file_that_it_comes_from(package: str) -> None:
    exported = import_module(package)
    assert exported.__file__
    assert not set(exported.__all__) & {path.stem for path in Path(exported.__file__).parent.glob("*.py")}
