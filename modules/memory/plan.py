"""Predicts the peak of GPU and main memory from measured parts, and chooses the fastest settings that fit."""

import contextlib
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import psutil
import torch

from modules.memory.meter import ModelUsage
from utils.cli import print_table
from utils.device_utils import is_out_of_memory
from utils.errors import UserError

T = TypeVar("T")

GIB = 1 << 30
# CUDA's context, cuBLAS's workspaces, and memory that PyTorch's allocator cannot reuse because of fragmentation.
DEVICE_OVERHEAD = 0.7 * GIB
FRAGMENTATION = 1.05
# Sizes of the VAE's tiles in pixels, None for no tiles. Larger tiles come closer to the result without tiles.
TILE_SIZES = (None, 256, 128, 64)
WEIGHT_AND_GRADIENT = 8  # bytes per trained parameter, in float32


def required_device_memory(tensors: int) -> int:
    """Bytes that a device must have free to hold `tensors` bytes of tensors."""
    return int(tensors * FRAGMENTATION + DEVICE_OVERHEAD)


def format_bytes(size: float) -> str:
    """A number of bytes in GiB, or in MiB if it is less than 1 GiB."""
    return f"{size / GIB:.2f} GiB" if size >= GIB else f"{size / GIB * 1024:.1f} MiB"


@dataclass(frozen=True)
class Settings:
    """The options that save memory.

    Attributes:
        fp8: block weights as float8.
        checkpointing: "none", "selective", "full" or "offload".
        blocks_to_swap: as `--blocks_to_swap`.
    """

    fp8: bool = False
    checkpointing: str = "none"
    blocks_to_swap: int = 0

    @property
    def relative_time(self) -> float:
        """Estimated time of a step; 1 for the fastest settings. Only used to sort settings by speed."""
        checkpointing = {"none": 1.0, "selective": 1.12, "full": 1.33, "offload": 1.4}[self.checkpointing]
        return checkpointing * (1.06 if self.fp8 else 1.0) * (1 + 0.003 * self.blocks_to_swap)

    def flags(self, training: bool = True) -> str:
        """These settings as command-line options of training or generation."""
        words = [("--fp8_base" if training else "--fp8") if self.fp8 else ""]
        words += {
            "none": [],
            "selective": ["--selective_checkpointing"],
            "full": ["--gradient_checkpointing"],
            "offload": ["--gradient_checkpointing", "--gradient_checkpointing_cpu_offload"],
        }[self.checkpointing]
        words += [f"--blocks_to_swap {self.blocks_to_swap}"] if self.blocks_to_swap else []
        return " ".join(filter(None, words)) or "no option"


def candidate_settings(
    max_swap: int, fp8: bool = False, checkpointing: str | None = None, blocks_to_swap: int | None = None
) -> list[Settings]:
    """All settings that agree with the user's choices, the fastest first.

    Args:
        max_swap: the largest `--blocks_to_swap` of the model.
        fp8: True if the user asked for it; otherwise both are tried.
        checkpointing: the user's choice, or None to try all. Generation passes "none".
        blocks_to_swap: the user's choice, or None to try all.
    """
    policies = [checkpointing] if checkpointing else ["none", "selective", "full", "offload"]
    counts = range(0, max_swap + 1, 2) if blocks_to_swap is None else [blocks_to_swap]
    found = [
        Settings(use_fp8, policy, count)
        for use_fp8 in {fp8, True}
        for policy in policies
        for count in counts
        # Block swap without checkpointing is not tried: the kept activations need more memory than the swap saves.
        if policy != "none" or count == 0 or checkpointing == "none"
    ]
    return sorted(found, key=lambda settings: settings.relative_time)


