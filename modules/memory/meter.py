"""Counts the bytes of tensors while code runs, with real tensors or with fake tensors, which have no data."""

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
    """Counts the bytes of the storages that are created inside this context.

    Attributes:
        live: bytes of those that are still referenced.
        peak: the maximum of `live`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = 0
        self.peak = 0
        # The weak reference keeps the key from being used again for another storage.
        self._storages: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, op: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        # Storages of the arguments are not new; `out=` is among the keyword arguments.
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        results = op(*args, **(kwargs or {}))
        self.drop_released()
        for result in results if isinstance(results, (tuple, list)) else [results]:
            if isinstance(result, Tensor) and not result.is_meta and result.untyped_storage()._cdata not in given:
                self._count(result)
        self.peak = max(self.peak, self.live)
        return results

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        self._storages[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.live += storage.nbytes()

    def drop_released(self) -> None:
        """Subtracts storages that are no longer referenced from `live`."""
        for key in [key for key, (storage, _) in self._storages.items() if storage.expired()]:
            self.live -= self._storages.pop(key)[1]


@contextlib.contextmanager
def fake_tensors(dtype: torch.dtype) -> Iterator[None]:
    """Inside, tensors are created without data and `dtype` is the default dtype, so any model runs without memory.

    Code that depends on the values of tensors cannot run inside.
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
        norms_and_biases: all other weights, which stay on the device.
        saved: activations that are kept from the forward to the backward pass; 0 in generation.
        working: the peak of temporary tensors while the block runs, forward or backward.
        streams: one entry for each token stream (B, L, D): image and text, or both as one.
    """

    matrices: int
    norms_and_biases: int
    saved: int
    working: int
    streams: tuple[int, ...]


@dataclass(frozen=True)
class ModelUsage:
    """Bytes of a running model.

    Attributes:
        blocks: in the order in which they run.
        outside: weights that belong to no block.
        streams: the tokens and the rotary frequencies, which all blocks share.
    """

    blocks: tuple[BlockUsage, ...]
    outside: int
    streams: int


def measure_block(
    block: nn.Module, streams: tuple[Tensor, ...], condition: tuple, training: bool, trained: nn.Module | None = None
) -> BlockUsage:
    """Runs a block and counts its bytes.

    Args:
        streams: the token streams (B, L, D), the block's first arguments; it returns them with the same shapes.
        condition: its other arguments.
        training: also run the backward pass to the streams.
        trained: a network whose parameters the block uses; their gradients are not counted.
    """
    weights = list(block.parameters())
    matrices = sum(nbytes(weight) for weight in weights if weight.ndim > 1)
    norms_and_biases, sizes = sum(map(nbytes, weights)) - matrices, tuple(map(nbytes, streams))
    streams = tuple(stream.requires_grad_(training) for stream in streams)
    with MemoryMeter() as meter, torch.set_grad_enabled(training):
        outputs = block(*streams, *condition)
        meter.drop_released()
        if not training:
            return BlockUsage(matrices, norms_and_biases, 0, meter.peak, sizes)
        saved = meter.live
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        torch.autograd.backward(outputs, [torch.empty_like(output) for output in outputs])
        gradients = sum(nbytes(p.grad) for p in trained.parameters() if p.grad is not None) if trained else 0
    if trained:
        trained.zero_grad(set_to_none=True)
    return BlockUsage(matrices, norms_and_biases, saved, meter.peak - saved - gradients, sizes)


def nbytes(tensor: Tensor) -> int:
    """Bytes of a tensor's elements."""
    return tensor.numel() * tensor.element_size()
