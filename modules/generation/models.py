"""Checks and loads the models of hv_generate_video.py."""

import functools
from typing import Literal

import torch

from hunyuan_model import attention, checkpoints
from hunyuan_model.block_swap import enable_block_swap, offload_embedders
from hunyuan_model.checkpoints.identification import CLIP, DIT, LLM, VAE, identify
from hunyuan_model.models import HYVideoDiffusionTransformer
from hunyuan_model.quantization import require_fp8_matmul, use_fp8_matmul
from modules.blocks.compilation import compile_blocks, require_backend
from modules.blocks.step_cache import StepCache, apply_step_cache
from modules.generation.lazy_model import LazyModel
from modules.generation.options import GenerationOptions
from networks.files.merged_files import merge_files
from networks.hooks import LoraHooks
from networks.merging import match_loras, weight_changes
from utils.device_utils import DTYPES, default_dtype, own_device


def check_models(options: GenerationOptions) -> None:
    """Finds before a model is loaded what would fail later: it reads the header of every model file and LoRA.

    Raises:
        UserError: a file is not what its option expects, a LoRA does not fit the DiT, PyTorch does not have the
            --compile_backend, or the device cannot do --fp8_fast.
    """
    if options.samples and options.compile.compile:
        require_backend(options.compilation().compile_backend)
    if options.samples and options.speed.fp8_fast:
        require_fp8_matmul(own_device(options.device.device))
    text = options.text
    for path, part in (
        (options.dit.dit, DIT),
        (options.vae.vae, VAE),
        (text.text_encoder1, LLM),
        (text.text_encoder2, CLIP),
    ):
        if path is not None:
            identify(path).tensors(part)
    if options.dit.dit is not None:
        shapes = checkpoints.open_dit(options.dit.dit).shapes
        for path in options.lora.lora_weight:
            match_loras(shapes, [(path, 1.0)], options.lora.exclude_single_blocks)


def verify_attention(options: GenerationOptions, device: torch.device) -> None:
    """Tries --attn_mode with the DiT's dtype and head size.

    Raises:
        UserError: it does not run on this device, or its result is wrong.
    """
    head_dim = checkpoints.read_dit_config(options.dit.dit).head_dim
    speed = options.speed
    attention.verify_attention(speed.attn_mode, device, _dit_dtype(options, device), head_dim, speed.split_attn)


def lazy_dit(
    options: GenerationOptions,
    device: torch.device,
    step_cache: StepCache | None = None,
    when_released: Literal["free", "keep"] = "free",
) -> LazyModel[HYVideoDiffusionTransformer]:
    """The DiT, ready to sample. It is loaded at its first use."""
    load = functools.partial(load_sampling_dit, options, device, step_cache)
    return LazyModel(load, device, when_released, advice="use --fp8 or --blocks_to_swap")


def load_sampling_dit(
    options: GenerationOptions, device: torch.device, step_cache: StepCache | None = None
) -> HYVideoDiffusionTransformer:
    """The DiT, ready to sample: LoRAs merged, quantised, compiled, block swap and a step cache around its blocks."""
    speed, swap = options.speed, options.swap
    model = load_merged_dit(options, device)
    if speed.fp8_fast:
        use_fp8_matmul(model, device)
    if options.compile.compile:
        compile_blocks(model.blocks, options.compilation())
    enable_block_swap(model, swap.blocks_to_swap or 0, device, pin=swap.use_pinned_memory_for_block_swap or None)
    if swap.img_in_txt_in_offloading:
        offload_embedders(model, device)
    if step_cache is not None:
        streams = [2] * len(model.double_blocks) + [1] * len(model.single_blocks)
        apply_step_cache(model.blocks, streams, step_cache)
    return model


def load_merged_dit(options: GenerationOptions, device: torch.device) -> HYVideoDiffusionTransformer:
    """The DiT with its LoRAs. The blocks that will be swapped are in main memory.

    LoRAs are merged into each weight before it is quantised, so that both are rounded once. If the file is already fp8
    and stays fp8, rounding would undo most of a small change. Then the LoRAs compute beside the weights.
    """
    lora, speed = options.lora, options.speed
    path, loras = options.dit.dit, lora.merged()
    config, swapped = checkpoints.read_dit_config(path), options.swap.blocks_to_swap or 0
    placement = checkpoints.block_swap_placement(config, swapped, device)
    tensors = checkpoints.open_dit(path)
    beside = speed.fp8 and tensors.file.fp8 != "none"
    changes = weight_changes(tensors.shapes, loras, lora.exclude_single_blocks) if loras and not beside else None
    model = checkpoints.load_dit(
        path,
        placement,
        _dit_dtype(options, device),
        speed.fp8,
        speed.attn_mode,
        speed.split_attn,
        compute_device=device,
        changes=changes,
    )
    if loras and beside:
        LoraHooks(model).use(loras, lora.exclude_single_blocks)
    return model


def _dit_dtype(options: GenerationOptions, device: torch.device) -> torch.dtype:
    return default_dtype(options.dit.dit_dtype, device, on_gpu="bfloat16")


def save_merged_model(options: GenerationOptions) -> None:
    """--save_merged_model: writes the DiT with the LoRAs merged, tensor by tensor, without loading a model."""
    lora, dtype = options.lora, options.dit.dit_dtype
    reports = merge_files(
        options.dit.dit,
        lora.merged(),
        lora.save_merged_model,
        dtype=None if dtype is None else DTYPES[dtype],
        fp8=options.speed.fp8,
        device=own_device(options.device.device),
        exclude_single_blocks=lora.exclude_single_blocks,
    )
    for report in reports:
        report.announce()
    print(f"written: {lora.save_merged_model}")
