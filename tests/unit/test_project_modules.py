"""A project's modules, imported from texts alone: by path, from beside an entry, and never in place of others."""

import importlib
import inspect
import keyword
import pickle
import sys
import threading
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest

from raytorch.system.project_modules import NOT_SENT, ProjectModules

ROOT = "/no/such/project"


@contextmanager
def installed(sources: Mapping[str, str], *entries: str) -> Iterator[ProjectModules]:
    """A project's modules, while the block runs."""
    modules = ProjectModules(ROOT, sources, entries)
    before = set(sys.modules)
    modules.install()
    try:
        yield modules
    finally:
        modules.uninstall()
        assert not {name for name in set(sys.modules) - before if name.startswith(("own", "beside"))}
    assert modules not in sys.meta_path


def test_a_file_is_imported_by_its_path() -> None:
    with installed({"own_nets/tagger.py": "class Tagger: ..."}) as modules:
        tagger = modules.load("own_nets/tagger.py", "Tagger")
        assert (tagger.__module__, tagger.__name__) == ("own_nets.tagger", "Tagger")
        module = sys.modules["own_nets.tagger"]
        assert (module.__file__, module.__package__) == (f"{ROOT}/own_nets/tagger.py", "own_nets")


def test_a_package_has_its_own_file_and_a_folder_needs_none() -> None:
    sources = {
        "own/__init__.py": "WIDTH = 8",
        "own/deep/er/net.py": "from ... import WIDTH\nfrom .layer import HEIGHT\nfrom ..side import DEPTH",
        "own/deep/er/layer.py": "HEIGHT = 9",
        "own/deep/side.py": "import own.deep.er.layer as layer\nDEPTH = layer.HEIGHT + 1",
    }
    with installed(sources) as modules:
        found = [modules.load("own/deep/er/net.py", name) for name in ("WIDTH", "HEIGHT", "DEPTH")]
        assert found == [8, 9, 10]
        assert modules.load("own/__init__.py", "WIDTH") == 8
        assert sys.modules["own"].__path__ == [f"{ROOT}/own"]


@pytest.mark.parametrize("folder", ["own-nets/v1.0", "own/1st", "own/class"])
def test_folders_whose_names_are_none_in_python_have_modules(folder: str) -> None:
    """By names that are, as what writes them down (TorchScript) takes no others."""
    sources = {
        f"{folder}/my-net.py": "from .layer import WIDTH\nfrom beside import DEPTH\nclass Net: ...",
        f"{folder}/layer.py": "WIDTH = 8",
        f"{folder}/beside.py": "DEPTH = 2",
    }
    with installed(sources, f"{folder}/my-net.py") as modules:
        assert [modules.load(f"{folder}/my-net.py", name) for name in ("WIDTH", "DEPTH")] == [8, 2]
        net = modules.load(f"{folder}/my-net.py", "Net")
        assert all(part.isidentifier() and not keyword.iskeyword(part) for part in net.__module__.split("."))
        assert inspect.getsource(net).strip() == "class Net: ..."
        assert pickle.loads(pickle.dumps(net)) is net


def test_a_package_comes_before_a_file_of_its_name() -> None:
    with installed({"own.py": "KIND = 'file'", "own/__init__.py": "KIND = 'package'"}) as modules:
        assert modules.load("own/__init__.py", "KIND") == "package"


def test_what_lies_beside_an_entry_is_the_same_module_by_either_name() -> None:
    sources = {
        "own/tagger.py": "import beside\nfrom beside_parts.conv import COUNT\nimport own.beside as by_path",
        "own/beside.py": "import own_count\nown_count.times += 1",
        "own/beside_parts/conv.py": "from own.beside_parts import conv\nfrom beside import own_count\nCOUNT = 1",
        "own_count.py": "times = 0",
    }
    with installed(sources, "own/tagger.py") as modules:
        assert modules.load("own/tagger.py", "beside") is modules.load("own/tagger.py", "by_path")
        assert sys.modules["beside_parts.conv"] is sys.modules["own.beside_parts.conv"]
        beside = sys.modules["beside"]
        assert beside.__name__ == "own.beside"
        assert beside.__spec__ is not None
        assert beside.__spec__.name == "own.beside"
        assert sys.modules["own_count"].times == 1


def test_the_root_comes_before_what_lies_beside_an_entry() -> None:
    sources = {"own/tagger.py": "import own_same\nWHERE = own_same.WHERE", "own_same.py": "WHERE = 'root'"}
    with installed({**sources, "own/own_same.py": "WHERE = 'beside'"}, "own/tagger.py") as modules:
        assert modules.load("own/tagger.py", "WHERE") == "root"


def test_files_that_import_each_other_are_imported_once() -> None:
    sources = {
        "own/a.py": "import b\nNAME = 'a'\ndef other(): return b.NAME",
        "own/b.py": "import a\nfrom own import a as same\nassert a is same\nNAME = 'b'\ndef other(): return a.NAME",
    }
    with installed(sources, "own/a.py") as modules:
        assert (modules.load("own/a.py", "other")(), modules.load("own/b.py", "other")()) == ("b", "a")


@pytest.mark.parametrize("name", ["random", "json", "torch", "ray", "raytorch", "numpy"])
def test_modules_that_others_import_are_never_replaced(name: str) -> None:
    finder = ProjectModules(ROOT, {f"{name}.py": "", f"{name}/own.py": ""})
    assert finder.find_spec(name, None) is None
    assert finder.find_spec(f"{name}.own", None) is None


