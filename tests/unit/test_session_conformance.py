"""Handles give what PyTorch gives: its own samples of all its operators, on a worker in this process."""

import pytest
from conformance.operators import Outcome, name_of, run_operators, table
from conformance.skipped import SKIPPED
from in_process import local_session


@pytest.fixture(scope="module")
def outcome() -> Outcome:
    with local_session() as session:
        return run_operators(session, samples=2, gradients=True)


def test_every_operator_that_is_not_listed_as_skipped_gives_what_pytorch_gives(outcome: Outcome) -> None:
    different = outcome.different.keys() - SKIPPED.keys()
    assert not different, "\n".join(f"{name}: {outcome.different[name]}" for name in sorted(different))


def test_every_operator_that_is_listed_as_skipped_has_to_be(outcome: Outcome) -> None:
    assert not SKIPPED.keys() & set(outcome.equal)


def test_nothing_of_the_table_is_left_out(outcome: Outcome) -> None:
    assert sorted([*outcome.equal, *outcome.different, *outcome.unavailable]) == sorted(name_of(op) for op in table())
    assert len(outcome.equal) >= 650
    assert outcome.calls >= 3500
    assert outcome.gradients >= 500
