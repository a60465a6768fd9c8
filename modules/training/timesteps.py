"""At which sigma a sample is trained, and the weight of its loss.

Every sampler is a quantile function: it takes a number u in 0..1 and returns sigma in 0..1, increasing in u. A sample
needs one uniform draw of u. A truncated distribution is a narrower range of u; stratified sampling draws from a part of
that range; evenly spaced u give the fixed sigmas of the validation.

Importing this module does not import torch, so that scripts can check the options first.
"""

import functools
import importlib.util
import math
import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist
from typing import TYPE_CHECKING

from modules.flow_matching import shift_sigmas
from utils.cli import option, print_table, unused_options
from utils.errors import UserError

if TYPE_CHECKING:
    import torch

TIMESTEPS = 1000
_NORMAL = NormalDist()
_SMALLEST = sys.float_info.epsilon / 2
_SAMPLERS = ("sigma", "uniform", "sigmoid", "shift")

# Of --show_timesteps.
PLOTTED_QUANTILES = 20_000
CONSOLE_BINS, IMAGE_BINS = 25, 200
BAR_LENGTH = 60
IMAGE_NAME = "timesteps.png"


@dataclass(frozen=True, kw_only=True)
class TimestepOptions:
    """timesteps and loss weighting"""

    preserve_distribution_shape, num_timestep_buckets = False, None  # options of LoRA training only

    timestep_sampling: str = option("sigma", help="distribution of the trained timesteps", choices=_SAMPLERS)
    discrete_flow_shift: float = option(1.0, help="shift towards noise, for the distributions sigma and shift")
    sigmoid_scale: float = option(1.0, help="width of the distributions sigmoid and shift", minimum=0)
    weighting_scheme: str = option(
        "none",
        help="logit_normal, mode: density for the distribution sigma; sigma_sqrt, cosmap: weight of the loss",
        choices=("logit_normal", "mode", "cosmap", "sigma_sqrt", "none"),
    )
    logit_mean: float = option(0.0, help="mean for logit_normal, and of log(SNR) for logsnr")
    logit_std: float = option(1.0, help="standard deviation for logit_normal, and of log(SNR) for logsnr", minimum=0)
    # Outside of these bounds the density would be negative: Esser et al. 2024 (arXiv 2403.03206), equation 20.
    mode_scale: float = option(1.29, help="scale of the weighting scheme mode", minimum=-1, maximum=1.75)
    min_timestep: int | None = option(None, help="smallest timestep; unset: 0", minimum=0, maximum=TIMESTEPS - 1)
    max_timestep: int | None = option(None, help="largest timestep; unset: 1000", minimum=1, maximum=TIMESTEPS)

    def __post_init__(self) -> None:
        if self.discrete_flow_shift <= 0:
            raise UserError(f"--discrete_flow_shift {self.discrete_flow_shift}: must be above 0")
        low, high = self.sigma_range
        if low >= high:
            raise UserError(
                f"--min_timestep {self.min_timestep} is not below --max_timestep {self.max_timestep or 1000}"
            )
        first, last = _trained_quantiles(self)
        if first >= last:
            raise UserError(
                f"--preserve_distribution_shape: --timestep_sampling {self.timestep_sampling} never falls between "
                f"timestep {low * TIMESTEPS:g} and {high * TIMESTEPS:g}; widen the range or leave the flag out"
            )

    @property
    def sigma_range(self) -> tuple[float, float]:
        """The smallest and largest sigma that are trained."""
        highest = TIMESTEPS if self.max_timestep is None else self.max_timestep
        return (self.min_timestep or 0) / TIMESTEPS, highest / TIMESTEPS

    def ignored(self) -> list[str]:
        """The options that were changed but have no effect with the chosen distribution."""
        sampler, scheme = self.timestep_sampling, self.weighting_scheme
        logit_normal = sampler == "sigma" and scheme == "logit_normal"
        used = {
            "discrete_flow_shift": sampler in ("sigma", "shift"),
            "sigmoid_scale": sampler in ("sigmoid", "shift"),
            "weighting_scheme": sampler == "sigma" or scheme in ("cosmap", "sigma_sqrt"),
            "logit_mean": logit_normal or sampler == "logsnr",
            "logit_std": logit_normal or sampler == "logsnr",
            "mode_scale": sampler == "sigma" and scheme == "mode",
            "preserve_distribution_shape": self.sigma_range != (0, 1),
        }
        return unused_options(self, used)


