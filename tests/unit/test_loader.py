"""Which samples the ranks get: each once, evenly, in an order that survives a restart and another world size."""

import itertools

import pytest
import torch
from loaders import assert_same_steps, epoch, numbered, ranks, samples, saved

from raytorch.config import Augment
from raytorch.config.run import smallest_batch
from raytorch.datasets import Dataset, TrainLoader, evaluation_batches
from raytorch.datasets.in_memory import MnistStrips, Moments
from raytorch.errors import CheckpointError, ConfigError

WORLDS = [1, 2, 3]


# -- exactly once ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("world_size", WORLDS)
@pytest.mark.parametrize("micro_batches", [1, 2, 3])
@pytest.mark.parametrize(("count", "batch_size"), [(53, 10), (50, 10), (7, 9), (19, 9), (1, 9)])
def test_every_sample_once_per_epoch(count, batch_size, micro_batches, world_size):
    loaders = ranks(numbered(count), world_size, batch_size=batch_size, micro_batches=micro_batches)
    for number in range(2):
        steps = epoch(loaders)
        assert len(steps) == loaders[0].steps_per_epoch
        assert all(len(step) == micro_batches * world_size for step in steps)
        assert [len(samples(step)) for step in steps[:-1]] == [batch_size] * (len(steps) - 1)
        assert sorted(sample for step in steps for sample in samples(step)) == list(range(count))
        for loader in loaders:
            assert (loader.epoch, loader.position) == (number, count)
            loader.next_epoch()


@pytest.mark.parametrize("world_size", WORLDS)
@pytest.mark.parametrize("micro_batches", [1, 2, 3])
def test_order_does_not_depend_on_world_size(micro_batches, world_size):
    dataset = numbered(53)
    alone = epoch(ranks(dataset, 1, batch_size=10))
    together = epoch(ranks(dataset, world_size, batch_size=10, micro_batches=micro_batches))
    assert list(map(samples, together)) == list(map(samples, alone))


SIZES = {
    (33, 32): [33],  # a single sample is left: it joins
    (39, 32): [39],
    (40, 32): [32, 8],  # a quarter of a batch is one of its own
    (71, 32): [32, 39],
    (64, 32): [32, 32],
    (3, 2): [3],
    (5, 3): [3, 2],
    (4, 3): [4],
    (5, 1): [1] * 5,
    (1, 32): [1],
}


@pytest.mark.parametrize("world_size", WORLDS)
@pytest.mark.parametrize(("count", "batch_size"), SIZES)
def test_a_small_remainder_joins_the_batch_before_it_whatever_the_number_of_workers(count, batch_size, world_size):
    loaders = ranks(numbered(count), world_size, batch_size=batch_size)
    assert loaders[0].steps_per_epoch == len(SIZES[count, batch_size])
    steps = epoch(loaders)
    assert [len(samples(step)) for step in steps] == SIZES[count, batch_size]
    assert min(map(len, steps), default=0) == world_size
    assert smallest_batch(count, batch_size) == min(batch_size, *SIZES[count, batch_size])


@pytest.mark.parametrize("stop", [1, 2])
def test_a_run_resumes_before_and_after_a_batch_that_a_remainder_has_joined(stop):
    whole = epoch(ranks(numbered(71), 1, batch_size=32, seed=5))
    first = TrainLoader(numbered(71), batch_size=32, seed=5)
    for _ in itertools.islice(first.remaining(), stop):
        state = saved(first)
    loaders = ranks(numbered(71), 2, batch_size=32, seed=5)
    for loader in loaders:
        loader.load_state_dict(state)
    assert_same_steps(epoch(loaders), whole[stop:])


def test_parts_are_as_even_as_can_be():
    step = epoch(ranks(numbered(11), 3, batch_size=11))[0]
    assert sorted(part.samples for part in step) == [3, 4, 4]


def test_inputs_belong_to_their_targets():
    dataset = numbered(20)
    for part in itertools.chain(*epoch(ranks(dataset, 2, batch_size=6, micro_batches=2))):
        assert torch.equal(part.content[0], dataset.batch(part.content[1])[0])


