"""Modules, optimizers and other objects that live on the workers of a session."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar

from torch import Tensor

from raytorch.errors import SessionError
from raytorch.session import worker_functions
from raytorch.session.arguments import BoundedCache, CallStructure
from raytorch.session.handles import Reference
from raytorch.session.hooks import require_hooks_without_effects
from raytorch.session.registry import HandleKind
from raytorch.session.remote_tensor import RemoteTensor
from raytorch.session.result_structure import rebuilt
from raytorch.session.tensor_transfer import Payload


class RemoteObject(Reference):
    """An object on the workers: methods are called there, and attributes read there, and waited for."""

    __slots__ = ("_expected", "_expected_at")
    kind: ClassVar[HandleKind] = HandleKind.OBJECT

    def __init__(self, recorder: Any, handle: int, rank: int | None = None) -> None:
        super().__init__(recorder, handle, rank)
        self._expected: BoundedCache[CallStructure, Any] = BoundedCache()
        self._expected_at = recorder.changes

    def expected(self) -> BoundedCache[CallStructure, Any]:
        """Results that its calls gave since objects were last changed."""
        if self._expected_at != self._recorder.changes:
            self._expected.clear()
            self._expected_at = self._recorder.changes
        return self._expected

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the object on the workers."""
        return self._recorder.call(worker_functions.call, (self, *args), kwargs)

    def call(self, method: str, *args: Any, **kwargs: Any) -> Any:
        """Call a method on the workers; ``method`` may be dotted (``encoder.forward``).

        Raises:
            SessionError: It registers a hook that is to change something here, of which the workers have a copy.
        """
        if "hook" in method:
            require_hooks_without_effects((*args, *kwargs.values()))
        return self._recorder.call(worker_functions.method, (self, method, *args), kwargs)

    def get(self, attribute: str) -> Any:
        """Read an attribute on the workers; ``attribute`` may be dotted (``encoder.training``)."""
        return self._recorder.ask(worker_functions.attribute, self, attribute)

    def set(self, attribute: str, value: Any) -> None:
        """Assign to an attribute on the workers."""
        self._recorder.do(worker_functions.set_attribute, self, attribute, value)
        self._recorder.changes += 1  # it, and what it is in, may give results of another structure now

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(
            f"{type(self).__name__} has no attribute {name!r} here: get({name!r}) reads it on the workers, "
            f"call({name!r}, ...) calls it, and a function of the object runs there by session.run(function, ...)"
        )

    def _do(self, method: str, *args: Any) -> None:
        self._recorder.do(worker_functions.method, self, method, *args)

    def _state(self) -> dict[str, Any]:
        state: dict[str, Any] = rebuilt(self._recorder.ask(worker_functions.state_of, self), Payload, Payload.tensor)
        return state


class RemoteModule(RemoteObject):
    """A ``torch.nn.Module`` on the workers."""

    __slots__ = ()
    kind = HandleKind.MODULE

    def parameters(self) -> Iterator[RemoteTensor]:
        """The parameters, as handles."""
        return iter(self.named_parameters().values())

    def named_parameters(self) -> dict[str, RemoteTensor]:
        """The parameters by their dotted names."""
        return dict(self._recorder.ask(worker_functions.named_parameters, self))

    def state_dict(self) -> dict[str, Tensor]:
        """Parameters and buffers by their dotted names, as local CPU tensors; rank 0's."""
        return self._state()

    def load_state_dict(self, state: Mapping[str, Tensor], *, strict: bool = True) -> None:
        """Give every rank's module the parameters and buffers of ``state``. See ``torch.nn.Module``."""
        self._recorder.ask(worker_functions.load_state, self, dict(state), strict)

    @property
    def parametrizations(self) -> Any:
        """Not to be had here, for ``torch.nn.utils.parametrize`` not to take the module for a plain one."""
        raise SessionError("a module is parametrized on the workers: session.run(parametrize.is_parametrized, module)")

    def train(self, mode: bool = True) -> "RemoteModule":
        """Set training mode. See ``torch.nn.Module.train``."""
        self._do("train", mode)
        self._recorder.changes += 1  # it, and what it is in, may give results of another structure now
        return self

    def eval(self) -> "RemoteModule":
        """Set evaluation mode."""
        return self.train(False)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the parameters' gradients."""
        self._do("zero_grad", set_to_none)

    def requires_grad_(self, requires_grad: bool = True) -> "RemoteModule":
        """Set whether autograd records on the parameters."""
        self._do("requires_grad_", requires_grad)
        return self


