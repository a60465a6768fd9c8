"""Offloads what a block keeps from its forward to its backward pass into main memory.

On CUDA, all copies run on one copy stream beside the computation. Only streams wait for each other, never the CPU:

- To main memory: a block's tensors are copied while the block runs. The next block waits for this copy before it
  starts, so that the memory on the GPU can be used again.
- Back to the GPU: a block's tensors are copied while the following block runs its backward pass. The block's own
  backward pass waits for this copy. The tensors of at most one block are on the GPU ahead of their use.

So the computing stream allocates, uses and frees all GPU memory in order. On other devices the copies are made at the
same points, and the computation waits for them.
"""

import contextlib
import functools
import weakref
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor


class ActivationOffload:
    """Offloads the tensors of a model's blocks, in the order in which the blocks run.

    Buffers in main memory are reused, also for smaller tensors, because PyTorch would pin and keep another buffer for
    every size. No copy can overwrite a buffer that another copy still reads, because all copies run on one stream.
    """

    def __init__(self) -> None:
        self.latest: weakref.ref[OffloadedTensors] | None = None
        self.free_buffers: list[Tensor] = []

    def offload(self, tensors: Sequence[Tensor], device: torch.device) -> "OffloadedTensors":
        """Starts to copy tensors from `device` to main memory; the result restores them."""
        buffers = [self._host_buffer(tensor) for tensor in tensors]
        offloaded = OffloadedTensors(tensors, buffers, device, self.latest)
        weakref.finalize(offloaded, self.free_buffers.extend, buffers)
        self.latest = weakref.ref(offloaded)
        return offloaded

    def _host_buffer(self, tensor: Tensor) -> Tensor:
        """The smallest free buffer that holds a tensor, or a new one."""
        fitting = [
            (buffer.numel(), index) for index, buffer in enumerate(self.free_buffers) if buffer.numel() >= tensor.nbytes
        ]
        if fitting:
            return self.free_buffers.pop(min(fitting)[1])
        return torch.empty(tensor.nbytes, dtype=torch.uint8, pin_memory=tensor.is_cuda)


class OffloadedTensors:
    """The tensors of one block in pinned main memory.

    Attributes:
        originals: the tensors on the device, referenced until their copy to main memory is made.
        prefetched: the copies back on the device, from the start of the copy until `restored` hands them out.
        was_restored: `restored` has handed them out.
    """

    def __init__(
        self,
        tensors: Sequence[Tensor],
        buffers: Sequence[Tensor],
        device: torch.device,
        previous: "weakref.ref[OffloadedTensors] | None" = None,
    ) -> None:
        self.device, self._previous = device, previous
        _wait_for_copies(device)
        if previous_block := self.previous:
            previous_block.originals = None
        self.originals: Sequence[Tensor] | None = tensors
        self.prefetched: list[Tensor] | None = None
        self.was_restored = False
        with _on_copy_stream(device):
            self.host = [_copy_to_host(tensor, buffer) for tensor, buffer in zip(tensors, buffers, strict=True)]

    @property
    def previous(self) -> "OffloadedTensors | None":
        """The tensors of the block that ran before this one; None once its graph is gone."""
        return self._previous and self._previous()

    @contextlib.contextmanager
    def restored(self) -> Iterator[list[Tensor]]:
        """Yields the tensors on the device, for the backward pass of the block, and prefetches the previous block's."""
        if self.prefetched is None:
            self.prefetch()
            _wait_for_copies(self.device)
        tensors, self.prefetched, self.originals, self.was_restored = self.prefetched, None, None, True
        previous = self.previous
        if previous and not previous.was_restored:
            previous.prefetch()
        try:
            yield tensors
        finally:
            _wait_for_copies(self.device)

    def prefetch(self) -> None:
        """Starts to copy the tensors back to the device."""
        self.prefetched = [torch.empty_like(host, device=self.device) for host in self.host]
        with _on_copy_stream(self.device):
            for tensor, host in zip(self.prefetched, self.host, strict=True):
                tensor.copy_(host, non_blocking=True)


def _copy_to_host(tensor: Tensor, buffer: Tensor) -> Tensor:
    host = buffer[: tensor.nbytes].view(tensor.dtype).view(tensor.shape)
    return host.copy_(tensor.detach(), non_blocking=True)


@functools.cache
def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


@contextlib.contextmanager
def _on_copy_stream(device: torch.device) -> Iterator[None]:
    """Inside, CUDA works on the copy stream, which first waits for all work queued on the computing stream so far."""
    if device.type != "cuda":
        yield
        return
    _copy_stream(device).wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(_copy_stream(device)):
        yield


def _wait_for_copies(device: torch.device) -> None:
    """Makes the computing stream wait for all copies queued so far. Work that is queued later runs after them."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).wait_stream(_copy_stream(device))
