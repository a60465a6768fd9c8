"""Streams the frozen weights of some blocks from main memory to the accelerator when the blocks run.

Each swapped block has one copy in main memory, pinned where possible. It never changes and nothing is copied back. The
accelerator holds a ring of buffers. The weights of a block are copied into one of them before the block runs, on a
separate stream: in the order of the blocks during the forward pass, in reverse order during the backward pass.

The model does not know of this: `enable_block_swap` wraps the `forward` of the swapped blocks from outside. Apply it
after compilation and before activation checkpointing.
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
from utils.wrap_forward import WrapperKind, is_wrapped, wrap_forward

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
    evenly, so that the weights of a swapped block can be copied while the blocks before it compute.

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
class _PackedParameter:
    """Where one parameter lies inside the buffer of its block; `start` in bytes."""

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
        self.packed: list[_PackedParameter] = []
        self.nbytes = 0
        for parameter in block.parameters():
            if parameter.ndim < 2:
                parameter.data = parameter.data.to(device)
                continue
            if parameter.requires_grad:
                raise ValueError("block swap streams frozen weights; this block has trained weights")
            self.packed.append(_PackedParameter(parameter, self.nbytes, parameter.shape, parameter.dtype))
            size = parameter.numel() * parameter.dtype.itemsize
            self.nbytes += math.ceil(size / ALIGNMENT) * ALIGNMENT
        for name, buffer in block.named_buffers():
            owner, _, leaf = name.rpartition(".")
            setattr(block.get_submodule(owner), leaf, buffer.to(device))
        self.flat = torch.empty(self.nbytes, dtype=torch.uint8)
        for packed in self.packed:
            packed.view(self.flat).copy_(packed.parameter.data)
        self.pinned = pin and _pin(self.flat)
        if self.pinned:
            weakref.finalize(self, _unpin, self.flat, device)
        self.use_buffer(self.flat)

    def use_buffer(self, flat: Tensor) -> None:
        """Makes the block's parameters views of the bytes `flat`."""
        for packed in self.packed:
            packed.parameter.data = packed.view(flat)


def _pin(flat: Tensor) -> bool:
    """Pins memory in place, because PyTorch's own allocator of pinned memory rounds up to a power of two."""
    if int(torch.cuda.cudart().cudaHostRegister(flat.data_ptr(), flat.numel(), 0)) == 0:
        return True
    with contextlib.suppress(RuntimeError):  # clears CUDA's error, which the next kernel would raise
        torch.zeros(1, device="cuda")
    return False


def _unpin(flat: Tensor, device: torch.device) -> None:
    with contextlib.suppress(RuntimeError):  # after a CUDA error no copy is running
        torch.cuda.synchronize(device)  # a block that was prefetched but not used may still be copied
    torch.cuda.cudart().cudaHostUnregister(flat.data_ptr())


class BlockSwap:
    """The ring of device buffers, and which block's weights each of them holds."""

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
        self.wanted: list[int] = []  # the current block and the next ones, which stay in the ring
        on_gpu = device.type == "cuda"
        self.copy_stream = torch.cuda.Stream(device) if on_gpu else None
        self.copied = [torch.cuda.Event() for _ in self.ring] if on_gpu else None
        self.started = torch.cuda.Event() if on_gpu else None
        for flat in self.ring if on_gpu else []:
            flat.record_stream(self.copy_stream)  # else its memory could be reused while a copy is running

    @property
    def pinned(self) -> bool:
        return all(block.pinned for block in self.blocks)

    def begin(self, *_: object) -> None:
        """Called before the model runs: notes whether a backward pass follows.

        The blocks cannot tell, because a checkpointed block always runs without gradients first.
        """
        self.backward_follows = torch.is_grad_enabled()

    def acquire(self, index: int) -> None:
        """Makes the weights of block `index` ready for the kernels that are queued next."""
        if index == self.current:
            return
        self.wanted = [index, *self._upcoming(index)]
        self.current = index
        if self.started:
            self.started.record(torch.cuda.current_stream(self.device))
        self._copy_missing([index])
        if self.copied:
            torch.cuda.current_stream(self.device).wait_event(self.copied[self.slot_of[index]])

    def prefetch(self) -> None:
        """Starts to copy the weights of the blocks that run after the current one.

        Called after the kernels of the current block are queued, because the CPU waits for copies from memory that is
        not pinned.
        """
        self._copy_missing(self.wanted[1:])

    def _copy_missing(self, indices: list[int]) -> None:
        # Selective checkpointing expects the same operations in both runs of a block, but the copies differ.
        with _disable_current_modes():
            for index in indices:
                if index in self.slot_of:
                    self.slot_of[index] = self.slot_of.pop(index)
                else:
                    self._copy(index, keep=set(self.wanted))

    def _upcoming(self, index: int) -> list[int]:
        """The blocks that will run next, nearest first; whether they run backward is seen from the order of calls."""
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
            self.blocks[evicted].use_buffer(self.blocks[evicted].flat)
        block = self.blocks[index]
        target = self.ring[slot][: block.nbytes]
        if self.copy_stream is None:
            target.copy_(block.flat)
        else:
            # Kernels that were queued before the current block may still read this buffer.
            self.copy_stream.wait_event(self.started)
            with torch.cuda.stream(self.copy_stream):
                target.copy_(block.flat, non_blocking=True)
                self.copied[slot].record()
        self.slot_of[index] = slot
        block.use_buffer(target)

    def wrap(self, index: int, block: nn.Module) -> None:
        """Makes a block fetch its weights before it runs, and makes autograd save their positions, not the weights."""

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

        def stream(forward: Callable, *args: object) -> object:
            self.acquire(index)
            try:
                # A checkpointed block runs again right before its backward pass, so its weights are in place. Hooks
                # here would take the place of those of the checkpoint, and every activation would be kept.
                if is_wrapped(block, WrapperKind.CHECKPOINTING) or not torch.is_grad_enabled():
                    return forward(*args)
                with saved_tensors_hooks(pack, lambda packed: packed() if callable(packed) else packed):
                    return forward(*args)
            finally:  # selective checkpointing ends the second run early, by an exception
                self.prefetch()

        wrap_forward(block, WrapperKind.WEIGHT_STREAMING, stream)


def enable_block_swap(
    model: nn.Module,
    blocks_to_swap: int,
    device: torch.device | str,
    ring_size: int = 2,
    training: bool = False,
    pin: bool | None = None,
) -> BlockSwap | None:
    """Moves a DiT to `device`, except for the swapped blocks, whose weights are copied there when they run.

    Args:
        model: a DiT with `double_blocks` and `single_blocks`, its swapped blocks frozen; it may still be on the CPU.
        blocks_to_swap: as `--blocks_to_swap`; 0 moves the whole model.
        device: where the model computes.
        ring_size: number of device buffers. With 2, one block is copied while another computes; 1 needs the least
            memory.
        training: use the maximum of `blocks_to_swap` for training, not that for generation.
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
        module.register_forward_hook(functools.partial(_use_host_weights, host))


def _use_host_weights(host: list[tuple[nn.Parameter, Tensor]], *_: object) -> None:
    """Frees the copies on the device; nothing is copied back, because the weights are frozen."""
    for parameter, data in host:
        parameter.data = data
