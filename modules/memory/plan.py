"""What fits where: predicts the peak of memory from measured parts, and chooses the cheapest settings that fit."""

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
# CUDA's context, cuBLAS's workspaces and what torch's allocator cannot hand out again.
DEVICE_OVERHEAD = 0.7 * GIB
FRAGMENTATION = 1.05
# Tiles of the VAE to choose from, in pixels; the larger, the closer to a picture taken whole.
TILE_SIZES = (None, 256, 128, 64)
# Bytes per trained element: float32 weight and gradient, and the two moments of Adam in float32 or 8 bits.
WEIGHT_AND_GRADIENT, MOMENTS, MOMENTS_8BIT = 8, 8, 2


def with_overhead(tensors: int) -> int:
    """What a device must have free for so many bytes of tensors."""
    return int(tensors * FRAGMENTATION + DEVICE_OVERHEAD)


def in_words(size: float) -> str:
    """Bytes with a unit that suits them."""
    return f"{size / GIB:.2f} GiB" if size >= GIB else f"{size / GIB * 1024:.1f} MiB"


@dataclass(frozen=True)
class Settings:
    """What a user can choose to save memory, with its price.

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
        """Estimated time of a step, 1 for the fastest settings; only its order matters."""
        checkpointing = {"none": 1.0, "selective": 1.12, "full": 1.33, "offload": 1.4}[self.checkpointing]
        return checkpointing * (1.06 if self.fp8 else 1.0) * (1 + 0.003 * self.blocks_to_swap)

    def flags(self, training: bool = True) -> str:
        """The options that choose these settings."""
        words = [("--fp8_base" if training else "--fp8") if self.fp8 else ""]
        words += {
            "none": [],
            "selective": ["--selective_checkpointing"],
            "full": ["--gradient_checkpointing"],
            "offload": ["--gradient_checkpointing", "--gradient_checkpointing_cpu_offload"],
        }[self.checkpointing]
        words += [f"--blocks_to_swap {self.blocks_to_swap}"] if self.blocks_to_swap else []
        return " ".join(filter(None, words)) or "no option"


def candidates(
    max_swap: int, fp8: bool = False, checkpointing: str | None = None, blocks_to_swap: int | None = None
) -> list[Settings]:
    """All settings that agree with what the user has already chosen, the fastest first.

    Args:
        max_swap: the largest `--blocks_to_swap` of the model.
        fp8: True if the user asked for it; otherwise both are tried.
        checkpointing: the way that the user chose, or None to try all ("none" alone for generation).
        blocks_to_swap: the number that the user chose, or None to try all.
    """
    ways = [checkpointing] if checkpointing else ["none", "selective", "full", "offload"]
    counts = range(0, max_swap + 1, 2) if blocks_to_swap is None else [blocks_to_swap]
    found = [
        Settings(eight, way, count)
        for eight in {fp8, True}
        for way in ways
        for count in counts
        # Swapped weights and activations that are all kept contradict each other: no trade that anyone needs.
        if way != "none" or count == 0 or checkpointing == "none"
    ]
    return sorted(found, key=lambda settings: settings.relative_time)


@dataclass(frozen=True)
class Prediction:
    """Bytes at the peak: on the device, and in main memory those of swapped blocks and of parked activations."""

    weights: int
    trained: int
    kept: int
    working: int
    swapped: int
    parked: int = 0

    @property
    def tensors(self) -> int:
        """What torch allocates on the device."""
        return self.weights + self.trained + self.kept + self.working

    @property
    def device(self) -> int:
        """What the device must have free, overheads included."""
        return with_overhead(self.tensors)

    @property
    def host(self) -> int:
        """What main memory must have free."""
        return self.swapped + self.parked

    def rows(self, training: bool = True) -> list[tuple[str, str]]:
        """Lines of a table."""
        parts = {"weights on the GPU": self.weights}
        if training:
            parts |= {"trained weights, gradients, optimizer": self.trained, "kept for the backward pass": self.kept}
        parts |= {
            "working memory of a block": self.working,
            "GPU memory needed in all": self.device,
            "main memory for swapped blocks": self.swapped,
        }
        if training:
            parts["main memory for parked activations"] = self.parked
        return [(name, in_words(size)) for name, size in parts.items()]


def predict(
    usage: ModelUsage,
    swapped: Sequence[int] = (),
    ring_size: int = 2,
    trained: int = 0,
    moments: int = MOMENTS,
    offload: bool = False,
) -> Prediction:
    """The peak of a training step, or of a sampling step if nothing is trained.

    Args:
        usage: the measured model.
        swapped: indices of the blocks that are streamed.
        ring_size: device buffers of the streamed blocks.
        trained: elements of trained parameters.
        moments: bytes per trained element that the optimizer keeps.
        offload: what blocks keep for backward waits in main memory.
    """
    gone = {index: usage.blocks[index].matrices for index in swapped}
    ring = max(gone.values(), default=0) * min(ring_size, len(gone))
    weights = usage.outside + sum(block.matrices + block.rest for block in usage.blocks) - sum(gone.values()) + ring
    kept = sum(block.kept for block in usage.blocks)
    # On the device, the inputs of one block are on their way.
    return Prediction(
        weights,
        trained * (WEIGHT_AND_GRADIENT + moments),
        usage.streams + (usage.streams if offload else kept),
        max(block.working for block in usage.blocks),
        sum(gone.values()),
        sum(pinned(stream) for block in usage.blocks for stream in block.streams) if offload else 0,
    )


def pinned(size: int) -> int:
    """What a tensor of so many bytes takes in pinned memory: torch's allocator rounds up to a power of two."""
    return 1 << (size - 1).bit_length()


