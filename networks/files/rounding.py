"""Rounds the factors of a LoRA to the dtype of a file so that the update of the weight changes least.

Powers of two can be moved from one factor to the other without loss, as long as float16 can hold the results. Its
smallest numbers are multiples of 2^-24, so small factors lose digits when they become smaller still.
"""

import dataclasses
import math

import torch
from torch import Tensor

from networks.factors import LoraFactors

# The powers of two that are tried for `down`, the smallest changes first: the first of equally good ones is taken.
_EXPONENTS = sorted(range(-24, 25), key=abs)
_SAMPLE = 4096  # values of each factor that decide
FLOAT16_MAX = torch.finfo(torch.float16).max


def rounded(factors: LoraFactors, dtype: torch.dtype | None = None, fold_alpha: bool = False) -> LoraFactors:
    """The same update with factors of another dtype, each rounded once.

    Args:
        factors: the LoRA.
        dtype: dtype of the result; None keeps the dtype of each factor.
        fold_alpha: multiply alpha / rank into the factors, so that the result needs no alpha.
    """
    scale = factors.scale if fold_alpha else 1.0
    down_dtype, up_dtype = dtype or factors.down.dtype, dtype or factors.up.dtype
    alpha = None if fold_alpha else factors.alpha
    dora = factors.dora_scale if factors.dora_scale is None or dtype is None else factors.dora_scale.to(dtype)
    if scale == 1 and (down_dtype, up_dtype) == (factors.down.dtype, factors.up.dtype):
        return dataclasses.replace(factors, alpha=alpha, dora_scale=dora)
    down_scale, up_scale = 1.0, scale
    if torch.float16 in (down_dtype, up_dtype) and scale:
        down_scale, up_scale = _best_scales(factors, scale, down_dtype, up_dtype)
    down = (factors.down.float() * down_scale).to(down_dtype)
    up = (factors.up.float() * up_scale).to(up_dtype)
    return dataclasses.replace(factors, down=down, up=up, alpha=alpha, dora_scale=dora)


def _best_scales(
    factors: LoraFactors, scale: float, down_dtype: torch.dtype, up_dtype: torch.dtype
) -> tuple[float, float]:
    """The two numbers with the product `scale` with which rounding `down` and `up` loses least."""
    mantissa, exponent = math.frexp(scale)
    best = (math.inf, 1.0, scale)
    for down_part, up_part in ((1.0, 2 * mantissa), (2 * mantissa, 1.0)):
        down_scales = [down_part * 2.0**power for power in _EXPONENTS]
        up_scales = [up_part * 2.0 ** (exponent - 1 - power) for power in _EXPONENTS]
        losses = _losses(factors.down, down_scales, down_dtype) + _losses(factors.up, up_scales, up_dtype)
        index = int(losses.argmin())
        best = min(best, (losses[index].item(), down_scales[index], up_scales[index]), key=lambda found: found[0])
    return best[1:]


def _losses(factor: Tensor, scales: list[float], dtype: torch.dtype) -> Tensor:
    """For each scale, what rounding loses of the scaled factor: a share of its squared norm; infinite if it overflows.

    Computed from a sample of the values.
    """
    flat = factor.detach().flatten()
    numbers = torch.tensor(scales, dtype=torch.float64)[:, None]
    exact = numbers * flat[:: max(1, len(flat) // _SAMPLE)].double()
    lost = (exact.float().to(dtype).double() - exact).square().sum(1) / exact.square().sum(1).clamp_min(1e-300)
    overflows = dtype == torch.float16 and numbers[:, 0].abs() * flat.abs().max().double() > FLOAT16_MAX
    return torch.where(torch.as_tensor(overflows), math.inf, lost.nan_to_num(math.inf, math.inf))
