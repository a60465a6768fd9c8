"""The mathematics against hand computation, and against diffusers' flow-matching scheduler."""

import itertools

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from modules.flow_matching import (
    euler_step,
    initial_noise,
    interpolate,
    shift_sigmas,
    sigmas_for_steps,
    velocity_target,
    weighted_mse,
)


def test_objective_by_hand() -> None:
    latents = torch.tensor([[2.0, -4.0], [1.0, 0.0]])
    noise = torch.tensor([[0.0, 1.0], [-1.0, 3.0]])
    sigma = torch.tensor([0.25, 1.0])
    # (1 - 0.25) 2 + 0.25 0 = 1.5; (1 - 0.25)(-4) + 0.25 1 = -2.75; at sigma 1 only noise is left
    assert interpolate(latents, noise, sigma).tolist() == [[1.5, -2.75], [-1.0, 3.0]]
    assert velocity_target(latents, noise).tolist() == [[-2.0, 5.0], [-2.0, 3.0]]
    # row 0: ((-2)^2 + 5^2) / 2 = 14.5, weight 2; row 1: (4 + 9) / 2 = 6.5, weight 0.5
    loss = weighted_mse(torch.zeros(2, 2), velocity_target(latents, noise), torch.tensor([2.0, 0.5]))
    assert loss.tolist() == [29.0, 3.25]


def test_the_path_has_the_target_as_its_slope() -> None:
    latents, noise = torch.randn(2, 1, 4, 2, 3, 3, dtype=torch.float64)
    a, b = (interpolate(latents, noise, torch.tensor([s], dtype=torch.float64)) for s in (0.3, 0.7))
    assert torch.allclose((b - a) / 0.4, velocity_target(latents, noise))


@pytest.mark.parametrize("shift", [1.0, 7.0, 17.0])
@pytest.mark.parametrize("steps", [1, 6, 50])
def test_sigmas_equal_diffusers(steps: int, shift: float) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    # the pipeline of diffusers passes linspace(1, 0, steps + 1)[:-1]
    scheduler.set_timesteps(sigmas=torch.linspace(1, 0, steps + 1)[:-1].tolist())
    assert torch.allclose(sigmas_for_steps(steps, shift), scheduler.sigmas, atol=1e-6)
    assert sigmas_for_steps(steps, shift)[[0, -1]].tolist() == [1.0, 0.0]


def test_shift_by_hand() -> None:
    assert shift_sigmas(torch.tensor([0.5]), 7.0).item() == pytest.approx(3.5 / 4)


def test_euler_with_the_true_velocity_arrives() -> None:
    latents, noise = torch.randn(2, 1, 4, 2, 3, 3)
    x, sigmas = noise, sigmas_for_steps(5, 7.0)
    for sigma, sigma_next in itertools.pairwise(sigmas):
        x = euler_step(x, velocity_target(latents, noise), sigma, sigma_next)
    assert torch.allclose(x, latents, atol=1e-5)


def test_two_lengths_share_their_common_frames() -> None:
    short, long = initial_noise((1, 16, 3, 8, 8), seed=7), initial_noise((1, 16, 5, 8, 8), seed=7)
    assert torch.equal(short, long[:, :, :3])
    assert not torch.equal(short, initial_noise((1, 16, 3, 8, 8), seed=8))
    assert not torch.equal(short[:, :, 0], short[:, :, 1])
