"""The loss on held-out items, always with the same noise and timesteps, so that the curve is smooth."""

from collections.abc import Callable, Sequence

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
    denoiser: Denoiser,
    dataset: TrainingDataset,
    sigmas: Sequence[float],
    accelerator: Accelerator,
    seed: int,
    stopping: Callable[[], bool],
) -> list[float] | None:
    """The mean loss over all items of `dataset` at each sigma; the processes share the batches.

    None if `stopping` is true, which all processes ask together before each call of the DiT.

    Args:
        dataset: item i is the i-th batch, always in the same order.
        sigmas: noise levels, such as quantiles of the trained distribution.
        seed: for the noise, which is drawn for each item and sigma.
    """
    totals = torch.zeros(len(sigmas) + 1, dtype=torch.float64, device=accelerator.device)
    rounds = range(0, len(dataset), accelerator.num_processes)
    silent = not accelerator.is_main_process
    for first in tqdm(rounds, desc="validation", unit="batch", leave=False, disable=silent):
        index = first + accelerator.process_index
        batch = dataset[index] if index < len(dataset) else None
        latents = denoiser.latents(batch) if batch is not None else ()
        size = len(latents)
        for place, value in enumerate(sigmas):
            if stopping():
                return None
            if batch is None:
                continue
            noise = draw_noise(latents, [generator_for(VALIDATION, seed, index, place, item) for item in range(size)])
            sigma = torch.full((size,), value, device=latents.device)
            x_t = interpolate(latents, noise, sigma)
            with accelerator.autocast():
                velocity = denoiser.velocity(x_t, sigma, batch)
            totals[place] += weighted_mse(velocity, velocity_target(latents, noise)).sum()
        totals[-1] += size
    *sums, count = sum_over_processes(accelerator, totals.tolist())
    return [total / count for total in sums]
