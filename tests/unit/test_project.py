"""References to own code: what is one, what it is found to be, and what is refused, without running any of it."""

import os
from pathlib import Path

import pytest

from raytorch.config.project import Project, Reference, is_reference
from raytorch.system.python_files import LARGEST, ProjectError, read_source

WRITES = "from pathlib import Path\nPath(__file__).with_name('ran').touch()\nclass Net: ...\n"
"""Code that leaves a trace when it runs."""


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A project in a repository, with a configuration's folder and code in both."""
    root = tmp_path / "project"
    for folder in (".git", "configs", "nets"):
        (root / folder).mkdir(parents=True)
    (root / "configs/tagger.py").write_text(WRITES, encoding="utf-8")
    (root / "nets/layers.py").write_text("def layer(): ...\n", encoding="utf-8")
    return root


def refused(root: Path, text: str, folder: str = "configs") -> str:
    """Why a reference in a configuration is refused, with the project's folder as ROOT."""
    with pytest.raises(ProjectError) as caught:
        Project.of(root).resolve(text, root / folder)
    return str(caught.value).replace(str(root), "ROOT")


def refused_file(root: Path, content: str | bytes, name: str = "net.py") -> str:
    """Why a file in the configuration's folder is refused."""
    raw = content.encode() if isinstance(content, str) else content
    (root / "configs" / name).write_bytes(raw)
    return refused(root, f"{name}:Net").replace("configs/", "")


@pytest.mark.parametrize("text", ["nets.py:Net", "os:system", "../x.py:f", "/tmp/x.py:f", "nets.py", "torch.nn.Linear"])
def test_what_is_meant_as_a_reference(text: str) -> None:
    assert is_reference(text)


@pytest.mark.parametrize("text", ["mlp", "resnet18", "seq2seq", "moving_mnist", ""])
def test_what_ships_is_no_reference(text: str) -> None:
    assert not is_reference(text)


def test_a_reference_is_written_as_its_file_and_name() -> None:
    assert str(Reference("nets/tagger.py", "Tagger")) == "nets/tagger.py:Tagger"


@pytest.mark.parametrize("mark", ["folder", "file"])
def test_a_project_is_the_repository_around_a_folder(tmp_path: Path, mark: str) -> None:
    git = tmp_path / ".git"
    git.mkdir() if mark == "folder" else git.write_text("gitdir: elsewhere", encoding="utf-8")
    (tmp_path / "a/b").mkdir(parents=True)
    assert Project.of(tmp_path / "a/b").root == Project.of(tmp_path).root == tmp_path.resolve()


def test_without_a_repository_a_project_is_the_folder_alone(tmp_path: Path) -> None:
    assert Project.of(tmp_path).root == tmp_path.resolve()


def test_a_file_is_found_beside_the_configuration_and_else_from_the_root(root: Path) -> None:
    project = Project.of(root / "configs")
    assert project.resolve("tagger.py:Net", root / "configs") == Reference("configs/tagger.py", "Net")
    assert project.resolve("./tagger.py:Net", root / "configs") == Reference("configs/tagger.py", "Net")
    assert project.resolve("nets/layers.py:layer", root / "configs") == Reference("nets/layers.py", "layer")
    (root / "tagger.py").write_text("class Other: ...", encoding="utf-8")
    assert project.resolve("tagger.py:Net", root / "configs").file == "configs/tagger.py"
    assert project.resolve("tagger.py:Other", root).file == "tagger.py"


def test_nothing_is_run(root: Path) -> None:
    project = Project.of(root)
    project.read(project.resolve("tagger.py:Net", root / "configs").file)
    assert [path.name for path in (root / "configs").iterdir()] == ["tagger.py"]


