"""Models of a user's own in files: saved with the digests of their code, and built again from it."""

import importlib
import pickle
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from raytorch.config import code_snapshot, own_calls
from raytorch.config.file import load_config
from raytorch.config.own_calls import imported
from raytorch.errors import ConfigError, ModelFileError
from raytorch.models.networks import Architecture
from raytorch.serialization import load_model, read_architecture
from raytorch.serialization.whole_models import save_model
from raytorch.system import project_modules
from raytorch.system.project_modules import ProjectModules

NET = """
import torch
from torch import nn
from layers import block

class Net(nn.Sequential):
    def __init__(self, num_classes: int, *, widths: tuple[int, ...] = (4, 3)):
        rates = [rate.item() for rate in torch.linspace(0, 0.5, len(widths))]
        sizes = [4, *widths]
        layers = [block(*pair, rate) for *pair, rate in zip(sizes, sizes[1:], rates)]
        super().__init__(nn.Flatten(), *layers, nn.Linear(sizes[-1], num_classes))
"""
LAYERS = """
from torch import nn

def block(fan_in, fan_out, rate):
    return nn.Sequential(nn.Linear(fan_in, fan_out), nn.Dropout(rate))
"""
LOSSES = """
def loss(model, batch, *, scale: float = 1.0):
    return scale * model(batch[0]).square().mean()
"""


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


@pytest.fixture(autouse=True)
def no_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """No code of a run is installed in the process."""
    for finder in [*sys.meta_path]:
        if isinstance(finder, ProjectModules):
            finder.uninstall()
    monkeypatch.setattr(own_calls, "_installed", None)


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A project with a model and a loss, each in a file of its own."""
    (tmp_path / ".git").mkdir()
    write(tmp_path / "net.py", NET)
    write(tmp_path / "layers.py", LAYERS)
    write(tmp_path / "losses.py", LOSSES)
    write(tmp_path / "run.yaml", "epochs: 1\nmodel: net.py:Net\nloss: losses.py:loss\n")
    return tmp_path


def saved(project: Path) -> Path:
    """The file of weights that the project's run writes."""
    config = load_config(project / "run.yaml")
    architecture = Architecture(config.model, (1, 2, 2), 5, config.code)
    save_model(architecture.build(), project / "model.safetensors", architecture)
    return project / "model.safetensors"


def test_a_model_needs_its_own_code_alone(project: Path) -> None:
    """A loss in another file is of the run, and may change or be gone where its model is loaded."""
    file = saved(project)
    (project / "losses.py").unlink()
    model = load_model(file, code=project / "net.py")
    assert model(torch.zeros(2, 1, 2, 2)).shape == (2, 5)
    again = read_architecture(file, code=project)
    assert again.code
    assert list(again.code.sources) == ["layers.py", "net.py"]
    write(project / "layers.py", LAYERS.replace("Dropout(rate)", "Dropout(0.1)"))
    with pytest.raises(ModelFileError, match=r"by other code than that in .*: layers.py has changed; give that of"):
        load_model(file, code=project / "net.py")


def test_a_model_that_computes_while_it_is_made_is_built_again(project: Path) -> None:
    """The rates of its dropout are items of a tensor, which tensors without memory have not."""
    model = load_model(saved(project), code=project)
    assert [module.p for module in model.modules() if isinstance(module, nn.Dropout)] == [0, 0.5]


CONSTANTS = """
import torch
from torch import nn

MEAN = torch.tensor([0.5])

class Net(nn.Module):
    def __init__(self, num_classes: int):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(num_classes))
        self.register_buffer("mean", MEAN, persistent=False)

    def forward(self, inputs):
        return (inputs - self.mean - MEAN) * self.scale
"""


def test_tensors_that_code_keeps_have_content_where_a_model_is_loaded_first(project: Path) -> None:
    write(project / "net.py", CONSTANTS)
    file = saved(project)
    for modules in [*project_modules._projects]:  # as in another process
        modules.uninstall()
    own_calls._installed = None
    assert_close(load_model(file, code=project)(torch.ones(1, 5)), torch.zeros(1, 5))


TIED = """
from torch import nn

class Net(nn.Module):
    def __init__(self, num_classes: int):
        super().__init__()
        self.embedding = nn.Embedding(num_classes, 4)
        self.head = nn.Linear(4, num_classes, bias=False)
        self.head.weight = self.embedding.weight
"""


