"""Option groups that several scripts share. Names and meaning follow musubi-tuner; see docs/options.md."""

from dataclasses import dataclass
from pathlib import Path

from hunyuan_model.attention_modes import require_attention
from utils.cli import option
from utils.dtype_names import DTYPE_NAMES
from utils.errors import UserError

# The values of --compile_mode.
COMPILE_MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
# The advice when full fine-tuning runs out of memory.
FINE_TUNING_ADVICE = (
    "give --gradient_checkpointing, --full_bf16, --optimizer_type adafactor or fewer --trainable_modules"
)


@dataclass(frozen=True, kw_only=True)
class DeviceOptions:
    """device"""

    device: str | None = option(None, help="device, for example cuda, cuda:1 or cpu; CUDA if available")


@dataclass(frozen=True, kw_only=True)
class VaeOptions:
    """VAE"""

    vae: Path | None = option(None, help="VAE: official pytorch_model.pt, .safetensors or diffusers folder", path="any")
    vae_dtype: str | None = option(
        None,
        help="dtype of the VAE (unset: float16 on a GPU, float32 on a CPU) and of cached latents (unset: float16)",
        choices=DTYPE_NAMES,
    )
    vae_tiling: bool = option(False, help="encode and decode in overlapping tiles to save memory")
    vae_chunk_size: int | None = option(None, help="frames that the VAE convolves at once, for example 32", minimum=1)
    vae_spatial_tile_sample_min_size: int | None = option(
        None, help="tile size in pixels; turns tiling on (--vae_tiling alone: 256)", minimum=32
    )

    @property
    def tile_size(self) -> int | None:
        """Tile size in pixels, or None without tiling."""
        return self.vae_spatial_tile_sample_min_size or (256 if self.vae_tiling else None)


@dataclass(frozen=True, kw_only=True)
class TextEncoderOptions:
    """text encoders"""

    text_encoder1: Path | None = option(
        None, help="LLaVA-Llama-3-8B language model: Hugging Face folder or one .safetensors file", path="any"
    )
    text_encoder2: Path | None = option(
        None, help="CLIP-L text model: Hugging Face folder or one .safetensors file", path="any"
    )
    tokenizer1: Path | None = option(
        None, help="tokenizer of text encoder 1 (folder or tokenizer.json) if the model is a single file", path="any"
    )
    tokenizer2: Path | None = option(
        None, help="tokenizer of text encoder 2 (folder or tokenizer.json) if the model is a single file", path="any"
    )
    text_encoder_dtype: str | None = option(
        None,
        help="dtype of the text encoders (unset: float16 on a GPU, float32 on a CPU) and of caches (unset: float16)",
        choices=DTYPE_NAMES,
    )
    fp8_llm: bool = option(False, help="keep the weights of text encoder 1 in float8, which halves their memory")


@dataclass(frozen=True, kw_only=True)
class DitOptions:
    """DiT"""

    dit: Path | None = option(
        None, help="DiT: official .pt, .safetensors (official, ComfyUI or fp8) or diffusers folder", path="any"
    )
    dit_dtype: str | None = option(
        None, help="dtype of the DiT; unset: bfloat16 on a GPU, float32 on a CPU", choices=DTYPE_NAMES
    )
    dit_in_channels: int | None = option(None, help="input channels of the DiT; must agree with the file", minimum=1)


@dataclass(frozen=True, kw_only=True)
class FullDitOptions(DitOptions):
    """DiT"""

    dit_dtype: str | None = option(
        None,
        help="dtype of saved checkpoints and of frozen weights; unset: that of the trained weights",
        choices=DTYPE_NAMES,
    )


@dataclass(frozen=True, kw_only=True)
class CompileOptions:
    """torch.compile"""

    compile: bool = option(False, help="compile every block of the DiT (needs a compiler: Triton on a GPU)")
    compile_backend: str = option("inductor", help="backend of torch.compile")
    compile_mode: str = option("default", help="mode of torch.compile", choices=COMPILE_MODES)
    compile_dynamic: str | None = option(None, help="dynamic shapes; unset: auto", choices=("true", "false", "auto"))
    compile_fullgraph: bool = option(False, help="stop with an error at a graph break")
    compile_cache_size_limit: int | None = option(None, help="compiled graphs that torch keeps per block", minimum=1)


