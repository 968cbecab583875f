"""The rooms of the package: who may import whom, and what is loaded when.

``python tests/unit/test_architecture.py`` writes the rooms into docs/architecture.md anew.
"""

import ast
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import raytorch

PACKAGE = Path(raytorch.__file__).parent
PAGE = Path(__file__).parents[2] / "docs/architecture.md"

# From the bottom up: a room imports only from rooms above its own in this list, whether at its top or inside a
# function, and a file of a room only from rows of the room above its own. A room without rows is a file. The
# ``__init__`` of a room comes after its files, which it may export.
ROOMS = {
    "system": [
        "allocator background deletion environment importing lazy_exports near_names processes regular_files safe_text",
        "memory python_files strict_json temporary_folders terminal",
        "project_modules",
    ],
    "errors": [],
    # torch, no ray
    "tensor_ops": [],
    "autograd": [],
    "losses": [],
    "layers": [
        "attention conv rnn transformer",
    ],
    "config": [
        "annotations export_formats interactive_code run_name section yaml_tree",
        "project",
        "code_snapshot execution model_keys reading_keys session_sources signature",
        "live_code",
        "own_section",
        "own_parts",
        "metrics parallel sources",
        "image_files",
        "data optimization optimizers",
        "models",
        "run",
        "json_schema own_calls own_code resuming sweep",
        "in_python messages",
        "file",
    ],
    "optimizers": [],
    "runs": [
        "events local_folder remote_folder",
        "metrics storage",
        "records skipped_list status",
        "catalog checkpoint_manifest",
        "curves live_record weights_source",
        "plan",
    ],
    "sources": [
        "array_files batch_room blocks by_block last_used node_cache png_decoding retries shared_pixels "
        "tar_headers texts",
        "image_decoding shard_fields stores",
        "files tokenizer",
        "arrays documents image_changes range_file shard_index table_columns token_files",
        "image_pipeline tokenizing windows",
        "images shards text tokens",
        "table_formats",
        "csv_tables",
        "table_files",
        "table_statistics",
        "table_encoding table_text",
        "table",
    ],
    "datasets": [
        "augmentation carried_errors common_generators download file_errors memmap_pickling order sample_generators",
        "archives cifar10_files idx_files shared_values shares",
        "files segments",
        "reader_server",
        "readers",
        "preparation",
        "requests",
        "in_memory sampling",
        "skipping text_coding",
        "loader own",
        "splits",
        "checking kinds_of_faults",
        "showing",
    ],
    "models": [
        "numbers stateful_metrics tokens",
        "objectives",
        "gpt image_transformers",
        "generation networks",
        "fitting",
    ],
    "serialization": [
        "comparison file_kinds",
        "refusals savable torch_pickles",
        "exported_programs pieces torchscript",
        "saved_tensors",
        "weights",
        "llama nested_state whole_models",
    ],
    "onnx": [],
    # ray
    "distributed": [
        "collectives exception_causes shards worker",
        "tensor_parallel",
        "sharding",
        "ddp",
        "process_group",
    ],
    "cluster": [
        "capacity elastic token worker_group",
        "joining",
        "ray_watch",
    ],
    "training": [
        "averaging batch_loss batches checkpoint_files flops heap history launch module_names peaks",
        "precision reproducibility saved_state schedules step_log stopping streams",
        "checkpoint_writer initial_weights",
        "checkpoints",
        "saving",
        "after_evaluation compilation evaluation export freezing model_shards monitor optimizer_steps recomputation",
        "memory_meter preparing run_state work writing",
        "failures parts rehearsal",
        "budget",
        "place",
        "progress",
        "run",
        "loop",
        "worker",
        "run_record",
        "driver",
        "api",
    ],
    "session": [
        "handles hooks host interrupts module_outline pickling rank_agreement registry saved_files saved_names",
        "tensor_transfer unreported_errors worker_output",
        "program saved_values",
        "instruction_stream restore result_structure save",
        "worker_functions",
        "function_names",
        "arguments interception interpreter remote_tensor",
        "remote_objects",
        "recorder",
        "session worker_session",
        "worker_actor worker_connection",
        "open_or_join",
        "connect",
    ],
    # what a person uses
    "sweeps": [
        "file trial_monitor trials",
        "live_table results",
        "picture",
        "result_files",
        "sweep",
    ],
    "scaling": [
        "step_timer table",
        "picture timed_training",
        "study",
    ],
    "service": [
        "exception_at_exit http projects secrets tracebacks",
        "dashboard job packages",
        "destination logs script",
        "client",
    ],
    "cli": [
        "common progress",
        "data jobs plan runs studies train",
        "main",
    ],
}
MOST_ROOMS = 22
MOST_ARROWS = 90
"""Ordered pairs of rooms of which a file of the one imports from the other."""

ROW = {
    module: (number, row)
    for number, (room, rows) in enumerate([*ROOMS.items(), ("__main__", [])])
    for row, names in enumerate([*rows, ""])
    for module in ([f"{room}.{name}" for name in names.split()] or [room])
}
"""Where each file stands, by its module's name; a room's own name stands for its ``__init__``."""