@dataclass(frozen=True, kw_only=True)
class LoraTimestepOptions(TimestepOptions):
    """timesteps and loss weighting"""

    timestep_sampling: str = option(
        "sigma", help="distribution of the trained timesteps", choices=(*_SAMPLERS, "logsnr")
    )
    preserve_distribution_shape: bool = option(
        False, help="cut the distribution off at --min_timestep and --max_timestep instead of compressing it"
    )
    num_timestep_buckets: int | None = option(
        None, help="stratified sampling: number of equally likely buckets, each trained once per cycle", minimum=2
    )
    show_timesteps: str | None = option(
        None,
        help="show the distribution, then stop: in a window (without a display: as a PNG file) or on the console",
        choices=("image", "console"),
    )


def normal_quantile(u: float) -> float:
    """The quantile function of the standard normal distribution; finite also at 0 and 1."""
    return _NORMAL.inv_cdf(min(max(u, _SMALLEST), 1 - _SMALLEST))


def sigmoid(x: float) -> float:
    """1 / (1 + e^-x) without overflow."""
    return 0.5 * (1 + math.tanh(x / 2))


def density_quantile(u: float, options: TimestepOptions) -> float:
    """The quantile functions of the densities of Stable Diffusion 3 (arXiv 2403.03206, section 3.1)."""
    if options.weighting_scheme == "logit_normal":
        return sigmoid(options.logit_mean + options.logit_std * normal_quantile(u))
    if options.weighting_scheme == "mode":
        return u - options.mode_scale * (math.sin(math.pi * u / 2) ** 2 - u)
    return u


def _sigma(u: float, options: TimestepOptions) -> float:
    # The density picks an index from the list of 1000 shifted sigmas, which starts at 1 and falls.
    index = min(int(density_quantile(1 - u, options) * TIMESTEPS), TIMESTEPS - 1)
    return shift_sigmas((TIMESTEPS - index) / TIMESTEPS, options.discrete_flow_shift)


def _uniform(u: float, options: TimestepOptions) -> float:
    return u


def _sigmoid(u: float, options: TimestepOptions) -> float:
    return sigmoid(options.sigmoid_scale * normal_quantile(u))


def _shift(u: float, options: TimestepOptions) -> float:
    return shift_sigmas(_sigmoid(u, options), options.discrete_flow_shift)


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
def _trained_quantiles(options: TimestepOptions) -> tuple[float, float]:
    """The range of u whose sigmas are trained: 0..1, unless the distribution is truncated."""
    if not options.preserve_distribution_shape:
        return 0.0, 1.0
    low, high = options.sigma_range
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
    """The u-quantile of the trained sigmas, within --min_timestep and --max_timestep."""
    first, last = _trained_quantiles(options)
    sigma = SAMPLERS[options.timestep_sampling](first + u * (last - first), options)
    low, high = options.sigma_range
    if options.preserve_distribution_shape:
        return min(max(sigma, low), high)
    return low + (high - low) * sigma


@functools.lru_cache
def _bucket_order(buckets: int, cycle: int, seed: int) -> list[int]:
    order = list(range(buckets))
    random.Random(f"{seed} {cycle}").shuffle(order)
    return order


def stratified(u: float, position: int, buckets: int | None, seed: int) -> float:
    """Stratified sampling: moves u into the bucket of the sample at `position` in the run; None: leaves it.

    A cycle is `buckets` consecutive samples and uses each bucket once, in an order that depends on the seed and the
    number of the cycle alone, so a resumed run continues it.
    """
    if buckets is None:
        return u
    cycle, place = divmod(position, buckets)
    return (_bucket_order(buckets, cycle, seed)[place] + u) / buckets


