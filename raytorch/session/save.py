"""Saving what the handles of a rank name: tensors, modules, optimizers and schedulers.

``session.json`` says how each object is made, of classes in a fixed list and plain values, and ``tensors.safetensors``
holds all tensors; docs/saved-sessions.md describes both. Neither can run code. Classes and functions of the user's own
are in a third file, a pickle, which is not even opened unless the caller trusts it.
"""

import io
import pickle
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from raytorch.errors import SessionError
from raytorch.serialization import save_tensors
from raytorch.serialization.file_kinds import TENSOR_DTYPES
from raytorch.session.module_outline import MOST_LEVELS, MOST_PLACES, extent, outline, tensors_in
from raytorch.session.pickling import Pickler
from raytorch.session.registry import Recipe, Registry
from raytorch.session.saved_files import FORMAT, OWN_CODE, SESSION, TENSORS, SavedObject, SavedSession, written
from raytorch.session.saved_names import MAKERS, STATEFUL, name_of
from raytorch.session.saved_values import Unsaved, encode
from raytorch.training.reproducibility import generator_states


def save(registry: Registry, folder: Path, device: torch.device) -> list[int]:
    """Write what the handles name to a new folder, which is removed again if that fails.

    Returns the handles of what is left out: what is no dense tensor, and was not made by ``module``, ``ddp``,
    ``optimizer`` or ``scheduler`` from tensors, plain values and other things that are saved, or was given other parts
    since.
    """
    folder.mkdir(parents=True)
    try:
        recipes = list(registry.recipes.items())
        names = _Names([made for made, _ in recipes] + [value for _, value in registry])
        for made, recipe in recipes:
            names.add_object(made, recipe)
        handles = {str(handle): name for handle, value in registry if (name := names.of(value))}
        text = written(names.session(handles, generator_states(device)))
        save_tensors(names.contents, folder / TENSORS)
        (folder / SESSION).write_text(text, encoding="utf-8")
        if names.own_values:
            (folder / OWN_CODE).write_bytes(pickle.dumps(names.own_values))
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return [handle for handle, _ in registry if str(handle) not in handles]


