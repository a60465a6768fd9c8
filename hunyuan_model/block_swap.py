"""Streams the frozen weights of some blocks from host memory, so that they need no place on the accelerator.

Each swapped block has one host copy, pinned where possible, that never changes and is never copied back. A ring of
device buffers receives the weights of a block ahead of its use, on a stream of its own: in forward order during the
forward pass, in reverse during the backward pass. Nothing in the model knows of it; `enable_block_swap` wraps the
`forward` of the swapped blocks from outside. Apply it before activation checkpointing.
"""

import contextlib
import functools
import math
import sys
import weakref
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import _disable_current_modes

from utils.errors import UserError

ALIGNMENT = 256  # bytes; every view of a buffer starts where a fresh allocation could start
# The reference tool allows 36 in training and 38 in generation.
TRAINING_MARGIN = 2


def max_blocks_to_swap(depth_double: int, depth_single: int, training: bool) -> int:
    """The largest `--blocks_to_swap`: 36 in training and 38 in generation for the 13B model."""
    maximum = min(2 * depth_double - 1, (depth_single - 2) // 2 * 2)
    return max(maximum - TRAINING_MARGIN * training, 0)


def swapped_blocks(blocks_to_swap: int, depth_double: int, depth_single: int, training: bool = False) -> list[int]:
    """Which blocks are streamed, as indices into all blocks (double blocks first, then single blocks).

    n counts as in the reference tool: n // 2 double blocks and 2 (n - n // 2) + 1 single blocks. They are spread
    evenly, so that every copy has the computation of the blocks between to hide behind.

    Raises:
        UserError: n is more than the model can swap.
    """
    maximum = max_blocks_to_swap(depth_double, depth_single, training)
    if not 0 <= blocks_to_swap <= maximum:
        use = "training" if training else "generation"
        raise UserError(f"--blocks_to_swap {blocks_to_swap}: the maximum for this model in {use} is {maximum}")
    if blocks_to_swap == 0:
        return []
    doubles, singles = blocks_to_swap // 2, 2 * (blocks_to_swap - blocks_to_swap // 2) + 1
    return _spread(doubles, depth_double) + [depth_double + index for index in _spread(singles, depth_single)]


def _spread(count: int, total: int) -> list[int]:
    """`count` of `total` indices, evenly spaced, ending with the last."""
    return [(index + 1) * total // count - 1 for index in range(count)]


@dataclass
class _Place:
    """Where one parameter lies inside its block's bytes."""

    parameter: nn.Parameter
    start: int
    shape: torch.Size
    dtype: torch.dtype

    def view(self, flat: Tensor) -> Tensor:
        size = math.prod(self.shape) * self.dtype.itemsize
        return flat[self.start : self.start + size].view(self.dtype).view(self.shape)


class _HostBlock:
    """The frozen weight matrices of one block, packed into one host buffer; norms and biases stay on the device."""

    def __init__(self, block: nn.Module, device: torch.device, pin: bool) -> None:
        self.places: list[_Place] = []
        self.nbytes = 0
        for parameter in block.parameters():
            if parameter.ndim < 2:
                parameter.data = parameter.data.to(device)
                continue
            if parameter.requires_grad:
                raise ValueError("block swap streams frozen weights; this block has weights that are trained")
            self.places.append(_Place(parameter, self.nbytes, parameter.shape, parameter.dtype))
            size = parameter.numel() * parameter.dtype.itemsize
            self.nbytes += math.ceil(size / ALIGNMENT) * ALIGNMENT
        for name, buffer in block.named_buffers():
            owner, _, leaf = name.rpartition(".")
            setattr(block.get_submodule(owner), leaf, buffer.to(device))
        self.flat = torch.empty(self.nbytes, dtype=torch.uint8)
        for place in self.places:
            place.view(self.flat).copy_(place.parameter.data)
        self.pinned = pin and _pin(self.flat)
        if self.pinned:
            weakref.finalize(self, _unpin, self.flat, device)
        self.point_at(self.flat)

    def point_at(self, flat: Tensor) -> None:
        """Makes the block's parameters views of `flat`."""
        for place in self.places:
            place.parameter.data = place.view(flat)


def _pin(flat: Tensor) -> bool:
    """Pins memory in place. torch's own pinning would round every block up to a power of two."""
    if int(torch.cuda.cudart().cudaHostRegister(flat.data_ptr(), flat.numel(), 0)) == 0:
        return True
    with contextlib.suppress(RuntimeError):  # the failure waits in CUDA as an error that the next kernel would raise
        torch.zeros(1, device="cuda")
    return False


def _unpin(flat: Tensor, device: torch.device) -> None:
    with contextlib.suppress(RuntimeError):  # after an error in CUDA nothing is on its way
        torch.cuda.synchronize(device)  # a block that was copied ahead may be, and nobody waits for it any more
    torch.cuda.cudart().cudaHostUnregister(flat.data_ptr())


class BlockSwap:
    """The ring of device buffers and what lies in them."""

    def __init__(self, blocks: list[nn.Module], device: torch.device, ring_size: int, pin: bool) -> None:
        self.device = device
        self.backward_follows = False
        self.blocks = [_HostBlock(block, device, pin) for block in blocks]
        self.nbytes = max(block.nbytes for block in self.blocks)
        slots = min(ring_size, len(blocks))
        self.ring = [torch.empty(self.nbytes, dtype=torch.uint8, device=device) for _ in range(slots)]
        self.storages = {flat.untyped_storage().data_ptr(): slot for slot, flat in enumerate(self.ring)}
        self.slot_of: dict[int, int] = {}  # block -> slot, least recently used first
        self.current: int | None = None
        self.wanted: list[int] = []  # the current block and those that follow, which stay in the ring
        on_gpu = device.type == "cuda"
        self.copies = torch.cuda.Stream(device) if on_gpu else None
        self.arrived = [torch.cuda.Event() for _ in self.ring] if on_gpu else None
        self.begun = torch.cuda.Event() if on_gpu else None
        for flat in self.ring if on_gpu else []:
            flat.record_stream(self.copies)  # else its memory could be handed out again below a copy

    @property
    def pinned(self) -> bool:
        return all(block.pinned for block in self.blocks)

    def begin(self, *_: object) -> None:
        """Notes, before the model runs, whether a backward pass follows; inside a checkpoint no block can tell."""
        self.backward_follows = torch.is_grad_enabled()

    def acquire(self, index: int) -> None:
        """Makes block `index` usable by the kernels that follow."""
        if index == self.current:
            return
        self.wanted = [index, *self._upcoming(index)]
        self.current = index
        if self.begun:
            self.begun.record(torch.cuda.current_stream(self.device))
        self._bring([index])
        if self.arrived:
            torch.cuda.current_stream(self.device).wait_event(self.arrived[self.slot_of[index]])

    def prefetch(self) -> None:
        """Starts to copy what is needed after the current block.

        Comes after the kernels of the block were queued: from memory that is not pinned, the CPU waits for its copies.
        """
        self._bring(self.wanted[1:])

    def _bring(self, indices: list[int]) -> None:
        # Selective checkpointing expects a block's second run to call what the first called; copies differ.
        with _disable_current_modes():
            for index in indices:
                if index in self.slot_of:
                    self.slot_of[index] = self.slot_of.pop(index)
                else:
                    self._copy(index, keep=set(self.wanted))

    def _upcoming(self, index: int) -> list[int]:
        """The blocks that follow, nearest first: downwards in a backward pass, which the order of calls reveals."""
        last = len(self.blocks) - 1
        ahead = min(len(self.ring) - 1, last)
        starts_over = index == 0 or self.current is None or (index == last and not self.backward_follows)
        backward = not starts_over and (index < self.current or index == last)
        step = -1 if backward else 1
        order = [index + step * distance for distance in range(1, ahead + 1)]
        return [i for i in order if i >= 0] if backward else [i % (last + 1) for i in order]

    def _copy(self, index: int, keep: set[int]) -> None:
        used = set(self.slot_of.values())
        free = [slot for slot in range(len(self.ring)) if slot not in used]
        if free:
            slot = free[0]
        else:
            evicted = next(block for block in self.slot_of if block not in keep)
            slot = self.slot_of.pop(evicted)
            self.blocks[evicted].point_at(self.blocks[evicted].flat)
        block = self.blocks[index]
        target = self.ring[slot][: block.nbytes]
        if self.copies is None:
            target.copy_(block.flat)
        else:
            # The buffer may still be read by kernels that were queued before the current block, which is not in it.
            self.copies.wait_event(self.begun)
            with torch.cuda.stream(self.copies):
                target.copy_(block.flat, non_blocking=True)
                self.arrived[slot].record()
        self.slot_of[index] = slot
        block.point_at(target)

    def wrap(self, index: int, block: nn.Module) -> None:
        """Makes a block fetch its weights before it runs, and autograd remember places instead of weights."""
        forward = block.forward

        def pack(tensor: Tensor) -> Tensor | Callable[[], Tensor]:
            if tensor.untyped_storage().data_ptr() not in self.storages:
                return tensor
            slot_start = self.ring[self.slot_of[index]].data_ptr()
            offset = (tensor.data_ptr() - slot_start) // tensor.dtype.itemsize
            dtype, size, stride = tensor.dtype, tensor.size(), tensor.stride()

            def fetch() -> Tensor:
                self.acquire(index)
                self.prefetch()
                return self.ring[self.slot_of[index]].view(dtype).as_strided(size, stride, offset)

            return fetch

        def streamed(*args: object) -> object:
            self.acquire(index)
            try:
                # A checkpointed block runs again right before its backward pass, with its weights in place; hooks here
                # would hide those of the checkpoint and keep every activation.
                if getattr(block, "is_checkpointed", False) or not torch.is_grad_enabled():
                    return forward(*args)
                with saved_tensors_hooks(pack, lambda packed: packed() if callable(packed) else packed):
                    return forward(*args)
            finally:  # selective checkpointing ends a second run by an exception, once it has what it needs
                self.prefetch()

        block.forward = streamed


def enable_block_swap(
    model: nn.Module,
    blocks_to_swap: int,
    device: torch.device | str,
    ring_size: int = 2,
    training: bool = False,
    pin: bool | None = None,
) -> BlockSwap | None:
    """Moves a DiT to `device`, except for the swapped blocks, which are streamed in when they run.

    Args:
        model: a DiT with `double_blocks` and `single_blocks`, its swapped blocks frozen; it may still be on the CPU.
        blocks_to_swap: as `--blocks_to_swap`; 0 moves the whole model.
        device: where the model computes.
        ring_size: device buffers; 2 copies ahead while one block computes, 1 needs the least memory.
        training: which maximum of `blocks_to_swap` holds.
        pin: pin the host copy; by default on CUDA, but not on Windows, where pinned memory counts as shared GPU memory.

    Raises:
        UserError: more blocks than the model can swap.
    """
    device = torch.device(device)
    indices = swapped_blocks(blocks_to_swap, len(model.double_blocks), len(model.single_blocks), training)
    blocks = [model.blocks[index] for index in indices]
    swapped = {id(parameter) for block in blocks for parameter in block.parameters()}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            if id(parameter) not in swapped:
                parameter.data = parameter.data.to(device)
    if not blocks:
        return None
    pin = (sys.platform != "win32") if pin is None else pin
    swap = BlockSwap(blocks, device, ring_size, pin and device.type == "cuda")
    if pin and device.type == "cuda" and not swap.pinned:
        print("warning: host memory could not be pinned; block swap copies will be slower", file=sys.stderr)
    model.register_forward_pre_hook(swap.begin)
    for index, block in enumerate(blocks):
        swap.wrap(index, block)
    return swap


def offload_embedders(model: nn.Module, device: torch.device | str) -> None:
    """Keeps the image and text embedders on the CPU between their uses (`--img_in_txt_in_offloading`)."""
    for module in (model.img_in, model.txt_in):
        host = [(parameter, parameter.data) for parameter in module.to("cpu").parameters()]
        module.register_forward_pre_hook(lambda module, _: module.to(device) and None)
        module.register_forward_hook(functools.partial(_put_back, host))


def _put_back(host: list[tuple[nn.Parameter, Tensor]], *_: object) -> None:
    """The weights are frozen: their copies on the device can go."""
    for parameter, data in host:
        parameter.data = data
