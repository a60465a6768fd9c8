"""`--show_timesteps`: how often each timestep is trained, and what its loss weighs, on the console or as a picture."""

import importlib.util
from pathlib import Path

from modules.training.timesteps import TIMESTEPS, TimestepOptions, loss_weight, sigma_at
from utils.cli import print_table
from utils.errors import UserError

QUANTILES = 20_000
CONSOLE_BINS, IMAGE_BINS = 25, 200
BAR_LENGTH = 60
IMAGE_NAME = "timesteps.png"


def show_timesteps(options: TimestepOptions, folder: Path) -> None:
    """Shows the distribution as `options.show_timesteps` says; a PNG file goes into `folder`.

    Raises:
        UserError: a picture is asked for and matplotlib is not installed.
    """
    if options.show_timesteps == "image":
        _show_image(options, folder)
    else:
        _show_on_console(options)


def timestep_shares(options: TimestepOptions, bins: int) -> list[float]:
    """The share of the samples in each of `bins` equal ranges of timesteps 0..1000."""
    counts = [0] * bins
    for index in range(QUANTILES):
        sigma = sigma_at((index + 0.5) / QUANTILES, options)
        counts[min(int(sigma * bins), bins - 1)] += 1
    return [count / QUANTILES for count in counts]


def bin_weights(options: TimestepOptions, bins: int) -> list[float]:
    """The weight of the loss in the middle of each range."""
    import torch

    return loss_weight((torch.arange(bins) + 0.5) / bins, options.weighting_scheme).tolist()


def _title(options: TimestepOptions) -> str:
    return f"timesteps: {options.timestep_sampling}, weighting scheme {options.weighting_scheme}"


def _show_on_console(options: TimestepOptions) -> None:
    shares, weights = timestep_shares(options, CONSOLE_BINS), bin_weights(options, CONSOLE_BINS)
    width = TIMESTEPS // CONSOLE_BINS
    rows = [
        (f"{index * width:4}-{(index + 1) * width:<4}", f"{share:6.2%}", f"{weight:.4g}", _bar(share / max(shares)))
        for index, (share, weight) in enumerate(zip(shares, weights, strict=True))
    ]
    print_table(_title(options), rows, ("timestep", "samples", "loss weight", ""))


def _bar(share: float) -> str:
    return "#" * round(share * BAR_LENGTH)


def _show_image(options: TimestepOptions, folder: Path) -> None:
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
    if plt.get_backend().lower() != "agg":  # what matplotlib takes where there is no display
        plt.show()
    else:
        path = folder / IMAGE_NAME
        folder.mkdir(parents=True, exist_ok=True)
        figure.savefig(path)
        print(f"no display: the picture is in {path}")
    plt.close(figure)
