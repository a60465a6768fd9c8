"""The loss on held-out items, always with the same noise and timesteps, so that the curve is smooth."""

from collections.abc import Sequence

import torch
from accelerate import Accelerator
from tqdm import tqdm

from dataset.image_video_dataset import TrainingDataset
from modules.flow_matching import interpolate, velocity_target, weighted_mse
from modules.training.denoiser import Denoiser
from modules.training.distributed import sum_over_processes
from modules.training.step_plan import VALIDATION, draw_noise, generator_for

QUANTILES = (0.1, 0.3, 0.5, 0.7, 0.9)


@torch.no_grad()
def validation_losses(
    denoiser: Denoiser, dataset: TrainingDataset, sigmas: Sequence[float], accelerator: Accelerator, seed: int
) -> list[float]:
    """The mean loss over all items of `dataset` at each sigma; the processes share the batches.

    Args:
        dataset: item i is the i-th batch, always in the same order.
        sigmas: noise levels, such as quantiles of the trained distribution.
        seed: for the noise, which is drawn for each item and sigma.
    """
    totals = torch.zeros(len(sigmas) + 1, dtype=torch.float64, device=accelerator.device)
    share = range(accelerator.process_index, len(dataset), accelerator.num_processes)
    silent = not accelerator.is_main_process
    for index in tqdm(share, desc="validation", unit="batch", leave=False, disable=silent):
        batch = dataset[index]
        latents = denoiser.latents(batch)
        size = len(latents)
        for place, value in enumerate(sigmas):
            noise = draw_noise(latents, [generator_for(VALIDATION, seed, index, place, item) for item in range(size)])
            sigma = torch.full((size,), value, device=latents.device)
            x_t = interpolate(latents, noise, sigma)
            with accelerator.autocast():
                velocity = denoiser.velocity(x_t, sigma, batch)
            totals[place] += weighted_mse(velocity, velocity_target(latents, noise)).sum()
        totals[-1] += size
    totals = sum_over_processes(accelerator, totals)
    return (totals[:-1] / totals[-1]).tolist()
