"""What a worker writes of a checkpoint: its parts of all tensors, copied in memory, and in files.

Where models are divided among workers, each writes a file with its pieces of every tensor; what is not divided, and all
that is no tensor, is in those of rank 0.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from raytorch.distributed.shards import is_divided, is_written_here, own_part, place_of
from raytorch.models.networks import Architecture
from raytorch.runs.checkpoint_manifest import STATE_FILE, STRUCTURE_FILE, model_file, tagged
from raytorch.serialization.nested_state import packed_state
from raytorch.serialization.pieces import Piece, piece_path, require_writable, whole, write_pieces
from raytorch.serialization.savable import require_tensors
from raytorch.serialization.whole_models import model_metadata

Models = Mapping[str, tuple[nn.Module, Architecture | None]]
"""By name a model, and what it was built from."""


class Share(NamedTuple):
    """Which of the workers that write a checkpoint together this one is."""

    rank: int = 0
    of: int = 1
    token: str = ""
    """A text that they have in common, and no others."""


class TensorFile(NamedTuple):
    """What a file of tensors is to hold."""

    pieces: Mapping[str, Piece]
    metadata: Mapping[str, str]


@dataclass(frozen=True)
class Content:
    """The files of a checkpoint that a worker writes, by their names."""

    tensors: Mapping[str, TensorFile]
    texts: Mapping[str, str]

    def named_apart(self, tag: str) -> "Content":
        """The same under names that no other checkpoint of the step has, to be beside it."""
        tensors = {tagged(name, tag): file for name, file in self.tensors.items()}
        return Content(tensors, {tagged(name, tag): text for name, text in self.texts.items()})


@dataclass
class Written:
    """What a checkpoint's manifest says of files."""

    files: dict[str, int] = field(default_factory=dict)
    digests: dict[str, str] = field(default_factory=dict)

    def add(self, other: Mapping[str, Mapping[str, Any]]) -> None:
        """Take those of another worker, which come from :func:`dataclasses.asdict`."""
        self.files.update(other["files"])
        self.digests.update(other["digests"])


def content_of(models: Models, state: Mapping[str, Any], share: Share, place: Path) -> Content:
    """What this worker writes of the models and of the rest of a run's state, without a copy of it.

    Raises TypeError for what is neither a tensor nor JSON, and ModelFileError for what could not be read again, both of
    a checkpoint that is to be at ``place``.
    """
    text, tensors = packed_state(state, place / STRUCTURE_FILE)
    every: dict[str, tuple[Mapping[str, Tensor], Mapping[str, str]]] = {STATE_FILE: (tensors, {})}
    for name, (model, architecture) in models.items():
        weights, file = model.state_dict(), model_file(name)
        metadata = model_metadata(len(weights), place / file, architecture) if architecture else {}
        every[file] = weights, metadata
    files: dict[str, TensorFile] = {}
    for file, (every_tensor, about) in every.items():
        require_tensors(every_tensor, place / file)
        pieces = {name: piece for name, tensor in every_tensor.items() if (piece := _own_piece(tensor, share))}
        if pieces or not share.rank:
            path = place / file if share.of == 1 else piece_path(place / file, share.rank, share.of)
            require_writable(pieces, path, about)
            files[path.name] = TensorFile(pieces, about)
    return Content(files, {} if share.rank else {STRUCTURE_FILE: text})


def _own_piece(tensor: Tensor, share: Share) -> Piece | None:
    """What this worker writes of a tensor."""
    if not is_divided(tensor):
        return None if share.rank else whole(tensor)
    shape, offsets = place_of(tensor)
    if not prod(shape):  # of which nobody has a part
        return None if share.rank else whole(torch.empty(shape, dtype=tensor.dtype, device="cpu"))
    own = own_part(tensor)
    return Piece(own, shape, offsets) if own.numel() and is_written_here(tensor) else None


class HostCopies:
    """Copies of tensors in this host's memory, pinned where they come from a GPU, which the next copies use again."""

    def __init__(self) -> None:
        self._memory: dict[tuple[str, str], Tensor] = {}

    @torch.no_grad()
    def of(self, content: Content) -> Content:
        """The same of tensors that nobody changes until the next call."""
        memory: dict[tuple[str, str], Tensor] = {}
        tensors: dict[str, TensorFile] = {}
        for file, (pieces, metadata) in content.tensors.items():
            copied = {name: self._copied((file, name), piece, memory) for name, piece in pieces.items()}
            tensors[file] = TensorFile(copied, metadata)
        if any(piece.tensor.is_cuda for file in content.tensors.values() for piece in file.pieces.values()):
            torch.cuda.synchronize()
        self._memory = memory
        return replace(content, tensors=tensors)

    def _copied(self, key: tuple[str, str], piece: Piece, memory: dict[tuple[str, str], Tensor]) -> Piece:
        tensor, own = piece.tensor, self._memory.get(key)
        if own is None or (own.shape, own.dtype, own.stride()) != (tensor.shape, tensor.dtype, tensor.stride()):
            own = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda, requires_grad=False)
        memory[key] = own.copy_(tensor, non_blocking=True)
        return piece._replace(tensor=own)


def write_files(content: Content, folder: Path, save: str) -> Written:
    """Write the files into a local folder; ``save`` is a text that those of the checkpoint have in common."""
    written = Written()
    for name, file in content.tensors.items():
        head = write_pieces(file.pieces, folder / name, save, file.metadata)
        written.files[name] = (folder / name).stat().st_size
        written.digests[name] = hashlib.sha256(head).hexdigest()
    for name, text in content.texts.items():
        (folder / name).write_text(text, encoding="utf-8")
        written.files[name] = (folder / name).stat().st_size
        written.digests[name] = hashlib.sha256(text.encode()).hexdigest()
    return written
