"""The denoising loop. Generation and training previews share it, so a preview equals the generated video.

Latents (1, C, f, h, w) are in the scaled space of the DiT, and float32 in the whole loop.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hunyuan_model.vae_tiling import SPACE_COMPRESSION
from modules.flow_matching import euler_step, initial_noise, interpolate, sigmas_for_steps
from modules.generation.requests import Request
from utils.errors import UserError

TIMESTEP_SCALE = GUIDANCE_SCALE = 1000.0  # models take sigma and embedded guidance times 1000

Velocity = Callable[[Tensor, Tensor], Tensor]
"""(x (B, C, f, h, w), timestep (B,) in 0..1000) -> velocity (B, C, f, h, w)"""
BeforeStep = Callable[[int, int], None]
"""(step from 0, steps)"""


class NonFiniteError(UserError):
    """A result holds NaN or infinity; the message says where, and what is likely to be the cause."""


@dataclass(frozen=True)
class Conditioning:
    """An encoded prompt, or a batch of them."""

    text_states: Tensor  # 1 L D
    text_mask: Tensor  # 1 L
    text_states_2: Tensor  # 1 D2

    def to(self, device: torch.device) -> "Conditioning":
        return Conditioning(self.text_states.to(device), self.text_mask.to(device), self.text_states_2.to(device))

    def arguments(self) -> tuple[Tensor, Tensor, Tensor]:
        """The tensors in the order in which the DiT takes them."""
        return self.text_states, self.text_mask, self.text_states_2


def denoise(velocity: Velocity, x: Tensor, sigmas: Tensor, before_step: BeforeStep | None = None) -> Tensor:
    """Euler steps from sigmas[0] to sigmas[-1].

    Args:
        velocity: the model with its conditioning bound.
        x: (B, C, f, h, w) float32 at sigmas[0]; pure noise if that is 1.
        sigmas: (steps + 1,) float32, decreasing.
        before_step: called with (step, steps) before each step.

    Raises:
        NonFiniteError: at the first step whose velocity is not finite.
    """
    steps = len(sigmas) - 1
    for step in range(steps):
        if before_step is not None:
            before_step(step, steps)
        timestep = (sigmas[step] * TIMESTEP_SCALE).to(x.device).expand(x.shape[0])
        v = velocity(x, timestep)
        if not torch.isfinite(v).all():
            raise NonFiniteError(f"NaN or infinity at step {step + 1} of {steps}: {_likely_cause(step, v.dtype)}")
        x = euler_step(x, v, sigmas[step], sigmas[step + 1])
    return x


def _likely_cause(step: int, dtype: torch.dtype) -> str:
    if dtype == torch.float16:
        return "float16 overflows easily in a DiT; use --dit_dtype bfloat16 or float32"
    if step == 0:
        return "the weights are damaged, a scaled fp8 file lacks its scales, or a LoRA holds NaN; check the model files"
    return "the values grew too large; lower --lora_multiplier or --guidance_scale, or use --dit_dtype float32"


def guided(conditional: Velocity, unconditional: Velocity, scale: float) -> Velocity:
    """Classifier-free guidance (arXiv 2207.12598): v_u + scale (v_c - v_u)."""

    def velocity(x: Tensor, timestep: Tensor) -> Tensor:
        v_u = unconditional(x, timestep).float()
        return v_u + scale * (conditional(x, timestep).float() - v_u)

    return velocity


def guided_in_one_batch(model: Velocity, scale: float) -> Velocity:
    """Like `guided`, but `model` makes both predictions in one call with batch 2, the unconditional one first."""

    def velocity(x: Tensor, timestep: Tensor) -> Tensor:
        v_u, v_c = model(x.repeat(2, 1, 1, 1, 1), timestep.repeat(2)).float().chunk(2)
        return v_u + scale * (v_c - v_u)

    return velocity


def latent_shape(request: Request, channels: int) -> tuple[int, int, int, int, int]:
    """(1, C, f, h, w) of a request's latents."""
    height, width = request.height // SPACE_COMPRESSION, request.width // SPACE_COMPRESSION
    return 1, channels, request.latent_frames, height, width


@torch.no_grad()
def sample_latents(
    model: nn.Module,
    request: Request,
    positive: Conditioning,
    negative: Conditioning | None = None,
    *,
    device: torch.device,
    split_uncond: bool = False,
    source: Tensor | None = None,
    image: Tensor | None = None,
    before_step: BeforeStep | None = None,
) -> Tensor:
    """Samples latents (1, C, f, h, w), float32 and finite, in the scaled space.

    Args:
        model: a DiT with `config.out_channels` and `config.guidance_embed`, called as
            model(x, timestep, text_states, text_mask, text_states_2, guidance).
        request: its seed is not None.
        positive, negative: encoded prompts; `negative` is needed unless request.cfg_scale is 1.
        split_uncond: with classifier-free guidance, two calls per step with batch 1 instead of one with batch 2.
        source: scaled latents (1, C, f, h, w) of a video to start from; request.strength says how much is changed.
        image: (1, C', f, h, w), concatenated to the latents at every step, for image to video.
        before_step: called with (step, steps) before each step.

    Raises:
        NonFiniteError: an input or a step is not finite.
    """
    shape = latent_shape(request, model.config.out_channels)
    x, sigmas = starting_point(initial_noise(shape, request.seed), request, source)

    def predict(conditioning: Conditioning) -> Velocity:
        arguments = conditioning.to(device).arguments()
        for name, tensor in zip(("text_states", "text_mask", "text_states_2"), arguments, strict=True):
            if not torch.isfinite(tensor).all():
                raise NonFiniteError(f"{name} of the prompt holds NaN: try --text_encoder_dtype float32")

        def velocity(x: Tensor, timestep: Tensor) -> Tensor:
            if image is not None:
                x = torch.cat((x, image.to(x).expand(x.shape[0], -1, -1, -1, -1)), dim=1)  # B C+C' f h w
            guidance = None
            if model.config.guidance_embed:
                guidance = torch.full((x.shape[0],), request.guidance * GUIDANCE_SCALE, device=device)
            return model(x, timestep, *arguments, guidance)

        return velocity

    if request.cfg_scale == 1.0:
        velocity = predict(positive)
    elif split_uncond:
        velocity = guided(predict(positive), predict(negative), request.cfg_scale)
    else:
        velocity = guided_in_one_batch(predict(stacked(negative, positive)), request.cfg_scale)
    return denoise(velocity, x.to(device), sigmas, before_step)


def stacked(*prompts: Conditioning) -> Conditioning:
    """Encoded prompts as one batch."""
    return Conditioning(*(torch.cat(tensors) for tensors in zip(*(p.arguments() for p in prompts), strict=True)))


def starting_point(noise: Tensor, request: Request, source: Tensor | None) -> tuple[Tensor, Tensor]:
    """The latents x (1, C, f, h, w) that the loop starts with, and the sigmas from there to 0.

    Without source latents x is the noise. With them the loop starts at a later step: x is the source mixed with noise
    at the sigma of that step, and `request.strength` is the share of steps that are left.
    """
    sigmas = sigmas_for_steps(request.steps, request.flow_shift)
    if source is None:
        return noise, sigmas
    sigmas = sigmas[request.steps - max(1, int(request.steps * request.strength)) :]
    return interpolate(source.float().cpu(), noise, sigmas[:1]), sigmas
