"""A session as its users see it."""

import contextlib
import functools
import secrets
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, Self, TypeVar

import torch
from torch import Tensor, nn

from raytorch.autograd import Context, CustomFunction, checkpoint
from raytorch.distributed import barrier, data_parallel
from raytorch.errors import HandleError, RemoteOpError, SessionError
from raytorch.optimizers import OPTIMIZERS
from raytorch.session import worker_functions
from raytorch.session.function_names import FACTORIES, function_named
from raytorch.session.handles import HANDLES_PER_CLIENT, Reference, first_of
from raytorch.session.instruction_stream import Transport
from raytorch.session.recorder import Recorder
from raytorch.session.registry import HandleKind
from raytorch.session.remote_objects import (
    RemoteContext,
    RemoteDDP,
    RemoteFunction,
    RemoteModule,
    RemoteObject,
    RemoteOptimizer,
    RemoteScheduler,
    stand_in,
)
from raytorch.session.remote_tensor import RemoteTensor
from raytorch.session.saved_names import STATEFUL
from raytorch.session.tensor_transfer import Payload, as_tensor

R = TypeVar("R", bound=RemoteObject)


class RemoteFactory:
    """Maker of tensors, modules and other objects on the workers: on all of them, or on one.

    Beside the methods below, the factories of ``torch`` that take no tensor are methods with their own arguments:
    ``arange``, ``empty``, ``empty_permuted``, ``empty_strided``, ``eye``, ``full``, ``linspace``, ``logspace``,
    ``ones``, ``rand``, ``randint``, ``randn``, ``randperm``, ``scalar_tensor``, ``tril_indices``, ``triu_indices``,
    ``zeros``. Each rank makes its own, on its own device.

    Example:
        >>> model = session.module(nn.Linear, 2, 1)
        >>> optimizer = session.optimizer("sgd", model.parameters(), lr=0.1)
        >>> model(session.tensor([[1.0, 2.0]])).sum().backward()
        >>> optimizer.step()
        >>> session.run(lambda model: model.weight.shape, model)
        torch.Size([1, 2])
    """

    def __init__(self, recorder: Recorder, rank: int | None = None) -> None:
        self._recorder, self._rank = recorder, rank

    def __getattr__(self, name: str) -> Any:
        if name not in FACTORIES:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return functools.partial(self._make, function_named(f"torch.{name}"))

    def _make(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> RemoteTensor:
        return self._recorder.keep(RemoteTensor, function, *args, rank=self._rank, **kwargs)

    def tensor(self, data: Any, *, requires_grad: bool = False) -> RemoteTensor:
        """Send a tensor, an array, a number or nested lists of numbers; every rank gets a copy of its own.

        Raises:
            SessionError: It is nothing of these, or a tensor that cannot be moved: a sparse one, one without content.
        """
        payload = Payload.of(as_tensor(data))
        payload = replace(payload, requires_grad=requires_grad or payload.requires_grad)
        return self._recorder.upload([payload], self._rank)

    def module(self, factory: Callable[..., nn.Module], *args: Any, **kwargs: Any) -> RemoteModule:
        """Make a module, on each worker's device: ``factory`` is a class or a function, called on each worker."""
        return self._create(RemoteModule, factory, *args, **kwargs)

    def optimizer(
        self, name: str | Callable[..., torch.optim.Optimizer], parameters: Iterable[RemoteTensor], **options: Any
    ) -> RemoteOptimizer:
        """Make an optimizer.

        Args:
            name: One of ``raytorch.optimizers.OPTIMIZERS``, or a class.
            parameters: Leaf tensors that require grad, such as ``module.parameters()``.
            options: The class's keyword arguments.

        Raises:
            SessionError: There is no optimizer of that name.
        """
        if isinstance(name, str) and name not in OPTIMIZERS:
            raise SessionError(f"there is no optimizer {name!r}; there are {', '.join(OPTIMIZERS)}")
        factory = OPTIMIZERS[name] if isinstance(name, str) else name
        groups = list(parameters)
        if first_of(Tensor, groups) is not None:
            raise SessionError("an optimizer would change copies of local tensors: give it session.module(...)'s")
        return self._create(RemoteOptimizer, factory, groups, **options)

    def scheduler(self, factory: Callable[..., Any], optimizer: RemoteOptimizer, **options: Any) -> RemoteScheduler:
        """Make a learning-rate scheduler: a class of ``torch.optim.lr_scheduler`` and its keyword arguments."""
        if not isinstance(optimizer, RemoteOptimizer):
            raise SessionError("a scheduler would change a copy of a local optimizer: give it session.optimizer(...)'s")
        return self._create(RemoteScheduler, factory, optimizer, **options)

    def context(self) -> RemoteContext:
        """Make an autograd context, which keeps tensors and values."""
        return self._create(RemoteContext, Context)

    def function(self, forward: Callable[..., Any], backward: Callable[..., Any]) -> RemoteFunction:
        """Make a custom function of autograd. See :class:`raytorch.autograd.CustomFunction`."""
        for given in (forward, backward):
            if not callable(given):
                raise SessionError(f"a custom function is made of two functions, not of a {type(given).__name__}")
        return self._create(RemoteFunction, CustomFunction, forward, backward)

    def checkpoint(self, function: Callable[..., Any], *args: Any) -> Any:
        """Call a function or a remote module, and compute it again in the backward pass instead of keeping what that
        needs. See :func:`raytorch.autograd.checkpoint`."""
        return self._recorder.call(worker_functions.call, (checkpoint, function, *args), rank=self._rank)

    def object(self, factory: Callable[..., Any], *args: Any, **kwargs: Any) -> RemoteObject:
        """Make an object of any other class."""
        return self._create(RemoteObject, factory, *args, **kwargs)

    def run(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call any Python function on the workers and wait for it; handles among the arguments are resolved there.

        Returns:
            What it returned, of the lowest rank, with handles for tensors, modules and other objects.

        Raises:
            RemoteOpError: The function raised.
            SessionError: There is a local tensor that requires grad, which would get none.
        """
        return self._recorder.run(function, args, kwargs, self._rank)

    def manual_seed(self, seed: int) -> None:
        """Seed the workers' random numbers, all alike. See ``torch.manual_seed``."""
        # Importing torch._dynamo, as an optimizer does, puts another function in the place of torch.manual_seed.
        self._recorder.do(torch.random.manual_seed, seed, rank=self._rank)

    def _create(self, remote: type[R], factory: Callable[..., Any], *args: Any, **kwargs: Any) -> R:
        if isinstance(factory, Reference):
            raise SessionError(f"{factory!r} is on the workers already: use it as it is")
        if isinstance(factory, STATEFUL) or not callable(factory):
            raise SessionError(
                f"a {type(factory).__name__} is no class or function that makes a {remote.kind}: give its class and "
                "the arguments, as in session.module(nn.Linear, 2, 3), or a function that returns it, as in "
                "session.module(lambda: net), of which each worker gets a copy"
            )
        return self._recorder.keep(remote, worker_functions.create, factory, *args, rank=self._rank, **kwargs)


class Session(RemoteFactory):
    """A group of workers that runs what is recorded here. Made by :func:`raytorch.connect`; a context manager.

    Attributes:
        workers: Number of workers.

    Example:
        >>> ones = session.rank(0).ones(2)  # on that worker alone
        >>> parts = session.scatter([[1.0], [2.0], [3.0]])  # rows apart, over all of them
        >>> session.get(ones.handle).sum().item()
        2.0
        >>> session.save("experiment")  # for connect(restore="experiment")
        []
    """

    def __init__(self, transport: Transport, *, client: int = 0) -> None:
        super().__init__(Recorder(transport, client=client))
        self.workers = transport.world_size
        self._transport = transport
        self._is_guest = client > 0
        self._unclaimed: set[int] = set()
        self._closed = False

    def rank(self, rank: int) -> RemoteFactory:
        """Return a factory: what is made through it is on that rank only, and operations on it run there only.

        Raises:
            SessionError: There is no such rank.
        """
        if not 0 <= rank < self.workers:
            raise SessionError(f"there is no rank {rank}: the session has {self.workers} workers, from 0")
        return RemoteFactory(self._recorder, rank)

    def scatter(self, data: Any) -> RemoteTensor:
        """Send each rank its shard of a tensor or an array, split along dimension 0 as evenly as can be.

        Raises:
            SessionError: There are fewer rows than workers, or see :meth:`tensor`.
        """
        tensor = as_tensor(data)
        if not tensor.dim() or len(tensor) < self.workers:
            raise SessionError(f"a tensor of shape {list(tensor.shape)} cannot be split over {self.workers} workers")
        return self._recorder.upload([Payload.of(part) for part in tensor.tensor_split(self.workers)])

    def ddp(self, module: RemoteModule) -> RemoteDDP:
        """Wrap a module so that backward passes average its gradients over the ranks; rank 0's weights go to all.

        Raises:
            SessionError: The module is a local one, or on one of several ranks.
        """
        if not isinstance(module, RemoteModule):
            raise SessionError("a copy of a local module would be trained: give ddp() session.module(...)'s")
        if module._rank is not None:
            self._recorder.require_every_rank("ddp", module._rank)
        return self._create(RemoteDDP, data_parallel, module)

    def barrier(self) -> None:
        """Let every rank wait until all have come here."""
        self._recorder.do(worker_functions.call, barrier)

    def get(self, handle: int, kind: HandleKind | str = HandleKind.TENSOR) -> Any:
        """A stand-in for what a handle names, which may be another client's; freeing it leaves that one as it is.

        Raises:
            HandleError: It names nothing, or nothing of that kind.
        """
        kinds = self._recorder.ask_all(worker_functions.kind_of_handle, handle)
        there = [rank for rank, found in enumerate(kinds) if found]
        if not there:
            raise HandleError(f"handle {handle} names nothing in this session: it was freed, or was never given out")
        if kinds[there[0]] != kind:
            raise HandleError(f"handle {handle} names a {kinds[there[0]]}, not a {kind}")
        rank = there[0] if len(there) == 1 < self.workers else None
        remote = stand_in(HandleKind(kind))
        if handle in self._unclaimed:
            self._unclaimed.remove(handle)
            return remote(self._recorder, handle, rank)
        return self._recorder.keep(remote, worker_functions.lookup, handle, rank=rank)

    def handles(self) -> list[dict[str, Any]]:
        """List what there is: for each handle, in order, its ``kind`` and ``type``, and a tensor's ``shape``.

        That of the lowest rank, with the ``ranks`` that have it where not all do.
        """
        merged: dict[int, dict[str, Any]] = {}
        for rank, listed in enumerate(self._recorder.ask_all(worker_functions.listing)):
            for found in listed:
                merged.setdefault(found["handle"], found | {"ranks": []})["ranks"].append(rank)
        for found in merged.values():
            if len(found["ranks"]) == self.workers:
                del found["ranks"]
        return [merged[handle] for handle in sorted(merged)]

    def stats(self) -> list[dict[str, Any]]:
        """For each rank and kind, how many handles there are, and the bytes per device of what they hold."""
        return self._recorder.ask_all(worker_functions.stats)

    def save(self, path: str | Path) -> list[int]:
        """Save all tensors, modules, optimizers and schedulers, for ``connect(restore=path)``.

        What autograd computed is saved without its history; a leaf with ``requires_grad`` and its gradient. Random
        numbers go on where they were.

        Args:
            path: A new folder, which every worker's node can reach. It is complete or not there.

        Returns:
            The handles of what is left out: contexts, functions and other objects, and what depends on them.

        Raises:
            RemoteOpError: It exists already, or could not be written.
        """
        final = Path(path).absolute()
        unfinished = final.with_name(f".{final.name}.{secrets.token_hex(4)}")
        try:
            left_out: list[list[int]] = self._recorder.ask_all(worker_functions.save, str(unfinished), str(final))
            self._recorder.ask(worker_functions.finish_save, str(unfinished), str(final), rank=0)
        except BaseException as error:
            # After Ctrl-C ranks may be writing for long yet: what there is then goes once rank 0 has come so far.
            discard = self._recorder.ask if isinstance(error, RemoteOpError) else self._recorder.do
            with contextlib.suppress(SessionError):
                discard(worker_functions.discard_save, str(unfinished), rank=0)
            raise
        return sorted({handle for part in left_out for handle in part})

    def restore(self, path: str | Path, *, trust: bool = False) -> None:
        """Put what :meth:`save` wrote under its handles, for :meth:`get`; for a session opened here that has none yet.

        Args:
            path: The folder.
            trust: Whether classes and functions other than PyTorch's and raytorch's may be loaded from it. They can
                run any code.

        Raises:
            RemoteOpError: The folder holds no saved session, one of another number of workers, or one that needs trust.
            SessionError: The session was joined, or has handles, which those of the folder would replace; or others
                have joined it.
        """
        if self._is_guest:
            raise SessionError("a session that was joined cannot be restored to: open one with connect(restore=path)")
        if self.handles():
            raise SessionError(
                "the session has handles, which the saved ones would replace: open another with connect(restore=path)"
            )
        folder = str(Path(path).absolute())
        looks = self._recorder.ask_all(worker_functions.look_at_saved, folder, self.workers, trust)
        if len({shared for _, shared in looks}) > 1:
            raise SessionError(f"{path}: the ranks' parts do not belong together; save the session again")
        saved = [handle for handles, _ in looks for handle in handles]
        if makers := max(saved, default=0) // HANDLES_PER_CLIENT:
            self._transport.skip_clients(makers)
        handles = self._recorder.ask_all(worker_functions.restore, folder, trust)
        self._unclaimed = {handle for part in handles for handle in part}
        self._recorder.skip_to(
            max((handle for handle in self._unclaimed if handle < HANDLES_PER_CLIENT), default=0) + 1
        )

    def synchronize(self) -> None:
        """Wait until every worker has done all that was recorded.

        Raises:
            RemoteOpError: Something that this thread recorded failed, and no result has told of it yet.
        """
        self._recorder.stream.synchronize()

    def close(self) -> None:
        """End the session: its handles are freed and, if it was opened here, its workers end.

        Raises:
            RemoteOpError: Something failed that no result has told of yet. The session is closed all the same.
        """
        self.__exit__(None, None, None)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if self._closed or self._recorder.stream.is_forked:
            return
        self._closed = True
        with contextlib.ExitStack() as ending:
            ending.callback(self._transport.close)
            ending.callback(self._recorder.stream.close)
            if error is None and not self._recorder.stream.loss_was_told:
                self._recorder.stream.synchronize(of_any_thread=True)
