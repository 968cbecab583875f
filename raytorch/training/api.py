"""Training from Python: ``raytorch.train`` and what goes with it. Imports neither torch nor ray at its top."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from raytorch.config import CodeSnapshot, RunConfig
from raytorch.config.export_formats import ExportFormat
from raytorch.config.file import from_data, one_line, with_own_code
from raytorch.config.file import load_config as load_file
from raytorch.config.in_python import require_guard
from raytorch.config.live_code import remembered
from raytorch.config.own_calls import refuse_while_importing
from raytorch.config.own_code import Code
from raytorch.errors import ConfigError, RaytorchError, StorageError, UserError, is_storage_fault
from raytorch.runs import catalog
from raytorch.runs.plan import RunPlan, plan_resume, plan_run, recorded_config
from raytorch.runs.storage import RunFolder, split
from raytorch.training.driver import run_training
from raytorch.training.history import History
from raytorch.training.stopping import StatusCallback

Config = str | Path | Mapping[str, Any] | RunConfig
"""A run's configuration: a YAML file, its content, or one that is checked already.

In its content a class or function stands for the reference to it: ``Net``, or with arguments
``{"name": Net, "width": 8}`` or ``partial(Net, width=8)``.
"""
Overrides = Mapping[str, Any] | Sequence[str]
"""Changes to a configuration: ``{"optimizer.lr": 0.01}``, or ``["optimizer.lr=0.01"]`` as ``--set`` takes them."""


@dataclass(frozen=True)
class Result:
    """The outcome of a run.

    Attributes:
        name: The run's name.
        path: Its folder, or the folder's address.
        state: ``finished``, ``stopped``, and of a listed run also ``running``, ``failed`` and ``lost``.
        metrics: Its last evaluation by name, ``loss`` among them; empty if there was none.
        summary: The content of its ``summary.json``.
    """

    name: str
    path: str
    state: str
    metrics: dict[str, float]
    summary: dict[str, Any] = field(repr=False)
    address: str = field(default="", repr=False, compare=False)
    """Where :meth:`model` and the others read: ``path`` with the secrets of its storage's address, if it has some."""
    code: CodeSnapshot | None = field(default=None, repr=False, compare=False)
    """The user's own code that a run of this process was trained by."""

    @property
    def test_metrics(self) -> dict[str, float]:
        """What the model that :meth:`model` loads has come to on the test split, when the run had finished.

        Without ``validation``, and of a loop of your own that does not call ``run.tested``, these are the
        :attr:`metrics`.
        """
        if tested := self.summary.get("test_metrics"):
            return dict(tested)
        return self.metrics if self.summary.get("split", "test") == "test" else {}

    def model(self, name: str | None = None, *, code: Code = None) -> Any:
        """Load the model of the run's latest checkpoint, on the CPU and in evaluation mode, as an ``nn.Module``.

        Args:
            name: Which model, of a loop that has several; see :meth:`raytorch.Run.model`.
            code: Of a model of your own the class, or the file or folder that has its code; by default that of the run,
                of one of another process the current folder.

        Raises:
            RunNotFoundError: The run has no complete checkpoint.
            ModelFileError: The checkpoint's weights are damaged, or of other code.
        """
        from raytorch.training.export import load_run

        with _own_errors():
            return load_run(self._folder, code or self.code or Path(), name)[0].eval()

    def export(
        self,
        kind: ExportFormat,
        path: str | Path,
        *,
        verify: bool = True,
        code: Code = None,
        model: str | None = None,
    ) -> list[Any]:
        """Export the model of the run's latest checkpoint; see :func:`raytorch.training.export.export_model`.

        Args:
            kind: ``onnx``, ``torchscript``, ``pt2``, ``safetensors`` or, of ``gpt``, ``hf``.
            path: The file to write, for ``hf`` a folder.
            verify: Whether the file is read again, and what it computes compared with the model.
            code: As for :meth:`model`.
            model: Which model, of a loop that has several.

        Returns:
            How far each output is off, as a :class:`~raytorch.serialization.comparison.Difference`.

        Raises:
            RunNotFoundError: The run has no complete checkpoint.
            ExportError: The model cannot be exported so, or the file computes something else.
            UserError: There is no such format.
        """
        from raytorch.training.export import SUFFIXES, export_run

        if kind not in SUFFIXES:
            raise UserError(f"a format is one of {', '.join(SUFFIXES)}, not {kind!r}")
        with _own_errors():
            place = Path(path)
            return export_run(self._folder, kind, place, verify=verify, code=code or self.code or Path(), model=model)

    def history(self) -> History:
        """Read the lines of the run's ``metrics.jsonl``, oldest first: ``step``, ``epoch``, ``split``, ``loss``, ...

        They are a list of dictionaries that a notebook shows as a table, and ``history().to_pandas()`` a DataFrame.
        """
        with _own_errors():
            return History(catalog.read_history(self._folder))

    @property
    def _folder(self) -> RunFolder:
        return RunFolder(*split(self.address or self.path))


