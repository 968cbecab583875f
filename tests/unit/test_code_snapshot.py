"""Which files of a project a run takes along, and what it records of them, without running any."""

import hashlib
from pathlib import Path
from typing import Any

import pytest

from raytorch.config import code_snapshot
from raytorch.config.code_snapshot import MASKED, CodeSnapshot, changed_files, snapshot
from raytorch.config.file import load_config
from raytorch.config.project import Project, Reference
from raytorch.errors import UserError
from raytorch.runs.plan import RunPlan, placed
from raytorch.runs.storage import RunFolder
from raytorch.system.project_modules import ProjectModules
from raytorch.system.python_files import ProjectError


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A project that is a repository."""
    (tmp_path / "project/.git").mkdir(parents=True)
    return tmp_path / "project"


def write(root: Path, **files: str) -> None:
    """Write files by their names as modules, ``a__b`` for ``a/b.py``."""
    for name, text in files.items():
        path = root / f"{name.replace('__', '/')}.py".replace("/init.py", "/__init__.py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


def taken(root: Path, *files: str) -> list[str]:
    """The files that a snapshot of references to ``files`` has."""
    return list(snapshot(Project.of(root), [Reference(file, "Net") for file in files]).sources)


def refused(root: Path, *files: str) -> str:
    """Why a snapshot is refused, with the project's folder as ROOT."""
    with pytest.raises(ProjectError) as caught:
        taken(root, *files)
    return str(caught.value).replace(str(root), "ROOT")


def test_files_are_followed_by_their_imports(root: Path) -> None:
    write(
        root,
        net="import a\nimport b.c, d as e\nfrom f import g, Name\nfrom h.i import *",
        a="def late():\n    import late",
        late="",
        b__c="",
        b__init="",
        d="",
        f__init="",
        f__g="",
        f__unused="",
        h__i="from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import typed",
        typed="",
        unused="",
    )
    expected = "a b/__init__ b/c d f/__init__ f/g h/i late net typed"
    assert taken(root, "net.py") == [f"{name}.py" for name in expected.split()]


def test_relative_imports_are_followed(root: Path) -> None:
    write(
        root,
        p__q__net="from . import a, Name\nfrom .b import c\nfrom .. import d\nfrom ..e import f\nfrom .... import far",
        p__init="from .g import h",
        p__q__a="",
        p__q__b="",
        p__d="",
        p__e__f="",
        p__g="",
        far="",
        a="",
    )
    expected = ["__init__", "d", "e/f", "g", "q/a", "q/b", "q/net"]
    assert taken(root, "p/q/net.py") == [f"p/{name}.py" for name in expected]


def test_a_relative_import_at_the_root_leads_nowhere(root: Path) -> None:
    write(root, net="from . import a\nfrom .a import b\nfrom .. import c", a="", c="")
    assert taken(root, "net.py") == ["net.py"]


def test_modules_beside_a_reference_are_found_as_beside_a_script(root: Path) -> None:
    write(root, sub__net="import helpers\nfrom parts.conv import Conv", sub__helpers="import net", sub__parts__conv="")
    assert taken(root, "sub/net.py") == ["sub/helpers.py", "sub/net.py", "sub/parts/conv.py"]


def test_files_that_import_each_other_are_taken_once(root: Path) -> None:
    write(root, a="import b", b="import a\nimport b")
    assert taken(root, "a.py") == taken(root, "b.py") == taken(root, "a.py", "b.py") == ["a.py", "b.py"]


def test_python_s_own_and_what_is_installed_stays_out(root: Path) -> None:
    write(root, sub__net="import random, torch.nn, yaml\nfrom raytorch import config", random="", torch__nn="")
    write(root, sub__random="", raytorch__config="")
    assert taken(root, "sub/net.py") == ["sub/net.py"]


def test_what_is_taken_is_what_is_imported(root: Path) -> None:
    write(root, sub__net="import helpers\nfrom lib import width\nWIDTH = width.WIDTH", sub__helpers="", lib__init="")
    write(root, lib__width="from .deep.er import WIDTH", lib__deep__er="WIDTH = 8")
    made = snapshot(Project.of(root), [Reference("sub/net.py", "WIDTH")])
    modules = ProjectModules("/elsewhere", made.sources, made.entries)
    modules.install()
    try:
        assert modules.load("sub/net.py", "WIDTH") == 8
    finally:
        modules.uninstall()


def test_an_import_that_means_two_files_is_refused(root: Path) -> None:
    write(root, sub__net="x = 1\nimport helpers.deep", sub__helpers__deep="", helpers__deep="")
    assert refused(root, "sub/net.py") == (
        "sub/net.py:2: helpers.deep means both helpers/deep.py and sub/helpers/deep.py; rename one of them"
    )


def test_what_lies_beside_a_reference_is_refused_where_the_root_has_its_name(root: Path) -> None:
    write(root, net__main="from net import Net", net__net="")
    assert refused(root, "net/main.py") == (
        "net/main.py:1: net means both net/net.py and what is imported as net from ROOT; import it by its path from "
        "there"
    )
    write(root, net__main="from net.net import Net")
    assert taken(root, "net/main.py") == ["net/main.py", "net/net.py"]