def cheapest(
    ordered: Sequence[Settings],
    limit: int,
    predicted: Callable[[Settings], Prediction],
    training: bool = True,
    host_limit: int | None = None,
) -> Settings:
    """The first settings whose prediction stays within `limit` bytes of device and `host_limit` of main memory.

    Raises:
        UserError: none does; says what the leanest would need.
    """

    def is_housed(settings: Settings) -> bool:
        return host_limit is None or predicted(settings).host <= host_limit

    for settings in filter(is_housed, ordered):
        if predicted(settings).device <= limit:
            return settings
    leanest = min(list(filter(is_housed, ordered)) or ordered, key=lambda settings: predicted(settings).device)
    needed = predicted(leanest)
    room = ""
    if host_limit is not None:
        room = f", and {in_words(needed.host)} of main memory, where {in_words(host_limit)} are free"
    raise UserError(
        f"nothing fits {in_words(limit)} of GPU memory: even with {leanest.flags(training)} "
        f"{in_words(needed.device)} are needed{room}; lower the resolution, the frames or the batch size"
    )


def first_fitting(work: str, choices: Sequence[T], needed: Callable[[T], int], limit: int | None) -> T:
    """The first choice that needs at most `limit` bytes (None: no limit); if none does, a warning and the last."""
    for choice in choices:
        if limit is None or needed(choice) <= limit:
            return choice
    print(f"warning: {work} needs {in_words(needed(choice))}, {in_words(limit)} are there", file=sys.stderr)
    return choice


def leaner(
    current: Settings, ordered: Sequence[Settings], predicted: Callable[[Settings], Prediction]
) -> Settings | None:
    """The fastest settings that need at least a tenth less than the current ones: what to try after out of memory."""
    limit = 0.9 * predicted(current).device
    return next((settings for settings in ordered if predicted(settings).device <= limit), None)


@dataclass(frozen=True)
class MemoryPlan:
    """The settings of a run, what they need, and what else there is. Nothing is measured before somebody asks.

    Attributes:
        settings: what the run uses.
        ordered: the alternatives, the fastest first.
        predicted: the prediction for any settings.
        work: the largest piece of work in words, for messages.
        training: which names the options have.
    """

    settings: Settings
    ordered: Sequence[Settings]
    predicted: Callable[[Settings], Prediction]
    work: str
    training: bool = True

    def print(self) -> None:
        """The prediction as a table."""
        flags = ("settings", self.settings.flags(self.training))
        print_table(f"memory plan, {self.work}", [flags, *self.predicted(self.settings).rows()])

    def warn_if_too_large(self, free: int) -> None:
        """Says before the first gigabyte is read that the prediction exceeds `free` bytes, and what would fit."""
        needed = self.predicted(self.settings).device
        if needed <= free:
            return
        try:
            fitting = cheapest(self.ordered, free, self.predicted, self.training, free_main_memory())
            advice = f"{fitting.flags(self.training)} would fit"
        except UserError as error:
            advice = str(error)
        numbers = f"{in_words(needed)} of GPU memory are needed, {in_words(free)} are free"
        print(f"warning: {self.work}: {numbers}; {advice}", file=sys.stderr)

    def explained(self, during: str) -> contextlib.AbstractContextManager[None]:
        """Turns running out of memory into one line: where, how much work, the peak, and what to try next."""
        return out_of_memory_in_one_line(during, self._work_and_advice)

    def _work_and_advice(self) -> str:
        lean = leaner(self.settings, self.ordered, self.predicted)
        advice = f"try {lean.flags(self.training)}" if lean else "lower resolution, frames or batch size"
        return f"{self.work} with {self.settings.flags(self.training)}; {advice}"


@contextlib.contextmanager
def out_of_memory_in_one_line(during: str, work_and_advice: str | Callable[[], str]) -> Iterator[None]:
    """Turns running out of memory into one line.

    Args:
        during: what was going on.
        work_and_advice: how much work it was and what to do; a function where that is costly to say.

    Raises:
        UserError: out of memory inside.
    """
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        peak = f" (peak {in_words(torch.cuda.max_memory_allocated())})" if torch.cuda.is_available() else ""
        advice = work_and_advice if isinstance(work_and_advice, str) else work_and_advice()
        raise UserError(f"out of GPU memory {during}: {advice}{peak}") from None


def memory_limit(vram_gb: float | None, free: int | None) -> int | None:
    """--vram_gb in bytes, where 0 is what the device has free; None without it.

    Raises:
        UserError: it is 0, and the device does not say what is free.
    """
    if vram_gb == 0 and free is None:
        raise UserError("--vram_gb 0: this device does not say how much memory is free; give a number")
    return None if vram_gb is None else int(vram_gb * GIB) or free


def free_memory(device: torch.device) -> int | None:
    """Bytes that a GPU has free; None for other devices."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None


def free_main_memory(cgroups: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes that this process may take of what machine and container have free, as much as each of its neighbours."""
    free = min([psutil.virtual_memory().available, *_left_by_container(cgroups)])
    return free // int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def _left_by_container(cgroups: Path) -> Iterator[int]:
    """What the limit of a container leaves, by cgroups v2 and v1; cached files give way."""
    v2 = (cgroups, "memory.max", "memory.current", "inactive_file")
    v1 = (cgroups / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
    for folder, limit, used, cached in (v2, v1):
        with contextlib.suppress(OSError, ValueError):  # no such files, or no limit, which is the word "max"
            statistics = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            left = int((folder / limit).read_text()) - int((folder / used).read_text())
            yield max(left + int(statistics.get(cached, 0)), 0)
