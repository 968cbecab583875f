"""A run's file as text: reading it, and what it is refused for."""

from pathlib import Path

import pytest

from raytorch.config import RunConfig
from raytorch.config.file import load_config
from raytorch.errors import ConfigError


def read(text: str, *overrides: str) -> RunConfig:
    """The run of a file ``run.yaml`` in the current folder."""
    Path("run.yaml").write_text(text, encoding="utf-8")
    return load_config("run.yaml", overrides)


def problems(text: str, *overrides: str) -> list[str]:
    """The lines with which it is refused."""
    with pytest.raises(ConfigError) as caught:
        read(text, *overrides)
    assert caught.value.__context__ is None or caught.value.__suppress_context__
    return str(caught.value).split("\n")