def test_a_weight_under_two_names_is_one_again_unless_they_differ(project: Path) -> None:
    write(project / "net.py", TIED)
    file = saved(project)
    model = load_model(file, code=project)
    assert model.head.weight is model.embedding.weight
    assert [name for name, _ in model.named_parameters()] == ["embedding.weight"]
    model.head.weight = nn.Parameter(model.embedding.weight + 1)
    save_model(model, file, read_architecture(file, code=project))
    again = load_model(file, code=project)
    assert_close(again.head.weight, again.embedding.weight + 1)


LAZY = """
import torch
from torch import nn

def lazy():
    return nn.Sequential(nn.Flatten(), nn.LazyLinear(5), nn.LazyBatchNorm1d())

def called():
    model = lazy()
    model(torch.zeros(2, 1, 2, 2))
    return model
"""


def test_sizes_that_only_a_call_gives_are_refused_unless_there_was_one(project: Path) -> None:
    write(project / "net.py", LAZY)
    write(project / "run.yaml", "epochs: 1\nmodel: net.py:lazy\n")
    with pytest.raises(
        ConfigError, match=r"^model.name: net.py:lazy makes a model whose 1.weight, 1.bias, 2.weight has"
    ):
        saved(project)
    write(project / "run.yaml", "epochs: 1\nmodel: net.py:called\n")
    assert load_model(saved(project), code=project)(torch.zeros(2, 1, 2, 2)).shape == (2, 5)


MASKED = """
from torch import empty, nn

class Net(nn.Linear):
    def __init__(self, *, cells: int = 5000 * 5000):
        super().__init__(4, 2)
        self.register_buffer('mask', empty(cells), False)
        self.register_buffer('table', empty(2 * cells))
"""


def test_buffers_are_as_large_as_the_users_code_makes_them_up_to_the_machines_memory(project: Path) -> None:
    """As those of 100 MB are, be they in the file or not; the arguments of a file may be anybody's."""
    write(project / "net.py", MASKED)
    file = saved(project)
    assert {name: each.nbytes for name, each in load_model(file, code=project).named_buffers()} == {
        "mask": 100_000_000,
        "table": 200_000_000,
    }
    write(project / "net.py", MASKED.replace("2 * cells", "2"))
    file = saved(project)
    config = load_config(project / "run.yaml", ["model.cells=1000000000000"])
    save_model(load_model(file, code=project), file, Architecture(config.model, (1, 2, 2), 5, config.code))
    told = r"buffers that are not saved with it \(persistent=False\), of 4,000,000,000,000 bytes, 'mask' the largest"
    with pytest.raises(ModelFileError, match=told):
        load_model(file, code=project)


def test_a_file_of_weights_names_no_other_file_than_the_users(project: Path) -> None:
    file = saved(project)
    other = write(project / "other.py", "raise SystemExit('this code must not run')\nNet = None\n")
    with pytest.raises(ModelFileError, match=r"is of net.py:Net, and .*/other.py is another file; give that, or "):
        load_model(file, code=other)


def test_a_file_of_code_may_be_a_link_within_its_project(project: Path) -> None:
    file = saved(project)
    (project / "net.py").rename(project / "net_1.py")
    (project / "net.py").symlink_to("net_1.py")
    assert load_model(file, code=project / "net.py")(torch.zeros(2, 1, 2, 2)).shape == (2, 5)
    (project / "net_1.py").rename(project.parent / "outside.py")
    (project / "net.py").unlink()
    (project / "net.py").symlink_to(project.parent / "outside.py")
    with pytest.raises(ModelFileError, match=r"net.py is a link, or behind one, that leads out of the project"):
        load_model(file, code=project / "net.py")


@pytest.mark.parametrize("code", [nn.Linear(1, 1), nn, 7])
def test_what_is_no_code_of_a_model_is_refused_by_its_kind(project: Path, code: Any) -> None:
    told = rf"code is a {type(code).__name__}; give a class or function, or the file or folder that has it"
    with pytest.raises(ModelFileError, match=told):
        load_model(saved(project), code=code)


@pytest.mark.parametrize("name", ["/net.py:Net", "../net.py:Net", f"{'n' * 5000}.py:Net"])
def test_a_damaged_name_is_refused(project: Path, name: str) -> None:
    file = saved(project)
    described = Architecture(load_config(project / "run.yaml").model.model_copy(update={"name": name}), (1, 2, 2), 5)
    save_model(load_model(file, code=project), file, described)
    for code in (project, project / "net.py", Path("/net.py")):
        with pytest.raises(ModelFileError):
            load_model(file, code=code)


