"""Weights that a new run begins with: read from a file or another run, and what of them fits."""

import hashlib
import logging
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from raytorch.config import ModelKeys
from raytorch.distributed.collectives import all_gather
from raytorch.distributed.shards import state_like
from raytorch.errors import ConfigError, ModelFileError
from raytorch.runs.checkpoint_manifest import MODEL_FILE
from raytorch.runs.storage import open_storage, translating_storage_errors
from raytorch.runs.weights_source import find_checkpoint, is_weights_file
from raytorch.serialization import load_weights
from raytorch.serialization.pieces import piece_paths
from raytorch.system.safe_text import without_secrets
from raytorch.system.temporary_folders import temporary_folder
from raytorch.training.saved_state import model_of_checkpoint

MOST_NAMES = 10
"""Names that an error or a line of a log lists."""
MOST_RECORDED = 1_000
"""Names of a kind that the summary lists."""

logger = logging.getLogger("raytorch")


def begin_with_weights(model: nn.Module, keys: ModelKeys, device: torch.device) -> dict[str, Any] | None:
    """Give a new run's model the weights that ``model.weights`` names in full; all workers call it together.

    Returns:
        What the run's summary tells of them: ``source``, ``sha256``, and the names ``missing`` from them,
        ``unexpected`` in them and ``of_other_shape``; None if there are none to begin with.

    Raises:
        ConfigError: They are not there, not the same for all workers, not as ``strict`` asks, or none of them fits.
        ModelFileError: The file is damaged, or holds more than tensors.
    """
    if keys.weights is None:
        return None
    with _local_file(keys.weights) as (path, source):
        try:
            given = load_weights(path)
        except ModelFileError as error:
            raise ModelFileError(f"model.weights: {error}") from None
        digest = hashlib.sha256()
        for each in piece_paths(path):
            with each.open("rb") as file:
                while block := file.read(2**20):
                    digest.update(block)
    _require_same(digest.digest(), source, device)
    odd = _load(model, given)
    _require_fit(odd, source, given, strict=keys.strict)
    logger.info("began with the weights of %s", source)
    for what, names in odd.items():
        if names:
            logger.warning("weights of %s: %s", source, _told(what, names))
    return {"source": source, "sha256": digest.hexdigest(), **{what: _recorded(names) for what, names in odd.items()}}


@contextmanager
def _local_file(weights: str) -> Iterator[tuple[Path, str]]:
    """The file of weights, here for as long as the block runs, and what it is called in records."""
    if not is_weights_file(weights):
        folder, name = find_checkpoint(weights)
        with model_of_checkpoint(folder, name) as fetched:
            yield fetched, f"{folder}/{name}/{MODEL_FILE}"
    elif "://" not in weights:
        yield Path(weights), weights
    else:
        shown = without_secrets(weights)
        filesystem, path = open_storage(weights)
        with temporary_folder() as copy, translating_storage_errors(shown):
            local = copy / Path(path).name
            try:
                with filesystem.open_input_stream(path) as source, local.open("xb") as target:
                    shutil.copyfileobj(source, target)
            except FileNotFoundError:
                raise ConfigError(f"model.weights: {shown}: no such file") from None
            yield local, shown


def _require_same(digest: bytes, source: str, device: torch.device) -> None:
    """Refuse a file that is not the same for every worker. Raises ConfigError."""
    rows = all_gather(torch.tensor(list(digest), dtype=torch.uint8, device=device))
    for rank, row in enumerate(rows.tolist()):
        if row != rows[0].tolist():
            raise ConfigError(
                f"model.weights: {source} has another content for rank {rank} than for rank 0; give a file that is "
                "the same on all nodes"
            )


def _load(model: nn.Module, given: dict[str, Tensor]) -> dict[str, Any]:
    """Give the model the tensors that fit; what does not, by kind."""
    own = {name: value for name, value in model.state_dict().items() if isinstance(value, Tensor)}
    misfits = {
        name: f"{tuple(value.shape)}, not {tuple(own[name].shape)}"
        for name, value in given.items()
        if name in own and own[name].shape != value.shape
    }
    fitting = {name: value for name, value in given.items() if name not in misfits}
    missing, unexpected = model.load_state_dict(state_like(model, fitting), strict=False)
    return {
        "missing": [name for name in missing if name not in misfits],
        "unexpected": list(unexpected),
        "of_other_shape": misfits,
    }


def _require_fit(odd: dict[str, Any], source: str, given: dict[str, Tensor], *, strict: bool) -> None:
    problems = "; ".join(_told(what, names) for what, names in odd.items() if names)
    outer = next(iter(given), "").partition(".")[0]
    inner = {name.partition(".")[2] for name in given if name.partition(".")[0] == outer}
    if len(inner) == len(given) and not inner.isdisjoint(odd["missing"]):
        problems += f" (all are of a module {outer!r}: save the state dict of that alone)"
    if strict and problems:
        raise ConfigError(
            f"model.weights: {source} is not of this model: {problems}; give weights of the same model, or take what "
            "fits with model.strict: false"
        )
    if len(odd["unexpected"]) + len(odd["of_other_shape"]) == len(given):
        raise ConfigError(f"model.weights: nothing in {source} fits this model{f': {problems}' if problems else ''}")


def _recorded(names: Any) -> Any:
    """The names of a kind as the summary has them, of very many the first."""
    if len(names) <= MOST_RECORDED:
        return names
    return dict(list(names.items())[:MOST_RECORDED]) if isinstance(names, dict) else names[:MOST_RECORDED]


def _told(what: str, names: Iterable[str] | dict[str, str]) -> str:
    """So many names as a person reads."""
    each = [f"{name} {shape}" for name, shape in names.items()] if isinstance(names, dict) else list(names)
    rest = f", and {len(each) - MOST_NAMES} more" if len(each) > MOST_NAMES else ""
    return f"{what.replace('_', ' ')}: {', '.join(each[:MOST_NAMES])}{rest}"
