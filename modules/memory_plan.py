"""What fits where: predicts the peak of memory from measured parts, and chooses the cheapest settings that fit."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from utils.errors import UserError
from utils.memory_meter import ModelUsage

GIB = 1 << 30
# CUDA's context, cuBLAS's workspaces and what torch's allocator cannot hand out again.
DEVICE_OVERHEAD = 0.7 * GIB
FRAGMENTATION = 1.05
# Bytes per trained element: float32 weight and gradient, and the two moments of Adam in float32 or 8 bits.
WEIGHT_AND_GRADIENT, MOMENTS, MOMENTS_8BIT = 8, 8, 2


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

    @property
    def flags(self) -> str:
        """The options that choose these settings in training."""
        checkpointing = {
            "none": "",
            "selective": "--selective_checkpointing",
            "full": "--gradient_checkpointing",
            "offload": "--gradient_checkpointing --gradient_checkpointing_cpu_offload",
        }[self.checkpointing]
        swap = f"--blocks_to_swap {self.blocks_to_swap}" if self.blocks_to_swap else ""
        return " ".join(filter(None, ["--fp8_base" if self.fp8 else "", checkpointing, swap])) or "no option needed"


@dataclass(frozen=True)
class Prediction:
    """Bytes at the peak."""

    weights: int
    trained: int
    kept: int
    working: int
    host: int

    @property
    def tensors(self) -> int:
        """What torch allocates on the device."""
        return self.weights + self.trained + self.kept + self.working

    @property
    def device(self) -> int:
        """What the device must have free, overheads included."""
        return int(self.tensors * FRAGMENTATION + DEVICE_OVERHEAD)

    def rows(self) -> list[tuple[str, str]]:
        """Lines of a table."""
        parts = {
            "weights on the GPU": self.weights,
            "trained weights, gradients, optimizer": self.trained,
            "kept for the backward pass": self.kept,
            "working memory of a block": self.working,
            "GPU memory needed in all": self.device,
            "main memory for swapped blocks": self.host,
        }
        return [(name, f"{size / GIB:.2f} GiB") for name, size in parts.items()]


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
    return Prediction(
        weights,
        trained * (WEIGHT_AND_GRADIENT + moments),
        usage.streams + (0 if offload else kept),
        max(block.working for block in usage.blocks),
        sum(gone.values()) + (kept if offload else 0),
    )


def cheapest(candidates: Iterable[Settings], limit: int, predicted: Callable[[Settings], Prediction]) -> Settings:
    """The fastest settings whose prediction stays within `limit` bytes of device memory.

    Raises:
        UserError: none does; says what the leanest would need.
    """
    ordered = sorted(candidates, key=lambda settings: settings.relative_time)
    for settings in ordered:
        if predicted(settings).device <= limit:
            return settings
    leanest = min(ordered, key=lambda settings: predicted(settings).device)
    need = predicted(leanest).device / GIB
    raise UserError(
        f"nothing fits {limit / GIB:.1f} GiB of GPU memory: even {leanest.flags} needs {need:.1f} GiB; "
        "lower the resolution, the frames or the batch size"
    )