def train(
    config: Config | None = None,
    *,
    set: Overrides = (),  # noqa: A002 - what --set is on the command line
    workers: int | None = None,
    name: str | None = None,
    storage: str | Path | None = None,
    address: str | None = None,
    watch: StatusCallback = lambda status: None,
    **keys: Any,
) -> Result:
    """Train the model that a configuration describes, to the end.

    Args:
        config: A YAML file, a dictionary of the same keys, or a :class:`~raytorch.config.RunConfig`; or its keys, as
            keyword arguments.
        set: Changes to it, by dotted keys: ``{"optimizer.lr": 0.01}`` or ``["optimizer.lr=0.01"]``.
        workers: Workers, in place of ``scaling.workers``.
        name: Name of the run and its folder; by default the configuration's name and the time.
        storage: Folder or URI that holds the runs, in place of the configuration's.
        address: A running Ray cluster; by default RAY_ADDRESS, else a Ray that is started here for this run. A Ray that
            this process has joined is used as it is.
        watch: Called several times a second with the run's :class:`~raytorch.runs.status.RunStatus`; the answer
            True ends the run after a last checkpoint.
        keys: The keys of a configuration, in place of ``config``. Models, data sets, losses and metrics may be classes
            and functions of yours, also of a notebook: ``model=Net``, or with arguments
            ``model={"name": Net, "width": 8}`` or ``model=partial(Net, width=8)``.

    Returns:
        The run's result. After a first Ctrl-C, or an interrupt in a notebook, its state is ``stopped``; the second is
        raised as KeyboardInterrupt.

    Raises:
        UserError: The input has to change: a :class:`~raytorch.errors.ConfigError`, say. Nothing was started.
        TrainingError: A worker raised or died; ``summary.json`` holds the details.
        RaytorchError: Any other failure; every error that is raised is one.

    Example:
        >>> result = raytorch.train(epochs=3, data="digits", model=Net, workers=2)
        >>> result.metrics["accuracy"], result.path
    """
    with _own_errors():
        refuse_while_importing("raytorch.train")
        read = load(config, _changes(set, workers, storage), **keys)
        return _run("raytorch.train", plan_run(read, name), address, watch)


def resume(
    run: str | Path | Result,
    config: Config | None = None,
    *,
    set: Overrides = (),  # noqa: A002 - what --set is on the command line
    workers: int | None = None,
    storage: str | Path | None = None,
    changed_code: bool = False,
    address: str | None = None,
    watch: StatusCallback = lambda status: None,
) -> Result:
    """Continue a run from its latest complete checkpoint; one that has nothing left to do is returned as it is.

    Args:
        run: The run's name or path, or its result.
        config: A changed configuration; by default the run's own.
        set: Changes to the configuration, such as ``{"epochs": 10}``.
        workers: Workers, in place of ``scaling.workers``.
        storage: Where to look for a run that is given by its name; by default the configuration's, else ``runs``.
        changed_code: Whether it may go on with code of your own that has changed since its latest checkpoint.
        address: As for :func:`train`.
        watch: As for :func:`train`.

    Raises:
        RunNotFoundError: There is no such run.
        RaytorchError: As for :func:`train`.

    Example:
        >>> raytorch.resume("runs/digits-20261122-093625", set={"epochs": 10})
    """
    with _own_errors():
        refuse_while_importing("raytorch.resume")
        place = _place(run)
        changes = _changes(set, workers, storage)
        changed = None if config is None else load(config, changes)
        code = run.code if isinstance(run, Result) else None
        if config is None and (changes or code):
            recorded = recorded_config(catalog.find_run(place, str(storage or "runs")))
            changed = with_own_code(recorded, changes, code)
        plan = plan_resume(place, changed, storage=str(storage or "runs"), changed_code=changed_code)
        return _run("raytorch.resume", plan, address, watch)