TORCH = {"torch", "torchvision", "safetensors", "onnx", "onnxruntime"}
WITHOUT_TORCH = """
    system errors config runs cluster sweeps service cli __main__
    datasets.archives datasets.cifar10_files datasets.download datasets.file_errors datasets.files datasets.idx_files
    datasets.preparation training.api training.driver training.failures training.history training.launch
    training.monitor training.run_record training.stopping session.connect session.host session.worker_actor
    scaling.picture scaling.study scaling.table sources.documents sources.files sources.node_cache
    sources.retries sources.stores sources.token_files sources.tokenizer sources.tokenizing
"""
"""Rooms and files; and of the rooms that have one of these, the ``__init__``."""


def modules() -> dict[str, Path]:
    """Every module of the package but its ``__init__``, by the name that ROW gives it."""
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
            yield node.value, False  # as import_module("raytorch.cluster.worker_group") has it


def own_module(name: str) -> str | None:
    """The module of raytorch that ``name`` is, or is in."""
    parts = name.split(".")[1:] if name.startswith("raytorch.") else []
    while parts and ".".join(parts) not in ROW:
        parts.pop()
    return ".".join(parts) or None


def edges() -> set[tuple[str, str]]:
    """Pairs of modules of which the first imports from the second."""
    return {
        (module, target)
        for module, path in modules().items()
        for name, _ in imported(path)
        if (target := own_module(name)) and target not in (module, room_of(module))
    }


def room_of(module: str) -> str:
    """The room that a module is in."""
    return module.partition(".")[0]


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


def test_every_file_has_a_row_of_its_room() -> None:
    files = {room for room, rows in ROOMS.items() if not rows}
    assert sorted(modules()) == sorted(ROW)
    assert {path.stem for path in PACKAGE.glob("*.py")} == files | {"__init__", "__main__"}


def test_a_file_imports_only_from_rooms_and_rows_above_its_own() -> None:
    found = edges()
    assert len(found) > 400  # imports are found at all
    upwards = [
        f"{module} {ROW[module]} imports {target} {ROW[target]}"
        for module, target in sorted(found)
        if ROW[target] >= ROW[module] or (room_of(module) != room_of(target) and ROW[target][0] == ROW[module][0])
    ]
    assert upwards == []


def test_the_rooms_are_few_and_few_know_each_other() -> None:
    entries = [path for path in PACKAGE.iterdir() if (path / "__init__.py").exists() or path.suffix == ".py"]
    assert len([path for path in entries if path.stem not in ("__init__", "__main__")]) <= MOST_ROOMS
    arrows = {(room_of(module), room_of(target)) for module, target in edges() if module != "__main__"}
    arrows = {(room, other) for room, other in arrows if room != other}
    assert len(arrows) <= MOST_ARROWS, sorted(arrows)


@pytest.mark.parametrize("of", ["files", "rooms"])
def test_no_circle_of_imports(of: str) -> None:
    """Whatever the order says: a file that imports itself by way of others, at its top or in a function, is one."""
    graph: dict[str, set[str]] = {}
    for module, target in edges():
        pair = (module, target) if of == "files" else (room_of(module), room_of(target))
        if pair[0] != pair[1]:
            graph.setdefault(pair[0], set()).add(pair[1])
    assert list(TopologicalSorter(graph).static_order())  # raises CycleError


def test_what_runs_on_the_driver_imports_no_torch_at_its_top() -> None:
    named = set(WITHOUT_TORCH.split())
    light = {module for module in ROW if named & {module, room_of(module)}} | {room_of(module) for module in named}
    paths = modules()
    found = [
        f"{module} imports {name}"
        for module in sorted(light)
        for name, at_top in imported(paths[module])
        if at_top and (name.split(".")[0] in TORCH or own_module(name) in set(ROW) - light)
    ]
    assert found == []


def test_torch_code_below_the_line_knows_no_ray() -> None:
    line = ROW["onnx"]
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
        "import raytorch.scaling.study, raytorch.cluster.worker_group, raytorch.training.monitor, "
        "raytorch.sweeps.trials"
    )
    assert "ray" in packages
    assert not packages & {"torch", "torchvision", "safetensors", "matplotlib", "sklearn"}


def test_the_driver_alone_loads_no_ray() -> None:
    modules = (
        "scaling.study, runs.catalog, runs.plan, runs.curves, sweeps.sweep, sweeps.live_table, service.client, "
        "training.api"
    )
    imports = ", ".join(f"raytorch.{module}" for module in modules.split(", "))
    assert not loaded_by(f"import {imports}") & {"torch", "ray", "matplotlib"}


def rooms() -> str:
    """The rooms as docs/architecture.md shows them: what each is, in the first line of its docstring, and its files."""
    paths = modules()
    lines = ["raytorch/"]
    for room, rows in ROOMS.items():
        doc = ast.get_docstring(ast.parse(paths[room].read_text(encoding="utf-8"))) or ""
        name = f"  {room}/" if rows else f"  {room}.py"
        lines += textwrap.wrap(doc.partition("\n")[0], 116, initial_indent=f"{name:<20}", subsequent_indent=" " * 20)
        files = " ".join(f"{file}.py" for row in rows for file in row.split())
        indent = " " * 22
        lines += textwrap.wrap(files, 116, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False)
    return "\n".join(lines) + "\n"


def test_the_page_shows_the_rooms() -> None:
    assert rooms() in PAGE.read_text(encoding="utf-8"), f"run python {Path(__file__).name}"


if __name__ == "__main__":
    before, _, behind = PAGE.read_text(encoding="utf-8").partition("raytorch/\n  ")
    PAGE.write_text(f"{before}{rooms()}jobs/ {behind.partition('jobs/ ')[2]}", encoding="utf-8")