def test_code_that_is_imported_may_load_a_model(project: Path) -> None:
    """As of a teacher; it does not wait for its own import to end."""
    file = saved(project)
    student = f"""
from raytorch.serialization import load_model
TEACHER = load_model({str(file)!r}, code={str(project)!r})
def student(num_classes: int): ...
"""
    write(project / "student.py", student)
    write(project / "student.yaml", "epochs: 1\nmodel: student.py:student\n")
    config, told = load_config(project / "student.yaml"), []

    def load() -> None:
        try:
            imported(config.model.name, config.code)
        except ModelFileError as error:
            told.append(str(error).partition("cannot be built: ")[2])

    thread = threading.Thread(target=load, daemon=True)
    thread.start()
    thread.join(30)
    why = "net.py:Net: is of other code than that which is being imported; load it in a function that is called later"
    assert [text.partition("; expected")[0] for text in told] == [why]


LATE = """
from torch import nn

class Net(nn.Linear):
    def __init__(self, num_classes: int):
        super().__init__(1, num_classes)

    def forward(self, inputs):
        from late import NAME
        import later
        return len(range(3)), NAME, later.NAME, sorted(zip([1], [2]))
"""


def test_models_of_two_projects_in_one_process_are_each_of_their_own_code(tmp_path: Path) -> None:
    """Which may have files of the same names, and import them when they are called."""
    finders, files, models = [*sys.meta_path], dict[str, Path](), dict[str, nn.Module]()
    for project in ("one", "two"):
        (tmp_path / project / ".git").mkdir(parents=True)
        write(tmp_path / project / "net.py", f"PROJECT = {project!r}\n{LATE}")
        for name in ("late", "later"):
            write(tmp_path / project / f"{name}.py", f"NAME = '{name} of {project}'\n")
        write(tmp_path / project / "run.yaml", "epochs: 1\nmodel: net.py:Net\n")
        files[project] = saved(tmp_path / project)
    for project, file in files.items():
        models[project] = load_model(file, code=file.parent)
        assert sys.meta_path == finders
        assert type(pickle.loads(pickle.dumps(models[project]))) is type(models[project])
    for project in ("one", "two", "one"):
        told = (3, f"late of {project}", f"later of {project}", [(1, 2)])
        assert models[project](torch.ones(1)) == told
        assert sys.meta_path == finders
        assert sys.modules["net"].PROJECT == "two"  # the newest, as of any module that is imported anew
    assert type(load_model(files["two"], code=files["two"].parent)) is type(models["two"])


def test_a_model_of_other_code_leaves_that_of_the_run_in_its_place(project: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    write(other / "net.py", f"PROJECT = 'other'\n{LATE}")
    write(other / "late.py", "NAME = 'late of other'\n")
    write(other / "later.py", "NAME = 'later of other'\n")
    (other / ".git").mkdir()
    write(other / "run.yaml", "epochs: 1\nmodel: net.py:Net\n")
    file, code = saved(other), load_config(project / "run.yaml").code
    own = imported("net.py:Net", code)
    teacher = load_model(file, code=other)
    assert teacher(torch.ones(1))[1:3] == ("late of other", "later of other")
    assert imported("net.py:Net", code) is own
    assert importlib.import_module("net").Net is own
    assert importlib.import_module("losses").loss


def test_a_model_of_own_code_is_compiled_as_any_other(project: Path) -> None:
    model = load_model(saved(project), code=project)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert_close(compiled(torch.ones(3, 1, 2, 2)), model(torch.ones(3, 1, 2, 2)))


def test_a_copy_of_code_without_its_secrets_is_told_from_other_code(project: Path) -> None:
    """A run's own record, in which they are ``***``."""
    write(project / "net.py", f"{NET}STORE = 's3://key:secret@bucket/x'\n")
    file, code = saved(project), load_config(project / "run.yaml").code
    assert code
    for name, text in code.copies().items():
        write(project / "copies" / name, text)
    told = (
        r"net.py has changed; give that of then, .* in its folder code; in net.py \*\*\* stands for secrets: put them b"
    )
    with pytest.raises(ModelFileError, match=told):
        load_model(file, code=project / "copies")
    text = code.copies()["net.py"].replace(f"{code_snapshot.MASKED}\n", "").replace("***", "key:secret")
    write(project / "copies/net.py", text)
    assert load_model(file, code=project / "copies")
