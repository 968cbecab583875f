"""Code of a user's own, imported from the sources that travel with a run, and called as shipped parts are."""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from pydantic import ValidationError

from raytorch.config.code_snapshot import CodeSnapshot
from raytorch.config.live_code import live_value
from raytorch.config.own_parts import OwnLoss, OwnPart
from raytorch.config.own_section import arguments_of, section_of
from raytorch.config.signature import signature_of
from raytorch.errors import ConfigError
from raytorch.system.near_names import did_you_mean
from raytorch.system.project_modules import LOCK, ProjectModules
from raytorch.system.python_files import ProjectError

_importing = False
_installed: tuple[CodeSnapshot, ProjectModules] | None = None


def imported(name: str, code: CodeSnapshot | None) -> Any:
    """What ``FILE.py:NAME`` stands for in ``code``, which takes the place of whatever code was imported so before.

    Raises ConfigError if there is no such file or name; what the user's own code raises comes as it is.
    """
    global _importing
    file, _, attribute = name.rpartition(":")
    if code is None or file not in code.sources:
        raise ConfigError(f"{name}: the code of the run has no such file")
    if (live := live_value(name, code)) is not None:
        return live
    with LOCK:
        if _importing and (_installed is None or _installed[0] != code):
            raise ConfigError(
                f"{name}: is of other code than that which is being imported; load it in a function that is called "
                "later"
            )
        modules = _modules_of(code)
        outer, _importing = _importing, True
        try:
            return modules.load(file, attribute)
        finally:
            _importing = outer


def code_in_use() -> CodeSnapshot | None:
    """The code whose modules have their names in this process, so that what is of them can be pickled by name."""
    with LOCK:
        return _installed[0] if _installed and _installed[1].has_names else None


def use_code(code: CodeSnapshot) -> None:
    """Let import statements find the modules of ``code``, in the place of those of whatever code was used before.

    Example:
        >>> use_code(CodeSnapshot("/project", {"nets/tagger.py": "WIDTH = 8"}))
        >>> import nets.tagger
    """
    with LOCK:
        _modules_of(code)


def _modules_of(code: CodeSnapshot) -> ProjectModules:
    global _installed
    if _installed is None or _installed[0] != code:
        _installed = code, ProjectModules(code.root, code.sources, code.entries)
    _installed[1].install()
    return _installed[1]


@contextmanager
def without_staying() -> Iterator[None]:
    """Let import statements look after the block where they did before it: in the code of the run, if there is one.

    What was imported in the block is kept where no other code has its names, so that a model of it can be pickled.
    """
    global _installed
    with LOCK:
        before = _installed
        was_installed = before is not None and before[1].is_installed
        try:
            yield
        finally:
            if before and was_installed:
                before[1].install()
                _installed = before
            elif _installed:
                _installed[1].retire()


def own_call(
    key: str,
    part: OwnPart,
    code: CodeSnapshot | None,
    given: Mapping[str, Any] = {},
    *,
    named_only: bool = False,
    giver: str = "the data",
) -> Callable[..., Any]:
    """What a part names, to be called with its arguments and those of ``given`` that it has parameters for.

    Args:
        key: Where the part stands in the configuration, for messages.
        part: The part.
        code: Where what it names is.
        given: What is known without it, by name; it takes the place of defaults.
        named_only: Whether it is called with none by position, and may take other keywords besides, which are no keys:
            a class of a library's, say.
        giver: Who gives ``given``, for messages.

    Raises:
        ConfigError: It has no such parameters, or requires others.
    """
    function, in_front = imported(part.name, code), () if named_only else part.called_with
    positional = len(in_front)
    if isinstance(part, OwnLoss):
        require_loss(key, function)
    parameters = _parameters(key, function, named_only)[positional:]
    names = [parameter.name for parameter in parameters]
    _require_free_names(key, part, names)
    arguments = _typed(key, part, code, positional)
    problems = [_unknown(f"{key}.{name}", name, names) for name in arguments if name not in names]
    for parameter in parameters:
        name = parameter.name
        if name in given and arguments.get(name, parameter.default) == parameter.default:  # not set by the user
            arguments[name] = given[name]
        elif name in given:
            problems.append(f"{key}.{name}: is given by {giver}, as {given[name]!r:.80}; leave it out")
    problems += [
        f"{key}.{parameter.name}: missing; {part.name} requires it"
        for parameter in parameters
        if parameter.default is parameter.empty and parameter.name not in arguments
    ]
    if problems:
        raise ConfigError("\n".join(problems))
    try:
        inspect.signature(function).bind(*range(positional), **arguments)
    except TypeError as error:  # it takes fewer by position, or one by position alone
        given_first = f"with {' and '.join(in_front)}, and " if in_front else ""
        raise ConfigError(f"{key}: {part.name} cannot be called {given_first}with these arguments: {error}") from None
    return partial(function, **arguments)


