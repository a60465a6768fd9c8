"""Main memory for what a block keeps from its forward to its backward pass.

On CUDA all copies run on a stream of their own, beside the computation, and only streams wait, never the CPU:

- out: while its block runs. The next block first waits for it, so that the memory on the GPU can be used again.
- back: while the block after it runs backward, which then waits for it. One block's tensors are ahead, no more.

So all memory on the GPU is allocated, used and freed in the order of the computing stream. Elsewhere copies are made at
once, at the same places.
"""

import contextlib
import functools
import weakref
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor


class Parking:
    """The tensors of a model's blocks, in the order in which the blocks ran.

    Their places in main memory serve again, for smaller tensors too: torch would pin more for every other size, and
    keep it. No copy can meet one that is still on its way, since all are made in order on one stream.
    """

    def __init__(self) -> None:
        self.latest: weakref.ref[Parked] | None = None
        self.free: list[Tensor] = []

    def park(self, tensors: Sequence[Tensor], device: torch.device) -> "Parked":
        """Starts to copy tensors from `device` to main memory; whoever holds the result can have them back."""
        places = [self._place(tensor) for tensor in tensors]
        parked = Parked(tensors, places, device, self.latest)
        weakref.finalize(parked, self.free.extend, places)
        self.latest = weakref.ref(parked)
        return parked

    def _place(self, tensor: Tensor) -> Tensor:
        """The smallest free bytes that hold a tensor, or new ones."""
        fitting = [(place.numel(), index) for index, place in enumerate(self.free) if place.numel() >= tensor.nbytes]
        if fitting:
            return self.free.pop(min(fitting)[1])
        return torch.empty(tensor.nbytes, dtype=torch.uint8, pin_memory=tensor.is_cuda)


class Parked:
    """Tensors of one block in pinned main memory.

    Attributes:
        leaving: the originals, as long as they are being copied.
        returned: the copies on the device, from when they are wanted soon until they are taken.
        used: they have been taken.
    """

    def __init__(
        self,
        tensors: Sequence[Tensor],
        places: Sequence[Tensor],
        device: torch.device,
        before: "weakref.ref[Parked] | None" = None,
    ) -> None:
        self.device, self._before = device, before
        _wait_for_copies(device)
        if previous := self.before:
            previous.leaving = None
        self.leaving: Sequence[Tensor] | None = tensors
        self.returned: list[Tensor] | None = None
        self.used = False
        with _copies(device):
            self.host = [_to_host(tensor, place) for tensor, place in zip(tensors, places, strict=True)]

    @property
    def before(self) -> "Parked | None":
        """What the block before parked, unless its graph is gone."""
        return self._before and self._before()

    @contextlib.contextmanager
    def taken(self) -> Iterator[list[Tensor]]:
        """Inside, for the backward pass of the block: its tensors; those of the block before are on their way."""
        if self.returned is None:
            self.bring_back()
            _wait_for_copies(self.device)
        tensors, self.returned, self.leaving, self.used = self.returned, None, None, True
        previous = self.before
        if previous and not previous.used:
            previous.bring_back()
        try:
            yield tensors
        finally:
            _wait_for_copies(self.device)

    def bring_back(self) -> None:
        """Starts to copy to the device."""
        self.returned = [torch.empty_like(host, device=self.device) for host in self.host]
        with _copies(self.device):
            for tensor, host in zip(self.returned, self.host, strict=True):
                tensor.copy_(host, non_blocking=True)


def _to_host(tensor: Tensor, place: Tensor) -> Tensor:
    host = place[: tensor.nbytes].view(tensor.dtype).view(tensor.shape)
    return host.copy_(tensor.detach(), non_blocking=True)


@functools.cache
def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


@contextlib.contextmanager
def _copies(device: torch.device) -> Iterator[None]:
    """Inside, CUDA works on the stream of copies, after everything that the computing stream was given before."""
    if device.type != "cuda":
        yield
        return
    _copy_stream(device).wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(_copy_stream(device)):
        yield


def _wait_for_copies(device: torch.device) -> None:
    """Lets what the computing stream is given from now on come after all copies so far."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).wait_stream(_copy_stream(device))
