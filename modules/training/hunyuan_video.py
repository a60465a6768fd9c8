"""What every training script does with the caches and models of HunyuanVideo, whatever it trains."""

import functools
import sys
from collections.abc import Callable, Sequence

import torch
from accelerate import Accelerator
from torch import Tensor

from dataset.config_utils import load_dataset_config
from dataset.image_video_dataset import TrainingDataset, cached_items
from hunyuan_model import attention, checkpoints
from hunyuan_model.checkpoints.identification import CLIP, LLM, VAE, identify
from hunyuan_model.models import HunyuanVideoConfig, HYVideoDiffusionTransformer
from hunyuan_model.vae import SCALING_FACTOR
from modules.generation.requests import Request
from modules.training.denoiser import TrainingModel, check_input_channels
from modules.training.hunyuan_options import HunyuanTrainerOptions
from modules.training.optimizers import optimizer_class
from modules.training.previews import Decode, Previewer, encode_prompts
from modules.training.schedulers import scheduler_class
from modules.training.setup import Run
from utils.device_utils import DTYPES, default_dtype
from utils.errors import UserError
from utils.processes import process_share


def check_choices(options: HunyuanTrainerOptions) -> None:
    """What is chosen by name exists, and the files of previews are what their options say, by headers.

    Raises:
        UserError: one is not.
    """
    optimizer_class(options.optimizer)
    scheduler_class(options.scheduler)
    attention.attention_backend(options.attention.mode)
    if options.previews.sample_prompts is not None:
        identify(options.vae.vae).tensors(VAE)
        identify(options.text.text_encoder1).tensors(LLM)
        identify(options.text.text_encoder2).tensors(CLIP)


def load_datasets(options: HunyuanTrainerOptions, seed: int) -> tuple[TrainingDataset, TrainingDataset | None]:
    """The training set, and the validation set if one is asked for.

    Raises:
        UserError: either is empty, or lacks caches.
    """
    config = load_dataset_config(options.dataset.dataset_config)
    split = options.validation.validation_split
    is_first = process_share()[0] == 0
    items_of = functools.cache(functools.partial(cached_items, show_progress=is_first))
    train_set = TrainingDataset(config, seed, subset="train", validation_split=split, items_of=items_of)
    for note in (*config.notes, *train_set.notes) if is_first else ():
        print(f"note: {note}", file=sys.stderr)
    if not split and not config.validation:
        return train_set, None
    validation_set = TrainingDataset(config, seed, subset="validation", validation_split=split, items_of=items_of)
    if not len(validation_set):
        raise UserError(
            f"{config.path}: nothing is held out for validation (--validation_split {split:g}), for a source is never "
            "cut in two; give more sources, or a [[validation]] set with items"
        )
    return train_set, validation_set


def read_dit_config(options: HunyuanTrainerOptions, run: Run) -> HunyuanVideoConfig:
    """The sizes of the DiT, which fit the caches.

    Raises:
        UserError: not a HunyuanVideo DiT, or caches of other models.
    """
    config = checkpoints.read_dit_config(options.dit.dit)
    channels, batch = options.dit.dit_in_channels, run.train_set[0]
    if channels is not None and channels != config.in_channels:
        raise UserError(f"--dit_in_channels {channels}: {options.dit.dit} has {config.in_channels}")
    previews = options.previews.sample_prompts is not None
    check_input_channels(options.dit.dit, config.in_channels, batch.latents.shape[1], previews)
    dims = (batch.text_states.shape[-1], batch.text_states_2.shape[-1])
    if dims != (config.text_dim, config.text_dim_2):
        raise UserError(
            f"{options.dataset.dataset_config}: text caches have {dims[0]} and {dims[1]} channels, {options.dit.dit} "
            f"takes {config.text_dim} and {config.text_dim_2}; run cache_text_encoder_outputs.py with its encoders"
        )
    return config


def verify_attention(options: HunyuanTrainerOptions, accelerator: Accelerator, weights: torch.dtype) -> None:
    """Tries the attention in the dtype that training computes in: that of autocast, else that of the weights.

    Raises:
        UserError: it does not run with this device and dtype, or is wrong.
    """
    computed = DTYPES.get(accelerator.mixed_precision, weights)
    head_dim = checkpoints.read_dit_config(options.dit.dit).head_dim
    attention.verify_attention(options.attention.mode, accelerator.device, computed, head_dim)


def training_model(
    options: HunyuanTrainerOptions, dit: HYVideoDiffusionTransformer, accelerator: Accelerator
) -> TrainingModel:
    """The DiT with what its call needs besides a batch."""
    guidance, split = options.training.guidance_scale, options.attention.split_attn
    return TrainingModel(dit, SCALING_FACTOR, guidance, accelerator.device, split)


def create_previewer(
    options: HunyuanTrainerOptions, requests: Sequence[Request], run: Run
) -> Callable[[HYVideoDiffusionTransformer], Previewer | None]:
    """Encodes the prompts; the text encoders are gone before the DiT is loaded, which completes the previewer."""
    accelerator = run.accelerator
    if not requests:
        return lambda dit: None
    text, device = options.text, accelerator.device
    dtype = default_dtype(text.text_encoder_dtype, device)
    prompts = encode_prompts(
        requests if accelerator.is_main_process else [],
        lambda: checkpoints.load_text_encoder_1(text.text_encoder1, device, dtype, text.fp8_llm, text.tokenizer1),
        lambda: checkpoints.load_text_encoder_2(text.text_encoder2, device, dtype, text.tokenizer2),
        device,
    )
    decode = load_decoder(options, accelerator) if accelerator.is_main_process else None
    return lambda dit: Previewer(dit, prompts, decode, options.files, accelerator, run.progress.seed)


def load_decoder(options: HunyuanTrainerOptions, accelerator: Accelerator) -> Decode:
    """The VAE's decoder; the VAE is on the GPU only while it decodes."""
    dtype = default_dtype(options.vae.vae_dtype, accelerator.device)
    vae = checkpoints.load_vae(options.vae.vae, "cpu", dtype)
    vae.configure_memory(options.vae.vae_chunk_size, options.vae.tile_size)

    def decode(latents: Tensor) -> Tensor:
        vae.to(accelerator.device)
        try:
            pixels = vae.decode((latents / SCALING_FACTOR).to(accelerator.device, dtype)).cpu()
            return pixels[0].float().div_(2).add_(0.5).clamp_(0, 1)
        finally:
            vae.to("cpu")

    return decode