class RemoteDDP(RemoteModule):
    """A module whose gradients are averaged over the ranks in the backward pass."""

    __slots__ = ()
    kind = HandleKind.DDP

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Backward passes of forward passes in the block leave each rank its own gradients."""
        self.set_sync(False)
        try:
            yield
        finally:
            self.set_sync(True)

    def set_sync(self, enabled: bool) -> None:
        """Set whether backward passes of the forward passes from here on average the gradients."""
        self._recorder.do(worker_functions.set_gradient_sync, self, enabled)


class RemoteOptimizer(RemoteObject):
    """A ``torch.optim.Optimizer`` on the workers."""

    __slots__ = ()
    kind = HandleKind.OPTIMIZER

    def step(self) -> None:
        """Take a step."""
        self._do("step")

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients of the optimizer's parameters."""
        self._do("zero_grad", set_to_none)

    @property
    def lr(self) -> float:
        """Learning rate of the first parameter group; assigning sets that of all groups."""
        return float(self._recorder.ask(worker_functions.learning_rate, self))

    @lr.setter
    def lr(self, value: float) -> None:
        self._recorder.do(worker_functions.set_learning_rate, self, value)

    def state_dict(self) -> dict[str, Any]:
        """The state as local CPU tensors and values; rank 0's. See ``torch.optim.Optimizer.state_dict``."""
        return self._state()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Give every rank's optimizer this state."""
        self._recorder.ask(worker_functions.load_state, self, dict(state))


class RemoteScheduler(RemoteObject):
    """A learning-rate scheduler on the workers."""

    __slots__ = ()
    kind = HandleKind.SCHEDULER

    def step(self) -> None:
        """Go on to the next learning rate."""
        self._do("step")

    def get_last_lr(self) -> list[float]:
        """The learning rate of each parameter group."""
        return list(self._recorder.ask(worker_functions.method, self, "get_last_lr"))


class RemoteContext(RemoteObject):
    """A :class:`raytorch.autograd.Context` on the workers."""

    __slots__ = ()
    kind = HandleKind.CONTEXT

    def save_tensor(self, tensor: RemoteTensor) -> None:
        """Keep a tensor."""
        self._do("save_tensor", tensor)

    def save_value(self, name: str, value: Any) -> None:
        """Keep a value under a name."""
        self._do("save_value", name, value)

    @property
    def saved_tensors(self) -> tuple[RemoteTensor, ...]:
        """The tensors, in the order in which they were saved."""
        return tuple(self.get("saved_tensors"))

    def value(self, name: str) -> Any:
        """The value that was saved under a name."""
        return self._recorder.ask(worker_functions.method, self, "value", name)


class RemoteFunction(RemoteObject):
    """A :class:`raytorch.autograd.CustomFunction` on the workers."""

    __slots__ = ()
    kind = HandleKind.FUNCTION

    def apply(self, *args: Any) -> Any:
        """Apply it, as a ``torch.autograd.Function``."""
        return self.call("apply", *args)


_OBJECTS = (RemoteModule, RemoteDDP, RemoteOptimizer, RemoteScheduler, RemoteContext, RemoteFunction)
_STAND_INS: dict[HandleKind, type[Reference]] = {
    HandleKind.TENSOR: RemoteTensor,
    HandleKind.SCRIPT: RemoteModule,
    **{remote.kind: remote for remote in _OBJECTS},
}


def stand_in(kind: HandleKind) -> type[Reference]:
    """The class of the client's objects for values of that kind on the workers."""
    return _STAND_INS.get(kind, RemoteObject)
