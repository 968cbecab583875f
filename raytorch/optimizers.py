"""Optimizers by the names that configs and sessions use, and their state in checkpoints."""

from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from raytorch.config import Muon, Optimizer, ParameterGroup
from raytorch.errors import CheckpointError, ConfigError
from raytorch.system.near_names import did_you_mean

MOST_NAMES = 12
"""Names of parameters that an error lists."""
OPTIMIZERS: dict[str, type[torch.optim.Optimizer]] = {
    "sgd": torch.optim.SGD,
    "asgd": torch.optim.ASGD,
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "nadam": torch.optim.NAdam,
    "radam": torch.optim.RAdam,
    "adamax": torch.optim.Adamax,
    "adafactor": torch.optim.Adafactor,
    "adagrad": torch.optim.Adagrad,
    "adadelta": torch.optim.Adadelta,
    "rmsprop": torch.optim.RMSprop,
    "rprop": torch.optim.Rprop,
    "muon": torch.optim.Muon,
}
"""Every optimizer by name: PyTorch's own classes."""
FUSED = ("adam", "adamw")
"""Those whose step is computed in one pass over the memory where it can be; that of SGD is slower so on CPUs."""
Group = dict[str, Any]
"""Parameters, as ``params``, and the settings that they have in common: a group of PyTorch's."""


def build_optimizer(config: Optimizer, parameters: Iterable[tuple[str, nn.Parameter]]) -> torch.optim.Optimizer:
    """Build the optimizer that ``config`` names of parameters with their names; its fields are the class's arguments.

    The first of its groups are the configuration's, the last has the parameters that none of them names. Muon's has
    each of them twice: those that AdamW trains come before all that Muon does.

    Raises:
        ConfigError: No parameter is left for one of the groups, or there is none of a name that is given.

    Example:
        >>> from raytorch.config import AdamW
        >>> optimizer = build_optimizer(AdamW(lr=0.01), nn.Linear(2, 2).named_parameters())
    """
    named = dict(parameters)
    if isinstance(config, Muon):
        return _build_muon(config, named)
    groups = [{"params": [*there.values()], **settings} for there, settings in _grouped(config, named)]
    settings = config.model_dump(exclude={"name", "groups"})
    return _made(OPTIMIZERS[config.name], groups, settings, is_fused=config.name in FUSED)


def _made(
    kind: type[torch.optim.Optimizer], groups: list[Group], settings: Mapping[str, Any], *, is_fused: bool
) -> torch.optim.Optimizer:
    """An optimizer of PyTorch's, fused if it is to be and its parameters allow for it."""
    build: Any = kind
    if not (is_fused and all(_can_be_fused(each) for group in groups for each in group["params"])):
        return build(groups, **settings)  # type: ignore[no-any-return]
    optimizer: torch.optim.Optimizer = build(groups, **settings, fused=True)
    optimizer.register_step_pre_hook(_lay_out_gradients)
    # As of other optimizers, GradScaler is to find what overflows by itself, so that state begins with a step.
    optimizer._step_supports_amp_scaling = False  # type: ignore[attr-defined]
    return optimizer


def _can_be_fused(parameter: Tensor) -> bool:
    if parameter.device.type not in ("cpu", "cuda") or not parameter.is_floating_point():
        return False
    outline = torch.empty_strided(parameter.shape, parameter.stride(), device="meta")
    return torch.empty_like(outline).stride() == outline.stride()  # neither gaps nor numbers that share memory