def makes_a_metric(named: Any) -> bool:
    """Tell whether what a metric names makes one that keeps a state: a class, or a function of keywords alone."""
    if isinstance(named, type):
        return True
    try:
        parameters = inspect.signature(named).parameters.values()
    except (TypeError, ValueError):  # of what cannot be called, and of what is written in C
        return False
    return all(parameter.kind in (parameter.KEYWORD_ONLY, parameter.VAR_KEYWORD) for parameter in parameters)


def require_loss(key: str, function: Callable[..., Any]) -> None:
    """Refuse a class, and a function of outputs and targets, as PyTorch's are. Raises ConfigError."""
    taken = () if isinstance(function, type) else [each.name for each in _parameters(key, function, named_only=True)]
    if isinstance(function, type) or tuple(taken[:2]) == ("input", "target"):
        called = f"{function.__name__}()" if isinstance(function, type) else function.__name__
        raise ConfigError(
            f"{key}: a loss is a function that is called with the model and a batch, which {function.__name__} is not; "
            f"write one, such as def loss(model, batch): x, y = batch; return {called}(model(x), y)"
        )


def require_arguments(
    key: str, function: Callable[..., Any], names: Sequence[str], positional: int = 0, *, named_only: bool = False
) -> None:
    """Refuse arguments that a class or function has no parameters for. Raises ConfigError.

    Args:
        key: Where it stands in the configuration, for messages.
        function: The class or function.
        names: Names of the arguments.
        positional: How many arguments are given at each call, in front.
        named_only: As for :func:`own_call`.
    """
    allowed = [parameter.name for parameter in _parameters(key, function, named_only)[positional:]]
    problems = [_unknown(f"{key}.{name}", name, allowed) for name in names if name not in allowed]
    if problems:
        raise ConfigError("\n".join(problems))


def _unknown(key: str, name: str, allowed: Sequence[str]) -> str:
    return f"{key}: unknown key; allowed: {', '.join(allowed)}{did_you_mean(name, allowed)}"


def refuse_while_importing(call: str) -> None:
    """Refuse a call that own code makes as it is imported. Raises ConfigError."""
    if _importing:
        raise ConfigError(
            f'the code of the run calls {call} as it is imported; put the call below if __name__ == "__main__":'
        )


def _typed(key: str, part: OwnPart, code: CodeSnapshot | None, positional: int) -> dict[str, Any]:
    """A part's arguments, of the types that its signature says where that is plain: tuples where JSON has lists."""
    arguments = part.arguments
    file, _, name = part.name.rpartition(":")
    try:
        signature = signature_of(code.sources[file], name) if code else None
        if signature is None:
            return arguments
        names = [parameter.name for parameter in signature.parameters]
        return arguments_of(section_of(signature, part.name, positional, optional=names).model_validate(arguments))
    except (ProjectError, ValidationError) as error:
        raise ConfigError(f"{key}: {part.name} does not take these arguments: {error}") from None


def _require_free_names(key: str, part: OwnPart, names: list[str]) -> None:
    """Refuse parameters that no key can stand for, as raytorch has it for itself. Raises ConfigError."""
    for name in names:
        if name in type(part).model_fields:
            raise ConfigError(
                f"{key}.name: {part.name} has a parameter {name!r}, which is a key of raytorch's own; rename it"
            )


def _parameters(key: str, function: Callable[..., Any], named_only: bool) -> list[inspect.Parameter]:
    if not callable(function):
        raise ConfigError(f"{key}.name: is a {type(function).__name__}, which cannot be called")
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except ValueError:  # of what is written in C
        raise ConfigError(
            f"{key}.name: does not tell what it takes; wrap it in a function that names its arguments"
        ) from None
    if not named_only and any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        raise ConfigError(
            f"{key}.name: takes any keyword, so that a misspelt one would not be told; wrap it in a function that "
            "names the arguments it takes"
        )
    return [
        parameter for parameter in parameters if parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    ]
