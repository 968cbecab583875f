"""The order of an epoch's samples, of which any part is computed at once."""

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from raytorch.datasets import TrainLoader
from raytorch.datasets.order import BlockOrder, DrawnOrder, Order, ShuffledOrder
from raytorch.datasets.requests import Request
from raytorch.datasets.shares import Share
from raytorch.sources.blocks import TOGETHER

BILLION = 10**9


def seed(*key: int) -> np.random.SeedSequence:
    return np.random.SeedSequence(7, spawn_key=key)


@pytest.mark.parametrize("hundred", range(50))
def test_it_has_every_sample_once(hundred: int) -> None:
    for count in range(100 * hundred + 1, 100 * hundred + 101):
        assert torch.equal(ShuffledOrder(count, seed(count)).at(0, count).sort().values, torch.arange(count))


def test_of_a_billion_samples_no_two_have_one_place() -> None:
    order = ShuffledOrder(BILLION, seed())
    parts = [order.at(start, start + 100_000) for start in range(0, BILLION, 50_000_000)]
    parts.append(order.at(BILLION - 1000, BILLION))
    samples = torch.cat(parts)
    assert len(samples.unique()) == len(samples)
    assert 0 <= samples.min() < samples.max() < BILLION


@pytest.mark.parametrize(
    "order",
    [ShuffledOrder(1000, seed()), DrawnOrder(torch.arange(1000).double(), seed())],
    ids=["shuffled", "drawn"],
)
def test_a_part_is_that_of_the_whole(order: Order) -> None:
    whole = order.at(0, 1000)
    assert whole.dtype == torch.int64
    for start, stop in [(0, 1), (1, 1), (3, 700), (999, 1000)]:
        assert torch.equal(order.at(start, stop), whole[start:stop])


def chi_square(counts: Tensor, expected: float | Tensor) -> float:
    """How many standard deviations the statistic of these counts is from what chance gives."""
    free = counts.numel() - 1
    return float((((counts - expected) ** 2 / expected).sum() - free) / (2 * free) ** 0.5)


def test_all_orders_of_few_samples_are_equally_likely() -> None:
    found = Counter(tuple(ShuffledOrder(4, seed(number)).at(0, 4).tolist()) for number in range(12_000))
    assert len(found) == 24
    assert abs(chi_square(torch.tensor([*found.values()]), 500)) < 4


@pytest.mark.parametrize("count", [2, 5, 16, 37, 100])
def test_every_sample_is_as_likely_at_every_place(count: int) -> None:
    times, counts = 4000, torch.zeros(count, count)
    for number in range(times):
        counts[torch.arange(count), ShuffledOrder(count, seed(number)).at(0, count)] += 1
    # Rows and columns add up, so that there are but (count - 1)^2 free numbers.
    statistic = float(((counts - times / count) ** 2 / (times / count)).sum())
    free = (count - 1) ** 2
    assert abs(statistic - free) < 4 * (2 * free) ** 0.5