@dataclass(frozen=True)
class Prediction:
    """Bytes at the peak.

    Attributes:
        weights: frozen weights on the device.
        trained: trained weights, their gradients and the optimizer's states, on the device.
        saved: activations that are kept on the device for the backward pass.
        working: temporary tensors of one block, on the device.
        swapped: weights of swapped blocks in main memory.
        offloaded: activations in main memory.
    """

    weights: int
    trained: int
    saved: int
    working: int
    swapped: int
    offloaded: int = 0

    @property
    def tensors(self) -> int:
        """Bytes of all tensors on the device."""
        return self.weights + self.trained + self.saved + self.working

    @property
    def device(self) -> int:
        """Bytes that the device must have free, including overheads."""
        return required_device_memory(self.tensors)

    @property
    def host(self) -> int:
        """Bytes that main memory must have free."""
        return self.swapped + self.offloaded

    def rows(self, training: bool = True) -> list[tuple[str, str]]:
        """Names and sizes, the rows of a table."""
        parts = {"weights on the GPU": self.weights}
        if training:
            parts |= {"trained weights, gradients, optimizer": self.trained, "kept for the backward pass": self.saved}
        parts |= {
            "working memory of a block": self.working,
            "GPU memory needed in all": self.device,
            "main memory for swapped blocks": self.swapped,
        }
        if training:
            parts["main memory for offloaded activations"] = self.offloaded
        return [(name, format_bytes(size)) for name, size in parts.items()]


def predict(
    usage: ModelUsage,
    swapped: Sequence[int] = (),
    ring_size: int = 2,
    trained: int = 0,
    state_bytes: float = 0.0,
    offload: bool = False,
) -> Prediction:
    """The peak of a training step, or of a sampling step if nothing is trained.

    Args:
        usage: the measured model.
        swapped: indices of the swapped blocks.
        ring_size: number of block swap's device buffers.
        trained: number of trained parameters.
        state_bytes: what the optimizer keeps of each trained parameter.
        offload: the blocks' inputs are kept in main memory for the backward pass.
    """
    in_main_memory = {index: usage.blocks[index].matrices for index in swapped}
    swapped_bytes = sum(in_main_memory.values())
    ring = max(in_main_memory.values(), default=0) * min(ring_size, len(in_main_memory))
    all_blocks = sum(block.matrices + block.norms_and_biases for block in usage.blocks)
    # With offload, the inputs of one block are still on the device while they are copied.
    saved = usage.streams if offload else sum(block.saved for block in usage.blocks)
    return Prediction(
        weights=usage.outside + all_blocks - swapped_bytes + ring,
        trained=int(trained * (WEIGHT_AND_GRADIENT + state_bytes)),
        saved=usage.streams + saved,
        working=max(block.working for block in usage.blocks),
        swapped=swapped_bytes,
        offloaded=sum(pinned_bytes(size) for block in usage.blocks for size in block.streams) if offload else 0,
    )


def pinned_bytes(size: int) -> int:
    """Bytes that a tensor takes in pinned memory: PyTorch's allocator rounds up to a power of two."""
    return 1 << (size - 1).bit_length()


def fastest_that_fits(
    ordered: Sequence[Settings],
    limit: int,
    predicted: Callable[[Settings], Prediction],
    training: bool = True,
    host_limit: int | None = None,
) -> Settings:
    """The first settings that need at most `limit` bytes of device memory and `host_limit` of main memory.

    Raises:
        UserError: none fit; names the settings that need the least, and how much they need.
    """

    def fits_main_memory(settings: Settings) -> bool:
        return host_limit is None or predicted(settings).host <= host_limit

    for settings in filter(fits_main_memory, ordered):
        if predicted(settings).device <= limit:
            return settings
    smallest = min(list(filter(fits_main_memory, ordered)) or ordered, key=lambda settings: predicted(settings).device)
    needed = predicted(smallest)
    room = ""
    if host_limit is not None:
        room = f", and {format_bytes(needed.host)} of main memory, where {format_bytes(host_limit)} are free"
    raise UserError(
        f"nothing fits {format_bytes(limit)} of GPU memory: even with {smallest.flags(training)} "
        f"{format_bytes(needed.device)} are needed{room}; lower the resolution, the frames or the batch size"
    )


def first_that_fits(work: str, choices: Sequence[T], needed: Callable[[T], int], limit: int | None) -> T:
    """The first choice that needs at most `limit` bytes; if none does, prints a warning and returns the last.

    Args:
        work: what is done, for the warning.
        choices: in order of preference.
        limit: None for no limit.
    """
    for choice in choices:
        if limit is None or needed(choice) <= limit:
            return choice
    print(f"warning: {work} needs {format_bytes(needed(choice))}, {format_bytes(limit)} are available", file=sys.stderr)
    return choice


