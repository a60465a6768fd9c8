"""The loss on held-out items, at noise and timesteps that never change, so that the curve is smooth."""

from collections.abc import Sequence
from typing import Any

import torch
from accelerate import Accelerator
from tqdm import tqdm

from modules.flow_matching import interpolate, velocity_target, weighted_mse
from modules.training.denoiser import TrainingModel
from modules.training.distributed import sum_over_processes
from modules.training.step_noise import VALIDATION, draw_noise, generator_for

QUANTILES = (0.1, 0.3, 0.5, 0.7, 0.9)


@torch.no_grad()
def validation_losses(
    model: TrainingModel, dataset: Any, sigmas: Sequence[float], accelerator: Accelerator, seed: int
) -> list[float]:
    """The mean loss over all items of `dataset` at each sigma; each process computes its share of the batches.

    Args:
        dataset: item i is the i-th batch; always in the same order.
        sigmas: where to measure, such as the quantiles of the trained distribution.
        seed: of the noise, one draw per item and sigma.
    """
    totals = torch.zeros(len(sigmas) + 1, dtype=torch.float64, device=accelerator.device)
    share = range(accelerator.process_index, len(dataset), accelerator.num_processes)
    silent = not accelerator.is_main_process
    for index in tqdm(share, desc="validation", unit="batch", leave=False, disable=silent):
        batch = dataset[index]
        latents = model.latents(batch)
        size = len(latents)
        for place, value in enumerate(sigmas):
            noise = draw_noise(latents, [generator_for(VALIDATION, seed, index, place, item) for item in range(size)])
            sigma = torch.full((size,), value, device=latents.device)
            with accelerator.autocast():
                velocity = model.velocity(interpolate(latents, noise, sigma), sigma, batch)
            totals[place] += weighted_mse(velocity, velocity_target(latents, noise)).sum()
        totals[-1] += size
    totals = sum_over_processes(accelerator, totals)
    return (totals[:-1] / totals[-1]).tolist()
