"""Training with weights, gradients and optimizer states in half precision (`--full_fp16`, `--full_bf16`)."""

from typing import Any

import torch
from torch import nn

from modules.training.optimizers import OptimizerOptions, create_optimizer
from utils.device_utils import dtype_word
from utils.errors import UserError, one_line

SMALL_GRADIENT = 1e-4


class HalfGradScaler(torch.amp.GradScaler):
    """Unscales gradients that are float16 themselves, which torch's own scaler refuses for their narrow range.

    An infinite gradient is found, and its step skipped, all the same.
    """

    def _unscale_grads_(self, optimizer: Any, inv_scale: Any, found_inf: Any, allow_fp16: bool) -> Any:
        return super()._unscale_grads_(optimizer, inv_scale, found_inf, True)


def try_optimizer(options: OptimizerOptions, dtype: torch.dtype, device: torch.device) -> float:
    """Takes a step with small gradients, and none, on a matrix of a dtype; returns the bytes of state per weight.

    What the optimizer keeps in main memory does not count.

    Raises:
        UserError: the optimizer cannot, or its states become zero and it divides by them.
    """
    # bitsandbytes pages the states of 100,000 weights and more.
    weight = nn.Parameter(torch.zeros(512, 512, dtype=dtype, device=device))
    weight.grad = torch.full_like(weight, SMALL_GRADIENT)
    weight.grad[0] = 0
    optimizer = create_optimizer(options, [{"params": [weight]}])
    try:
        optimizer.step()
        problem = "" if weight.isfinite().all() else "its states underflow, and weights become NaN"
    except (RuntimeError, NotImplementedError, ValueError, TypeError) as error:
        problem = one_line(error)
    if problem:
        raise UserError(
            f"--optimizer_type {options.description}: does not work with {dtype_word(dtype)} weights: {problem}; give "
            "--optimizer_type adafactor or adamw8bit, or a larger eps"
        )
    states = [value for value in optimizer.state[weight].values() if isinstance(value, torch.Tensor)]
    return sum(state.nbytes for state in states if state.device == weight.device) / weight.numel()