@pytest.mark.parametrize("count", [60_000, BILLION])
def test_neighbours_are_strangers(count: int) -> None:
    samples = ShuffledOrder(count, seed()).at(count // 2, count // 2 + 20_000)
    hundredths = torch.bincount(samples * 100 // count, minlength=100)
    assert abs(chi_square(hundredths, 200)) < 4
    steps = torch.bincount((samples[1:] - samples[:-1]) % count * 100 // count, minlength=100)
    assert abs(chi_square(steps, 199.99)) < 4


def test_draws_are_in_proportion_to_the_weights() -> None:
    weights = torch.tensor([0.0, 1, 2, 5, 0, 8], dtype=torch.float64)
    drawn = torch.cat([DrawnOrder(weights, seed(number)).at(0, 6) for number in range(4000)])
    counts = torch.bincount(drawn, minlength=6)
    assert counts[weights == 0].sum() == 0
    assert abs(chi_square(counts[weights > 0], 24_000 * weights[weights > 0] / 16)) < 4


class Numbers:
    """A billion samples, each its own number."""

    device, facts = torch.device("cpu"), dict[str, Any]()

    def __len__(self) -> int:
        return BILLION

    def read(self, requests: Iterable[Request]) -> Iterator[Any]:
        return (request.indices for request in requests)


def test_a_loader_of_a_billion_samples_keeps_its_place_in_a_few_bytes_and_goes_on_there() -> None:
    loader = TrainLoader(Numbers(), batch_size=128)
    loader.load_state_dict(loader.state_dict() | {"epoch": 3, "position": 7 * 10**8})
    steps = loader.remaining()
    [first], [second] = next(steps), next(steps)
    state = json.loads(json.dumps(loader.state_dict()))
    assert (state["position"], len(json.dumps(state)) < 100) == (7 * 10**8 + 256, True)

    resumed = [TrainLoader(Numbers(), batch_size=128, rank=rank, world_size=2) for rank in range(2)]
    for rank in resumed:
        rank.load_state_dict(state | {"position": state["position"] - 128})
    halves = [next(rank.remaining())[0].content for rank in resumed]
    assert torch.equal(torch.cat(halves), second.content)
    assert not set(first.content.tolist()) & set(second.content.tolist())


# -- blocks ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, TOGETHER, TOGETHER + 1, 5 * TOGETHER + 3])
def test_blocks_of_any_sizes_have_every_sample_once_and_any_part_is_computed_alone(count: int) -> None:
    generator = torch.Generator().manual_seed(count)
    blocks = torch.randint(1, 40, (count,), generator=generator)
    order, total = BlockOrder(blocks, seed(count)), int(blocks.sum())
    whole = order.at(0, total)
    assert torch.equal(whole.sort().values, torch.arange(total))
    for start in range(0, total, max(1, total // 7)):
        stop = min(total, start + 1 + total // 3)
        assert torch.equal(order.at(start, stop), whole[start:stop])


def test_few_blocks_are_read_at_a_time_and_no_two_of_their_samples_stay_together() -> None:
    blocks = torch.full((100,), 1000)
    whole = BlockOrder(blocks, seed()).at(0, 100_000)
    groups = [set((part // 1000).tolist()) for part in whole.split(TOGETHER * 1000)]
    assert [len(group) for group in groups] == [TOGETHER] * 12 + [4]
    assert len(set.union(*groups)) == 100
    assert [sorted(group) for group in groups] != sorted(sorted(group) for group in groups)
    counts = torch.bincount(whole[:8000] // 1000, minlength=100)[sorted(groups[0])]
    early = torch.bincount(whole[:800] // 1000, minlength=100)[sorted(groups[0])]
    assert counts.tolist() == [1000] * TOGETHER
    assert abs(chi_square(early, 100)) < 4
    assert abs(float((whole[1:] - whole[:-1] == 1).float().mean())) < 0.01


def test_another_epoch_has_the_blocks_in_another_order() -> None:
    blocks = torch.full((50,), 10)
    orders = {tuple(BlockOrder(blocks, seed(epoch)).at(0, 500).tolist()) for epoch in range(5)}
    assert len(orders) == 5


# -- shares ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("samples", [2, 3, 10, 97, 1500])
def test_a_share_and_the_rest_have_every_sample_once_in_their_order(samples: int) -> None:
    for held_out in {1, samples // 3, samples // 2, samples - 1} - {0}:
        parts = [Share(samples, held_out, seed(held_out), is_held_out=which) for which in (True, False)]
        taken = [part.at(torch.arange(len(part))) for part in parts]
        assert [len(part) for part in parts] == [held_out, samples - held_out]
        assert torch.equal(torch.cat(taken).sort().values, torch.arange(samples))
        for part, those in zip(parts, taken, strict=True):
            assert torch.equal(those, those.sort().values)
            below = torch.arange(samples + 1)
            assert torch.equal(part.below(below), torch.searchsorted(those, below))


def test_every_sample_of_a_stretch_is_as_likely_to_be_held_out() -> None:
    times = 4000
    held_out = [Share(50, 5, seed(number), is_held_out=True).at(torch.arange(5)) for number in range(times)]
    counts = torch.bincount(torch.cat(held_out), minlength=50)
    assert abs(chi_square(counts, times / 10)) < 4


def test_a_share_of_a_billion_samples_takes_no_memory() -> None:
    rest = Share(BILLION, BILLION // 10, seed(), is_held_out=False)
    places = torch.tensor([0, 7 * 10**8, len(rest) - 1])
    samples = rest.at(places)
    assert torch.equal(rest.below(samples), places)
    assert samples[-1] >= BILLION - 2
