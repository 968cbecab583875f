"""What own code takes, told without running it, and the sections that are made of it."""

import json
from typing import Annotated, Any, Literal

import pytest
from pydantic import Field, ValidationError

from raytorch.config.own_section import OwnSection, arguments_of, section_of
from raytorch.config.section import Section
from raytorch.config.signature import REQUIRED, UNKNOWN, Signature, signature_of
from raytorch.system.python_files import ProjectError

IMPORTS = """
import dataclasses, torch, typing as t
import torch.nn as nn
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, List, Literal, Optional, Union, overload
from torch.utils.data import Dataset
from elsewhere import Unknown
raise SystemExit("this code must not run")
"""


def read(source: str, name: str = "Net") -> Signature | None:
    """The signature in a file that begins with the imports above."""
    return signature_of(IMPORTS + source, name)


def names(source: str) -> list[str] | None:
    """Names of the parameters; None if they cannot be told."""
    signature = read(source)
    return None if signature is None else [parameter.name for parameter in signature.parameters]


def section(parameters: str, **given: Any) -> type[OwnSection]:
    """The section of a function with these parameters."""
    signature = read(f"def Net({parameters}): ...")
    assert signature
    return section_of(signature, "nets.py:Net", **given)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("def Net(shape, width=8): ...", ["shape", "width"]),
        ("@torch.no_grad()\ndef Net(shape, width=8): ...", ["shape", "width"]),
        ("class Net:\n    def __init__(self, width): ...", ["width"]),
        ("class Net(Unknown):\n    def __init__(this, width): ...", ["width"]),
        ("@Unknown\nclass Net:\n    def __init__(self, width): ...", ["width"]),
        ("class Net:\n    def __init__(*everything): ...", []),
        ("class Net:\n    def __init__(self, width, *rest, depth=1): ...", ["width", "depth"]),
        ("class Net(nn.Module): ...", []),
        ("class Net(torch.nn.Module, t.Generic[t.T]): ...", []),
        ("class Net(Dataset[int]): ...", []),
        ("class Net: ...", []),
        ("class A(nn.Module):\n    def __init__(self, a): ...\nclass B(A): ...\nclass Net(B, nn.Module): ...", ["a"]),
        ("@overload\ndef Net(a): ...\n@t.overload\ndef Net(b): ...\ndef Net(c): ...", ["c"]),
        ("try:\n    import fast\nexcept ImportError:\n    def Net(a): ...", ["a"]),
        (
            "@dataclass\nclass Net:\n    a: int\n    b: 't.ClassVar[int]' = 1\n    c: list = field(default=3)",
            ["a", "c"],
        ),
        ("@dataclasses.dataclass(frozen=True)\nclass Net(nn.Module):\n    a: int = 1\n    x = 3", ["a"]),
        ("@dataclass\nclass Net:\n    a: int\n    def __init__(self, b): ...", ["b"]),
    ],
)
def test_what_is_taken_is_read_off_the_source(source: str, expected: list[str]) -> None:
    assert names(source) == expected


@pytest.mark.parametrize(
    "source",
    [
        "from elsewhere import Net",
        "Net = make()",
        "class Net(Unknown): ...",
        "class Net(nn.Linear): ...",
        "class A:\n    def __init__(self, a): ...\nclass Net(A, Unknown): ...",
        "class Net(metaclass=Unknown): ...",
        "class Net:\n    def __new__(cls, a): ...",
        "class Net:\n    __init__ = Unknown",
        "class Net:\n  if Unknown:\n    def __init__(self, a): ...\n  else:\n    def __init__(self, b): ...",
        "def Net(a): ...\ndef Net(b): ...",
        "class Net(Net): ...",
        "class A(Net): ...\nclass Net(A): ...",
        "class Net(make()): ...",
        "@Unknown\nclass Net:\n    a: int",
        "@Unknown.define(slots=True)\n@dataclass\nclass Net:\n    a: int",
        "@dataclass\nclass Net(Unknown):\n    a: int",
        "@dataclass(kw_only=True)\nclass Net:\n    a: int",
        "@dataclass\nclass Net:\n    a: int = field(default=1, init=False)",
        "@dataclass\nclass Net:\n    _: dataclasses.KW_ONLY\n    a: int",
        "@dataclass\nclass Net:\n    a: dataclasses.InitVar[int]",
        "pass",
    ],
)
def test_what_only_running_would_tell_is_not_guessed(source: str) -> None:
    assert names(source) is None


def test_parameters_have_kinds_defaults_and_lines() -> None:
    found = signature_of("def net(\n  a, __b, c=-1, /,\n  d=(1, 2.5),\n  *, e, f=2 * 3): ...", "net")
    assert found
    assert [(each.name, each.kind, each.default, each.line) for each in found.parameters] == [
        ("a", "positional_only", REQUIRED, 2),
        ("__b", "positional_only", REQUIRED, 2),
        ("c", "positional_only", -1, 2),
        ("d", "positional", (1, 2.5), 3),
        ("e", "keyword", REQUIRED, 4),
        ("f", "keyword", UNKNOWN, 4),
    ]
    assert found.line == 1


