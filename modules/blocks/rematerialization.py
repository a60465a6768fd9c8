"""Pointwise operations are computed again in the backward pass instead of keeping their results.

Inside a wrapped block, autograd saves no tensor that pointwise operations can compute from tensors that are saved
anyway. It saves a record of the operation instead. The gradients are those of plain autograd, bit for bit.

Autograd refuses to use a saved tensor that was changed in place since. Saved-tensor hooks switch that check off, so it
is made here: tensors count their changes.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from utils.wrap_forward import WrapperKind, wrap_forward

aten = torch.ops.aten
POINTWISE = {
    aten._to_copy.default,
    aten.addcmul.default,
    aten.cat.default,
    aten.clone.default,
    aten.gelu.default,
    aten.mean.dim,
    aten.mul.Tensor,
    aten.native_layer_norm.default,
    aten.pow.Tensor_Scalar,
    aten.rsqrt.default,
    aten.silu.default,
    aten.stack.default,
    aten.sub.Tensor,
}


def rematerialize_pointwise(blocks: Iterable[nn.Module]) -> None:
    """Wraps blocks so that autograd keeps pointwise operations instead of their results.

    For training without checkpointing: repeats a few pointwise operations and saves about two thirds of the memory.
    """
    for block in blocks:
        wrap_forward(block, WrapperKind.REMATERIALIZATION, _run_and_record)


def _run_and_record(forward: Callable, *inputs: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*inputs)
    recorder = _Recorder()
    with saved_tensors_hooks(recorder.pack, _unpack), recorder:
        return forward(*inputs)


@dataclass(frozen=True)
class _Kept:
    """A tensor that is kept as it is, and how often it had been changed in place when it was kept."""

    tensor: Tensor
    version: int

    def compute(self) -> Tensor:
        if self.tensor._version != self.version:
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an inplace operation: "
                f"a {self.tensor.dtype} tensor of shape {tuple(self.tensor.shape)} is at version "
                f"{self.tensor._version}, expected version {self.version}; use the operation that makes a new tensor"
            )
        return self.tensor


@dataclass(frozen=True)
class _Operation:
    """A pointwise operation and its arguments.

    Attributes:
        args: kept tensors, views of other operations' results, plain values, and lists of these.
        kwargs: plain values only.
        output: which result is meant, for operations with several.
    """

    op: Callable
    args: tuple
    kwargs: dict
    output: int | None

    def compute(self) -> Tensor:
        result = self.op(*_each(_unpack, self.args), **self.kwargs)
        return result if self.output is None else result[self.output]


@dataclass(frozen=True)
class _View:
    """A view of an operation's result."""

    operation: _Operation
    size: torch.Size
    stride: tuple[int, ...]
    offset: int

    def compute(self) -> Tensor:
        return self.operation.compute().as_strided(self.size, self.stride, self.offset)


def _unpack(value: Any) -> Any:
    return value.compute() if isinstance(value, (_Kept, _View)) else value


def _each(change: Callable[[Any], Any], args: tuple) -> tuple:
    """Changes arguments, also those in lists; torch's `tree_map` takes longer than a small operation itself."""
    return tuple([change(value) for value in arg] if isinstance(arg, list) else change(arg) for arg in args)


class _Recorder(TorchDispatchMode):
    """Records, for every result of a pointwise operation in one block, the operation that computed it."""

    def __init__(self) -> None:
        super().__init__()
        # By storage: the operation, and the version of its result. The weak reference keeps the key from being used
        # again for another storage.
        self.operations: dict[int, tuple[StorageWeakRef, _Operation, int]] = {}

    def __torch_dispatch__(self, op: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        results = op(*args, **kwargs)
        if op in POINTWISE or (op is aten.add.Tensor and self._adds_recorded(args)):
            args = _each(self.pack, args)
            outputs = enumerate(results) if isinstance(results, tuple) else [(None, results)]
            for index, result in outputs:
                storage = result.untyped_storage()
                operation = _Operation(op, args, kwargs, index)
                self.operations[storage._cdata] = (StorageWeakRef(storage), operation, result._version)
        return results

    def _adds_recorded(self, args: tuple) -> bool:
        """Whether all summands are recorded results. A residual sum is kept: its summands would need more memory."""
        return all(isinstance(self.pack(value), _View) for value in args if isinstance(value, Tensor))

    def pack(self, value: Any) -> Any:
        """A view of the result of the recorded operation of a tensor, or the tensor itself; plain values unchanged.

        A result that was changed in place is no longer what its operation computes, so it is kept.
        """
        if not isinstance(value, Tensor):
            return value
        found = self.operations.get(value.untyped_storage()._cdata)
        if found is None or value._version != found[2]:
            return _Kept(value, value._version)
        return _View(found[1], value.size(), value.stride(), value.storage_offset())
