"""What the handles of a rank name, in files: tensors, modules, optimizers and schedulers.

Tensors are safetensors; states are what ``torch.load(weights_only=True)`` reads. How an object was made, by its class
and arguments, is a pickle, which is read back with nothing allowed in it but classes of PyTorch's and raytorch's own,
unless the caller trusts the file.
"""

import io
import json
import pickle
from pathlib import Path
from typing import Any

import cloudpickle
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from raytorch.distributed import data_parallel
from raytorch.errors import SessionError
from raytorch.registry import Recipe, Registry
from raytorch.reproducibility import generator_states, set_generator_states

_MANIFEST, _TENSORS, _STATES, _RECIPES = "manifest.json", "tensors.safetensors", "states.pt", "recipes.pkl"
STATEFUL = (nn.Module, Optimizer, LRScheduler)
"""Types whose objects have a state dict, and are saved."""
_PACKAGES = ("torch", "torchvision", "raytorch")
_PLAIN_CLASSES = (torch.device, torch.Size, complex, set, frozenset, slice, range)


def save(registry: Registry, folder: Path, device: torch.device) -> list[int]:
    """Write what the handles name to a new folder.

    What autograd computed is saved without its history; a leaf with ``requires_grad`` and its gradient.

    Returns:
        The handles of what is left out: what is no tensor, and was not made by ``module``, ``ddp``, ``optimizer`` or
        ``scheduler`` from tensors, plain values and other things that are saved.
    """
    folder.mkdir(parents=True)
    handles = {id(value): str(handle) for handle, value in registry}
    names = _Names()
    recipes: dict[str, bytes] = {}
    for number, (made, recipe) in enumerate(registry.recipes.items()):
        pickled = names.pickle(recipe)
        if pickled:
            name = handles.get(id(made), f"unnamed-{number}")  # another object may need it
            names.add_object(made, name)
            recipes[name] = pickled
    tensors = {str(handle): names.of_tensor(value) for handle, value in registry if isinstance(value, Tensor)}
    torch.save({"objects": names.states(), "generators": generator_states(device)}, folder / _STATES)
    (folder / _RECIPES).write_bytes(pickle.dumps(recipes))
    safetensors.torch.save_file(names.contents(), folder / _TENSORS)
    manifest = {
        "format": 1,
        "tensors": tensors,
        "objects": [name for name in recipes if name.isdigit()],
        "leaves": names.leaves(),
        "frozen": names.frozen(),
        "modes": names.modes(),
    }
    (folder / _MANIFEST).write_text(json.dumps(manifest))
    return [handle for handle, _ in registry if not {str(handle)} & (recipes.keys() | tensors.keys())]


def saved_handles(folder: Path) -> list[int]:
    """The handles of what :func:`save` wrote. Raises SessionError: the folder holds no such files."""
    manifest = _read_manifest(folder)
    return [
        int(name) for name in (*manifest["tensors"], *manifest.get("objects", ()))
    ]  # older snapshots name no objects


def _read_manifest(folder: Path) -> dict[str, Any]:
    try:
        manifest: dict[str, Any] = json.loads((folder / _MANIFEST).read_text())
    except FileNotFoundError:
        raise SessionError(f"{folder} holds no saved session") from None
    return manifest


def restore(registry: Registry, folder: Path, device: torch.device, *, trust: bool = False) -> list[int]:
    """Put what :func:`save` wrote under its handles again; returns these.

    Raises:
        SessionError: The folder holds no such files; or ones that can run code, without ``trust``.
    """
    manifest = _read_manifest(folder)
    found = _Found(safetensors.torch.load_file(folder / _TENSORS, device=str(device)), manifest)
    recipes = _Unpickler((folder / _RECIPES).read_bytes(), found, trust=False).load()
    for name, pickled in recipes.items():
        recipe = Recipe(*_Unpickler(pickled, found, trust=trust).load())
        found.objects[name] = made = recipe.make(device)
        found.put_requires_grad(name)  # at once, as data parallelism is over the parameters that require it
        registry.recipes[made] = recipe
    states = torch.load(folder / _STATES, map_location="cpu", weights_only=True)
    for name, state in states["objects"].items():
        found.objects[name].load_state_dict(state)
    found.put_gradients()
    found.put_modes()
    values = {int(name): made for name, made in found.objects.items() if name.isdigit()}
    values |= {int(handle): found.tensor(name) for handle, name in manifest["tensors"].items()}
    for handle, value in values.items():
        registry.put(handle, value)
    set_generator_states(states["generators"], device)
    return list(values)


