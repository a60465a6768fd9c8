"""What blocks park in main memory; on the CPU everything but the overlap."""

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.saved_bytes import inputs
from modules.blocks import activation_offload as parking
from modules.blocks.activation_offload import Parked, Parking
from modules.memory.meter import MemoryMeter
from tests.small_dit import prepare, random_dit, small_config

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


def test_a_smaller_batch_needs_no_further_main_memory() -> None:
    parking = Parking()
    large = [parking.park([torch.ones(40), torch.ones(8)], CPU) for _ in range(2)]
    del large
    tensors = [torch.full((9,), 2.0), torch.full((3,), 3.0, dtype=torch.bfloat16)]
    with MemoryMeter() as meter:
        small = [parking.park(tensors, CPU) for _ in range(2)]
    assert meter.live == 0
    for block in reversed(small):
        with block.taken() as returned:
            assert all(torch.equal(*pair) for pair in zip(returned, tensors, strict=True))


def test_a_block_without_anything_to_park() -> None:
    parking = Parking()
    parking.park([], CPU)
    with park(parking, 1)[0].taken() as tensors:
        assert len(tensors) == 2


class Later(TorchDispatchMode):
    """Inside, copies only queue up, as those of a slow stream do."""

    def __init__(self, queue: list[Callable[[], Tensor]]) -> None:
        super().__init__()
        self.queue = queue

    def __torch_dispatch__(self, op: Callable, types: object, args: tuple = (), kwargs: dict | None = None) -> Any:
        if op is torch.ops.aten.copy_.default:
            self.queue.append(functools.partial(op, *args, **kwargs or {}))
            return args[0]
        return op(*args, **kwargs or {})


def gradients(checkpointing: str) -> list[Tensor]:
    dit = random_dit(small_config(depth_double=2, depth_single=3))
    network = prepare(dit, checkpointing)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.1)
    for seed in range(2):
        torch.manual_seed(seed)
        dit(**inputs((1, 4, 4), 40, torch.float32)).square().mean().backward()
    return [parameter.grad for parameter in network.parameters()]


def test_nothing_is_read_before_its_copy_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """The order of copies and waits, as it is on CUDA, with copies as late as they may be."""
    queue: list[Callable[[], Tensor]] = []

    def wait(device: torch.device) -> None:
        while queue:
            queue.pop(0)()

    monkeypatch.setattr(parking, "_copies", lambda device: Later(queue))
    monkeypatch.setattr(parking, "_wait_for_copies", wait)
    late = gradients("offload")
    monkeypatch.undo()
    for ours, plain in zip(late, gradients("none"), strict=True):
        assert torch.equal(ours, plain)
