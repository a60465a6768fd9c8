"""How much GPU memory the VAE needs to encode a batch, and with which tiles that fits."""

import dataclasses
import functools

import torch

from hunyuan_model.checkpoints import read_vae_config
from modules.memory import plan as planner
from modules.memory.measure import estimate_vae
from modules.memory.text_encoder import PlanRows
from modules.options import VaeOptions
from utils.device_utils import default_dtype


def plan_vae_encoding(
    vae: VaeOptions, device: torch.device, vram_gb: float | None, batch: tuple[int, int, int, int]
) -> tuple[VaeOptions, PlanRows]:
    """Chooses the largest tiles that fit, unless the user has chosen their size.

    Args:
        vram_gb: GPU memory in GiB that may be used; 0: what is free; None: no limit.
        batch: (B, F, H, W) of the pixels.

    Returns:
        The options with the chosen tile size, and the rows of the plan's table.
    """
    config, dtype = read_vae_config(vae.vae), default_dtype(vae.vae_dtype, device)
    B, F, H, W = batch
    # Before encoding, the pixels exist as bytes, in float32 and in the VAE's dtype at the same time.
    prepared = B * config.pixel_channels * F * H * W * (1 + 4 + dtype.itemsize)

    @functools.cache
    def needed(tile: int | None) -> int:
        shape = (B, config.pixel_channels, F, H, W)
        return planner.required_device_memory(
            max(estimate_vae(config, shape, dtype, vae.vae_chunk_size, tile), prepared)
        )

    tiles = [vae.tile_size] if vae.tile_size else planner.TILE_SIZES
    limit = planner.memory_limit(vram_gb, planner.free_device_memory(device))
    tile = planner.first_that_fits("encoding", tiles, needed, limit)
    rows = [("VAE tiles", tile or "none"), ("GPU memory of encoding", planner.format_bytes(needed(tile)))]
    return dataclasses.replace(vae, vae_spatial_tile_sample_min_size=tile), rows
