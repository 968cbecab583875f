"""What a run takes, before it is begun: memory of a worker by kind, operations, and the size of a checkpoint."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from raytorch.config import Augment, ImageData, RunConfig, TextData, TokensData
from raytorch.datasets import MicroBatch, TrainLoader
from raytorch.datasets.checking import opened_splits
from raytorch.errors import ConfigError, RaytorchError, UserError
from raytorch.models.fitting import require_fitting
from raytorch.training.memory_meter import ACTIVATIONS, WEIGHTS
from raytorch.training.model_shards import gathered_apart
from raytorch.training.precision import Precision, PrecisionName
from raytorch.training.rehearsal import AVERAGE, CPU, GRADIENTS, INPUTS, OPTIMIZER, Rehearsal, rehearse

GATHERED, KEPT, DATA = "gathered modules", "kept by the allocator", "data in memory"
COPY = "copy for checkpoints"
_OF_NODE = 8
"""Workers of a node, where nothing says how many there are."""
_SHARDED = (WEIGHTS, GRADIENTS, OPTIMIZER, AVERAGE)


@dataclass(frozen=True)
class Budget:
    """What a run takes.

    Example:
        >>> budget(config).memory["optimizer"]
    """

    parameters: int
    trained: int
    """Parameters that are."""
    memory: dict[str, int]
    """Bytes of the worker that needs most, by kind, at the moment when most are in use; without those of the process
    itself, of CUDA and of the workers' communication.
    """
    samples: int
    """Of the largest micro-batch."""
    flops: float | None
    """Operations of an optimizer step over all workers; None where none can be counted."""
    checkpoint: int
    """Bytes of the tensors in a checkpoint."""
    workers: int
    precision: str
    strategy: str
    notes: list[str]
    """What is taken for granted."""

    @property
    def total(self) -> int:
        """Bytes of a worker."""
        return sum(self.memory.values())

    def to_dict(self) -> dict[str, Any]:
        """All of it for JSON."""
        return {**asdict(self), "total": self.total}


def budget(config: RunConfig, facts: Mapping[str, Any] | None = None, *, on_gpu: bool | None = None) -> Budget:
    """What a run takes, by two steps without memory on a batch of its data.

    Args:
        config: The run.
        facts: Of the data, where that is not here: ``vocabulary``, or ``input_shape`` and ``num_classes``.
        on_gpu: Whether workers have GPUs; by default what the configuration says.

    Raises:
        ConfigError: The run has a loop of the user's own, or its data is not here and ``facts`` do not tell its shapes;
            and what the run itself would refuse.
    """
    if config.loop:
        raise UserError(
            f"{config.loop.name} makes its models itself, so that nothing is known of them before it runs; "
            "peak_memory_bytes in metrics.jsonl of a run with a few steps tells what it takes"
        )
    is_gpu = config.scaling.gpus_per_worker > 0 if on_gpu is None else on_gpu
    notes: list[str] = []
    precision = _precision(config, notes, on_gpu=is_gpu)
    known, batch, data, of_step = _batch(config, facts or {}, notes)
    require_fitting(config, known)
    rehearsal = rehearse(config, known, batch.content, precision, on_gpu=is_gpu)
    if rehearsal.is_real:
        notes.append("code of your own asks for numbers: two steps were taken on this CPU, with memory for all of it")
    if config.compile:
        notes.append("compile: true is not taken into account; activations are fewer with it as a rule")
    memory = dict(_of_worker(config, rehearsal, notes, on_gpu=is_gpu))
    if data:
        memory[DATA] = data
    if config.checkpoint.background and not is_gpu:  # of a GPU it is in the memory of the host
        memory[COPY] = rehearsal.saved // _group(config)
    if config.parallel.tensor > 1:
        notes.append("tensor is not taken into account: activations, and with ddp all of the model, are fewer with it")
    parameters = list(rehearsal.model.parameters())
    samples = max(batch.samples, 1)
    return Budget(
        parameters=sum(each.numel() for each in parameters),
        trained=sum(each.numel() for each in parameters if each.requires_grad),
        memory={kind: size for kind, size in memory.items() if size},
        samples=samples,
        flops=rehearsal.flops and rehearsal.flops / samples * of_step,
        checkpoint=rehearsal.saved,
        workers=config.scaling.max_workers,
        precision=precision,
        strategy=config.parallel.strategy,
        notes=notes,
    )


def _precision(config: RunConfig, notes: list[str], *, on_gpu: bool) -> PrecisionName:
    if not on_gpu:
        return Precision.choose(config.precision, CPU).name
    notes.append("activations are those of PyTorch's kernels for CPUs, with attention that keeps no matrix, as on GPUs")
    if config.precision == "auto":
        notes.append("precision: auto is taken to be bf16")
        return "bf16"
    return config.precision


# -- memory of a worker ------------------------------------------------------------------------------------------------


def _of_worker(config: RunConfig, whole: Rehearsal, notes: list[str], *, on_gpu: bool) -> Counter[str]:
    workers = config.scaling.max_workers
    if config.parallel.strategy == "ddp" or workers == 1:
        memory = whole.peak.copy()
        if workers > 1:
            memory[GRADIENTS] = whole.most[GRADIENTS]  # in DDP's buckets, which stay
        if not on_gpu:
            memory[KEPT] = max(0, whole.heap - memory.total())
        return memory
    return _sharded(config, whole, notes)


def _sharded(config: RunConfig, whole: Rehearsal, notes: list[str]) -> Counter[str]:
    """A share of what each parameter has, and what is gathered at once: of modules by turns two, with gradients of one
    in its own place and in the order in which it is sent, and what is gathered with the call of the whole model.
    """
    group = _group(config)
    if config.parallel.strategy == "hsdp" and not config.parallel.shard:
        notes.append(f"a node is taken to have {group} workers, over which the model is sharded")
    memory = Counter({kind: -(-whole.most[kind] // group) for kind in _SHARDED})
    memory[INPUTS] = whole.most[INPUTS]
    model = whole.model
    sizes = [_bytes(model.get_submodule(place)) for place in gathered_apart(model, config, "model")]
    rest = _bytes(model) - sum(sizes)
    in_turn = max(sizes) if config.parallel.reshard_after_forward else sum(sizes)
    gathered = 2 * rest + in_turn + 3 * max(sizes)  # with what is cast of it, which is let go of as well
    if whole.activations + gathered >= whole.of_step / group:
        memory |= Counter({ACTIVATIONS: whole.activations, GATHERED: gathered})
    else:
        memory[ACTIVATIONS] = whole.of_step // group
    if config.parallel.offload == "cpu":
        for kind in _SHARDED:
            del memory[kind]
        notes.append("offload: shares of the model, gradients and optimizer are in the CPU's memory, and not counted")
    return memory


def _group(config: RunConfig) -> int:
    """Over how many workers a model is sharded."""
    workers, parallel = config.scaling.max_workers, config.parallel
    if parallel.strategy == "hsdp":
        return parallel.shard or min(workers, _OF_NODE)
    return workers if parallel.strategy == "fsdp" else 1


def _bytes(model: nn.Module) -> int:
    return sum(each.nbytes for each in model.parameters())


# -- a batch -----------------------------------------------------------------------------------------------------------


def _batch(
    config: RunConfig, given: Mapping[str, Any], notes: list[str]
) -> tuple[Mapping[str, Any], MicroBatch, int, int]:
    """The facts of a run's data, its largest micro-batch, bytes of what of it lies in memory, and samples of a step."""
    if given:
        _require_facts(given)
        notes.append("the data is taken to be as --fact tells")
        facts = {"context": config.data.context, **given} if isinstance(config.data, TokensData | TextData) else given
        return facts, _told(config, facts), 0, config.batch_size
    changes = {"download": False, "readers": 0}
    data = config.data.model_copy(update={key: value for key, value in changes.items() if hasattr(config.data, key)})
    try:
        train = opened_splits(config.model_copy(update={"data": data}).with_code(config.code)).splits.train
    except RaytorchError as error:
        if isinstance(config.data, ImageData):
            notes.append("the data is not here; its shapes are those that it is published with")
            facts = {"input_shape": config.data.input_shape, "num_classes": 10}
            return facts, _told(config, facts), 0, config.batch_size
        raise ConfigError(
            f"{error}\nplan reads a batch of the data; where that is elsewhere, tell its facts: --fact "
            "vocabulary=50257 of tokens, or --fact input_shape=[3,224,224] --fact num_classes=1000"
        ) from error
    loader = TrainLoader(
        train,
        batch_size=config.batch_size,
        micro_batches=config.accumulate,
        rank=_readers(config) - 1,  # which has most where they do not have the same
        world_size=_readers(config),
        augment=config.data.augment if isinstance(config.data, ImageData) else Augment(),
    )
    last = (loader.steps_per_epoch - 1) * config.batch_size
    if loader.samples - last > config.batch_size:  # what is left of the epoch has joined it
        loader.load_state_dict({"samples": loader.samples, "epoch": 0, "position": last})
    batch = max(next(iter(loader.remaining())), key=lambda each: each.samples)
    held = [each for each in vars(train).values() if isinstance(each, Tensor)]
    return train.facts, batch, sum(each.nbytes for each in held), min(config.batch_size, loader.samples)