def _lay_out_gradients(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    """Give gradients the layout in memory of their parameters, which a fused step takes for granted on CPUs.

    Backward passes do, what puts others in their place may not.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            gradient = parameter.grad
            if gradient is not None and gradient.stride() != parameter.stride():
                parameter.grad = torch.empty_like(parameter, requires_grad=False).copy_(gradient)


def _grouped(
    config: Optimizer, named: Mapping[str, nn.Parameter]
) -> list[tuple[dict[str, nn.Parameter], dict[str, float]]]:
    """The parameters of each group by their names, with its settings; those that are left come last, with none."""
    rest, groups = dict(named), []
    for number, group in enumerate(config.groups):
        there = _matching(group.match, rest, f"optimizer.groups[{number}].match", " that is left" if number else "")
        rest = {name: parameter for name, parameter in rest.items() if name not in there}
        groups.append((there, _settings(group)))
    return [*groups, (rest, {})] if rest else groups


def _matching(pattern: str, named: Mapping[str, nn.Parameter], key: str, left: str = "") -> dict[str, nn.Parameter]:
    found = {name: parameter for name, parameter in named.items() if fnmatchcase(name, pattern)}
    if not found:
        raise ConfigError(
            f"{key}: no parameter{left} has a name like {pattern!r}{did_you_mean(pattern, named)}; there are "
            f"{', '.join([*named][:MOST_NAMES])}{', ...' if len(named) > MOST_NAMES else ''}"
        )
    return found


def _settings(group: ParameterGroup) -> dict[str, float]:
    return group.model_dump(exclude={"match"}, exclude_none=True)


# -- Muon --------------------------------------------------------------------------------------------------------------


class MuonWithAdamW(torch.optim.Optimizer):
    """Muon and AdamW as one optimizer: groups of ``torch.optim.Muon``, and before them groups of ``torch.optim.AdamW``.

    Each of its groups says as ``is_muon`` whose it is. What both remember is its own ``state``, by parameter.

    Args:
        muon: Groups of matrices.
        adamw: Groups of other parameters; may be empty.
        settings: Arguments of ``torch.optim.Muon``.
        others: Arguments of ``torch.optim.AdamW``.

    Example:
        >>> net = nn.Linear(2, 2)
        >>> optimizer = MuonWithAdamW([{"params": [net.weight]}], [{"params": [net.bias]}], {"lr": 0.02}, {"lr": 3e-4})
    """

    def __init__(
        self, muon: list[Group], adamw: list[Group], settings: Mapping[str, Any], others: Mapping[str, Any]
    ) -> None:
        self._parts: list[tuple[bool, torch.optim.Optimizer]] = []
        if adamw:
            self._parts.append((False, _made(torch.optim.AdamW, adamw, others, is_fused=True)))
        self._parts.append((True, torch.optim.Muon(muon, **settings)))
        groups = [{**group, "is_muon": is_muon} for is_muon, part in self._parts for group in part.param_groups]
        super().__init__(groups, {})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One step of both."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for is_muon, part in self._parts:  # load_state_dict and schedulers replace what is here, so it is handed down
            part.state = self.state
            part.param_groups = [group for group in self.param_groups if group["is_muon"] == is_muon]
            part.step()
        return loss


def _build_muon(config: Muon, named: Mapping[str, nn.Parameter]) -> MuonWithAdamW:
    matrices = {name for name, parameter in named.items() if parameter.ndim == 2}
    for number, pattern in enumerate(config.others.match):
        matrices -= _matching(pattern, named, f"optimizer.others.match[{number}]").keys()
    if not matrices:
        raise ConfigError(
            "optimizer.name: muon trains matrices, of which the model has none that optimizer.others does not name; "
            "take adamw"
        )
    muon: list[Group] = []
    adamw: list[Group] = []
    for there, settings in _grouped(config, named):
        for groups, is_muon in ((muon, True), (adamw, False)):
            if chosen := [parameter for name, parameter in there.items() if (name in matrices) == is_muon]:
                groups.append({"params": chosen, **settings})
    return MuonWithAdamW(
        muon,
        adamw,
        config.model_dump(exclude={"name", "groups", "others"}),
        config.others.model_dump(exclude={"match"}),
    )


# -- checkpoints -------------------------------------------------------------------------------------------------------


def optimizer_state(optimizer: torch.optim.Optimizer, parameters: Iterable[nn.Parameter]) -> list[dict[str, Any]]:
    """Return what ``optimizer`` remembers of each of ``parameters``; its settings are not among it."""
    return [dict(optimizer.state[parameter]) if parameter in optimizer.state else {} for parameter in parameters]


def restore_optimizer(
    optimizer: torch.optim.Optimizer, remembered: list[dict[str, Any]], parameters: Iterable[nn.Parameter]
) -> None:
    """Give ``optimizer``, whose settings stay as they are, what :func:`optimizer_state` took from one like it.

    What only its present settings need (a momentum that was 0, say) begins with zeros. Raises CheckpointError for what
    was taken from another kind of optimizer, or one of other parameters.
    """
    parameters = list(parameters)
    if len(remembered) != len(parameters):
        raise CheckpointError(
            f"the checkpoint's optimizer has {len(remembered)} parameters, the model {len(parameters)}; resume with "
            "the model of the run that saved it"
        )
    groups = {parameter: number for number, group in enumerate(optimizer.param_groups) for parameter in group["params"]}
    examples: dict[tuple[int, int], _Example] = {}
    for parameter, there in zip(parameters, remembered, strict=True):
        if there and parameter in groups:  # what is not trained any more is left as it is
            kind = (groups[parameter], parameter.ndim)
            if kind not in examples:
                examples[kind] = _Example(optimizer, optimizer.param_groups[kind[0]], parameter)
            optimizer.state[parameter] = examples[kind].fitted(parameter, there)


class _Example:
    """What an optimizer remembers of a parameter of a group, as one that takes a step with a small one shows."""

    SIZE = 2
    """Of the small parameter, in each of its dimensions."""

    def __init__(self, optimizer: torch.optim.Optimizer, group: Group, parameter: Tensor) -> None:
        kind = type(optimizer)
        if isinstance(optimizer, MuonWithAdamW):
            kind = torch.optim.Muon if group["is_muon"] else torch.optim.AdamW
        settings = {name: value for name, value in group.items() if name != "params"}
        small = torch.zeros((self.SIZE,) * parameter.ndim, dtype=parameter.dtype, device=parameter.device)
        self._shown = _remembered(kind, small, settings)
        self._always = _remembered(kind, small, {}).keys()

    def fitted(self, parameter: Tensor, there: Mapping[str, Any]) -> dict[str, Any]:
        """The state of one parameter; what has its shape in its own layout in memory, where an optimizer is faster."""
        if isinstance(there.get("step"), Tensor) != ("step" in self._shown) or self._always - there.keys():
            raise CheckpointError(
                "the checkpoint is of another kind of optimizer; resume with the optimizer of its run"
            )
        fitted: dict[str, Any] = {}
        for name in sorted(self._shown):
            shown, value = self._shown[name], there.get(name)
            sizes = zip(parameter.shape, shown.shape, strict=False)  # a count of steps has no dimensions
            shape = torch.Size(size if part == self.SIZE else part for size, part in sizes)
            if value is not None and not (isinstance(value, Tensor) and value.shape == shape):
                raise CheckpointError(
                    f"the checkpoint's {name} does not fit the model; resume with the model of its run"
                )
            like = parameter if shape == parameter.shape else shown.new_empty(shape)
            place = torch.zeros_like(like, dtype=shown.dtype, device=shown.device)
            fitted[name] = place if value is None else place.copy_(value)
        return fitted


def _remembered(kind: type[torch.optim.Optimizer], values: Tensor, settings: Mapping[str, Any]) -> dict[str, Tensor]:
    build: Any = kind
    parameter = nn.Parameter(values.clone())
    parameter.grad = torch.zeros_like(values)
    optimizer = build([parameter])
    optimizer.param_groups[0] |= settings
    optimizer.step()
    return {name: value for name, value in optimizer.state[parameter].items() if value is not None}