class _Names:
    """Names for what is saved, of all ``values`` on the rank: objects, their parameters and buffers, other tensors."""

    def __init__(self, values: list[Any]) -> None:
        self.contents: dict[str, Tensor] = {}
        """Content of the tensors, and their gradients."""
        self.own_values: list[bytes] = []
        """The user's own values, each a pickle."""
        self._own_names: list[str] = []
        self._values = {id(value) for value in values if isinstance(value, STATEFUL)}
        self._in_work: Any = None
        self._objects: list[tuple[Any, dict[str, Any]]] = []
        """Those that can be saved, each with how it is made."""
        self._numbers: dict[int, int] = {}
        self._tensors: dict[int, tuple[str, Tensor]] = {}
        self._complex: list[str] = []
        self._places = 0

    def add_object(self, made: Any, recipe: Recipe) -> None:
        """Number an object, and name the tensors in it that have no name yet, if it can be saved."""
        kept, self._in_work = len(self.own_values), made
        try:
            name = name_of(recipe.factory)
            make = name if name in MAKERS else self.own(recipe.factory)
            args = encode(list(recipe.args), self)
            kwargs = {key: encode(value, self) for key, value in recipe.kwargs.items()}
            places = self._unnamed(made)
            if name in MAKERS:
                self._require_restorable(made, recipe, places)
        except Unsaved:
            del self.own_values[kept:], self._own_names[kept:]
            return
        self._numbers[id(made)] = number = len(self._objects)
        self._objects.append((made, {"make": make, "args": args, "kwargs": kwargs}))
        for place, tensor in places.items():
            self._name(tensor, f"in/{number}/{place}")

    def of(self, value: Any) -> dict[str, Any] | None:
        """The name of what a handle names; None if it cannot be saved."""
        try:
            if isinstance(value, Tensor):
                return {"tensor": self.tensor(value)}
            return {"object": self.object(value)}
        except Unsaved:
            return None

    def tensor(self, tensor: Tensor) -> str:
        """The name of a tensor, which it has from now on. Raises Unsaved."""
        if id(tensor) not in self._tensors:
            self._name(tensor, f"tensor/{len(self._tensors)}")
        return self._tensors[id(tensor)][0]

    def object(self, value: Any) -> int:
        """The number of an object. Raises Unsaved."""
        if id(value) not in self._numbers:
            raise Unsaved("it is made from an object that is not saved")
        return self._numbers[id(value)]

    def own(self, value: Any) -> int:
        """The number of a value of the user's own. Raises Unsaved."""
        buffer = io.BytesIO()
        try:
            _Pickler(buffer, self).dump(value)
        except Exception as error:  # of the user's own code, whatever it raises
            raise Unsaved(str(error)) from None
        self.own_values.append(buffer.getvalue())
        named = value if hasattr(value, "__qualname__") else type(value)
        self._own_names.append(f"{named.__module__}.{named.__qualname__}"[:1000])
        return len(self.own_values) - 1

    def reference(self, value: Any) -> tuple[str, str | int] | None:
        """What stands in a pickle for a value that is saved outside of it; None for what is in the pickle itself."""
        if isinstance(value, Tensor):
            return "tensor", self.tensor(value)
        if id(value) in self._values and value is not self._in_work:
            return "object", self.object(value)
        return None

    def session(self, handles: dict[str, Any], generators: dict[str, Tensor]) -> SavedSession:
        """All that is no tensor's content. Raises SessionError: an object's state cannot be saved."""
        objects = [
            SavedObject(**recipe, groups=self._groups(made), state=self._state(made), modes=_modes(made))
            for made, recipe in self._objects
        ]
        named = list(self._tensors.values())
        for name, tensor in named:
            if tensor.is_leaf and not is_lazy(tensor) and tensor.grad is not None:
                self._keep(f"grad/{name}", tensor.grad)
        for name, state in generators.items():
            self._keep(f"generator/{name}", state)
        return SavedSession.model_validate(
            {
                "format": FORMAT,
                "objects": objects,
                "handles": handles,
                "leaves": {name: tensor.requires_grad for name, tensor in named if _is_leaf(tensor)},
                "parameters": [
                    name for name, tensor in named if isinstance(tensor, nn.Parameter) and name.startswith("tensor/")
                ],
                "complex": self._complex,
                "generators": list(generators),
                "own_code": self._own_names,
            }
        )

    def _unnamed(self, made: Any) -> dict[str, Tensor]:
        """The tensors of a module that have no name yet, by their places in it. Raises Unsaved."""
        places = {place: tensor for place, tensor in tensors_in(made).items() if id(tensor) not in self._tensors}
        for tensor in places.values():
            _require_storable(tensor)
        return places

    def _require_restorable(self, made: Any, recipe: Recipe, places: dict[str, Tensor]) -> None:
        """Refuse a module that has other tensors than it was made with, or more modules than can be restored."""
        if not isinstance(made, nn.Module) or isinstance(made, DistributedDataParallel):
            return
        outlined = self._unnamed(outline(recipe.factory, recipe.args, recipe.kwargs))
        if outlined.keys() != places.keys() or not all(map(_fits, outlined.values(), places.values())):
            raise Unsaved("it was given other parts since it was made")
        places_in_it, depth = extent(made)
        if depth > MOST_LEVELS or self._places + places_in_it > MOST_PLACES:
            raise Unsaved(f"it has more than {MOST_LEVELS} levels, or {MOST_PLACES:,} places of modules with others")
        self._places += places_in_it

    def _groups(self, made: Any) -> list[list[Any]]:
        if not isinstance(made, Optimizer):
            return []
        return [[self._encoded(made, tensor) for tensor in group["params"]] for group in made.param_groups]

    def _state(self, made: Any) -> Any:
        """Return what an object's state dict has beside the tensors that are in a module's places."""
        if isinstance(made, DistributedDataParallel):
            return None  # that of the module in it
        if not isinstance(made, nn.Module):
            return self._encoded(made, made.state_dict())
        there = {id(tensor) for tensor in tensors_in(made).values()}
        others = {name: value for name, value in made.state_dict(keep_vars=True).items() if id(value) not in there}
        return self._encoded(made, others) if others else None

    def _encoded(self, made: Any, value: Any) -> Any:
        try:
            return encode(value, self)
        except Unsaved as unsaved:
            raise SessionError(f"the state of a {type(made).__name__} cannot be saved: {unsaved}") from None

    def _name(self, tensor: Tensor, name: str) -> None:
        _require_storable(tensor)
        self._tensors[id(tensor)] = name, tensor
        if not is_lazy(tensor):
            self._keep(name, tensor)

    def _keep(self, name: str, tensor: Tensor) -> None:
        plain = tensor.detach().resolve_conj().resolve_neg()
        if plain.is_complex():  # of which safetensors does not know all
            plain = torch.view_as_real(plain)
            self._complex.append(name)
        self.contents[name] = plain.cpu().clone(memory_format=torch.contiguous_format)


def _fits(outlined: Tensor, tensor: Tensor) -> bool:
    """Tell whether a tensor can have the place of an outlined one; a lazy one takes any shape."""
    return is_lazy(outlined) or is_lazy(tensor) or outlined.shape == tensor.shape


def _is_leaf(tensor: Tensor) -> bool:
    return isinstance(tensor, nn.Parameter) or (tensor.is_leaf and tensor.requires_grad)


def _modes(made: Any) -> dict[str, bool]:
    return {place: module.training for place, module in made.named_modules()} if isinstance(made, nn.Module) else {}


def _require_storable(tensor: Tensor) -> None:
    """Refuse what safetensors cannot hold. Raises Unsaved."""
    if is_lazy(tensor):
        return
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.dtype not in TENSOR_DTYPES:
        raise Unsaved(f"a {tensor.layout} tensor of {tensor.dtype} cannot be saved")


class _Pickler(Pickler):
    """Pickles what is the user's own, with names for tensors and objects that are saved elsewhere."""

    def __init__(self, file: io.BytesIO, names: _Names) -> None:
        super().__init__(file)
        self._names = names

    def persistent_id(self, value: Any) -> Any:
        return self._names.reference(value)