def _require_facts(given: Mapping[str, Any]) -> None:
    """Raise ConfigError for facts that are none of data."""
    for name, value in given.items():
        sizes = value if isinstance(value, list | tuple) and name == "input_shape" else [value]
        if not sizes or not all(type(size) is int and 0 < size < 2**31 for size in sizes):
            is_shape = name == "input_shape"
            form = "a list such as [3,224,224]" if is_shape else "a whole number of at least 1"
            raise ConfigError(f"--fact: {name} must be {form}, not {value!r:.80}")


def _readers(config: RunConfig) -> int:
    """How many workers, or groups of them, have samples of their own."""
    return config.scaling.max_workers // config.parallel.tensor


def _told(config: RunConfig, facts: Mapping[str, Any]) -> MicroBatch:
    """A micro-batch as the facts tell, of zeros. Raises ConfigError if they do not tell its shapes."""
    parts = _readers(config) * config.accumulate
    size = -(-config.batch_size // parts)
    if "vocabulary" in facts and "context" in facts:
        tokens = torch.zeros(size, facts["context"], dtype=torch.int64)
        return MicroBatch((tokens, tokens.clone()), size, 1.0)
    if "input_shape" in facts:
        targets = (
            torch.zeros(size, facts["num_targets"]) if "num_targets" in facts else torch.zeros(size, dtype=torch.int64)
        )
        return MicroBatch((torch.zeros(size, *facts["input_shape"]), targets), size, 1.0)
    raise ConfigError("--fact: tell vocabulary of tokens, or input_shape and num_classes (or num_targets)")


# -- what to do --------------------------------------------------------------------------------------------------------


def advice(config: RunConfig, planned: Budget) -> str:
    """What takes most of a worker's memory, and how it takes less."""
    memory = planned.memory
    of_model = sum(memory.get(kind, 0) for kind in _SHARDED)
    of_batch = planned.total - of_model
    more = f"accumulate: {2 * config.accumulate}" if planned.samples > 1 else ""
    repeated = '["blocks.*"]' if config.model.name == "gpt" else "[...] for its repeated modules"
    recomputed = "" if config.model.checkpointing else f"model.checkpointing: {repeated}"
    shared = "parallel: {strategy: fsdp}" if planned.strategy == "ddp" and planned.workers > 1 else ""
    workers = "more workers (--workers)" if not shared else ""
    steps = [shared or workers, recomputed, more] if of_model > of_batch else [more, recomputed, shared]
    most = "the weights, gradients and optimizer" if of_model > of_batch else "the activations"
    return f"most of it {most}; set {' or '.join(filter(None, steps)) or 'a smaller model or batch_size'}"
