"""Making again, under the same handles, what :mod:`raytorch.session.save` saved.

What the files say is not believed: names count in fixed tables alone, and sizes are held against the bytes that are
there before anything is made.
"""

import inspect
import io
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from raytorch.distributed import data_parallel
from raytorch.errors import RaytorchError, SessionError
from raytorch.session.module_outline import MOST_LEVELS, MOST_PLACES, Bounds, WithinBounds, extent, outline, tensors_in
from raytorch.session.registry import Recipe, Registry
from raytorch.session.saved_files import SavedObject, SavedSession, Tensors, open_tensors, read_own_code, read_session
from raytorch.session.saved_names import MAKERS, STATEFUL, name_of
from raytorch.session.saved_values import decode
from raytorch.training.reproducibility import generator_states, set_generator_states


def look(folder: Path, *, trust: bool = False) -> tuple[list[int], int]:
    """The handles of what was saved, and how many of the objects are data-parallel, which all ranks make together.

    Raises SessionError: the folder holds no such files; or ones that can run code, without ``trust``.
    """
    session = read_session(folder, trust=trust)
    shared = [saved for saved in session.objects if saved.make == name_of(data_parallel)]
    return [int(handle) for handle in session.handles], len(shared)


def restore(registry: Registry, folder: Path, device: torch.device, *, trust: bool = False) -> list[int]:
    """Put what was saved under its handles again, all of it or nothing; returns the handles.

    Raises SessionError: see :func:`look`; or the files do not fit together.
    """
    session = read_session(folder, trust=trust)
    own = read_own_code(folder, session) if session.own_code else []
    with _keeping_generators(device):
        with open_tensors(folder) as tensors, _explaining(folder):
            count, nbytes = len(tensors.shapes), tensors.nbytes(tensors.shapes)
            bounds = None if own else Bounds(tensors=count, nbytes=nbytes, modules=0)  # code that is trusted has none
            with WithinBounds(bounds):
                found = _Found(session, tensors, own, device)
                found.make_objects(registry)
                found.load_states()
                found.put_gradients()
                values = found.values()
                set_generator_states(found.generators(), device)
        try:
            for handle, value in values.items():
                registry.put(handle, value)
        except BaseException:
            registry.free(values)
            raise
    return list(values)


@contextmanager
def _keeping_generators(device: torch.device) -> Iterator[None]:
    """Leave the random numbers as they were before the block if that fails: modules draw some when they are made."""
    before = generator_states(device)
    try:
        yield
    except BaseException:
        set_generator_states(before, device)
        raise


@contextmanager
def _explaining(folder: Path) -> Iterator[None]:
    """Tell errors of PyTorch about what the files ask for as the files' fault."""
    try:
        yield
    except RaytorchError as error:
        raise SessionError(f"{folder} cannot be restored: {error}") from None
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".partition("\n")[0][:300]
        raise SessionError(f"{folder} cannot be restored: {reason}") from error