def sample_sigmas(
    options: TimestepOptions, generators: Sequence["torch.Generator"], positions: Sequence[int], seed: int
) -> "torch.Tensor":
    """Sigmas (B,) in float32 on the CPU, one draw from each generator.

    Args:
        generators: one CPU generator per sample.
        positions: number of each sample in the run, counted over all steps and processes.
        seed: of the run, for the order of the buckets.
    """
    import torch

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

    sigma_sqrt is 1 / sigma^2, with sigma at least 1/1000, the smallest in the 1000-step schedule that it was made for;
    cosmap is 2 / (pi (1 - 2 sigma + 2 sigma^2)); the other schemes give every sample the weight 1.
    """
    if scheme == "sigma_sqrt":
        return sigma.clamp(min=1 / TIMESTEPS) ** -2
    if scheme == "cosmap":
        return 2 / (math.pi * (1 - 2 * sigma + 2 * sigma**2))
    return sigma.new_ones(sigma.shape)


def show_timesteps(options: LoraTimestepOptions, folder: Path) -> None:
    """Shows how often each timestep is trained and the weight of its loss; a PNG file is written into `folder`.

    Raises:
        UserError: --show_timesteps image, and matplotlib is not installed.
    """
    if options.show_timesteps == "image":
        _show_image(options, folder)
    else:
        _show_on_console(options)


def timestep_shares(options: TimestepOptions, bins: int) -> list[float]:
    """The share of the samples in each of `bins` equal ranges of timesteps 0..1000."""
    counts = [0] * bins
    for index in range(PLOTTED_QUANTILES):
        sigma = sigma_at((index + 0.5) / PLOTTED_QUANTILES, options)
        counts[min(int(sigma * bins), bins - 1)] += 1
    return [count / PLOTTED_QUANTILES for count in counts]


def bin_weights(options: TimestepOptions, bins: int) -> list[float]:
    """The weight of the loss in the middle of each of `bins` equal ranges of timesteps."""
    import torch

    return loss_weight((torch.arange(bins) + 0.5) / bins, options.weighting_scheme).tolist()


def _title(options: TimestepOptions) -> str:
    return f"timesteps: {options.timestep_sampling}, weighting scheme {options.weighting_scheme}"


def _show_on_console(options: TimestepOptions) -> None:
    shares, weights = timestep_shares(options, CONSOLE_BINS), bin_weights(options, CONSOLE_BINS)
    width = TIMESTEPS // CONSOLE_BINS
    bars = ["#" * round(BAR_LENGTH * share / max(shares)) for share in shares]
    rows = [
        (f"{index * width:4}-{(index + 1) * width:<4}", f"{share:6.2%}", f"{weight:.4g}", bar)
        for index, (share, weight, bar) in enumerate(zip(shares, weights, bars, strict=True))
    ]
    print_table(_title(options), rows, ("timestep", "samples", "loss weight", ""))


def _show_image(options: LoraTimestepOptions, folder: Path) -> None:
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError("--show_timesteps image: matplotlib is not installed; pip install matplotlib, or use console")
    import matplotlib.pyplot as plt

    shares, weights = timestep_shares(options, IMAGE_BINS), bin_weights(options, IMAGE_BINS)
    middles = [(index + 0.5) * TIMESTEPS / IMAGE_BINS for index in range(IMAGE_BINS)]
    figure, (upper, lower) = plt.subplots(2, sharex=True, figsize=(9, 6))
    upper.bar(middles, shares, width=TIMESTEPS / IMAGE_BINS)
    upper.set(title=_title(options), ylabel="share of the samples")
    lower.plot(middles, weights)
    lower.set(xlabel="timestep (1000 sigma)", ylabel="loss weight", ylim=(0, None))
    if plt.get_backend().lower() != "agg":  # the backend that matplotlib chooses without a display
        plt.show()
    else:
        path = folder / IMAGE_NAME
        folder.mkdir(parents=True, exist_ok=True)
        figure.savefig(path)
        print(f"no display: the picture is in {path}")
    plt.close(figure)
