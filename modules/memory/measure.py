"""Measures how many bytes the models need, by running their real code with fake tensors, which have no data."""

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from torch.func import functional_call

from hunyuan_model.checkpoints import empty_text_encoder_1, is_quantized_in_dit
from hunyuan_model.checkpoints.identification import identify
from hunyuan_model.layers import rotary_frequencies
from hunyuan_model.models import ROPE_THETA, HunyuanVideoConfig, HYVideoDiffusionTransformer
from hunyuan_model.quantization import FP8, Fp8Linear
from hunyuan_model.tokenizers import LLM_MAX_TOKENS, VIDEO_PREFIX_TOKENS
from hunyuan_model.vae import TIME_TILE, AutoencoderKLCausal3D, VaeConfig
from hunyuan_model.vae_tiling import SPACE_COMPRESSION, pixel_size
from modules.memory.meter import MemoryMeter, ModelUsage, fake_tensors, measure_block, nbytes


def measure_dit(
    config: HunyuanVideoConfig,
    latent_shape: tuple[int, int, int, int, int],
    text_tokens: int,
    dtype: torch.dtype,
    fp8: bool = False,
    training: bool = False,
    prepare: Callable[[HYVideoDiffusionTransformer], nn.Module | None] = lambda dit: None,
) -> ModelUsage:
    """Runs one block of each kind and counts for all of them.

    Args:
        latent_shape: (B, C, f, h, w).
        text_tokens: tokens of the longest caption in the batch.
        fp8: the weights of the blocks are float8.
        prepare: applies to a DiT of one double and one single block what is applied to the real one (network,
            checkpointing); returns the trained network, or None.
    """
    grid = tuple(size // patch for size, patch in zip(latent_shape[2:], config.patch_size, strict=True))
    B, L, D = latent_shape[0], math.prod(grid), config.hidden_size
    with fake_tensors(dtype):
        dit = HYVideoDiffusionTransformer(dataclasses.replace(config, depth_double=1, depth_single=1))
        dit.requires_grad_(False)
        outside = sum(nbytes(weight) for name, weight in dit.named_parameters() if "_blocks." not in name)
        if fp8:
            _replace_by_empty_fp8(dit)
        (double,), (single,) = dit.double_blocks, dit.single_blocks
        network = prepare(dit)
        vec = torch.empty(B, D)
        freqs = rotary_frequencies(grid, text_tokens, config.rope_dims, ROPE_THETA, vec.device)
        mask = torch.ones(B, 1, 1, L + text_tokens, dtype=torch.bool) if B > 1 else None
        img, txt = torch.empty(B, L, D), torch.empty(B, text_tokens, D)
        joint = torch.empty(B, L + text_tokens, D)
        doubles = measure_block(double, (img, txt), (vec, freqs, mask), training, network)
        singles = measure_block(single, (joint,), (vec, freqs, mask), training, network)
        blocks = (doubles,) * config.depth_double + (singles,) * config.depth_single
        return ModelUsage(blocks, outside, nbytes(joint) + sum(map(nbytes, freqs)))


def _replace_by_empty_fp8(dit: HYVideoDiffusionTransformer) -> None:
    """Replaces the layers that are quantised in the real DiT by empty fp8 layers; nothing is quantised."""
    for name, module in list(dit.named_modules()):
        if isinstance(module, nn.Linear) and is_quantized_in_dit(name):
            owner, _, leaf = name.rpartition(".")
            empty = Fp8Linear(module.in_features, module.out_features, module.bias, module.weight.device)
            setattr(dit.get_submodule(owner), leaf, empty)


def add_step_cache_memory(usage: ModelUsage, calls: int) -> ModelUsage:
    """The memory of a model with a step cache around its blocks.

    The cache keeps two changes for each of the `calls` of the model in a step, and the first block's output. All are
    as large as the tokens (B, L, D) of the last block.
    """
    return dataclasses.replace(usage, streams=usage.streams + (2 * calls + 1) * sum(usage.blocks[-1].streams))


def measure_vae(
    config: VaeConfig, shape: tuple[int, int, int, int, int], dtype: torch.dtype, chunk: int | None, tile: int | None
) -> int:
    """Peak bytes, with the weights, of encoding pixels (B, 3, F, H, W) or decoding latents (B, 16, f, h, w)."""
    with fake_tensors(dtype), torch.no_grad():
        vae = AutoencoderKLCausal3D(config)
        vae.configure_memory(chunk, tile)
        with MemoryMeter() as meter:
            given = torch.empty(shape)
            vae.encode(given) if shape[1] == config.pixel_channels else vae.decode(given)
        return meter.peak + sum(map(nbytes, vae.parameters()))


def estimate_vae(
    config: VaeConfig, shape: tuple[int, int, int, int, int], dtype: torch.dtype, chunk: int | None, tile: int | None
) -> int:
    """Like `measure_vae`, but measures only the largest tile, because all tiles would take minutes.

    The pixels of all tiles are added: those to encode, or those decoded so far.
    """
    if tile is None:
        return measure_vae(config, shape, dtype, chunk, None)
    B, C, *size = shape
    encodes = config.pixel_channels == C
    limits = [TIME_TILE, tile // SPACE_COMPRESSION, tile // SPACE_COMPRESSION]
    limits = pixel_size(limits) if encodes else limits
    largest = [min(length, limit) for length, limit in zip(size, limits, strict=True)]
    elements = B * math.prod(size if encodes else pixel_size(size))
    counted = math.prod(largest if encodes else pixel_size(largest))
    other_pixels = config.pixel_channels * (elements - counted) * dtype.itemsize
    return measure_vae(config, (1, C, *largest), dtype, chunk, None) + other_pixels


def measure_text_encoder_1(path: Path, dtype: torch.dtype, fp8: bool, captions: int) -> int:
    """Peak bytes, with the weights, of encoding a batch of `captions` captions with text encoder 1.

    Raises:
        UserError: the file is no Llama model.
    """
    llm = empty_text_encoder_1(identify(path), fp8).eval()
    L = VIDEO_PREFIX_TOKENS + LLM_MAX_TOKENS
    with fake_tensors(dtype), torch.no_grad():
        weights = {
            name: torch.empty(tensor.shape, dtype=FP8 if tensor.dtype == FP8 else dtype)
            for name, tensor in [*llm.named_parameters(), *llm.named_buffers()]
        }
        # transformers reads the values of a mask (B, L), but fake tensors have none. It does not read a 4D mask.
        mask = torch.ones(captions, 1, L, L, dtype=torch.bool)
        with MemoryMeter() as meter:
            functional_call(llm, weights, (torch.ones(captions, L, dtype=torch.long), mask))
        return meter.peak + sum(map(nbytes, weights.values()))