@pytest.mark.parametrize(
    "text", ["os:system", "torch.nn.Linear", "tagger.py", "tagger.py:", "a.py:b:c", "tagger.py:a.b"]
)
def test_what_has_another_form_is_refused(root: Path, text: str) -> None:
    assert refused(root, text) == (
        f"must be FILE.py:NAME, as in nets.py:Net, not {text!r}: name a file of the project, and what it defines; "
        "what is installed is imported there"
    )


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (
            "/tmp/tagger.py:Net",
            "/tmp/tagger.py is an absolute path; give it from the configuration's or the project's folder",
        ),
        ("../nets/layers.py:layer", "../nets/layers.py has a '..'; give the path from the project's folder"),
        ("nets/../../x.py:f", "nets/../../x.py has a '..'; give the path from the project's folder"),
        ("tager.py:Net", "no file tager.py in ROOT/configs or in ROOT (did you mean 'tagger.py'?)"),
        ("nets/layer.py:layer", "no file nets/layer.py in ROOT/configs or in ROOT (did you mean 'layers.py'?)"),
        (
            "\x1b[2J\ud800.py:f",
            r"no file \x1b[2J\ud800.py in ROOT/configs or in ROOT; give the path of one that is, from there",
        ),
        ("none/x.py:f", "no file none/x.py in ROOT/configs or in ROOT; give the path of one that is, from there"),
        ("nets/layers.py:layers", "nets/layers.py has no layers at its top level (did you mean 'layer'?)"),
        ("tagger.py:Path_", "configs/tagger.py has no Path_ at its top level (did you mean 'Path'?)"),
    ],
)
def test_what_leads_elsewhere_or_nowhere_is_refused(root: Path, text: str, reason: str) -> None:
    assert refused(root, text) == reason


def test_in_the_root_one_folder_is_named(root: Path) -> None:
    assert refused(root, "x.py:f", ".") == "no file x.py in ROOT; give the path of one that is, from there"


@pytest.mark.parametrize("name", ["random.py", "torch.py", "raytorch.py", "numpy.py", "__main__.py"])
def test_a_file_that_hides_a_module_is_refused(root: Path, name: str) -> None:
    (root / name).write_text("class Net: ...", encoding="utf-8")
    module = name.removesuffix(".py")
    assert (
        refused(root, f"{name}:Net") == f"{name} would hide the module {module}, which others import; rename the file"
    )


def test_a_folder_that_hides_a_module_is_refused_but_not_a_file_in_another(root: Path) -> None:
    (root / "json").mkdir()
    for file in ("json/net.py", "nets/random.py"):
        (root / file).write_text("class Net: ...", encoding="utf-8")
    assert refused(root, "json/net.py:Net") == (
        "json/net.py would hide the module json, which others import; rename the folder"
    )
    assert Project.of(root).resolve("nets/random.py:Net", root) == Reference("nets/random.py", "Net")


@pytest.mark.parametrize("file", ["my-net.py", "class.py", "1st/net.py", "v1.0/my net.py"])
def test_a_path_that_no_import_statement_can_name_may_be_referred_to(root: Path, file: str) -> None:
    (root / file).parent.mkdir(exist_ok=True)
    (root / file).write_text("class Net: ...", encoding="utf-8")
    assert Project.of(root).resolve(f"{file}:Net", root) == Reference(file, "Net")


@pytest.mark.parametrize("link", ["net.py", "linked"])
def test_a_link_that_leads_out_of_the_project_is_refused(root: Path, link: str) -> None:
    outside = root.parent / "outside"
    outside.mkdir()
    (outside / "net.py").write_text("class Net: ...", encoding="utf-8")
    (root / link).symlink_to(outside / "net.py" if link.endswith(".py") else outside)
    file = link if link.endswith(".py") else f"{link}/net.py"
    assert refused(root, f"{file}:Net") == (
        f"{file} is a link, or behind one, that leads out of the project, to {outside / 'net.py'}; put a copy in its "
        "place"
    )


def test_a_link_within_the_project_is_followed(root: Path) -> None:
    (root / "alias.py").symlink_to("configs/tagger.py")
    assert Project.of(root).resolve("alias.py:Net", root) == Reference("alias.py", "Net")


def test_a_link_that_leads_nowhere_is_refused(root: Path) -> None:
    (root / "gone.py").symlink_to("nothing.py")
    assert refused(root, "gone.py:Net") == "gone.py cannot be read: No such file or directory"