class _Names:
    """Names for what is saved: for objects, for their parameters and buffers, and for other tensors."""

    def __init__(self) -> None:
        self._objects: dict[str, Any] = {}
        self._tensors: dict[str, Tensor] = {}
        self._names: dict[int, str] = {}

    def add_object(self, made: Any, name: str) -> None:
        """Name an object, and the tensors in it that have no name yet."""
        self._objects[name] = made
        self._names[id(made)] = f"object/{name}"
        if isinstance(made, nn.Module):
            for place, tensor in [*made.named_parameters(), *made.named_buffers()]:
                self._add_tensor(tensor, f"in/{name}/{place}")

    def of_tensor(self, tensor: Tensor) -> str:
        """The name of a tensor, which it has from now on."""
        return self._add_tensor(tensor, f"tensor/{len(self._tensors)}")

    def pickle(self, recipe: Recipe) -> bytes | None:
        """A recipe with names for tensors and objects; None if it needs something that is not saved."""
        buffer = io.BytesIO()
        try:
            _Pickler(buffer, self._persistent).dump((recipe.factory, recipe.args, recipe.kwargs))
        except (SessionError, pickle.PicklingError, TypeError):
            return None
        return buffer.getvalue()

    def states(self) -> dict[str, Any]:
        """The objects' state dicts; a data-parallel module's is that of the module in it."""
        return {
            name: made.state_dict()
            for name, made in self._objects.items()
            if not isinstance(made, DistributedDataParallel)
        }

    def contents(self) -> dict[str, Tensor]:
        """Contents of the tensors that are in no object, and all gradients."""
        kept = {name: tensor for name, tensor in self._tensors.items() if name.startswith("tensor/")}
        for name, tensor in self._tensors.items():
            if tensor.is_leaf and tensor.grad is not None:
                kept[f"grad/{name}"] = tensor.grad
        return {
            name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in kept.items()
        }

    def leaves(self) -> list[str]:
        """The names of those that are leaves and require grad."""
        return [name for name, tensor in self._tensors.items() if tensor.requires_grad and tensor.is_leaf]

    def frozen(self) -> list[str]:
        """The names of the objects' parameters that do not require grad."""
        parameters = ((name, tensor) for name, tensor in self._tensors.items() if isinstance(tensor, nn.Parameter))
        return [name for name, parameter in parameters if name.startswith("in/") and not parameter.requires_grad]

    def modes(self) -> dict[str, dict[str, bool]]:
        """For each object that is a module, which modules in it are in training mode."""
        return {
            name: {place: module.training for place, module in made.named_modules()}
            for name, made in self._objects.items()
            if isinstance(made, nn.Module)
        }

    def _add_tensor(self, tensor: Tensor, name: str) -> str:
        if id(tensor) not in self._names:
            self._names[id(tensor)], self._tensors[name] = name, tensor
        return self._names[id(tensor)]

    def _persistent(self, value: Any) -> str | None:
        if isinstance(value, Tensor):
            return self.of_tensor(value)
        if isinstance(value, STATEFUL):
            if id(value) not in self._names:
                raise SessionError("it is made from an object that is not saved")
            return self._names[id(value)]
        return None


class _Found:
    """What names stand for when a snapshot is read."""

    def __init__(self, contents: dict[str, Tensor], manifest: dict[str, Any]) -> None:
        self.objects: dict[str, Any] = {}
        self._contents = contents
        self._modes: dict[str, dict[str, bool]] = manifest.get("modes", {})  # older snapshots have none
        self._requires_grad = dict.fromkeys(manifest["leaves"], True) | dict.fromkeys(manifest.get("frozen", ()), False)
        for name in manifest["leaves"]:
            if name in contents:
                contents[name].requires_grad_()

    def tensor(self, name: str) -> Tensor:
        """The tensor of that name."""
        if name in self._contents:
            return self._contents[name]
        _, owner, place = name.split("/", 2)
        inner, _, last = place.rpartition(".")
        tensor: Tensor = getattr(self.objects[owner].get_submodule(inner), last)
        return tensor

    def resolve(self, name: str) -> Any:
        """What a persistent id stands for."""
        kind, _, rest = name.partition("/")
        return self.objects[rest] if kind == "object" else self.tensor(name)

    def put_requires_grad(self, owner: str) -> None:
        """Let an object's tensors require grad, or not, as they did."""
        for name, requires_grad in self._requires_grad.items():
            if name.startswith(f"in/{owner}/"):
                self.tensor(name).requires_grad = requires_grad

    def put_modes(self) -> None:
        """Give modules the training or evaluation mode that they had."""
        for name, modes in self._modes.items():
            for place, module in self.objects[name].named_modules():
                module.training = modes.get(place, module.training)

    def put_gradients(self) -> None:
        """Give leaves the gradients that they had."""
        for name, gradient in self._contents.items():
            if name.startswith("grad/"):
                self.tensor(name.removeprefix("grad/")).grad = gradient


class _Pickler(cloudpickle.Pickler):
    """Pickles arguments, with names for tensors and objects."""

    def __init__(self, file: io.BytesIO, persistent: Any) -> None:
        super().__init__(file)
        self._persistent = persistent

    def persistent_id(self, value: Any) -> Any:
        """The name of what is saved elsewhere."""
        return self._persistent(value)


class _Unpickler(pickle.Unpickler):
    """Reads arguments back; without trust it makes nothing but PyTorch's and raytorch's own objects."""

    def __init__(self, pickled: bytes, found: _Found, *, trust: bool) -> None:
        super().__init__(io.BytesIO(pickled))
        self._found, self._trust = found, trust

    def persistent_load(self, name: Any) -> Any:
        """What a name stands for."""
        return self._found.resolve(name)

    def find_class(self, module: str, name: str) -> Any:
        """A class or function that the pickle names. Raises SessionError for one that needs trust."""
        if self._trust:
            return super().find_class(module, name)
        if module == "builtins" or module.partition(".")[0] in _PACKAGES:
            value = super().find_class(module, name)
            if isinstance(value, torch.dtype | torch.layout | torch.memory_format) or value is data_parallel:
                return value
            if isinstance(value, type) and issubclass(value, (*STATEFUL, *_PLAIN_CLASSES)):
                return value
        raise SessionError(
            f"the saved session makes an object by {module}.{name}, which can run any code; if you know who wrote the "
            "file, restore it with trust=True"
        )
