"""Which keys of a configuration may differ when a run is resumed, in one table for the check and for the docs."""

from collections.abc import Iterator
from enum import StrEnum
from typing import Any, NamedTuple

from raytorch.config.run import RunConfig


class OnResume(StrEnum):
    """Fate of a key that differs."""

    APPLIED = "applied"
    REFUSED = "refused"
    KEPT = "the run keeps its own"


class Rule(NamedTuple):
    """Rule for a key, and for all below it that have no rule of their own."""

    what: OnResume
    remark: str = ""


RULES: dict[str, Rule] = {
    "name": Rule(OnResume.KEPT, "its folder has its name"),
    "seed": Rule(OnResume.REFUSED, "it decides the order of the data"),
    "deterministic": Rule(OnResume.APPLIED),
    "data": Rule(OnResume.REFUSED, "each epoch has every sample once"),
    "data.root": Rule(OnResume.APPLIED, "the same files in another place"),
    "data.download": Rule(OnResume.APPLIED),
    "data.cache_folder": Rule(OnResume.APPLIED),
    "data.cache_size": Rule(OnResume.APPLIED),
    "data.readers": Rule(OnResume.APPLIED, "they change no batch"),
    "data.on_error": Rule(OnResume.APPLIED, "from the next batch on"),
    "data.max_skipped": Rule(OnResume.APPLIED, "those of the run until now count"),
    "data.tokens_folder": Rule(OnResume.APPLIED),
    "data.cache": Rule(OnResume.APPLIED, "it changes no batch"),
    "validation": Rule(OnResume.REFUSED, "it decides which samples are trained on, and what has been judged by"),
    "validation.test": Rule(OnResume.APPLIED),
    "sampling": Rule(OnResume.REFUSED, "it decides the order of the data"),
    "shuffle": Rule(OnResume.REFUSED, "it decides the order of the data"),
    "model": Rule(OnResume.REFUSED, "the weights are of the model that was trained"),
    "loop": Rule(
        OnResume.APPLIED, "its arguments, though optimizers and what else it has registered go on as they were saved"
    ),
    "loop.name": Rule(OnResume.REFUSED, "what it has saved is of that loop"),
    "model.weights": Rule(OnResume.KEPT, "read once, by a run that has no checkpoint yet"),
    "model.strict": Rule(OnResume.KEPT, "it says how they are read"),
    "model.freeze": Rule(OnResume.APPLIED, "from the next step on; of what is trained anew an optimizer has no memory"),
    "model.checkpointing": Rule(OnResume.APPLIED, "the numbers are the same"),
    "loss": Rule(OnResume.APPLIED, "losses and accuracies before and after are of different measures"),
    "metrics": Rule(OnResume.APPLIED, "from the next evaluation on"),
    "on_evaluation": Rule(OnResume.APPLIED, "from the next evaluation on"),
    "optimizer": Rule(OnResume.APPLIED, "from the next step on; a momentum that was off begins at zero"),
    "optimizer.name": Rule(OnResume.REFUSED, "what one optimizer remembers is of no use to another"),
    "optimizer.others.match": Rule(OnResume.REFUSED, "what Muon remembers is of no use to AdamW"),
    "schedule": Rule(OnResume.APPLIED, "as if it had been so from the start: the next step's rate is the new one's"),
    "schedule.name": Rule(OnResume.APPLIED, "a plateau begins with the rate of the optimizer"),
    "schedule.metric": Rule(OnResume.APPLIED, "evaluations are counted anew"),
    "precision": Rule(OnResume.APPLIED),
    "compile": Rule(OnResume.APPLIED),
    "epochs": Rule(OnResume.APPLIED, "refused if the run has gone further already"),
    "steps": Rule(OnResume.APPLIED, "refused if the run has gone further already"),
    "stop": Rule(OnResume.APPLIED, "from the next evaluation on"),
    "ema": Rule(OnResume.APPLIED, "an average begins with the weights that are there"),
    "batch_size": Rule(OnResume.REFUSED, "the steps of the run are counted in it"),
    "accumulate": Rule(OnResume.APPLIED),
    "clip_norm": Rule(OnResume.APPLIED),
    "scaling": Rule(OnResume.APPLIED, "with another number of workers, dropout draws anew"),
    "parallel": Rule(OnResume.APPLIED, "a checkpoint is of the whole model, whoever has had which share of it"),
    "checkpoint": Rule(OnResume.APPLIED, "`keep` to what is on the disk as well"),
    "failure": Rule(OnResume.APPLIED),
    "logging": Rule(OnResume.APPLIED),
    "export": Rule(OnResume.APPLIED),
    "storage": Rule(OnResume.KEPT, "its folder is where it is; a run that is given by its name is looked for there"),
}


def rule_of(key: str) -> Rule:
    """The rule for a key such as ``optimizer.lr``, its own or that of the nearest key above it."""
    while key not in RULES:
        key = key.rpartition(".")[0]
    return RULES[key]


def refused_changes(before: RunConfig, after: RunConfig) -> Iterator[tuple[str, Any, Any]]:
    """The keys that differ and must not, in the schema's order, each with its value before and after.

    Of a part of another name, the name alone.
    """
    old, new = (dict(_leaves(config.model_dump(mode="json"))) for config in (before, after))
    replaced: tuple[str, ...] = ()
    for key in old | new:
        if old.get(key) == new.get(key) or rule_of(key).what is not OnResume.REFUSED or key.startswith(replaced):
            continue
        if key.endswith(".name"):
            replaced += (key.removesuffix("name"),)
        yield key, old.get(key), new.get(key)


def _leaves(section: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in section.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