def fastest_that_needs_less(
    current: Settings, ordered: Sequence[Settings], predicted: Callable[[Settings], Prediction]
) -> Settings | None:
    """The fastest settings that need at least a tenth less than the current ones, to try after running out of memory.

    Args:
        ordered: the settings to choose from, the fastest first.
    """
    limit = 0.9 * predicted(current).device
    return next((settings for settings in ordered if predicted(settings).device <= limit), None)


@dataclass(frozen=True)
class MemoryPlan:
    """The settings of a training run, the memory that they need, and the alternatives.

    Attributes:
        settings: the settings of the run.
        ordered: the alternatives, the fastest first.
        predicted: the prediction for any settings; the model is measured when it is first called.
        work: names the largest batch in messages.
    """

    settings: Settings
    ordered: Sequence[Settings]
    predicted: Callable[[Settings], Prediction]
    work: str

    def print(self) -> None:
        """The prediction as a table."""
        flags = ("settings", self.settings.flags())
        print_table(f"memory plan, {self.work}", [flags, *self.predicted(self.settings).rows()])

    def warn_if_too_large(self, free: int) -> None:
        """Before the model is loaded: warns if the run needs more than `free` bytes, and names settings that fit."""
        needed = self.predicted(self.settings).device
        if needed <= free:
            return
        try:
            fitting = fastest_that_fits(self.ordered, free, self.predicted, host_limit=free_main_memory())
            advice = f"{fitting.flags()} would fit"
        except UserError as error:
            advice = str(error)
        numbers = f"{format_bytes(needed)} of GPU memory are needed, {format_bytes(free)} are free"
        print(f"warning: {self.work}: {numbers}; {advice}", file=sys.stderr)

    def explain_out_of_memory(self, during: str) -> contextlib.AbstractContextManager[None]:
        """Like the function `explain_out_of_memory`, with settings that need less memory as the advice."""
        return explain_out_of_memory(during, self._batch_and_advice)

    def _batch_and_advice(self) -> str:
        smaller = fastest_that_needs_less(self.settings, self.ordered, self.predicted)
        advice = f"try {smaller.flags()}" if smaller else "lower resolution, frames or batch size"
        return f"{self.work} with {self.settings.flags()}; {advice}"


@contextlib.contextmanager
def explain_out_of_memory(during: str, advice: str | Callable[[], str]) -> Iterator[None]:
    """Turns an out-of-memory error into a message of one line.

    Args:
        during: what was running, as in "while the models are loaded".
        advice: the size of the work and what to change; or a function that returns this, if it takes long.

    Raises:
        UserError: out of memory inside.
    """
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        peak = f" (peak {format_bytes(torch.cuda.max_memory_allocated())})" if torch.cuda.is_available() else ""
        text = advice if isinstance(advice, str) else advice()
        raise UserError(f"out of GPU memory {during}: {text}{peak}") from None


def memory_limit(vram_gb: float | None, free: int | None) -> int | None:
    """--vram_gb in bytes; 0 means `free`, the free memory of the device. None if --vram_gb is not given.

    Raises:
        UserError: --vram_gb is 0 and the free memory of the device is not known.
    """
    if vram_gb == 0 and free is None:
        raise UserError("--vram_gb 0: this device does not report its free memory; give a number")
    return None if vram_gb is None else int(vram_gb * GIB) or free


def free_device_memory(device: torch.device) -> int | None:
    """Bytes that a GPU has free; None for other devices."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None


def free_main_memory(cgroups: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes of main memory that this process may use.

    This is the free memory of the machine or of its container, whichever is less, divided by the number of processes
    on this machine.
    """
    free = min([psutil.virtual_memory().available, *_left_by_container(cgroups)])
    return free // int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def _left_by_container(cgroups: Path) -> Iterator[int]:
    """Free bytes below the memory limit of a container, by cgroups v2 and v1. Cached files count as free."""
    v2 = (cgroups, "memory.max", "memory.current", "inactive_file")
    v1 = (cgroups / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
    for folder, limit, used, cached in (v2, v1):
        with contextlib.suppress(OSError, ValueError):  # no such files, or the limit is "max", which means none
            statistics = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            left = int((folder / limit).read_text()) - int((folder / used).read_text())
            yield max(left + int(statistics.get(cached, 0)), 0)
