"""Structure-aware damage to the files that raytorch reads back, drawn by Hypothesis."""

import json
import os
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import yaml
from hypothesis import strategies as st

HUGE = 10**400
NESTED: Any = []
for _ in range(200):
    NESTED = [NESTED]

VALUES = st.one_of(
    st.sampled_from(
        [
            *(None, True, False, 0, -1, 1, 2**31, 2**63, -(2**63), HUGE, 0.5, -0.5, 1e308, float("inf"), float("nan")),
            *("", " ", "0", "1e-3", "..", "../outside/precious", "/etc/passwd", "checkpoint_00000009", "a/../../b"),
            *("\x00", "\ud800", "\x1b]0;owned\x07", "[/red]", "$x^$", "größer", "nan", "2021-99-99", "9" * 5000),
            *("x" * 100_000, [], {}, [[]], [None], {"": None}, {"a": {"b": {}}}, NESTED, [0] * 20_000),
            *("0001-01-01T00:00:00", "9999-12-31T23:59:59+00:00", "2026-01-01T00:00:00", "running", "finished"),
        ]
    ),
    st.integers(),
    st.floats(),
    st.text(max_size=20),
    st.lists(st.integers(), max_size=3),
)
KEYS = st.one_of(
    st.sampled_from(
        [
            "",
            "files",
            "../outside/precious",
            "/x",
            "0",
            "-1",
            "state",
            "step",
            "\x00",
            "$tensor",
            "name",
            "[/red]",
            "$x^$",
        ]
    ),
    st.text(max_size=10),
)
RAW = [
    b"",
    b"\x00",
    b"\xff\xfe",
    b"\xef\xbb\xbf",
    b"null",
    b"[]",
    b"{}",
    b'""',
    b"[" * 100_000,
    b'{"a":' * 50_000,
    b"9" * 10_000,
    b"1e999999",
    b"\n" * 1000,
    b'{"step": 1}',
    b"a: &a [*a]",
    b"&a {<<: *a}",
    b"x: &x [a, a]\ny: &y [*x, *x]\nz: &z [*y, *y, *y]",
    b"!!python/object/apply:os.system ['true']",
    b"%YAML 9.9\n---\n",
    b"x: 2021-99-99\ny: 010\nz: 1:1:1",
    b"caf\xe9: 1",
    b"\xc2\x85\xe2\x80\xa8",
]
"""Whole files."""

Draw = Callable[[st.SearchStrategy[Any]], Any]


def damage_file(draw: Draw, path: Path, outside: Path) -> None:
    """Damage one file: in its structure, in its bytes, or as a whole."""
    content = path.read_bytes()
    kind = draw(st.sampled_from(["structure"] * 12 + ["bytes"] * 4 + ["raw", "replaced"]))
    if kind == "structure" and path.suffix in (".json", ".yaml", ".jsonl"):
        path.write_bytes(_restructured(draw, path.suffix, content))
    elif kind == "raw":
        path.write_bytes(draw(st.sampled_from(RAW)))
    elif kind == "replaced":
        _replace(draw(st.sampled_from(range(7))), path, outside)
    else:
        path.write_bytes(_spoilt(draw, content))


def damage_tree(draw: Draw, tree: Any) -> Any:
    """A copy of plain data with one to three places changed."""
    tree = json.loads(json.dumps(tree))
    for _ in range(draw(st.integers(1, 3))):
        tree = _changed(draw, tree)
    return tree


def _value(draw: Draw) -> Any:
    return deepcopy(draw(VALUES))  # the next change may be inside it


def _changed(draw: Draw, tree: Any) -> Any:
    """Change one place of a tree, which is changed itself."""
    if not isinstance(tree, dict | list) or not tree or draw(st.integers(0, 9)) == 0:
        return _value(draw)
    places = list(tree) if isinstance(tree, dict) else list(range(len(tree)))
    place = draw(st.sampled_from(places[:200]))
    match draw(st.sampled_from(["inside"] * 4 + ["replace"] * 3 + ["delete", "add", "wrap", "rename", "swap"])):
        case "inside":
            tree[place] = _changed(draw, tree[place])
        case "replace":
            tree[place] = _value(draw)
        case "delete":
            del tree[place]
        case "wrap":
            tree[place] = draw(st.sampled_from([[tree[place]], {"a": tree[place]}, str(tree[place])]))
        case "swap":
            other = draw(st.sampled_from(places[:200]))
            tree[place], tree[other] = tree[other], tree[place]
        case _ if isinstance(tree, dict):
            tree[draw(KEYS)] = _value(draw)
        case _:
            tree.append(_value(draw))
    return tree


def _restructured(draw: Draw, suffix: str, content: bytes) -> bytes:
    if suffix == ".jsonl":
        lines = content.splitlines()
        for _ in range(draw(st.integers(1, 3))):
            number = draw(st.integers(0, len(lines) - 1))
            lines[number] = _restructured(draw, ".json", lines[number])
        return b"\n".join(lines) + b"\n"
    tree = damage_tree(draw, json.loads(content) if suffix == ".json" else yaml.safe_load(content))
    # JSON is YAML as well, but not one with numbers as people write them.
    dumped = yaml.safe_dump(tree, allow_unicode=False) if suffix == ".yaml" else json.dumps(tree)
    return dumped.encode(errors="surrogatepass")


def _spoilt(draw: Draw, content: bytes) -> bytes:
    place = draw(st.integers(0, len(content)))
    piece = draw(st.one_of(st.binary(max_size=8), st.sampled_from([b"\xff", b'"', b"{", b"\n", b"\x00", b"9" * 30])))
    match draw(st.sampled_from(["cut", "insert", "overwrite", "repeat"])):
        case "cut":
            return content[:place]
        case "insert":
            return content[:place] + piece + content[place:]
        case "overwrite":
            return content[:place] + piece + content[place + len(piece) :]
        case _:
            return content + content[place:]


def _replace(how: int, path: Path, outside: Path) -> None:
    """Put something else than a file in its place, or one of a size that must not be read."""
    path.unlink()
    match how:
        case 0:
            path.mkdir()
        case 1:
            os.mkfifo(path)
        case 2:
            path.symlink_to(outside / "precious")
        case 3:
            path.symlink_to(outside)
        case 4:
            path.symlink_to("/dev/zero")
        case 5:
            with path.open("wb") as file:
                file.truncate(10 * 2**30)  # of zeros, which take no room on the disk
        case _:
            pass
