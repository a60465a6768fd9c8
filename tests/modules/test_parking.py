"""What blocks park in main memory; on the CPU everything but the overlap."""

import torch

from modules.parking import Parked, Parking

CPU = torch.device("cpu")


def park(parking: Parking, count: int) -> list[Parked]:
    """Block i parks two tensors full of i."""
    return [
        parking.park([torch.full((2, 3), float(i)).T, torch.full((4,), float(i), dtype=torch.bfloat16)], CPU)
        for i in range(count)
    ]


def waiting(blocks: list[Parked]) -> list[bool]:
    return [block.returned is not None for block in blocks]


def test_tensors_come_back_one_block_ahead() -> None:
    blocks = park(Parking(), 4)
    assert [block.leaving is not None for block in blocks] == [False, False, False, True]
    for index in reversed(range(4)):
        with blocks[index].taken() as tensors:
            assert [tensor.shape for tensor in tensors] == [(3, 2), (4,)]
            assert all(bool((tensor == index).all()) for tensor in tensors)
            assert waiting(blocks) == [i == index - 1 for i in range(4)]
    assert not any(waiting(blocks)) and blocks[-1].leaving is None


def test_the_originals_may_change_afterwards() -> None:
    original = torch.ones(3)
    parked = Parking().park([original], CPU)
    original.zero_()
    with parked.taken() as (returned,):
        assert bool((returned == 1).all())


def test_what_was_taken_or_is_gone_is_not_fetched_for_the_next_step() -> None:
    parking = Parking()
    first = park(parking, 2)
    for block in reversed(first):
        with block.taken():
            pass
    second = park(parking, 1)
    with second[0].taken():
        assert not any(waiting(first))
    third = park(parking, 2)
    del third[0], second[:]
    with third[0].taken():
        assert third[0].before is None


def test_a_graph_may_be_used_twice() -> None:
    (block,) = park(Parking(), 1)
    for _ in range(2):
        with block.taken() as tensors:
            assert bool((tensors[0] == 0).all())


def test_a_block_without_anything_to_park() -> None:
    parking = Parking()
    parking.park([], CPU)
    with park(parking, 1)[0].taken() as tensors:
        assert len(tensors) == 2
