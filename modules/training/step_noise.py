"""The randomness of training, as a function of (seed, step, position in the global batch) and of nothing else."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

NOISE, DROPOUT, VALIDATION = range(3)


def generator_for(*key: int) -> torch.Generator:
    """A CPU generator whose numbers belong to this key alone."""
    return torch.Generator("cpu").manual_seed(seed_for(*key))


def seed_for(*key: int) -> int:
    """63 bits that depend on every number of the key; nearby keys give unrelated seeds (numpy's SeedSequence)."""
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1)


def step_generators(seed: int, step: int, positions: Sequence[int]) -> list[torch.Generator]:
    """One generator for each sample of a batch."""
    return [generator_for(NOISE, seed, step, position) for position in positions]


def draw_noise(latents: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
    """Standard normal noise like latents (B, C, f, h, w), each sample from its own generator, drawn on the CPU."""
    noise = torch.stack([torch.randn(latents.shape[1:], generator=generator) for generator in generators])
    return noise.to(latents.device, non_blocking=True)


def seed_dropout(seed: int, step: int, position: int) -> None:
    """Makes torch's global generators, which dropout uses, start anew for the batch at this position."""
    torch.manual_seed(seed_for(DROPOUT, seed, step, position))
