"""Counts bytes of tensors while code runs, with real tensors or with tensors that have no data."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class MemoryMeter(TorchDispatchMode):
    """Inside, `live` is the bytes of storages made since the beginning and still referenced; `peak` their maximum."""

    def __init__(self) -> None:
        super().__init__()
        self.live = 0
        self.peak = 0
        # The weak reference keeps the key from being used again for another storage.
        self._storages: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, op: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        # Not only in `args`: `out=` is given too.
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        results = op(*args, **(kwargs or {}))
        self.forget_released()
        for result in results if isinstance(results, (tuple, list)) else [results]:
            if isinstance(result, Tensor) and not result.is_meta and result.untyped_storage()._cdata not in given:
                self._count(result)
        self.peak = max(self.peak, self.live)
        return results

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        self._storages[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.live += storage.nbytes()

    def forget_released(self) -> None:
        """Takes storages that nobody references any more out of `live`."""
        for key in [key for key, (storage, _) in self._storages.items() if storage.expired()]:
            self.live -= self._storages.pop(key)[1]


@contextlib.contextmanager
def without_data(dtype: torch.dtype) -> Iterator[None]:
    """Inside, tensors have shapes and dtypes but no data, so that any model runs in no memory; `dtype` is the default.

    What depends on the values of tensors cannot run in here.
    """
    previous = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with FakeTensorMode():
            yield
    finally:
        torch.set_default_dtype(previous)


@dataclass(frozen=True)
class BlockUsage:
    """Bytes of one block of a model.

    Attributes:
        matrices: frozen weight matrices, which block swap streams.
        rest: norms and biases, which stay on the device.
        kept: what lives from the forward to the backward pass; 0 in generation.
        working: what is needed beside that while the block runs, forward or backward.
        streams: each tensor that the block transforms.
    """

    matrices: int
    rest: int
    kept: int
    working: int
    streams: tuple[int, ...]


@dataclass(frozen=True)
class ModelUsage:
    """Bytes of a model at work: its blocks in the order in which they run, the weights and the tensors around them."""

    blocks: tuple[BlockUsage, ...]
    outside: int
    streams: int


def measure_block(
    block: nn.Module, streams: tuple[Tensor, ...], condition: tuple, training: bool, trained: nn.Module | None = None
) -> BlockUsage:
    """Runs a block and counts.

    Args:
        streams: the tensors that the block transforms; it returns as many of the same shapes.
        condition: its further arguments.
        training: with a backward pass to the streams.
        trained: a network whose parameters the block uses; their gradients are not counted.
    """
    weights = list(block.parameters())
    matrices = sum(nbytes(weight) for weight in weights if weight.ndim > 1)
    rest, sizes = sum(map(nbytes, weights)) - matrices, tuple(map(nbytes, streams))
    streams = tuple(stream.requires_grad_(training) for stream in streams)
    with MemoryMeter() as meter, torch.set_grad_enabled(training):
        outputs = block(*streams, *condition)
        meter.forget_released()
        if not training:
            return BlockUsage(matrices, rest, 0, meter.peak, sizes)
        kept = meter.live
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        torch.autograd.backward(outputs, [torch.empty_like(output) for output in outputs])
        gradients = sum(nbytes(p.grad) for p in trained.parameters() if p.grad is not None) if trained else 0
    if trained:
        trained.zero_grad(set_to_none=True)
    return BlockUsage(matrices, rest, kept, meter.peak - kept - gradients, sizes)


def nbytes(tensor: Tensor) -> int:
    """Bytes of a tensor's elements."""
    return tensor.numel() * tensor.element_size()
