"""The files of a saved session: their names, the schema of the JSON one, and reading them with nothing believed."""

import json
import os
import pickle
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from raytorch.errors import SessionError
from raytorch.serialization.file_kinds import read_safetensors_header

FORMAT = 2
SESSION, TENSORS, OWN_CODE = "session.json", "tensors.safetensors", "own_code.pickle"
LARGEST_SESSION = 16 * 2**20
"""Bytes of the JSON file at most: room for some 50,000 parameters."""
_OF_FORMAT_1 = "manifest.json"

Name = Annotated[str, Field(max_length=1000)]
Handle = Annotated[str, Field(pattern=r"^[1-9][0-9]{0,17}$")]


class _Part(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


class SavedObject(_Part):
    """A module, an optimizer or a scheduler."""

    make: Name | int
    """Factory that makes it: a name of the fixed list, or the number of a value of the user's own."""
    args: list[Any]
    kwargs: dict[Name, Any]
    groups: list[list[Any]] = []
    """An optimizer's parameters, group by group."""
    state: Any
    """Entries that its state dict has beside tensors of a module's own."""
    modes: dict[Name, bool]
    """For each module in it whether it is in training mode."""


class TensorOf(_Part):
    tensor: Name


class ObjectOf(_Part):
    object: int


class SavedSession(_Part):
    """All that a rank's handles name, but for the tensors' contents."""

    format: Literal[2]
    objects: list[SavedObject]
    handles: dict[Handle, TensorOf | ObjectOf]
    leaves: dict[Name, bool]
    """Parameters, and other leaves of autograd's, and whether they require grad."""
    parameters: list[Name]
    """Those tensors in no object that are of the class Parameter."""
    complex: list[Name]
    """Those tensors whose elements are kept as pairs of real numbers."""
    generators: list[Name]
    own_code: list[Name]
    """The user's own values, each by its class or function."""


def written(session: SavedSession) -> str:
    """The JSON of a session. Raises SessionError: it is larger than what can be read again."""
    text = json.dumps(session.model_dump(), allow_nan=False, separators=(",", ":"))
    if len(text) > LARGEST_SESSION:
        raise SessionError(
            f"the handles take {len(text):,} bytes of {SESSION}, and at most {LARGEST_SESSION:,} can be read again: "
            "free some of them, or save state dicts"
        )
    return text


def read_session(folder: Path, *, trust: bool = False) -> SavedSession:
    """The content of the folder's session.json.

    Raises SessionError: it is missing, of another format, or damaged; or needs code that is not trusted.
    """
    if (folder / _OF_FORMAT_1).exists() and not (folder / SESSION).exists():
        raise SessionError(
            f"{folder} was saved in the format of an older raytorch, which could run code, and is not read any more: "
            "restore it with the raytorch that saved it, and save the state dicts of what it holds"
        )
    content = _read_json(folder / SESSION)
    if isinstance(content, dict) and content.get("format") != FORMAT:
        raise SessionError(
            f"{folder} says that it is of format {str(content.get('format'))[:20]!r}, and this raytorch reads "
            f"{FORMAT}: restore it with the raytorch that saved it"
        )
    try:
        session = SavedSession.model_validate(content)
    except RecursionError:
        raise _damaged(folder, "its values are nested too deep") from None
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        raise _damaged(folder, f"{SESSION}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    if session.own_code and not trust:
        names = ", ".join(sorted(set(session.own_code)))[:300]
        raise SessionError(
            f"{folder} needs code of its author's own, which can do anything: {names!r} in {OWN_CODE}. Nothing of it "
            "was read. If you know who wrote the file, restore it with trust=True"
        )
    return session


def read_own_code(folder: Path, session: SavedSession) -> list[bytes]:
    """The user's own values, each a pickle, for a caller that trusts them. Raises SessionError."""
    _require_file(folder / OWN_CODE)
    own = pickle.loads((folder / OWN_CODE).read_bytes())  # noqa: S301 - the caller trusts it
    if not isinstance(own, list) or len(own) != len(session.own_code):
        raise SessionError(f"{folder} is damaged: {OWN_CODE} has not the values that it should have; save it again")
    return own


class Tensors:
    """The tensors of a saved session, each read when it is asked for, and their shapes by name."""

    def __init__(self, file: Any, header: dict[str, Any]) -> None:
        self._file = file
        entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
        self.shapes = {name: tuple(entry["shape"]) for name, entry in entries.items()}
        self._offsets = {name: entry["data_offsets"] for name, entry in entries.items()}

    def view(self, name: str) -> Tensor:
        """A tensor's content, on the CPU, where it lies in the file: only for as long as that is open."""
        tensor: Tensor = self._file.get_tensor(name)
        return tensor

    def nbytes(self, names: Iterable[str]) -> int:
        """The bytes of some of the tensors."""
        return sum(end - begin for begin, end in (self._offsets[name] for name in names))


@contextmanager
def open_tensors(folder: Path) -> Iterator[Tensors]:
    """The tensors of a folder, for the block. Raises RaytorchError: they are missing, or not what the header claims."""
    path = folder / TENSORS
    _require_file(path)
    header = read_safetensors_header(path)
    try:
        with safe_open(path, "pt") as file:
            yield Tensors(file, header)
    except SafetensorError as error:
        raise _damaged(folder, str(error)) from None


def _read_json(path: Path) -> Any:
    size = _require_file(path)
    if size > LARGEST_SESSION:
        raise SessionError(f"{path} has {size:,} bytes, and {LARGEST_SESSION:,} is the most: it is no saved session")
    try:
        text = path.read_bytes().decode()
        return json.loads(text, object_pairs_hook=_without_duplicates, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:  # what is no UTF-8 is a ValueError
        raise _damaged(path.parent, str(error)) from None


def _require_file(path: Path) -> int:
    """The size of a plain file. Raises SessionError: it is none; a link could lead anywhere, a pipe would block."""
    try:
        found = os.lstat(path)
    except OSError:
        raise SessionError(f"{path.parent.parent} holds no saved session: {path} is not there") from None
    if not stat.S_ISREG(found.st_mode) or path.parent.is_symlink():
        raise SessionError(f"{path} is a link or no file, which a saved session does not have: copy the file itself")
    return found.st_size


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)[:80]!r} is there twice")
    return content


def _refuse_constant(word: str) -> None:
    raise ValueError(f"{word} is no number of JSON's")


def _damaged(folder: Path, found: str) -> SessionError:
    return SessionError(f"{folder} is damaged, or no saved session: {found[:300]}; save it again")
