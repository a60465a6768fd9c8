"""At which sigma a sample is trained, and how much its loss counts.

Every sampler is a quantile function: it takes one number u in 0..1 and returns sigma in 0..1, increasing in u. So one
uniform draw per sample is all the randomness there is, a truncated distribution is a narrower range of u, stratified
sampling is a share of that range, and evenly spaced u give the fixed sigmas of a validation.

The options and the samplers need no torch, so that a script can check and plot them at once.
"""

import functools
import math
import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import TYPE_CHECKING

from utils.cli import option, unused_options
from utils.errors import UserError

if TYPE_CHECKING:
    import torch

TIMESTEPS = 1000
_NORMAL = NormalDist()
_SMALLEST = sys.float_info.epsilon / 2


@dataclass(frozen=True, kw_only=True)
class TimestepOptions:
    """timesteps and loss weighting"""

    timestep_sampling: str = option(
        "sigma",
        help="distribution of the trained timesteps",
        choices=("sigma", "uniform", "sigmoid", "shift", "logsnr"),
    )
    discrete_flow_shift: float = option(1.0, help="shift towards noise, for the samplers sigma and shift")
    sigmoid_scale: float = option(1.0, help="width of the samplers sigmoid and shift", minimum=0)
    weighting_scheme: str = option(
        "none",
        help="logit_normal and mode: density of the sampler sigma; sigma_sqrt and cosmap: weight of the loss",
        choices=("logit_normal", "mode", "cosmap", "sigma_sqrt", "none"),
    )
    logit_mean: float = option(0.0, help="mean for logit_normal, and of log(SNR) for the sampler logsnr")
    logit_std: float = option(1.0, help="deviation for logit_normal, and of log(SNR) for the sampler logsnr", minimum=0)
    # The bounds within which the density is one: Esser et al. 2024 (arXiv 2403.03206), equation 20.
    mode_scale: float = option(1.29, help="scale of the weighting scheme mode", minimum=-1, maximum=1.75)
    min_timestep: int | None = option(None, help="smallest timestep; 0", minimum=0, maximum=TIMESTEPS - 1)
    max_timestep: int | None = option(None, help="largest timestep; 1000", minimum=1, maximum=TIMESTEPS)
    preserve_distribution_shape: bool = option(
        False, help="cut the distribution at min and max_timestep instead of squeezing it in between"
    )
    num_timestep_buckets: int | None = option(
        None, help="cut the distribution in so many equally likely parts and train each once per cycle", minimum=2
    )
    show_timesteps: str | None = option(
        None,
        help="show the distribution and end: in a window (without a display: a PNG file) or on the console",
        choices=("image", "console"),
    )

    def __post_init__(self) -> None:
        if self.discrete_flow_shift <= 0:
            raise UserError(f"--discrete_flow_shift {self.discrete_flow_shift}: must be above 0")
        low, high = self.window
        if low >= high:
            raise UserError(
                f"--min_timestep {self.min_timestep} is not below --max_timestep {self.max_timestep or 1000}"
            )
        first, last = _mass_within(self)
        if first >= last:
            raise UserError(
                f"--preserve_distribution_shape: --timestep_sampling {self.timestep_sampling} never falls between "
                f"timestep {low * TIMESTEPS:g} and {high * TIMESTEPS:g}; widen the range or leave the flag out"
            )

    @property
    def window(self) -> tuple[float, float]:
        """The smallest and largest sigma that are trained."""
        highest = TIMESTEPS if self.max_timestep is None else self.max_timestep
        return (self.min_timestep or 0) / TIMESTEPS, highest / TIMESTEPS

    def ignored(self) -> list[str]:
        """The options that were changed but have no effect with the chosen sampler, for a warning."""
        sampler, scheme = self.timestep_sampling, self.weighting_scheme
        logit_normal = sampler == "sigma" and scheme == "logit_normal"
        used = {
            "discrete_flow_shift": sampler in ("sigma", "shift"),
            "sigmoid_scale": sampler in ("sigmoid", "shift"),
            "weighting_scheme": sampler == "sigma" or scheme in ("cosmap", "sigma_sqrt"),
            "logit_mean": logit_normal or sampler == "logsnr",
            "logit_std": logit_normal or sampler == "logsnr",
            "mode_scale": sampler == "sigma" and scheme == "mode",
            "preserve_distribution_shape": self.window != (0, 1),
        }
        return unused_options(self, used)


def shift_sigma(sigma: float, shift: float) -> float:
    """s' = shift s / (1 + (shift - 1) s): more time at high noise for shift > 1."""
    return shift * sigma / (1 + (shift - 1) * sigma)


def normal_quantile(u: float) -> float:
    """The standard normal number below which a share u lies; finite also at 0 and 1."""
    return _NORMAL.inv_cdf(min(max(u, _SMALLEST), 1 - _SMALLEST))


def sigmoid(x: float) -> float:
    """1 / (1 + e^-x) without overflow."""
    return 0.5 * (1 + math.tanh(x / 2))