@pytest.mark.parametrize("default", ["nn.ReLU", "1e999", "{1}", "b'x'", "1j", "{1: 2}", "[...]", "f'{1}'", "WIDTH"])
def test_a_default_that_yaml_cannot_have_is_unknown(default: str) -> None:
    found = read(f"def Net(a={default}): ...")
    assert found
    assert found.parameters[0].default is UNKNOWN


def test_further_keywords_are_refused() -> None:
    with pytest.raises(ProjectError) as caught:
        signature_of("class Net:\n  def __init__(self, width,\n    **options): ...", "Net")
    assert str(caught.value) == (
        "Net.__init__ takes **options (line 3), so that a misspelt key could not be told; name its parameters one by "
        "one"
    )


def test_what_is_no_python_is_refused() -> None:
    with pytest.raises(ProjectError, match=r"the file of Net:1: not valid Python: expected ':'"):
        signature_of("class Net", "Net")


@pytest.mark.parametrize("parameter", ["a: " + " | ".join(["int"] * 1100), "a: " + "a." * 1100 + "b"])
def test_what_is_nested_too_deeply_is_refused(parameter: str) -> None:
    with pytest.raises(ProjectError, match=r"the file of Net: an expression .*is nested too deeply"):
        read(f"def Net({parameter}): ...")


ACCEPTED = [
    ("int", 3, 3),
    ("float", 3, 3.0),
    ("bool", True, True),
    ("str", "a", "a"),
    ("None", None, None),
    ("list", [1, "a"], [1, "a"]),
    ("list[int]", [1], [1]),
    ("List[float]", [1], [1.0]),
    ("tuple", [1], (1,)),
    ("tuple[int, str]", [1, "a"], (1, "a")),
    ("t.Tuple[int, ...]", [1, 2, 3], (1, 2, 3)),
    ("Sequence[int]", [1], (1,)),
    ("dict", {"a": 1}, {"a": 1}),
    ("dict[str, list[int]]", {"a": [1]}, {"a": [1]}),
    ("Literal['a', 'b']", "b", "b"),
    ("t.Literal[1, None]", None, None),
    ("int | None", None, None),
    ("Optional[int]", None, None),
    ("Union[int, str]", "a", "a"),
    ("'int | list[int]'", [1], [1]),
    ("dict | None", {"a": 1}, {"a": 1}),
    ("dict[str, int] | int", "any", "any"),
    ("Any", {"a": None}, {"a": None}),
    ("nn.Module", 1, 1),
    ("list[nn.Module]", 1, 1),
    ("int | nn.Module", "a", "a"),
    ("dict[int, int]", 1, 1),
    ("tuple[()]", 1, 1),
    ("'no type'", 1, 1),
    ("Unknown[int]", "a", "a"),
    ("Literal[nn]", "a", "a"),
]


@pytest.mark.parametrize(("annotation", "given", "passed"), ACCEPTED)
def test_a_value_of_the_type_is_accepted(annotation: str, given: Any, passed: Any) -> None:
    found = arguments_of(section(f"a: {annotation}").model_validate({"a": given}))
    assert found == {"a": passed}
    assert type(found["a"]) is type(passed)


@pytest.mark.parametrize(
    ("annotation", "given"),
    [
        ("int", True),
        ("int", 1.0),
        ("int", "1"),
        ("float", True),
        ("float", "1"),
        ("bool", 1),
        ("str", 1),
        ("None", 0),
        ("list[int]", ["a"]),
        ("List[int]", 1),
        ("tuple[int, int]", [1]),
        ("tuple[int, ...]", [True]),
        ("Sequence[int]", "a"),
        ("dict[str, int]", {"a": "b"}),
        ("dict[str, int] | None", {"a": "b"}),
        ("Literal['a', 'b']", "c"),
        ("int | None", "a"),
        ("'Optional[int]'", "a"),
        ("Union[int, None]", 1.5),
    ],
)
def test_a_value_of_another_type_is_refused(annotation: str, given: Any) -> None:
    with pytest.raises(ValidationError):
        section(f"a: {annotation}").model_validate({"a": given})


def test_a_type_that_the_file_defines_itself_is_not_checked() -> None:
    source = "class int: ...\ndef Net(a: int): ..."
    found = read(source)
    assert found
    assert section_of(found, "n.py:Net").model_validate({"a": "x"})