@dataclass(frozen=True, kw_only=True)
class BlockSwapOptions:
    """block swap"""

    blocks_to_swap: int | None = option(
        None, help="number of DiT blocks that stay in main memory and are streamed to the GPU", minimum=0
    )
    use_pinned_memory_for_block_swap: bool = option(
        False,
        help="pin the memory of swapped blocks on Windows too, where pinned memory counts as GPU memory; "
        "other systems always pin it",
    )
    img_in_txt_in_offloading: bool = option(
        False, help="keep the image and text embedders in main memory between their uses"
    )


@dataclass(frozen=True, kw_only=True)
class FullSwapOptions(BlockSwapOptions):
    """block swap"""

    blocks_to_swap: int | None = option(None, help="refused: trained blocks cannot be swapped", minimum=0)
    use_pinned_memory_for_block_swap: bool = False  # hv_train.py does not have this option

    def __post_init__(self) -> None:
        if self.blocks_to_swap:
            raise UserError(
                f"--blocks_to_swap {self.blocks_to_swap}: only frozen blocks can be swapped; leave it out, and to "
                f"save memory {FINE_TUNING_ADVICE}"
            )


@dataclass(frozen=True, kw_only=True)
class AttentionOptions:
    """attention"""

    sdpa: bool = option(False, help="PyTorch's attention (default)")
    flash_attn: bool = option(False, help="FlashAttention, needs the package flash-attn")
    sage_attn: bool = option(False, help="refused: SageAttention has no backward pass")
    xformers: bool = option(False, help="xformers, needs the package xformers")
    split_attn: bool = option(False, help="run the items of a batch one by one, without an attention mask")

    def __post_init__(self) -> None:
        if self.sage_attn:
            raise UserError("--sage_attn: SageAttention has no backward pass; train with --sdpa or --flash_attn")
        if len(self._chosen()) > 1:
            raise UserError(f"{' and '.join(f'--{name}' for name in self._chosen())}: choose one attention backend")
        require_attention(self.mode)

    def _chosen(self) -> list[str]:
        return [name for name in ("sdpa", "flash_attn", "flash3", "xformers") if getattr(self, name, False)]

    @property
    def mode(self) -> str:
        """The backend's name for `hunyuan_model.attention.attention_backend`."""
        chosen = next(iter(self._chosen()), "torch")
        return "flash" if chosen == "flash_attn" else chosen


@dataclass(frozen=True, kw_only=True)
class LoraAttentionOptions(AttentionOptions):
    """attention"""

    flash3: bool = option(False, help="FlashAttention 3, needs its package")


@dataclass(frozen=True, kw_only=True)
class CheckpointingOptions:
    """activation checkpointing"""

    gradient_checkpointing: bool = option(False, help="recompute activations in the backward pass to save memory")
    selective_checkpointing: bool = option(
        False, help="recompute all but large matrix products and attention: faster, but saves less memory"
    )

    def __post_init__(self) -> None:
        if self.selective_checkpointing and self.gradient_checkpointing:
            raise UserError("--selective_checkpointing and --gradient_checkpointing exclude each other; give one")

    @property
    def policy(self) -> str | None:
        """The policy for `modules.blocks.activation_checkpointing`; None without checkpointing."""
        if self.selective_checkpointing:
            return "selective"
        return "full" if self.gradient_checkpointing else None


@dataclass(frozen=True, kw_only=True)
class LoraCheckpointingOptions(CheckpointingOptions):
    """activation checkpointing"""

    gradient_checkpointing_cpu_offload: bool = option(
        False, help="with --gradient_checkpointing: keep the inputs of the blocks in main memory"
    )

    def __post_init__(self) -> None:
        if self.gradient_checkpointing_cpu_offload and not self.gradient_checkpointing:
            raise UserError("--gradient_checkpointing_cpu_offload needs --gradient_checkpointing")
        super().__post_init__()

    @property
    def policy(self) -> str | None:
        return "offload" if self.gradient_checkpointing_cpu_offload else super().policy


def require(options: object, *names: str) -> None:
    """Raises a UserError that names every one of these options that has no value."""
    missing = [f"--{name}" for name in names if getattr(options, name) is None]
    if missing:
        raise UserError(f"required and not given: {', '.join(missing)}")