class _Found:
    """Objects that names stand for, while a session is restored."""

    def __init__(self, session: SavedSession, tensors: Tensors, own: list[bytes], device: torch.device) -> None:
        self._session, self._tensors, self._device = session, tensors, device
        self._own = own
        self._objects: list[Any] = []
        self._known: dict[str, Tensor] = {}
        self._ids: set[int] = set()
        self._places = 0
        self._complex, self._parameters = set(session.complex), set(session.parameters)
        self._of_object: dict[str, list[str]] = {}
        for name in tensors.shapes:
            kind, _, rest = name.partition("/")
            if kind == "in":
                self._of_object.setdefault(rest.partition("/")[0], []).append(name)

    def tensor(self, name: str) -> Tensor:
        """The tensor of that name. Raises SessionError."""
        if name not in self._known:
            if not name.startswith("tensor/"):
                raise SessionError(f"{name[:80]!r} names no tensor")
            tensor, requires_grad = self.content(name), self._session.leaves.get(name, False)
            if name in self._parameters:
                self._know(name, nn.Parameter(tensor, requires_grad))
            else:
                self._know(name, tensor.requires_grad_(requires_grad))
        return self._known[name]

    def content(self, name: str) -> Tensor:
        """Read what the file has under a name, on the device, in memory of its own. Raises SessionError."""
        return self._view(name).clone().to(self._device)

    def object(self, number: int) -> Any:
        if not 0 <= number < len(self._objects):
            raise SessionError(f"object {number} is not there, or not yet")
        return self._objects[number]

    def own(self, number: int) -> Any:
        if not 0 <= number < len(self._own):
            raise SessionError(f"own value {number} is not there")
        return _Unpickler(self._own[number], self).load()

    def make_objects(self, registry: Registry) -> None:
        for number, saved in enumerate(self._session.objects):
            factory, args = self._maker(saved.make), tuple(decode(saved.args, self))
            kwargs = {name: decode(value, self) for name, value in saved.kwargs.items()}
            recipe = _without_whole_factor(Recipe(factory, args, kwargs))
            self._require_sizes(number, saved, recipe)
            made = recipe.make(self._device)
            if not isinstance(made, STATEFUL):
                raise SessionError(f"object {number} was made as a {type(made).__name__}")
            self._objects.append(made)
            self._take_places(number, made)
            if isinstance(made, Optimizer):
                for group in saved.groups[len(made.param_groups) :]:
                    made.add_param_group({"params": decode(group, self)})
            registry.recipes[made] = recipe

    def load_states(self) -> None:
        """Give all objects the contents, states and modes that they had."""
        for name, tensor in self._known.items():
            if name.startswith("in/") and not is_lazy(tensor):
                with torch.no_grad():
                    tensor.copy_(self._view(name))
        for made, saved in zip(self._objects, self._session.objects, strict=True):
            state = decode(saved.state, self)
            if state is not None:
                _load_state(made, state)
            if isinstance(made, nn.Module):
                for place, module in made.named_modules():
                    module.training = saved.modes.get(place, module.training)

    def put_gradients(self) -> None:
        for name in self._tensors.shapes:
            if name.startswith("grad/"):
                self.tensor(name.removeprefix("grad/")).grad = self.content(name)

    def values(self) -> dict[int, Any]:
        return {int(handle): decode(name.model_dump(), self) for handle, name in self._session.handles.items()}

    def generators(self) -> dict[str, Tensor]:
        return {name: self._view(f"generator/{name}").clone() for name in self._session.generators}

    def _view(self, name: str) -> Tensor:
        if name not in self._tensors.shapes:
            raise SessionError(f"tensor {name[:80]!r} is not there")
        content = self._tensors.view(name)
        return torch.view_as_complex(content) if name in self._complex else content

    def _maker(self, make: str | int) -> Any:
        if isinstance(make, int):
            return self.own(make)
        if make not in MAKERS:
            raise SessionError(f"{make[:80]!r} is not among the classes that a saved session may name")
        return MAKERS[make]

    def _require_sizes(self, number: int, saved: SavedObject, recipe: Recipe) -> None:
        """Hold what a module of the fixed list would have against what the file has, before it is made."""
        is_module = isinstance(recipe.factory, type) and issubclass(recipe.factory, nn.Module)
        if isinstance(saved.make, int) or not (is_module or saved.make.startswith("raytorch.models.")):
            return
        names = self._of_object.get(str(number), [])
        bounds = Bounds(tensors=len(names), nbytes=self._tensors.nbytes(names), modules=len(saved.modes))
        outlined = outline(recipe.factory, recipe.args, recipe.kwargs, bounds)
        places, depth = extent(outlined)
        self._places += places
        if self._places > MOST_PLACES or depth > MOST_LEVELS:
            raise SessionError(
                f"object {number} has modules in {places:,} places and {depth} levels; {MOST_PLACES:,} of all objects "
                f"and {MOST_LEVELS} are the most"
            )
        self._require_same(number, outlined)

    def _require_same(self, number: int, made: Any) -> dict[str, Tensor]:
        """The tensors that are an object's own, by name. Raises SessionError: the file has not just these."""
        own = {f"in/{number}/{place}": t for place, t in tensors_in(made).items() if id(t) not in self._ids}
        there = set(self._of_object.get(str(number), []))
        needed = {name for name, tensor in own.items() if not is_lazy(tensor)}
        for name in sorted((there - own.keys()) | (needed - there)):
            raise SessionError(f"tensor {name[:80]!r} is {'in no object' if name in there else 'missing'}")
        for name in sorted(needed):
            if tuple(own[name].shape) != self._shape(name):
                raise SessionError(f"{name[:80]!r} is of shape {self._shape(name)}, not {tuple(own[name].shape)}")
        return own

    def _shape(self, name: str) -> tuple[int, ...]:
        shape = self._tensors.shapes[name]
        return shape[:-1] if name in self._complex else shape

    def _take_places(self, number: int, made: Any) -> None:
        """Name a module's tensors, and let them be of the kind that they were, before others are made of them."""
        for name, tensor in self._require_same(number, made).items():
            if name in self._tensors.shapes:
                content = self._view(name)
                if is_lazy(tensor):
                    tensor.materialize(content.shape, device=self._device, dtype=content.dtype)
                if tensor.dtype != content.dtype:
                    tensor.data = self.content(name)
            self._know(name, tensor)
            tensor.requires_grad = self._session.leaves.get(name, tensor.requires_grad)

    def _know(self, name: str, tensor: Tensor) -> None:
        self._known[name] = tensor
        self._ids.add(id(tensor))


def _without_whole_factor(recipe: Recipe) -> Recipe:
    """A scheduler's ``gamma`` as a float: the power of a whole number can have more digits than there is memory."""
    if not (isinstance(recipe.factory, type) and issubclass(recipe.factory, LRScheduler)):
        return recipe
    bound = inspect.signature(recipe.factory).bind(*recipe.args, **recipe.kwargs)
    if not isinstance(bound.arguments.get("gamma"), int):
        return recipe
    bound.arguments["gamma"] = float(bound.arguments["gamma"])
    return Recipe(recipe.factory, bound.args, bound.kwargs)


def _load_state(made: Any, state: Any) -> None:
    if not isinstance(state, dict):
        raise SessionError(f"the state of a {type(made).__name__} is a {type(state).__name__}")
    if isinstance(made, nn.Module):
        made.load_state_dict({**made.state_dict(), **state})
        return
    if isinstance(made, LRScheduler) and (odd := state.keys() - made.state_dict().keys()):
        raise SessionError(f"a {type(made).__name__} has no {min(map(str, odd))[:80]!r} in its state")
    if isinstance(made, LRScheduler) and isinstance(state.get("gamma"), int):
        state = {**state, "gamma": float(state["gamma"])}
    made.load_state_dict(state)


class _Unpickler(pickle.Unpickler):
    """Reads values of the user's own, for a caller that trusts them."""

    def __init__(self, pickled: bytes, found: _Found) -> None:
        super().__init__(io.BytesIO(pickled))
        self._found = found

    def persistent_load(self, name: Any) -> Any:
        kind, rest = name
        return self._found.tensor(rest) if kind == "tensor" else self._found.object(rest)
