"""When workers agree on whether to save or stop: all of them in one process, on clocks that the test moves."""

import threading
from collections.abc import Callable
from itertools import pairwise

import pytest
import ray

from raytorch.cluster.ray_watch import HeadLostError, RayletLostError
from raytorch.training.stopping import INTERVAL_S, DriverRequest, StopAgreement, abandon_workers, steps_ahead


class Workers:
    """Workers that take their steps together; rank 1's clock runs at another speed than rank 0's."""

    def __init__(self, world_size: int, speed: float = 1.0) -> None:
        self.now = 0.0
        self._word = [0.0, 0.0]
        speeds = [1.0, speed][:world_size]
        self._agreements = [StopAgreement(self._add_up, self._clock(speed)) for speed in speeds]

    def step(self, seconds: float, request: DriverRequest = DriverRequest.CONTINUE) -> DriverRequest | None:
        """What they do after a step of so many seconds; None where they do not ask."""
        self.now += seconds
        due = {agreement.count_step() for agreement in self._agreements}
        assert len(due) == 1, "some would wait for the others without end"
        if due == {False}:
            return None
        self._word = [0.0, 0.0]
        agreed = {agreement.agree(None if rank else request) for rank, agreement in enumerate(self._agreements)}
        assert len(agreed) == 1
        return agreed.pop()

    def _add_up(self, word: list[float]) -> list[float]:
        """The sum over the ranks until this one, of which only the first has anything to add."""
        self._word = [sum(pair) for pair in zip(self._word, word, strict=True)]
        return self._word

    def _clock(self, speed: float) -> Callable[[], float]:
        return lambda: self.now * speed


def agreements(workers: Workers, steps: int, seconds: float) -> list[int]:
    return [step for step in range(1, steps + 1) if workers.step(seconds) is not None]


@pytest.mark.parametrize(
    ("steps", "seconds", "ahead"),
    [
        (10, 1.0, 20),  # a pace of 0.1 s
        (10, 2.0, 10),
        (10, 8.0, 2),
        (10, 20.0, 1),
        (10, 600.0, 1),  # a minute a step: after each
        (1, 0.001, 2),  # a pace that cannot be: twice as far and no further
        (100, 0.0, 200),
    ],
)
def test_the_next_agreement_is_an_interval_ahead(steps: int, seconds: float, ahead: int) -> None:
    assert INTERVAL_S == 2
    assert steps_ahead(steps, seconds) == ahead


@pytest.mark.parametrize("world_size", [1, 2])
def test_the_first_step_ends_with_an_agreement_and_slow_steps_all_do(world_size: int) -> None:
    assert agreements(Workers(world_size), 5, seconds=30.0) == [1, 2, 3, 4, 5]


def test_fast_steps_agree_every_interval_once_the_pace_is_known() -> None:
    workers = Workers(2)
    workers.step(20.0)  # compiles, say
    asked = agreements(workers, 20_000, seconds=0.005)
    assert len(asked) < 20_000 * 0.005 / INTERVAL_S + 10
    assert {b - a for a, b in pairwise(asked[-5:])} == {400}


def test_a_pace_that_breaks_down_is_noticed_at_the_next_agreement() -> None:
    workers = Workers(2)
    agreements(workers, 10_000, seconds=0.005)
    asked = agreements(workers, 450, seconds=1.0)
    assert asked[0] <= 400
    assert {b - a for a, b in pairwise(asked[3:])} <= {1, 2}


def test_workers_with_clocks_of_their_own_agree_on_the_steps() -> None:
    assert len(agreements(Workers(2, speed=1.7), 3_000, seconds=0.02)) > 20


@pytest.mark.parametrize("asked", [DriverRequest.SAVE, DriverRequest.STOP])
@pytest.mark.parametrize("world_size", [1, 2])
def test_all_workers_save_or_stop_at_the_agreement_after_the_wish(world_size: int, asked: DriverRequest) -> None:
    workers = Workers(world_size)
    agreements(workers, 1_000, seconds=0.01)
    wished_at = workers.now
    while (agreed := workers.step(0.01, asked)) is None:
        pass
    assert agreed is asked
    assert workers.now - wished_at <= INTERVAL_S + 0.1


def test_nobody_saves_or_stops_unasked() -> None:
    workers = Workers(2)
    assert {workers.step(0.5) for _ in range(100)} == {DriverRequest.CONTINUE, None}


# -- when a part of Ray is lost ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "done"),
    [
        (HeadLostError("it died"), "abandon"),
        (RayletLostError(), "abandon"),
        (ray.exceptions.RayActorError(), "end"),
    ],
)
def test_nobody_waits_for_workers_of_a_ray_that_is_left_as_that_would_start_another(
    error: Exception, done: str
) -> None:
    fit = Fit()
    abandon_workers(fit, error)
    assert fit.calls == [done]


class Fit:
    """What waits for workers, and ends when it is told to."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.done = threading.Event()

    def end(self) -> None:
        self.calls.append("end")
        self.done.set()

    def abandon(self) -> None:
        self.calls.append("abandon")
        self.done.set()
