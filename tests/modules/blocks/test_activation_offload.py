"""Activation offload on the CPU: the order of copies and waits, without their overlap."""

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.saved_bytes import inputs
from modules.blocks import activation_offload
from modules.blocks.activation_offload import ActivationOffload, OffloadedTensors
from modules.memory.meter import MemoryMeter
from tests.small_dit import prepare, random_dit, small_config

CPU = torch.device("cpu")


def offload_blocks(offload: ActivationOffload, count: int) -> list[OffloadedTensors]:
    """Block i offloads two tensors full of i."""
    return [
        offload.offload([torch.full((2, 3), float(i)).T, torch.full((4,), float(i), dtype=torch.bfloat16)], CPU)
        for i in range(count)
    ]


def prefetched(blocks: list[OffloadedTensors]) -> list[bool]:
    return [block.prefetched is not None for block in blocks]


def test_tensors_come_back_one_block_ahead() -> None:
    blocks = offload_blocks(ActivationOffload(), 4)
    assert [block.originals is not None for block in blocks] == [False, False, False, True]
    for index in reversed(range(4)):
        with blocks[index].restored() as tensors:
            assert [tensor.shape for tensor in tensors] == [(3, 2), (4,)]
            assert all(bool((tensor == index).all()) for tensor in tensors)
            assert prefetched(blocks) == [i == index - 1 for i in range(4)]
    assert not any(prefetched(blocks)) and blocks[-1].originals is None


def test_the_originals_may_change_afterwards() -> None:
    original = torch.ones(3)
    offloaded = ActivationOffload().offload([original], CPU)
    original.zero_()
    with offloaded.restored() as (returned,):
        assert bool((returned == 1).all())


def test_restored_or_freed_tensors_are_not_prefetched_in_the_next_step() -> None:
    offload = ActivationOffload()
    first = offload_blocks(offload, 2)
    for block in reversed(first):
        with block.restored():
            pass
    second = offload_blocks(offload, 1)
    with second[0].restored():
        assert not any(prefetched(first))
    third = offload_blocks(offload, 2)
    del third[0], second[:]
    with third[0].restored():
        assert third[0].previous is None


def test_a_graph_may_be_used_twice() -> None:
    (block,) = offload_blocks(ActivationOffload(), 1)
    for _ in range(2):
        with block.restored() as tensors:
            assert bool((tensors[0] == 0).all())


def test_a_smaller_batch_needs_no_further_main_memory() -> None:
    offload = ActivationOffload()
    large = [offload.offload([torch.ones(40), torch.ones(8)], CPU) for _ in range(2)]
    del large
    tensors = [torch.full((9,), 2.0), torch.full((3,), 3.0, dtype=torch.bfloat16)]
    with MemoryMeter() as meter:
        small = [offload.offload(tensors, CPU) for _ in range(2)]
    assert meter.live == 0
    for block in reversed(small):
        with block.restored() as returned:
            assert all(torch.equal(*pair) for pair in zip(returned, tensors, strict=True))


def test_a_block_with_nothing_to_offload() -> None:
    offload = ActivationOffload()
    offload.offload([], CPU)
    with offload_blocks(offload, 1)[0].restored() as tensors:
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

    monkeypatch.setattr(activation_offload, "_on_copy_stream", lambda device: Later(queue))
    monkeypatch.setattr(activation_offload, "_wait_for_copies", wait)
    late = gradients("offload")
    monkeypatch.undo()
    for ours, plain in zip(late, gradients("none"), strict=True):
        assert torch.equal(ours, plain)
