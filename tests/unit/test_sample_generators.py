"""Generators of samples, which are numpy's."""

import pickle

import numpy as np
import pytest

from raytorch.datasets.sample_generators import SampleGenerators


def numpys(seed: int, epoch: int, place: int) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(seed, spawn_key=(epoch, place))))


@pytest.mark.parametrize("seed", [0, 7, 2**32 - 1, 2**32, 2**63 + 11, 2**128 + 3, 2**200])
def test_generators_are_those_of_numpy(seed: int) -> None:
    generators = SampleGenerators(seed)
    for epoch in (0, 1, 2**32 - 1, 2**32, 10**12):
        for place in (0, 1, 1023, 1024, 70_001, 2**32 - 1, 2**32, 2**32 + 1025, 2**64 + 5):
            expected = numpys(seed, epoch, place).bit_generator.state
            assert generators.at(epoch, place).bit_generator.state == expected, (epoch, place)


def test_each_is_new() -> None:
    generators = SampleGenerators(3)
    first, again = generators.at(1, 5), generators.at(1, 5)
    assert first.random(3).tolist() == again.random(3).tolist() == numpys(3, 1, 5).random(3).tolist()
    assert generators.at(1, 5).random() != generators.at(1, 6).random()


def test_they_spawn_and_travel_as_those_of_numpy() -> None:
    rng, expected = SampleGenerators(3).at(2, 9), numpys(3, 2, 9)
    assert [each.random() for each in rng.spawn(2)] == [each.random() for each in expected.spawn(2)]
    sent = pickle.loads(pickle.dumps(rng))
    assert sent.random() == rng.random() == expected.random()
    assert sent.spawn(1)[0].random() == expected.spawn(1)[0].random()
    assert rng.bit_generator.seed_seq.spawn_key == (2, 9)
    assert (
        rng.bit_generator.seed_seq.generate_state(3).tolist()
        == expected.bit_generator.seed_seq.generate_state(3).tolist()
    )
