"""The layers of the package: who may import whom, and what is loaded when."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import raytorch

PACKAGE = Path(raytorch.__file__).parent

# From the bottom up: a module imports only from rows above its own, whether at its top or inside a function.
# A package's own name stands for its ``__init__``, below the modules inside it, which it re-exports.
ROWS = [
    "causes deletion pictures processes text",
    "temporary",
    "errors",
    "local_folder remote_folder terminal",
    "model_files",
    "torch_files",
    "config.section",
    "config.data config.models config.optimization",
    "config.run",
    "config.sweep config.resuming",
    "config",
    "allocator yaml_tree storage metrics stopping",
    "config_file records",
    "runs sweep_file",
    # torch, no ray
    "datasets.download datasets.formats datasets.pixels",
    "datasets.archives datasets.files",
    "datasets.preparation",
    "datasets.sources",
    "datasets.loader",
    "datasets",
    "overrides",
    "autograd collectives tensor_ops",
    "layers.attention layers.conv layers.rnn layers.transformer losses optimizers precision",
    "layers models",
    "agreement",
    "serialization",
    "state_files",
    "onnx",
    "export",
    "tasks",
    "distributed",
    "checkpoint reproducibility registry session step_timer",
    "session.hooks session.pickling session.printed",
    "session.peers session.program session.transfer session.interrupts session.untold",
    "session.results session.allowed session.outline session.saved_files",
    "session.saved_values",
    "session.snapshot session.restoring",
    "session.primitives",
    "session.functions session.stream session.arguments",
    "session.interpreter session.interception",
    "session.recorder",
    "session.tensor",
    "session.objects",
    "session.client",
    # ray
    "access",
    "cluster monitor worker_group session.host",
    "ray_watch",
    "session.worker",
    "session.connection",
    "session.transport",
    "session.connect elastic failures",
    "record training",
    "timed_training",
    "trainer",
    # what a person uses
    "service",
    "service.projects",
    "service.packages service.secrets service.capacity service.tracebacks service.scaling service.http",
    "service.job",
    "service.connection service.script service.scaling_report service.board service.sweep_results service.trial",
    "service.logs",
    "service.client service.sweep service.sweep_display",
    "progress report cli",
    "cli.common",
    "cli.training cli.jobs cli.studies cli.records cli.data",
    "cli.main",
    "__main__",
]
ROW = {module: number for number, row in enumerate(ROWS) for module in row.split()}

TORCH = {"torch", "torchvision", "safetensors", "onnx", "onnxruntime"}
WITHOUT_TORCH = [
    *ROWS[: ROWS.index("runs sweep_file") + 1],
    "datasets.archives datasets.download datasets.files datasets.formats datasets.preparation",
    "access cluster monitor worker_group ray_watch elastic failures record trainer session.host session.connect",
    *ROWS[ROWS.index("service") :],
]


def modules() -> dict[str, Path]:
    """Every module of the package but its ``__init__``, by the name that ROWS gives it."""
    paths = [path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py"]
    return {".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"): path for path in paths}


def imported(path: Path) -> Iterator[tuple[str, bool]]:
    """Full names of what a module imports, and whether at its top, where importing the module loads it."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        at_top = node in tree.body
        if isinstance(node, ast.Import):
            yield from ((alias.name, at_top) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}:{node.lineno}: relative import"
            yield from ((f"{node.module}.{alias.name}", at_top) for alias in node.names)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.startswith("raytorch."):
            yield node.value, False  # as import_module("raytorch.worker_group") has it


def own_module(name: str) -> str | None:
    """The module of raytorch that ``name`` is, or is in."""
    parts = name.split(".")[1:] if name.startswith("raytorch.") else []
    while parts and ".".join(parts) not in ROW:
        parts.pop()
    return ".".join(parts) or None


def texts_of_the_locale(path: Path) -> Iterator[str]:
    """The calls that read or write text without naming its encoding, which then is the machine's."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
            continue
        name, given = node.func.attr, len(node.args)
        values = [part.value for part in node.args if isinstance(part, ast.Constant)]
        opened = name in ("open", "fdopen") and any(mode in values for mode in ("r", "w", "a", "x"))
        if "encoding" not in {keyword.arg for keyword in node.keywords} and (
            (name, given) in (("read_text", 0), ("write_text", 1)) or (opened and "zip" not in ast.unparse(node))
        ):
            yield f"{path}:{node.lineno}: {ast.unparse(node)}"


def test_text_is_utf_8_whatever_the_locale() -> None:
    assert [call for path in modules().values() for call in texts_of_the_locale(path)] == []


def test_every_module_has_a_row() -> None:
    assert sorted(modules()) == sorted(ROW)


def test_a_module_imports_only_from_rows_above_its_own() -> None:
    edges = {
        (module, target)
        for module, path in modules().items()
        for name, _ in imported(path)
        if (target := own_module(name)) and target != module
    }
    assert len(edges) > 40  # imports are found at all
    upwards = [
        f"{module} (row {ROW[module]}) imports {target} (row {ROW[target]})"
        for module, target in sorted(edges)
        if ROW[target] >= ROW[module]
    ]
    assert upwards == []


def test_what_runs_on_the_driver_imports_no_torch_at_its_top() -> None:
    light = {module for row in WITHOUT_TORCH for module in row.split()}
    paths = modules()
    found = [
        f"{module} imports {name}"
        for module in sorted(light)
        for name, at_top in imported(paths[module])
        if at_top and (name.split(".")[0] in TORCH or own_module(name) in set(ROW) - light - {"datasets"})
    ]
    assert found == []


def test_torch_code_below_the_line_knows_no_ray() -> None:
    line = ROW["tasks"]
    found = [
        f"{module} imports {name}"
        for module, path in modules().items()
        for name, _ in imported(path)
        if ROW[module] <= line and name.split(".")[0] == "ray"
    ]
    assert found == []


def loaded_by(statement: str) -> set[str]:
    """The top-level packages that a fresh Python has loaded after ``statement``."""
    code = f"{statement}\nimport sys\nprint(*{{name.partition('.')[0] for name in sys.modules}})"
    return set(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split())


def test_the_command_line_loads_nothing_heavy() -> None:
    packages = loaded_by("import raytorch.cli.main")
    assert "typer" in packages
    assert not packages & {"torch", "ray", "numpy", "matplotlib", "pyarrow", "pydantic", "torchvision", "sklearn"}


def test_the_driver_loads_no_torch() -> None:
    packages = loaded_by(
        "import raytorch.service.scaling, raytorch.worker_group, raytorch.monitor, raytorch.service.trial"
    )
    assert "ray" in packages
    assert not packages & {"torch", "torchvision", "safetensors", "matplotlib", "sklearn"}


def test_the_driver_alone_loads_no_ray() -> None:
    modules = "service.scaling, runs, report, service.sweep, service.sweep_display, service.client"
    imports = ", ".join(f"raytorch.{module}" for module in modules.split(", "))
    assert not loaded_by(f"import {imports}") & {"torch", "ray", "matplotlib"}
