"""Two steps of a run without its memory and its time: on tensors that have shapes alone, by PyTorch's fake tensors.

``torch._subclasses.fake_tensor`` is an internal of PyTorch's, and used here alone.
"""

import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map

from raytorch.config import RunConfig
from raytorch.config.own_calls import imported
from raytorch.errors import RaytorchError
from raytorch.models.networks import Architecture
from raytorch.models.objectives import LossFunction, loss_function
from raytorch.training.flops import FlopCounter
from raytorch.training.memory_meter import ACTIVATIONS, WEIGHTS, MemoryMeter
from raytorch.training.optimizer_steps import OptimizerSteps
from raytorch.training.precision import Precision, PrecisionName
from raytorch.training.preparing import prepare

CPU = torch.device("cpu")
GRADIENTS, OPTIMIZER, AVERAGE, INPUTS = "gradients", "optimizer", "average", "inputs"
_MANY = 10**6
"""Steps of a run whose number is not known, of which two are taken."""
logger = logging.getLogger("raytorch")


@dataclass(frozen=True)
class Rehearsal:
    """What a worker takes that has all of the model."""

    model: nn.Module
    """The model, of which the tensors may have no memory."""
    peak: Counter[str]
    """Bytes of each kind when most are in use."""
    most: Counter[str]
    """The most bytes of each kind at any time."""
    activations: int
    """The most bytes of them in forward and backward passes."""
    of_step: int
    """The most bytes that the optimizer takes for its step, and then no more."""
    heap: int
    """Bytes that a process on a CPU comes to by all of it."""
    flops: int | None
    """Operations of a forward and backward pass of one micro-batch; None if none can be counted."""
    saved: int
    """Bytes of the tensors in a checkpoint."""
    is_real: bool
    """Whether the steps were taken with memory for all of it, as code asks for numbers."""


def rehearse(
    config: RunConfig, facts: Mapping[str, Any], content: Any, precision: PrecisionName, *, on_gpu: bool
) -> Rehearsal:
    """Take two steps of a run with micro-batches like ``content``, on data with these ``facts``.

    Code of the user's own that asks for numbers is called with memory for all of it, on the CPU.

    Raises ConfigError for what a run would refuse, and what own code raises.

    Example:
        >>> batch = torch.zeros(128, 1, 28, 28), torch.zeros(128, dtype=torch.int64)
        >>> facts = {"input_shape": (1, 28, 28), "num_classes": 10}
        >>> rehearse(RunConfig(epochs=1), facts, batch, "fp32", on_gpu=False).peak["weights"]
    """
    for name in config.references:
        imported(name, config.code)
    rehearsing = _Rehearsing(config, facts, content, precision, on_gpu=on_gpu)
    with _attention_of(on_gpu=on_gpu), torch.random.fork_rng(devices=[]):
        try:
            with FakeTensorMode(allow_non_fake_inputs=True):
                return rehearsing.taken(tree_map(_like, content), is_real=False)
        except RaytorchError:
            raise
        except Exception as error:
            logger.info("steps are taken with memory: %s", error)
            return rehearsing.taken(content, is_real=True)


class _Rehearsing:
    def __init__(
        self, config: RunConfig, facts: Mapping[str, Any], content: Any, precision: PrecisionName, *, on_gpu: bool
    ) -> None:
        self._config, self._facts, self._on_gpu = config, facts, on_gpu
        # The scale of fp16 is found by numbers; what is computed in it is as large as in bf16.
        self._precision = Precision("bf16" if precision == "fp16" else precision, "cpu")
        self._layout = Precision(precision, "cuda" if on_gpu else "cpu")

    def taken(self, content: Any, *, is_real: bool) -> Rehearsal:
        config, meter, counter = self._config, MemoryMeter(), FlopCounter()
        model = Architecture.of(config.model, self._facts, config.code).build(CPU)
        model = prepare(self._laid_out(model), config.model)
        average = [torch.empty_like(each) for each in _tensors_of(model)] if config.ema else []
        loss = loss_function(config.loss, model, config.code)
        span = {"total_steps": config.most_steps or _MANY, "steps_per_epoch": _MANY}
        steps = OptimizerSteps(config, model, Precision("fp32", "cpu"), **span)
        if self._on_gpu:
            _step_as_on_gpu(steps.optimizer)
        meter.hold(WEIGHTS, _tensors_of(model))
        meter.hold(AVERAGE, average)
        meter.hold(INPUTS, (each for each in tree_leaves(content) if isinstance(each, Tensor)))
        _hold_gradients(model, meter)
        with meter:
            for number in range(2):
                meter.restart()  # the first step makes what the optimizer remembers
                self._pass(model, loss, steps, content, counter if number == 0 else nullcontext())
                passes = meter.peak, meter.most
                meter.restart()
                with meter.guessing():
                    steps.take()
                meter.hold(OPTIMIZER, _remembered(steps.optimizer))
        models = sum(each.nbytes for each in model.state_dict().values()) * (2 if average else 1)
        size = models + sum(each.nbytes for each in _remembered(steps.optimizer))
        peak = max(passes[0], meter.peak, key=Counter.total)
        most, of_step = passes[1] | meter.most, meter.most[ACTIVATIONS]
        return Rehearsal(
            model, peak, most, passes[1][ACTIVATIONS], of_step, meter.heap.peak, counter.total or None, size, is_real
        )

    def _laid_out(self, model: nn.Module) -> nn.Module:
        return self._layout.to_memory_format(model)

    def _pass(
        self,
        model: nn.Module,
        loss: LossFunction,
        steps: OptimizerSteps,
        content: Any,
        counting: AbstractContextManager[Any],
    ) -> None:
        """The forward and backward passes of a step, of which more than two micro-batches take no more memory."""
        steps.zero_grad()
        for number in range(min(self._config.accumulate, 2)):
            with nullcontext() if number else counting:
                with self._precision.autocast():
                    value = loss(model, self._layout.layout_of(content))
                torch.autograd.backward(value[0] if isinstance(value, tuple) else value.mean())


@contextmanager
def _attention_of(*, on_gpu: bool) -> Iterator[None]:
    """Let attention be computed as where the run is: on GPUs by a kernel that keeps no matrix of all pairs."""
    before = torch.backends.cuda.flash_sdp_enabled()  # type: ignore[no-untyped-call]
    torch.backends.cuda.enable_flash_sdp(on_gpu)
    try:
        yield
    finally:
        torch.backends.cuda.enable_flash_sdp(before)


def _like(value: Any) -> Any:
    return torch.empty_like(value, device=CPU) if isinstance(value, Tensor) else value


def _tensors_of(model: nn.Module) -> Iterable[Tensor]:
    return (*model.parameters(), *model.buffers())


def _remembered(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [each for state in optimizer.state.values() for each in state.values() if isinstance(each, Tensor)]


def _step_as_on_gpu(optimizer: torch.optim.Optimizer) -> None:
    """All parameters of a group at once, as PyTorch does there by default: faster, with temporary copies of them."""
    for group in optimizer.param_groups:
        if group.get("foreach", False) is None and not group.get("fused"):
            group["foreach"] = True


def _hold_gradients(model: nn.Module, meter: MemoryMeter) -> None:
    parameter: Any  # whose method has no types
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(lambda each: meter.hold(GRADIENTS, [each.grad]))
