"""The denoising loop against diffusers' HunyuanVideoPipeline, and its own algebra."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from diffusers import (
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    HunyuanSkyreelsImageToVideoPipeline,
    HunyuanVideoPipeline,
    HunyuanVideoTransformer3DModel,
)

from hunyuan_model.checkpoints.names import dit_from_official
from hunyuan_model.models import HunyuanVideoConfig, HYVideoDiffusionTransformer
from modules.flow_matching import initial_noise, interpolate, sigmas_for_steps
from modules.generation.requests import Request
from modules.generation.sampler import (
    Conditioning,
    NonFiniteError,
    denoise,
    guided,
    guided_in_one_batch,
    latent_shape,
    sample_latents,
    stacked,
    starting_point,
)

CPU = torch.device("cpu")
CONFIG = HunyuanVideoConfig(
    hidden_size=64,
    heads=2,
    mlp_hidden=256,
    depth_double=2,
    depth_single=2,
    text_dim=48,
    text_dim_2=24,
    rope_dims=(4, 14, 14),
)
REQUEST = Request(prompt="cat", width=32, height=48, frames=9, seed=5, steps=6)


@pytest.fixture(scope="module")
def model() -> HYVideoDiffusionTransformer:
    torch.manual_seed(0)
    model = HYVideoDiffusionTransformer(CONFIG).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter += 0.1 * torch.randn(parameter.shape)
    return model


def encoded(seed: int, tokens: int) -> Conditioning:
    generator = torch.Generator().manual_seed(seed)
    mask = torch.zeros(1, 16, dtype=torch.int64)
    mask[:, :tokens] = 1
    return Conditioning(torch.randn(1, 16, 48, generator=generator), mask, torch.randn(1, 24, generator=generator))


def diffusers_transformer(model: HYVideoDiffusionTransformer) -> HunyuanVideoTransformer3DModel:
    transformer = HunyuanVideoTransformer3DModel(
        in_channels=model.config.in_channels,
        num_attention_heads=2,
        attention_head_dim=32,
        num_layers=2,
        num_single_layers=2,
        num_refiner_layers=2,
        text_embed_dim=48,
        pooled_projection_dim=24,
        rope_axes_dim=(4, 14, 14),
        guidance_embeds=True,
    ).eval()
    transformer.load_state_dict(dit_from_official(model.state_dict(), "diffusers"))
    return transformer


def diffusers_pipeline(
    model: HYVideoDiffusionTransformer,
    shift: float,
    cls: type[DiffusionPipeline] = HunyuanVideoPipeline,
    vae: torch.nn.Module | None = None,
) -> DiffusionPipeline:
    pipeline = cls(
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        vae=vae,
        transformer=diffusers_transformer(model),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=shift),
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.mark.parametrize(("cfg_scale", "split"), [(1.0, False), (2.5, False), (2.5, True)])
def test_equals_diffusers_pipeline(model, cfg_scale, split):
    request = dataclasses.replace(REQUEST, cfg_scale=cfg_scale, flow_shift=7.0)
    positive, negative = encoded(1, 11), encoded(2, 4)
    ours = sample_latents(model, request, positive, negative, device=CPU, split_uncond=split)
    theirs = diffusers_pipeline(model, request.flow_shift)(
        height=request.height,
        width=request.width,
        num_frames=request.frames,
        num_inference_steps=request.steps,
        true_cfg_scale=cfg_scale,
        guidance_scale=request.guidance,
        latents=initial_noise(latent_shape(request, 16), request.seed),
        prompt_embeds=positive.text_states,
        prompt_attention_mask=positive.text_mask,
        pooled_prompt_embeds=positive.text_states_2,
        negative_prompt_embeds=negative.text_states,
        negative_prompt_attention_mask=negative.text_mask,
        negative_pooled_prompt_embeds=negative.text_states_2,
        output_type="latent",
        return_dict=False,
    )[0]
    assert ours.shape == theirs.shape == (1, 16, 3, 6, 4)
    assert (ours - initial_noise(ours.shape, request.seed)).abs().max() > 1
    assert (ours - theirs).norm() <= 1e-4 * theirs.norm()


def test_video_to_video_equals_diffusers_pipeline_from_the_same_sigma(model):
    """Half of 6 steps: diffusers is given the last three sigmas, and the source with noise at the first of them."""
    request = dataclasses.replace(REQUEST, flow_shift=3.0, strength=0.5)
    positive, source = encoded(1, 11), torch.randn(1, 16, 3, 6, 4)
    ours = sample_latents(model, request, positive, device=CPU, source=source)
    sigmas = [3 * s / (1 + 2 * s) for s in (3 / 6, 2 / 6, 1 / 6)]
    noise = initial_noise(latent_shape(request, 16), request.seed)
    theirs = diffusers_pipeline(model, shift=1.0)(
        height=request.height,
        width=request.width,
        num_frames=request.frames,
        sigmas=sigmas,
        guidance_scale=request.guidance,
        latents=(1 - sigmas[0]) * source + sigmas[0] * noise,
        prompt_embeds=positive.text_states,
        prompt_attention_mask=positive.text_mask,
        pooled_prompt_embeds=positive.text_states_2,
        output_type="latent",
        return_dict=False,
    )[0]
    assert (ours - theirs).norm() <= 1e-4 * theirs.norm()
    assert (ours - sample_latents(model, request, positive, device=CPU)).norm() > 0.1 * theirs.norm()


class FixedVae(torch.nn.Module):
    """A VAE with the same latents (1, 16, 1, 6, 4) for every picture."""

    config = SimpleNamespace(scaling_factor=0.476986)
    temporal_compression_ratio, spatial_compression_ratio, dtype, device = 4, 8, torch.float32, CPU

    def encode(self, pixels):
        return SimpleNamespace(latents=torch.randn(1, 16, 1, 6, 4, generator=torch.Generator().manual_seed(9)))


def test_image_to_video_equals_diffusers_pipeline():
    torch.manual_seed(0)
    model = HYVideoDiffusionTransformer(dataclasses.replace(CONFIG, in_channels=32)).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter += 0.1 * torch.randn(parameter.shape)
    request, positive, vae = dataclasses.replace(REQUEST, flow_shift=3.0), encoded(1, 11), FixedVae()
    first = vae.encode(None).latents * 0.476986
    image = torch.cat((first, torch.zeros(1, 16, 2, 6, 4)), dim=2)
    ours = sample_latents(model, request, positive, device=CPU, image=image)
    theirs = diffusers_pipeline(model, 3.0, HunyuanSkyreelsImageToVideoPipeline, vae)(
        image=torch.zeros(1, 3, request.height, request.width),
        height=request.height,
        width=request.width,
        num_frames=request.frames,
        num_inference_steps=request.steps,
        guidance_scale=request.guidance,
        true_cfg_scale=1.0,
        latents=initial_noise(latent_shape(request, 16), request.seed),
        prompt_embeds=positive.text_states,
        prompt_attention_mask=positive.text_mask,
        pooled_prompt_embeds=positive.text_states_2,
        output_type="latent",
        return_dict=False,
    )[0]
    assert (ours - theirs).norm() <= 1e-4 * theirs.norm()


def test_the_noise_of_a_seed_is_frozen():
    """The first and the last channel, in the first and in the second latent frame."""
    noise = initial_noise((1, 16, 2, 2, 2), 5)
    assert noise[0, 0, 0].flatten().tolist() == pytest.approx([1.8423299, 0.5188872, -1.7119213, -1.7013793], abs=1e-5)
    assert noise[0, 15, 1].flatten().tolist() == pytest.approx([0.3639821, -0.3012481, -1.6497084, 0.0286545], abs=1e-5)


def test_same_seed_same_latents_and_another_seed_others(model):
    first, second = (sample_latents(model, REQUEST, encoded(1, 11), device=CPU) for _ in range(2))
    assert torch.equal(first, second)
    other = sample_latents(model, dataclasses.replace(REQUEST, seed=6), encoded(1, 11), device=CPU)
    assert not torch.allclose(first, other)


def test_a_constant_velocity_is_integrated_exactly():
    """x(0) = x(1) - v, however many steps and whatever shift."""
    noise, v = torch.randn(1, 2, 1, 2, 2), torch.randn(1, 2, 1, 2, 2)
    for steps, shift in [(1, 1.0), (7, 7.0), (50, 17.0)]:
        result = denoise(lambda x, t: v, noise, sigmas_for_steps(steps, shift))
        torch.testing.assert_close(result, noise - v)


def test_the_velocity_of_a_straight_path_is_followed_to_its_end():
    target, noise = torch.randn(1, 2, 1, 2, 2), torch.randn(1, 2, 1, 2, 2)
    seen = []

    def velocity(x, timestep):
        seen.append(timestep.item())
        torch.testing.assert_close(x, interpolate(target, noise, timestep / 1000))
        return noise - target

    result = denoise(velocity, noise, sigmas_for_steps(5, 3.0), before_step=lambda step, steps: None)
    torch.testing.assert_close(result, target)
    assert seen == pytest.approx((1000 * sigmas_for_steps(5, 3.0)[:-1]).tolist())


def test_nan_is_found_at_its_step():
    def velocity(x, timestep):
        return torch.full_like(x, float("nan") if timestep.item() < 600 else 0.0)

    with pytest.raises(NonFiniteError, match=r"step 4 of 6: .*--lora_multiplier"):
        denoise(velocity, torch.zeros(1, 1, 1, 1, 1), sigmas_for_steps(6, 1.0))
    with pytest.raises(NonFiniteError, match=r"step 1 of 2: .*float16"):
        denoise(lambda x, t: x.half() * float("inf"), torch.ones(1, 1, 1, 1, 1), sigmas_for_steps(2, 1.0))


def test_nan_in_the_prompt_is_found_before_the_first_step(model):
    broken = encoded(1, 11)
    broken.text_states_2[0, 0] = float("inf")
    with pytest.raises(NonFiniteError, match="text_states_2"):
        sample_latents(model, REQUEST, broken, device=CPU)


def test_guidance_in_one_batch_equals_two_calls():
    x, t = torch.randn(1, 2, 1, 2, 2), torch.tensor([500.0])

    def both(x, t):
        return torch.cat((x[:1] * 2, x[1:] * 3)) + t.view(-1, 1, 1, 1, 1)

    one = guided_in_one_batch(both, 4.0)(x, t)
    two = guided(lambda x, t: x * 3 + t, lambda x, t: x * 2 + t, 4.0)(x, t)
    torch.testing.assert_close(one, two)
    torch.testing.assert_close(two, 2 * x + t + 4.0 * x)


def test_video_to_video_starts_on_the_path_and_strength_1_is_text_to_video(model):
    noise, source = torch.randn(1, 2, 1, 2, 2), torch.randn(1, 2, 1, 2, 2)
    x, sigmas = starting_point(noise, Request(steps=10, strength=0.3, flow_shift=7.0), source)
    assert torch.equal(sigmas, sigmas_for_steps(10, 7.0)[7:])
    torch.testing.assert_close(x, (1 - sigmas[0]) * source + sigmas[0] * noise)
    x, sigmas = starting_point(noise, Request(steps=10, strength=1.0), source)
    assert torch.equal(x, noise)
    assert len(sigmas) == 11


def test_image_latents_are_seen_by_the_model():
    torch.manual_seed(0)
    model = HYVideoDiffusionTransformer(dataclasses.replace(CONFIG, in_channels=32)).eval().requires_grad_(False)
    image = torch.randn(latent_shape(REQUEST, 16))
    with_image = sample_latents(model, REQUEST, encoded(1, 11), device=CPU, image=image)
    without = sample_latents(model, REQUEST, encoded(1, 11), device=CPU, image=torch.zeros_like(image))
    assert with_image.shape == without.shape
    assert not torch.allclose(with_image, without)


def test_image_latents_are_the_channels_after_those_of_the_noise():
    """And guidance and timestep are given times 1000."""
    seen = []

    def model(x, timestep, text_states, text_mask, text_states_2, guidance):
        seen.append((x, timestep.tolist(), guidance.tolist()))
        return torch.zeros_like(x[:, :16])

    model.config = dataclasses.replace(CONFIG, in_channels=32)
    image = torch.randn(latent_shape(REQUEST, 16))
    sample_latents(
        model, dataclasses.replace(REQUEST, steps=2, flow_shift=1.0), encoded(1, 11), device=CPU, image=image
    )
    for x, _, _ in seen:
        assert torch.equal(x[:, 16:], image)
        assert torch.equal(x[:, :16], initial_noise(latent_shape(REQUEST, 16), REQUEST.seed))
    assert [(timestep, guidance) for _, timestep, guidance in seen] == [([1000.0], [6000.0]), ([500.0], [6000.0])]


def test_prompts_stack_in_order():
    both = stacked(encoded(1, 11), encoded(2, 4))
    assert both.text_states.shape == (2, 16, 48)
    assert both.text_mask.sum(1).tolist() == [11, 4]
