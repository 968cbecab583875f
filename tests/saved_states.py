"""Nested state in a folder and back, through the files that a checkpoint has of it."""

from pathlib import Path
from typing import Any

from raytorch.serialization import load_tensors, save_tensors
from raytorch.serialization.nested_state import packed_state, unpacked_state


def save_state(state: dict[str, Any], folder: Path) -> None:
    text, tensors = packed_state(state, folder / "state.json")
    save_tensors(tensors, folder / "state.safetensors")
    (folder / "state.json").write_text(text, encoding="utf-8")


def load_saved_state(folder: Path) -> dict[str, Any]:
    path = folder / "state.json"
    return unpacked_state(path.read_bytes(), load_tensors(folder / "state.safetensors"), path)