def density_quantile(u: float, options: TimestepOptions) -> float:
    """The densities of Stable Diffusion 3 (arXiv 2403.03206, section 3.1) as increasing functions of u."""
    if options.weighting_scheme == "logit_normal":
        return sigmoid(options.logit_mean + options.logit_std * normal_quantile(u))
    if options.weighting_scheme == "mode":
        return u - options.mode_scale * (math.sin(math.pi * u / 2) ** 2 - u)
    return u


def _sigma(u: float, options: TimestepOptions) -> float:
    # The scheduler's list of 1000 shifted sigmas runs from 1 downwards and the density picks an index of it.
    index = min(int(density_quantile(1 - u, options) * TIMESTEPS), TIMESTEPS - 1)
    return shift_sigma((TIMESTEPS - index) / TIMESTEPS, options.discrete_flow_shift)


def _uniform(u: float, options: TimestepOptions) -> float:
    return u


def _sigmoid(u: float, options: TimestepOptions) -> float:
    return sigmoid(options.sigmoid_scale * normal_quantile(u))


def _shift(u: float, options: TimestepOptions) -> float:
    return shift_sigma(_sigmoid(u, options), options.discrete_flow_shift)


def _logsnr(u: float, options: TimestepOptions) -> float:
    # log(SNR) = 2 log((1 - sigma) / sigma) falls with sigma, hence the mirrored quantile.
    return sigmoid(-0.5 * (options.logit_mean + options.logit_std * normal_quantile(1 - u)))


SAMPLERS: dict[str, Callable[[float, TimestepOptions], float]] = {
    "sigma": _sigma,
    "uniform": _uniform,
    "sigmoid": _sigmoid,
    "shift": _shift,
    "logsnr": _logsnr,
}


@functools.lru_cache
def _mass_within(options: TimestepOptions) -> tuple[float, float]:
    """The range of u whose sigmas are trained: all of it, unless the distribution is cut at the window."""
    if not options.preserve_distribution_shape:
        return 0.0, 1.0
    low, high = options.window
    return _first_above(options, lambda sigma: sigma >= low), _first_above(options, lambda sigma: sigma > high)


def _first_above(options: TimestepOptions, reached: Callable[[float], bool]) -> float:
    """The smallest u for whose sigma `reached` holds, by bisection; 1 if there is none."""
    sampler, below, above = SAMPLERS[options.timestep_sampling], 0.0, 1.0
    if reached(sampler(below, options)):
        return below
    for _ in range(64):
        middle = (below + above) / 2
        below, above = (below, middle) if reached(sampler(middle, options)) else (middle, above)
    return above


def sigma_at(u: float, options: TimestepOptions) -> float:
    """The sigma below which a share u of the training lies, with the window of min and max_timestep."""
    first, last = _mass_within(options)
    sigma = SAMPLERS[options.timestep_sampling](first + u * (last - first), options)
    low, high = options.window
    if options.preserve_distribution_shape:
        return min(max(sigma, low), high)
    return low + (high - low) * sigma


@functools.lru_cache
def _bucket_order(buckets: int, cycle: int, seed: int) -> list[int]:
    order = list(range(buckets))
    random.Random(f"{seed} {cycle}").shuffle(order)
    return order


def stratified(u: float, position: int, buckets: int | None, seed: int) -> float:
    """Moves u into the bucket that belongs to the sample number `position` of the run.

    Any `buckets` consecutive samples from a multiple of `buckets` on fill each bucket once, in an order that depends on
    seed and cycle alone, so a resumed run continues it.
    """
    if buckets is None:
        return u
    cycle, place = divmod(position, buckets)
    return (_bucket_order(buckets, cycle, seed)[place] + u) / buckets


def sample_sigmas(
    options: TimestepOptions, generators: Sequence["torch.Generator"], positions: Sequence[int], seed: int
) -> "torch.Tensor":
    """Sigmas (B,) in float32 on the CPU; each takes one draw of its own generator and depends on nothing else.

    Args:
        generators: one CPU generator per sample.
        positions: number of each sample in the run, counted over all steps and processes.
        seed: of the run; decides the order of the buckets.
    """
    import torch  # here, so that the options above are checked before torch is imported

    draws = [torch.rand((), generator=generator, dtype=torch.float64).item() for generator in generators]
    buckets = options.num_timestep_buckets
    return torch.tensor(
        [
            sigma_at(stratified(u, position, buckets, seed), options)
            for u, position in zip(draws, positions, strict=True)
        ],
        dtype=torch.float32,
    )


def loss_weight(sigma: "torch.Tensor", scheme: str) -> "torch.Tensor":
    """Weight of a sample's loss, sigma (B,) -> (B,).

    sigma_sqrt is 1 / sigma^2, bounded at the smallest sigma of the 1000-step schedule that it was made for; cosmap is
    2 / (pi (1 - 2 sigma + 2 sigma^2)); the other schemes weigh all samples alike.
    """
    if scheme == "sigma_sqrt":
        return sigma.clamp(min=1 / TIMESTEPS) ** -2
    if scheme == "cosmap":
        return 2 / (math.pi * (1 - 2 * sigma + 2 * sigma**2))
    return sigma.new_ones(sigma.shape)
