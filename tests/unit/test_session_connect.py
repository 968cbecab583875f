"""What a session cannot be opened with is refused before anything starts."""

import math
from typing import Any

import pytest

from raytorch.errors import UserError
from raytorch.session import connect as connecting

REFUSED: list[tuple[dict[str, Any], str]] = [
    *(({"workers": value}, "whole number of at least 1") for value in (0, -1, 1.5, True, "2")),
    *(({"cpus_per_worker": value}, "expected more than 0") for value in (0, -1, math.nan, math.inf, "1")),
    *(({"gpus_per_worker": value}, "expected 0 or more") for value in (-1, math.nan, None)),
    *(({"timeout_s": value}, "seconds, more than 0") for value in (-1, 0, math.inf, None)),
    *(({"max_bytes": value}, "None or a whole number from 0") for value in (-5, 1.5)),
    *(({"idle_timeout": value}, "None or seconds, 0 or more") for value in (-1, math.nan)),
    *(({"backend": value}, "one of auto, nccl, gloo") for value in ("mpi", None)),
]


@pytest.mark.parametrize(("options", "told"), REFUSED, ids=lambda part: str(part))
def test_what_is_not_possible_is_refused_with_what_is(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], told: str
) -> None:
    def join(address: str | None) -> None:
        raise AssertionError("nothing is to start")

    monkeypatch.setattr(connecting, "joined_ray", join)
    with pytest.raises(UserError, match=told) as failure:
        connecting.connect(**options)
    assert str(failure.value).startswith(next(iter(options)) + "=")