def test_keys_are_the_parameters_that_are_not_given_otherwise() -> None:
    made = section("shape, classes, width: int, *, depth=1", skip=2, optional={"width"})
    assert list(made.model_fields) == ["name", "width", "depth"]
    assert arguments_of(made()) == {"depth": 1}
    assert list(section("shape, classes, width", skip={"shape", "width"}).model_fields) == ["name", "classes"]
    assert list(section("a=1, /, b=2").model_fields) == ["name", "b"]


@pytest.mark.parametrize(("given", "kind"), [({}, "missing"), ({"width": 1, "widht": 2}, "extra_forbidden")])
def test_missing_and_misspelt_keys_are_refused(given: dict[str, int], kind: str) -> None:
    with pytest.raises(ValidationError) as caught:
        section("width").model_validate(given)
    assert [error["type"] for error in caught.value.errors()] == [kind]


def test_a_section_has_the_name_that_it_was_made_for() -> None:
    assert section("")().name == "nets.py:Net"
    with pytest.raises(ValidationError):
        section("").model_validate({"name": "nets.py:Other"})


@pytest.mark.parametrize("parameters", ["name", "name='x'", "*, name"])
def test_a_parameter_called_name_is_refused(parameters: str) -> None:
    with pytest.raises(ProjectError) as caught:
        section(parameters)
    line = IMPORTS.count("\n") + 1
    assert str(caught.value) == (f"has a parameter 'name' (line {line}), which is a key of raytorch's own; rename it")
    assert list(section(parameters, skip={"name"}).model_fields) == ["name"]


def test_a_parameter_that_no_key_can_give_is_refused() -> None:
    with pytest.raises(ProjectError, match=r"takes a by position alone \(line \d+\), which no key can give; let it be"):
        section("a, /, b")
    assert list(section("a, /, b", skip=1).model_fields) == ["name", "b"]


ODD = [
    "_hidden",
    "model_config",
    "model_fields",
    "model_x",
    "copy",
    "json",
    "schema",
    "dict",
    "made_of",
    "_",
    "parameter_copy",
]


def test_names_that_sections_have_themselves_are_keys_as_well() -> None:
    made = section(", ".join(f"{name}: int" for name in ODD))
    given = {name: number for number, name in enumerate(ODD)}
    made_of_it = made.model_validate(given)
    assert arguments_of(made_of_it) == given
    assert set(made.model_json_schema()["properties"]) == {"name", *ODD}
    with pytest.raises(ValidationError) as caught:
        made.model_validate(given | {"_hidden": "x"})
    assert caught.value.errors()[0]["loc"] == ("_hidden",)


@pytest.mark.parametrize(
    ("parameter", "default"),
    [
        ("a=1", 1),
        ("a=[1, {'b': None}]", [1, {"b": None}]),
        ("a: float = 1", 1.0),
        ("a: int = None", None),
        ("a: int = 'auto'", "auto"),
        ("a: tuple[int, int] = (1, 2)", (1, 2)),
        ("a: Sequence[int] = [1]", (1,)),
        ("a: 'Literal[\"x\"]' = 'x'", "x"),
    ],
)
def test_a_default_is_written_down_and_read_back_the_same(parameter: str, default: Any) -> None:
    made = section(parameter)
    written = json.loads(json.dumps(arguments_of(made())))
    for each in (made(), made.model_validate(written)):
        assert arguments_of(each) == {"a": default}
        assert type(arguments_of(each)["a"]) is type(default)


@pytest.mark.parametrize("parameter", ["a=(1, 2)", "a: nn.Module = (1,)", "a=nn.ReLU()", "a: int = WIDTH"])
def test_a_default_that_reads_back_otherwise_is_left_to_the_code(parameter: str) -> None:
    made = section(parameter)
    assert arguments_of(made()) == {}
    assert arguments_of(made(a=3)) == {"a": 3}
    assert "default" not in made.model_json_schema()["properties"]["a"]


def test_a_section_is_a_variant_of_a_run_s() -> None:
    class Shipped(Section):
        name: Literal["mlp"] = "mlp"

    made = section("width: int = 8")

    class Run(Section):
        model: Annotated[Shipped | made, Field(discriminator="name")] = Shipped()  # type: ignore[valid-type]

    run = Run.model_validate({"model": {"name": "nets.py:Net", "width": 9}})
    assert run.model_dump(mode="json") == {"model": {"name": "nets.py:Net", "width": 9}}
    assert Run.model_validate({"model": {"name": "mlp"}}).model == Shipped()


@pytest.mark.parametrize("annotation", [annotation for annotation, _, _ in ACCEPTED])
def test_the_json_schema_says_what_messages_can_tell(annotation: str) -> None:
    told = {"integer", "number", "boolean", "string", "array", "object", "null"}
    fragment = section(f"a: {annotation}").model_json_schema()["properties"]["a"]
    for each in fragment.get("anyOf", [fragment]):
        assert {"type", "enum", "const"} & set(each) or set(each) == {"title"}
        assert each.get("type", "null") in told