# -- weights -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("world_size", WORLDS)
@pytest.mark.parametrize("micro_batches", [1, 2, 3])
@pytest.mark.parametrize("batch_size", [2, 18, 25])
def test_weighted_means_average_to_the_mean_over_the_global_batch(batch_size, micro_batches, world_size):
    for step in epoch(ranks(numbered(53), world_size, batch_size=batch_size, micro_batches=micro_batches)):
        assert sum(part.weight for part in step) == pytest.approx(world_size)
        assert all(len(part.content[1]) >= 1 for part in step)
        mean = sum(part.weight * part.content[1].double().mean().item() for part in step) / world_size
        assert mean == pytest.approx(torch.tensor(samples(step)).double().mean().item())


@pytest.mark.parametrize("world_size", WORLDS)
@pytest.mark.parametrize("micro_batches", [1, 2, 3])
def test_weights_of_even_parts_are_exact(micro_batches, world_size):
    for part in epoch(ranks(numbered(72), world_size, batch_size=36, micro_batches=micro_batches))[0]:
        assert part.weight == 1 / micro_batches


# -- repeat and resume -------------------------------------------------------------------------------------------------


def orders(seed: int, epochs: int = 2) -> list[list[int]]:
    loader = TrainLoader(numbered(53), batch_size=53, seed=seed)
    order = []
    for _ in range(epochs):
        order.append(samples(next(loader.remaining())))
        loader.next_epoch()
    return order


def test_order_depends_on_seed_and_epoch():
    assert orders(seed=1) == orders(seed=1)
    drawn = [tuple(order) for seed in (0, 1, 2**40, 2**40 + 1) for order in orders(seed)]
    assert len(set(drawn)) == len(drawn)
    assert tuple(range(53)) not in drawn


@pytest.mark.parametrize("stop", [1, 3, 6])
@pytest.mark.parametrize("world_size", WORLDS)
def test_resumes_at_the_exact_next_batch_under_another_world_size(world_size, stop):
    options = {"batch_size": 10, "augment": Augment(crop=1, flip=True)}
    dataset = numbered(53)
    whole = TrainLoader(dataset, seed=5, **options)
    whole.next_epoch()
    expected = epoch([whole])
    expected_next = (whole.next_epoch(), epoch([whole]))[1]

    interrupted = TrainLoader(dataset, seed=5, rank=1, world_size=2, **options)
    interrupted.next_epoch()
    for _ in itertools.islice(interrupted.remaining(), stop):
        state = saved(interrupted)
    assert state["epoch"] == 1
    assert state["position"] == min(10 * stop, 53)

    loaders = ranks(dataset, world_size, seed=5, **options)
    for loader in loaders:
        loader.load_state_dict(state)
    assert_same_steps(epoch(loaders), expected[stop:])
    for loader in loaders:
        loader.next_epoch()
    assert_same_steps(epoch(loaders), expected_next)


@pytest.mark.parametrize("count", [52, 54])
def test_state_of_another_data_set_is_refused(count):
    with pytest.raises(CheckpointError, match=f"orders 53 training samples, the data set has {count}"):
        TrainLoader(numbered(count), batch_size=10).load_state_dict(
            TrainLoader(numbered(53), batch_size=10).state_dict()
        )


@pytest.mark.parametrize(
    "change",
    [
        {"epoch": -1},
        {"epoch": "2"},
        {"epoch": True},
        {"position": 54},
        {"position": -1},
        {"position": 1.0},
        {"samples": None},
    ],
)
def test_a_damaged_place_is_refused(change):
    loader = TrainLoader(numbered(53), batch_size=10)
    with pytest.raises(CheckpointError, match="place in the data"):
        loader.load_state_dict(loader.state_dict() | change)


# -- augmentation ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("augment", [Augment(crop=2), Augment(flip=True), Augment(crop=2, flip=True)])
def test_augmentation_does_not_depend_on_world_size(augment, world_size):
    dataset = numbered(53, (3, 8, 8))
    alone = epoch(ranks(dataset, 1, batch_size=10, augment=augment))
    together = epoch(ranks(dataset, world_size, batch_size=10, micro_batches=2, augment=augment))
    assert_same_steps(together, alone)


