"""Room for a batch's images: whatever is put together is what was given, and is copied only where it must be."""

import pickle

import torch
from torch import Tensor

from raytorch.sources.batch_room import BatchRoom


def filled(room: BatchRoom, *values: int) -> list[Tensor]:
    return [room.next().fill_(value) for value in values]


def values(batch: Tensor) -> list[int]:
    assert batch.shape[1:] == (2, 3, 3)
    return [int(image.float().mean()) for image in batch]


def test_a_batch_is_not_copied_from_the_second_on() -> None:
    room = BatchRoom(2, 3)
    assert values(room.batch(filled(room, 1, 2, 3))) == [1, 2, 3]
    images = filled(room, 4, 5, 6)
    batch = room.batch(images)
    assert values(batch) == [4, 5, 6]
    assert [each.data_ptr() for each in batch] == [each.data_ptr() for each in images]
    assert values(room.batch(filled(room, 7, 8, 9))) == [7, 8, 9]
    assert values(batch) == [4, 5, 6]


def test_batches_of_other_sizes_orders_and_origins_are_right_too() -> None:
    room = BatchRoom(2, 3)
    room.batch(filled(room, 0, 0, 0))
    assert values(room.batch(filled(room, 1, 2))) == [1, 2]
    assert values(room.batch(filled(room, 3, 4, 5, 6, 7))) == [3, 4, 5, 6, 7]
    unused, *images = filled(room, 8, 9, 10)
    assert values(room.batch(images)) == [9, 10]
    assert values(room.batch([unused])) == [8]
    one, other = filled(room, 11, 12)
    assert values(room.batch([other, one])) == [12, 11]
    one, other = filled(room, 13, 14)
    assert values(room.batch([other, other])) == [14, 14]
    assert values(room.batch([*filled(room, 15), torch.full((2, 3, 3), 16, dtype=torch.uint8)])) == [15, 16]
    assert values(room.batch([each.flip(0) for each in filled(room, 17, 18)])) == [17, 18]


def test_what_is_in_it_is_not_sent_with_it() -> None:
    room = BatchRoom(100, 100)
    filled(room, 1)
    again = pickle.loads(sent := pickle.dumps(room))
    assert len(sent) < 1_000
    assert again.next().shape == (100, 100, 3)
