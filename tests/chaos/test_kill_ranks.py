"""The ranks of a run are killed at random: what their checkpoints promise, without Ray, which makes a kill cheap."""

import os
from pathlib import Path
from typing import Any

import pytest
from killing import Killer, often_saved
from rank_runs import train
from whole_runs import assert_bitwise_equal, plan, weights

KILLS = int(os.environ.get("RAYTORCH_KILLS", "4"))
"""How often the run is killed; the suite is content with few."""


@pytest.mark.timeout(600 + 120 * KILLS)
def test_a_run_whose_ranks_are_killed_again_and_again_ends_with_the_same_bits(
    small_run: dict[str, Any], tmp_path: Path
) -> None:
    whole, broken = (plan(small_run | often_saved(KILLS), name) for name in ("whole", "broken"))
    assert train(whole, tmp_path) == 0
    with Killer(broken.folder, KILLS) as killer:
        assert train(broken, tmp_path, killer, KILLS) == KILLS
    killer.check()
    assert_bitwise_equal(weights(whole.folder), weights(broken.folder))