def test_a_syntax_error_in_an_imported_file_is_refused_with_its_line(root: Path) -> None:
    write(root, net="import helpers", helpers="x = 1\nclass Net\n")
    assert refused(root, "net.py") == "helpers.py:2: not valid Python: expected ':'"


def test_a_link_that_leads_out_of_the_project_is_refused(root: Path) -> None:
    write(root, net="import vendor.secret")
    write(root.parent / "outside", secret="")
    (root / "vendor").symlink_to(root.parent / "outside")
    assert refused(root, "net.py").startswith(
        "vendor/secret.py is a link, or behind one, that leads out of the project"
    )


def test_too_much_code_is_refused(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(root, net="import a, b", a="", b="#" * 100)
    with monkeypatch.context() as patched:
        patched.setattr(code_snapshot, "MOST_FILES", 2)
        assert refused(root, "net.py") == (
            "the code that is imported has more than 2 files or 20,000,000 bytes; install what is not the project's "
            "own, and import it from there"
        )
    monkeypatch.setattr(code_snapshot, "MOST_BYTES", 100)
    assert "has more than 2,000 files or 100 bytes" in refused(root, "net.py")


def test_nothing_is_run(root: Path) -> None:
    trace = "import pathlib\npathlib.Path(__file__).with_name('ran').touch()\n"
    write(root, net=f"import helpers\n{trace}", helpers=trace, sub__init=trace)
    snapshot(Project.of(root), [Reference("net.py", "Net")])
    assert not [*root.rglob("ran"), *root.rglob("__pycache__")]


def test_texts_are_as_python_reads_them(root: Path) -> None:
    (root / "net.py").write_bytes(b"\xef\xbb\xbfx = 'caf\xc3\xa9'\r\n")
    made = snapshot(Project.of(root), [Reference("net.py", "x")])
    assert made == CodeSnapshot(str(root), {"net.py": "x = 'café'\n"}, ("net.py",))
    assert made.digests() == {"net.py": hashlib.sha256("x = 'café'\n".encode()).hexdigest()}


def recording(root: Path, **plan: Any) -> RunFolder:
    """The folder in which a run of ``net.py`` has recorded its code."""
    config = load_config(root / "run.yaml")
    made = RunPlan(placed(config, "mine", str(root / "runs")), **plan)
    made.folder.make()
    made.record_code()
    return made.folder


@pytest.fixture
def run(root: Path) -> Path:
    """A project with a run of its own model, which imports another file."""
    write(root, net="import sub.deep\ndef net(): ...\nstore = 's3://key:secret@bucket/x'\n", sub__deep="x = 'é'")
    (root / "run.yaml").write_text("epochs: 1\nmodel: net.py:net\n", encoding="utf-8")
    return root


def test_a_run_records_its_code_without_secrets_of_addresses_and_says_so(run: Path) -> None:
    """In the copies that differ from what the digests in checkpoints are of; others are exact."""
    copy, code = Path(recording(run).path, "code/step-0"), load_config(run / "run.yaml").code
    assert code
    copied = {file: (copy / file).read_bytes() for file in code.sources}
    assert hashlib.sha256(copied["sub/deep.py"]).hexdigest() == code.digests()["sub/deep.py"]
    text = copied["net.py"].decode()
    assert text == f"import sub.deep\ndef net(): ...\nstore = 's3://***@bucket/x'\n{MASKED}\n"
    restored = text.replace(f"{MASKED}\n", "").replace("***", "key:secret")
    assert hashlib.sha256(restored.encode()).hexdigest() == code.digests()["net.py"]


def test_code_that_is_recorded_already_is_not_recorded_again(run: Path) -> None:
    recording(run)
    folder = Path(recording(run, new_code_at=None).path, "code")
    assert [path.name for path in folder.iterdir()] == ["step-0"]
    recording(run, new_code_at=20)
    assert sorted(path.name for path in folder.iterdir()) == ["step-0", "step-20"]


def test_a_record_has_no_files_of_an_attempt_that_saved_nothing(run: Path) -> None:
    recording(run)
    write(run, net="def net(): ...")
    folder = Path(recording(run).path, "code/step-0")
    assert [path.name for path in folder.iterdir()] == ["net.py"]


def test_a_link_in_the_place_of_the_record_is_not_followed(run: Path) -> None:
    (outside := run / "outside").mkdir()
    (run / "runs/mine").mkdir(parents=True)
    (run / "runs/mine/code").symlink_to(outside)
    with pytest.raises(UserError):
        recording(run)
    assert not [*outside.iterdir()]


def test_what_has_changed_is_told_by_file() -> None:
    before = {"same.py": "0", "net.py": "0", "old.py": "0"}
    assert changed_files(before, {"same.py": "0", "net.py": "1", "new.py": "0"}) == [
        "net.py has changed",
        "new.py is new",
        "old.py is gone",
    ]
    assert changed_files(before, before) == []
