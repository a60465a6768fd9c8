"""What each stage of generation needs of a GPU's memory, and the settings with which it fits."""

import dataclasses
import functools
import math
from collections.abc import Sequence

from hunyuan_model.block_swap import max_blocks_to_swap, swapped_blocks
from hunyuan_model.checkpoints import read_dit_config, read_vae_config
from hunyuan_model.tokenizers import LLM_MAX_TOKENS
from modules.generation.options import GenerationOptions
from modules.generation.outputs import Job
from modules.generation.requests import Request
from modules.generation.sampler import latent_shape
from modules.memory import plan
from modules.memory.measure import add_step_cache_memory, estimate_vae, measure_dit
from modules.memory.meter import ModelUsage
from modules.memory.text_encoder import PlanRows, plan_text_encoder_1
from utils.cli import print_table
from utils.device_utils import default_dtype, own_device


def plan_memory(options: GenerationOptions, requests: Sequence[Request]) -> GenerationOptions:
    """Prints what each stage needs for the largest request, and returns the options with what --vram_gb chooses.

    Options that the user has given are not changed.

    Raises:
        UserError: nothing fits.
    """
    channels = read_dit_config(options.dit.dit).out_channels
    shape = max((latent_shape(request, channels) for request in requests), key=math.prod)
    text, rows = plan_text_encoder_1(options.text, own_device(options.device.device), options.speed.vram_gb)
    options = dataclasses.replace(options, text=text)
    guided = any(request.cfg_scale != 1 for request in requests)
    options, sampling = _plan_sampling(options, shape, guided)
    options, decoding = _plan_decoding(options, shape)
    _print_plan(shape, rows + sampling + decoding)
    return options


def plan_memory_of_decoding(options: GenerationOptions, jobs: Sequence[Job]) -> GenerationOptions:
    """Like `plan_memory`, for jobs that only decode saved latents."""
    shape = max((job.latents.shape for job in jobs), key=math.prod)
    options, rows = _plan_decoding(options, shape)
    _print_plan(shape, rows)
    return options


def _print_plan(shape: Sequence[int], rows: PlanRows) -> None:
    print_table("memory plan, latents " + "x".join(map(str, shape[2:])), rows)


def _plan_sampling(
    options: GenerationOptions, shape: Sequence[int], guided: bool
) -> tuple[GenerationOptions, PlanRows]:
    """The options with --fp8 and --blocks_to_swap chosen, and the rows of the table.

    Args:
        shape: (1, C, f, h, w) of the latents.
        guided: a step needs two predictions.
    """
    config, device = read_dit_config(options.dit.dit), own_device(options.device.device)
    depths, swap, speed = (config.depth_double, config.depth_single), options.swap.blocks_to_swap, options.speed
    predictions = 1 + guided
    split = speed.split_uncond or speed.split_attn
    batch, calls = (1, predictions) if split else (predictions, 1)
    dtype = default_dtype(options.dit.dit_dtype, device, on_gpu="bfloat16")

    @functools.cache
    def measured(fp8: bool) -> ModelUsage:
        usage = measure_dit(config, (batch, config.in_channels, *shape[2:]), LLM_MAX_TOKENS, dtype, fp8)
        return usage if speed.step_cache is None else add_step_cache_memory(usage, calls)

    def predicted(settings: plan.Settings) -> plan.Prediction:
        return plan.predict(measured(settings.fp8), swapped_blocks(settings.blocks_to_swap, *depths))

    settings = plan.Settings(speed.fp8, "none", swap or 0)
    limit = plan.memory_limit(speed.vram_gb, plan.free_device_memory(device))
    if limit is not None:
        ordered = plan.candidate_settings(max_blocks_to_swap(*depths, training=False), settings.fp8, "none", swap)
        settings = plan.fastest_that_fits(ordered, limit, predicted, False, plan.free_main_memory())
    options = dataclasses.replace(
        options,
        speed=dataclasses.replace(speed, fp8=settings.fp8),
        swap=dataclasses.replace(options.swap, blocks_to_swap=settings.blocks_to_swap or swap),
    )
    return options, [("settings", settings.flags(training=False)), *predicted(settings).rows(training=False)]


def _plan_decoding(options: GenerationOptions, shape: Sequence[int]) -> tuple[GenerationOptions, PlanRows]:
    """The options with the VAE's tile size chosen, and the rows of the table; `shape` (1, C, f, h, w)."""
    vae, device = options.vae, own_device(options.device.device)
    if vae.vae is None:
        return options, []
    config, dtype = read_vae_config(vae.vae), default_dtype(vae.vae_dtype, device)

    @functools.cache
    def needed(tile: int | None) -> int:
        return plan.required_device_memory(estimate_vae(config, tuple(shape), dtype, vae.vae_chunk_size, tile))

    tiles = [vae.tile_size] if vae.tile_size else plan.TILE_SIZES
    limit = plan.memory_limit(options.speed.vram_gb, plan.free_device_memory(device))
    tile = plan.first_that_fits("decoding", tiles, needed, limit)
    rows = [("VAE tiles", tile or "none"), ("GPU memory of decoding", plan.format_bytes(needed(tile)))]
    return dataclasses.replace(options, vae=dataclasses.replace(vae, vae_spatial_tile_sample_min_size=tile)), rows
