"""The rank of this process among those that `accelerate launch` or torchrun started.

Scripts divide their work by rank; the processes need not communicate for that.
"""

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def process_share() -> tuple[int, int]:
    """(rank, number of processes); (0, 1) without a launcher."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def own_device(name: str | None) -> "torch.device":
    """The device called `name`; if None, the GPU with the local rank of this process, or the CPU without CUDA.

    Raises:
        UserError: torch does not know the name or cannot use the device.
    """
    import torch

    from utils.device_utils import resolve_device

    local_rank = os.environ.get("LOCAL_RANK")
    if name is None and local_rank is not None and torch.cuda.is_available():
        name = f"cuda:{local_rank}"
    return resolve_device(name)
