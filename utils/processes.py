"""Which of the processes of `accelerate launch` or torchrun this is; scripts share out work by it without talking."""

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def process_share() -> tuple[int, int]:
    """(rank, number of processes); (0, 1) when started alone."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def own_device(name: str | None) -> "torch.device":
    """The device called `name`, else this process's GPU of the machine, else the CPU.

    Raises:
        UserError: torch does not know the name or cannot reach the device.
    """
    import torch

    from utils.device_utils import resolve_device

    local_rank = os.environ.get("LOCAL_RANK")
    if name is None and local_rank is not None and torch.cuda.is_available():
        name = f"cuda:{local_rank}"
    return resolve_device(name)
