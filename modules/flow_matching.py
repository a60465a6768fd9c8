"""The mathematics of flow matching (arXiv 2210.02747, rectified flow 2209.03003), pure functions of tensors.

A straight path leads from the latents x0 at sigma 0 to noise at sigma 1; the model learns its velocity, noise - x0.
Importing this module does not import torch, because the options of training use `shift_sigmas` and are checked first.
"""

from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from torch import Tensor

Sigma = TypeVar("Sigma", float, "Tensor")


def _per_sample(sigma: "Tensor", like: "Tensor") -> "Tensor":
    """sigma (B,) -> (B, 1, ..., 1) with as many axes as `like`."""
    return sigma.view(-1, *[1] * (like.ndim - 1))


def interpolate(latents: "Tensor", noise: "Tensor", sigma: "Tensor") -> "Tensor":
    """x_t = (1 - sigma) x0 + sigma noise; latents and noise (B, ...), sigma (B,) in 0..1."""
    sigma = _per_sample(sigma, latents)
    return (1 - sigma) * latents + sigma * noise


def velocity_target(latents: "Tensor", noise: "Tensor") -> "Tensor":
    """dx_t / dsigma = noise - x0."""
    return noise - latents


def weighted_mse(prediction: "Tensor", target: "Tensor", weight: "Tensor | None" = None) -> "Tensor":
    """Mean squared error of each sample in float32, (B,), multiplied by the weights (B,)."""
    error = (prediction.float() - target.float()).square().flatten(1).mean(1)
    return error if weight is None else error * weight


def shift_sigmas(sigmas: Sigma, shift: float) -> Sigma:
    """s' = shift s / (1 + (shift - 1) s): towards high noise for shift > 1 (arXiv 2403.03206, section 5.3.2)."""
    return shift * sigmas / (1 + (shift - 1) * sigmas)


def sigmas_for_steps(steps: int, shift: float) -> "Tensor":
    """The sigmas of a sampling run, (steps + 1,) float32 from 1 down to 0."""
    import torch

    return shift_sigmas(torch.linspace(1, 0, steps + 1), shift)


def euler_step(x: "Tensor", velocity: "Tensor", sigma: "Tensor", sigma_next: "Tensor") -> "Tensor":
    """One step along the path: x + (sigma_next - sigma) velocity, in float32."""
    return x + (sigma_next - sigma).to(x.device) * velocity.float()


def initial_noise(shape: tuple[int, int, int, int, int], seed: int) -> "Tensor":
    """Noise (B, C, f, h, w) from a seed, float32 on the CPU: the same for every device and dtype.

    Latent frames are drawn one after another, so a longer video starts with the noise of a shorter one.
    """
    import torch

    B, C, f, h, w = shape
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.cat([torch.randn(B, C, 1, h, w, generator=generator) for _ in range(f)], dim=2)