def load(
    config: Config | None = None,
    set: Overrides = (),  # noqa: A002 - what --set is on the command line
    **keys: Any,
) -> RunConfig:
    """Read and check a run's configuration.

    Args:
        config: A YAML file, a dictionary of the same keys, or a :class:`~raytorch.config.RunConfig`.
        set: Changes to it, as for :func:`train`.
        keys: The keys of a configuration, in place of ``config``, as for :func:`train`.

    Raises:
        ConfigError: It is invalid; the message has a line for each problem.

    Example:
        >>> raytorch.load("configs/quickstart.yaml", {"epochs": 1})
    """
    changes = _as_texts(set)
    if config is None and keys:
        return from_data(keys, changes)
    if keys:
        raise ConfigError(
            f'{", ".join(keys)}: beside a configuration, give what changes in it as set, such as set={{"epochs": 3}}'
        )
    if isinstance(config, RunConfig):
        config = config if config.code else with_own_code(config)
        project = remembered(config.code) if config.code else None
        return from_data(config.model_dump(mode="json"), changes, project.root if project else None, project)
    if not isinstance(config, str | Path | Mapping):
        raise ConfigError(
            f"a configuration is a YAML file, a dictionary or a RunConfig, not {config!r}; or give its keys, such as "
            "epochs=3"
        )
    return from_data(config, changes) if isinstance(config, Mapping) else load_file(config, changes)


def list_runs(storage: str | Path = "runs") -> list[Result]:
    """The runs in a storage, oldest first; the state of one whose driver is gone is ``lost``.

    Args:
        storage: Folder or URI that holds the runs.

    Raises:
        UserError: It cannot be opened, or nothing answers there.

    Example:
        >>> best = max(raytorch.list_runs(), key=lambda run: run.metrics.get("accuracy", 0))
    """
    with _own_errors():
        found = catalog.list_runs(str(storage))
        return [_result(summary, RunFolder(str(storage), summary["name"])) for summary in found]


def find_run(run: str | Path | Result, storage: str | Path = "runs") -> Result:
    """The run of a name or a path.

    Args:
        run: The run's name in the storage, its path, or an earlier result of it, which is read anew.
        storage: Folder or URI that holds the runs.

    Raises:
        RunNotFoundError: There is no such run.

    Example:
        >>> raytorch.find_run("digits-20261122-093625").model()
    """
    with _own_errors():
        folder = catalog.find_run(_place(run), str(storage))
        return _result(catalog.read_summary(folder), folder)


def _run(call: str, plan: RunPlan, address: str | None, watch: StatusCallback) -> Result:
    if plan.config.code and plan.finished is None:
        require_guard(plan.config.code.sources, Path(plan.config.code.root), call)
    return _result(run_training(plan, address=address, watch=watch), plan.folder, plan.config.code)


def _result(summary: dict[str, Any], folder: RunFolder, code: CodeSnapshot | None = None) -> Result:
    metrics = summary.get("metrics", {})
    return Result(summary["name"], summary["path"], summary["state"], metrics, summary, folder.address, code)


def _place(run: str | Path | Result) -> str:
    if not isinstance(run, str | Path | Result):
        raise UserError(f"a run is given by its name, its path or its result, not by {run!r}")
    return (run.address or run.path) if isinstance(run, Result) else str(run)


def _changes(overrides: Overrides, workers: int | None, storage: str | Path | None) -> list[str]:
    named = {"scaling.workers": workers, "storage": None if storage is None else str(storage)}
    return [*_as_texts(overrides), *_as_texts({key: value for key, value in named.items() if value is not None})]


def _as_texts(overrides: Overrides) -> list[str]:
    if isinstance(overrides, Mapping):
        return [f"{key}={one_line(value, key)}" for key, value in overrides.items()]
    if isinstance(overrides, str) or not (
        isinstance(overrides, Sequence) and all(isinstance(override, str) for override in overrides)
    ):
        raise UserError(f'set: must be {{"epochs": 3}} or ["epochs=3"], say, not {overrides!r}')
    return list(overrides)


_REMEDIES = {
    "resume": "raytorch.resume({!r})",
    "list_runs": "raytorch.list_runs({!r})",
    "changed_code": "raytorch.resume(..., changed_code=True)",
    "code": "code=Net, its class, or the file or folder that has it",
    "name": "name=...",
    "out": "another path",
}


@contextmanager
def _own_errors() -> Iterator[None]:
    """Raise what a disk or a permission refuses as raytorch's own, and add to an error what may be given in Python."""
    try:
        yield
    except RaytorchError as error:
        remedies = [_REMEDIES[each.name].format(each.value) for each in error.remedies if each.name in _REMEDIES]
        if remedies and not hasattr(error, "__notes__"):
            error.add_note(f"try: {' or '.join(remedies)}")
        raise
    except OSError as error:
        if isinstance(error, PermissionError) or is_storage_fault(error):
            raise StorageError(f"{error}; make room or mend the access to it") from None
        raise
