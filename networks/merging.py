"""LoRA into weights, computed exactly: each weight in float32, rounded once."""

from collections.abc import Callable

import torch
from torch import nn


def dense_weight(module: nn.Module, device: torch.device | str | None = None) -> torch.Tensor:
    """The weight (out, in) of a Linear, plain or quantised, in float32."""
    if hasattr(module, "dequantized"):
        return module.dequantized(torch.float32).to(device or module.weight.device)
    return module.weight.detach().to(device or module.weight.device, torch.float32)


@torch.no_grad()
def write_weight(
    module: nn.Module, change: Callable[[torch.Tensor], torch.Tensor], device: torch.device | str | None = None
) -> None:
    """Replaces a Linear's weight by `change(float32 weight)`, rounded to the dtype that it has.

    Args:
        module: a Linear, plain or quantised.
        change: maps the old to the new weight.
        device: where to compute, None: where the weight is.
    """
    module.weight.copy_(change(dense_weight(module, device)))