def test_an_import_of_python_s_own_beside_a_file_of_its_name_gets_python_s() -> None:
    sources = {"own/tagger.py": "import random\nSEED = random.seed", "own/random.py": "raise RuntimeError"}
    with installed(sources, "own/tagger.py") as modules:
        assert modules.load("own/tagger.py", "SEED").__module__ == "random"


def test_a_module_that_is_there_already_is_told_from_the_project_s() -> None:
    with installed({"pytest.py": "raises = 1", "pytest/deep.py": "x = 1"}) as modules:
        with pytest.raises(ImportError, match=r"pytest.py cannot be imported as pytest, as another module has that na"):
            modules.load("pytest.py", "raises")
        with pytest.raises(ModuleNotFoundError):
            modules.load("pytest/deep.py", "x")
    assert sys.modules["pytest"] is pytest


def test_a_project_comes_before_what_is_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_net.py").write_text("FROM = 'installed'", encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    with installed({"own_net.py": "FROM = 'project'"}) as modules:
        assert modules.load("own_net.py", "FROM") == "project"
    assert importlib.import_module("own_net").FROM == "installed"
    del sys.modules["own_net"]


def test_a_traceback_shows_the_lines_of_files_that_are_not_here() -> None:
    with installed({"own.py": "def fails():\n    return 1 / 0  # here\n"}) as modules:
        with pytest.raises(ZeroDivisionError) as caught:
            modules.load("own.py", "fails")()
        assert f'File "{ROOT}/own.py", line 2, in fails\n    return 1 / 0  # here' in "".join(
            traceback.format_exception(caught.value)
        )
        assert inspect.getsource(modules.load("own.py", "fails")).startswith("def fails():")


def test_edited_code_is_seen_anew() -> None:
    for text in ("one", "two"):
        with installed({"own/net.py": f"def net(): return '{text}'", "own/__init__.py": ""}, "own/net.py") as modules:
            net = modules.load("own/net.py", "net")
            assert (net(), inspect.getsource(net)) == (text, f"def net(): return '{text}'\n")


def test_a_syntax_error_names_the_file_and_line() -> None:
    with installed({"own.py": "x = 1\nclass Net\n"}) as modules, pytest.raises(SyntaxError) as caught:
        modules.load("own.py", "Net")
    assert (caught.value.filename, caught.value.lineno) == (f"{ROOT}/own.py", 2)


def test_a_failed_import_can_be_tried_again() -> None:
    with installed({"own/a.py": "import beside", "own/beside.py": "raise OSError('full')"}, "own/a.py") as modules:
        for _ in range(2):
            with pytest.raises(OSError, match="full"):
                modules.load("own/a.py", "x")
        assert not {"own.a", "beside", "own.beside"} & set(sys.modules)


@pytest.mark.parametrize("statement", ["import own.missing", "from .missing import x", "import own_missing"])
def test_what_was_not_sent_is_told(statement: str) -> None:
    with installed({"own/net.py": statement}) as modules, pytest.raises(ModuleNotFoundError) as caught:
        modules.load("own/net.py", "x")
    assert caught.value.__notes__ == [NOT_SENT]
    assert str(caught.value).startswith("No module named 'own")


def test_what_was_not_sent_is_not_looked_for_in_the_project_s_folder(tmp_path: Path) -> None:
    (tmp_path / "missing.py").touch()
    with installed({"own/net.py": "def late():\n    import own.missing"}) as modules:
        late = modules.load("own/net.py", "late")
        sys.modules["own"].__path__ = [str(tmp_path)]
        with pytest.raises(ModuleNotFoundError) as caught:
            late()
    assert caught.value.__notes__ == [NOT_SENT]


def test_a_name_that_is_missing_in_a_package_is_told_as_ever() -> None:
    with installed({"own/__init__.py": "", "own/net.py": "from own import nothing"}) as modules:
        with pytest.raises(ImportError, match="cannot import name 'nothing' from 'own'"):
            modules.load("own/net.py", "x")
        with pytest.raises(ImportError, match=r"own/__init__.py has run, and has no Net; define it at the top level"):
            modules.load("own/__init__.py", "Net")


def test_sources_are_told_of_the_project_s_modules_alone() -> None:
    modules = ProjectModules(ROOT, {"own/__init__.py": "x = 1", "own/net.py": ""})
    assert (modules.get_source("own"), modules.get_filename("own")) == ("x = 1", f"{ROOT}/own/__init__.py")
    assert (modules.is_package("own"), modules.is_package("own.net")) == (True, False)
    with pytest.raises(ImportError, match="other is no module of the project in /no/such/project"):
        modules.get_source("other")


def test_threads_import_a_module_once() -> None:
    sources = {
        "own/a.py": "from beside import times\ntimes.append(1)",
        "own/b.py": "from own.beside import times\ntimes.append(1)",
        "own/beside.py": "times = []",
    }
    failures: list[BaseException] = []

    def load(modules: ProjectModules, file: str, barrier: threading.Barrier) -> None:
        barrier.wait()
        try:
            modules.load(file, "times")
        except BaseException as error:
            failures.append(error)

    with installed(sources, "own/a.py") as modules:
        barrier = threading.Barrier(8)
        files = ["own/a.py", "own/b.py"] * 4
        threads = [threading.Thread(target=load, args=(modules, file, barrier)) for file in files]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert failures == []
        assert modules.load("own/beside.py", "times") == [1, 1]