def test_crop_and_flip_are_drawn_evenly_and_anew():
    dataset = numbered(2000, (1, 3, 3))
    loader = TrainLoader(dataset, batch_size=500, augment=Augment(crop=1, flip=True))
    seen = []
    for _ in range(2):
        step = [part for parts in loader.remaining() for part in parts]
        order = torch.cat([part.content[1] for part in step]).argsort()
        seen.append(torch.cat([part.content[0] for part in step])[order, 0])
        loader.next_epoch()
    assert not torch.equal(*seen)
    plain = dataset.batch(torch.arange(2000))[0][:, 0]
    for augmented in seen:
        untouched = (augmented == plain).all(dim=(1, 2)).float().mean().item()
        assert untouched == pytest.approx(1 / 18, abs=0.02)
        for row in (0, 2):  # is padding in a third of the shifts
            assert (augmented[:, row, 1] == 0).float().mean().item() == pytest.approx(1 / 3, abs=0.04)


def test_padding_is_black_before_normalization():
    dataset = Dataset(torch.full((1, 1, 4, 4), 200, dtype=torch.uint8), torch.zeros(1).long(), Moments((0.5,), (0.5,)))
    values = set()
    loader = TrainLoader(dataset, batch_size=1, augment=Augment(crop=3))
    for _ in range(9):
        values |= set(next(loader.remaining())[0].content[0].flatten().tolist())
        loader.next_epoch()
    assert sorted(values) == pytest.approx([-1, 200 / 127.5 - 1])


def test_strips_are_cropped_but_never_mirrored():
    images = torch.randint(1, 256, (5, 1, 28, 28), dtype=torch.uint8)
    strips = MnistStrips(images, torch.arange(5), "train", fewest=1, most=2)
    (part,) = next(TrainLoader(strips, batch_size=5, augment=Augment(crop=2)).remaining())
    assert part.content[0].shape == (5, 1, 28, 56)
    with pytest.raises(ConfigError, match=r"data\.augment\.flip: must be false"):
        TrainLoader(strips, batch_size=5, augment=Augment(flip=True))


# -- evaluation --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
@pytest.mark.parametrize("count", [1, 7, 53])
@pytest.mark.parametrize("batch_size", [1, 10, 100])
def test_evaluation_covers_each_sample_once(count, batch_size, world_size):
    dataset = numbered(count)
    shares = [
        list(evaluation_batches(dataset, batch_size=batch_size, rank=rank, world_size=world_size))
        for rank in range(world_size)
    ]
    batches = list(itertools.chain(*shares))
    assert all(1 <= batch.samples <= batch_size for batch in batches)
    assert torch.cat([batch.content[1] for batch in batches]).tolist() == list(range(count))
    assert torch.equal(torch.cat([batch.content[0] for batch in batches]), dataset.batch(torch.arange(count))[0])
    sizes = [sum(batch.samples for batch in share) for share in shares]
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
@pytest.mark.parametrize("count", [1, 7, 53])
@pytest.mark.parametrize("batch_size", [1, 10, 100])
def test_ranks_that_are_kept_in_step_have_as_many_batches(count, batch_size, world_size):
    dataset = numbered(count)
    shares = [
        list(evaluation_batches(dataset, batch_size=batch_size, rank=rank, world_size=world_size, in_step=True))
        for rank in range(world_size)
    ]
    assert len({len(share) for share in shares}) == 1
    batches = list(itertools.chain(*shares))
    assert all(len(batch.content[1]) == max(1, batch.samples) for batch in batches)
    assert all((batch.samples > 0) == (batch.weight == 1) for batch in batches)
    counted = [batch.content[1] for batch in batches if batch.samples]
    assert torch.cat(counted).tolist() == list(range(count))
    assert max(map(len, counted)) <= batch_size + 1


@pytest.mark.parametrize("parts", range(1, 5))
def test_what_is_left_gives_every_worker_two_samples_where_whole_batches_give_it_eight(parts: int) -> None:
    for count in range(2 * parts, 300):
        assert smallest_batch(count, 32) >= min(2 * parts, count)