def test_only_regular_files_are_opened(root: Path) -> None:
    (root / "folder.py").mkdir()
    os.mkfifo(root / "pipe.py")
    reason = "cannot be read: it is not a file, but a folder, a pipe or a device"
    assert refused(root, "pipe.py:Net") == f"pipe.py {reason}"
    assert refused(root, "folder.py:Net") == f"folder.py {reason}"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("x = 1\nclass Net\n", "net.py:2: not valid Python: expected ':'"),
        ("class Net: ...\nreturn 1\n", "net.py:2: not valid Python: 'return' outside function"),
        ("def Net(a, a): ...\n", "net.py:1: not valid Python: duplicate argument 'a' in function definition"),
        ("class Net: ...\n# é".encode("latin-1"), "net.py:2: not UTF-8; save the file as UTF-8"),
        (
            "# -*- coding: latin-1 -*-\nclass Net: ...\n",
            "net.py has a coding line for iso-8859-1; save the file as UTF-8 and remove that line",
        ),
        (
            "# coding: klingon\nclass Net: ...\n",
            "net.py: unknown encoding: klingon; remove the coding line, as the file is UTF-8",
        ),
        (
            "#" + "x" * LARGEST + "\nclass Net: ...",
            "net.py has more than 1,048,576 bytes; move what is data into a file of its own",
        ),
    ],
)
def test_what_is_no_python_in_utf_8_is_refused(root: Path, content: str | bytes, reason: str) -> None:
    assert refused_file(root, content) == reason


def test_what_the_parser_itself_gives_up_on_is_refused(root: Path) -> None:
    assert "not valid Python: " in refused_file(root, "class Net: ...\0")
    deep = refused_file(root, "x = " + "-" * 200_000 + "1\nclass Net: ...")
    assert deep == "net.py: an expression or block is nested too deeply for Python"


def test_warnings_of_a_file_are_left_to_its_import(root: Path) -> None:
    (root / "odd.py").write_text("class Net: ...\npattern = '\\d'\nassert (1, 'always')\n", encoding="utf-8")
    assert Project.of(root).resolve("odd.py:Net", root).name == "Net"


def test_text_is_read_as_python_reads_it(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_bytes(b"\xef\xbb\xbf# coding: utf-8\r\nname = 'caf\xc3\xa9'\rx = 1\n")
    assert read_source(tmp_path / "net.py", "net.py") == "# coding: utf-8\nname = 'café'\nx = 1\n"


@pytest.mark.parametrize(
    "source",
    [
        "from elsewhere import Net",
        "import Net",
        "from elsewhere import *",
        "Net = make()",
        "a, (Net, b) = make()",
        "try:\n    from fast import Net\nexcept ImportError:\n    class Net: ...",
        "if True:\n    def Net(): ...",
        "with open('x') as Net: ...",
        "async def Net(): ...",
    ],
)
def test_a_name_is_at_the_top_level_whatever_binds_it(root: Path, source: str) -> None:
    (root / "net.py").write_text(source, encoding="utf-8")
    assert Project.of(root).resolve("net.py:Net", root) == Reference("net.py", "Net")


@pytest.mark.parametrize("guard", ['if __name__ == "__main__":', "if '__main__' == __name__:"])
def test_a_name_below_the_guard_of_a_script_is_none_that_workers_have(root: Path, guard: str) -> None:
    told = 'net.py has Net below if __name__ == "__main__": alone, which workers that import the file do not run'
    assert refused_file(root, f"{guard}\n    class Net: ...").startswith(told)
    (root / "net.py").write_text(f"{guard}\n    Net = 1\nelse:\n    Net = 2", encoding="utf-8")
    assert Project.of(root).resolve("net.py:Net", root) == Reference("net.py", "Net")


@pytest.mark.parametrize(
    "source", ["def f():\n    class Net: ...", "class A:\n    Net = 1", "Net: int", "x = [Net for Net in ()]", "Net"]
)
def test_a_name_inside_something_is_not_at_the_top_level(root: Path, source: str) -> None:
    assert refused_file(root, source).startswith("net.py has no Net at its top level")
