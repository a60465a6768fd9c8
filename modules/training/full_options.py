"""The options of full fine-tuning: its own, and those of LoRA training without what it does not have.

A field that is declared again without `option` is no longer an option; training reads the value that it has here.
Importing this module does not import torch.
"""

from dataclasses import dataclass

from modules.options import BlockSwapOptions, DitOptions
from modules.training.timesteps import TimestepOptions
from modules.training.training_options import SaveOptions, TrainingAttentionOptions, TrainingOptions
from networks.files.metadata import ARCHITECTURE, MetadataOptions
from utils.cli import option
from utils.dtype_names import DTYPE_NAMES
from utils.errors import UserError

SAVE_MEMORY = "give --gradient_checkpointing, --full_bf16, --optimizer_type adafactor or fewer --trainable_modules"


@dataclass(frozen=True, kw_only=True)
class FineTuningOptions:
    """full fine-tuning"""

    trainable_modules: list[str] = option(
        ["."], help="train the parameters whose names contain one of these, e.g. single_blocks.; a dot means all"
    )
    full_fp16: bool = option(False, help="keep weights, gradients and the optimizer's states as float16")
    full_bf16: bool = option(False, help="keep weights, gradients and the optimizer's states as bfloat16")

    def __post_init__(self) -> None:
        if self.full_fp16 and self.full_bf16:
            raise UserError("--full_fp16 and --full_bf16 exclude each other; give one")
        if not self.trainable_modules:
            raise UserError("--trainable_modules: parts of names are expected, or a dot for all")

    @property
    def dtype(self) -> str:
        """Of the trained weights."""
        return "float16" if self.full_fp16 else "bfloat16" if self.full_bf16 else "float32"


@dataclass(frozen=True, kw_only=True)
class FullDitOptions(DitOptions):
    """DiT"""

    dit_dtype: str | None = option(
        None,
        help="dtype of saved checkpoints and of what is not trained; that of the trained weights if unset",
        choices=DTYPE_NAMES,
    )


@dataclass(frozen=True, kw_only=True)
class FullTrainingOptions(TrainingOptions):
    """training"""

    mixed_precision: str = option("no", help="autocast dtype", choices=("no", "fp16", "bf16"))
    gradient_checkpointing_cpu_offload: bool = False
    cuda_allow_tf32: bool = False
    cuda_cudnn_benchmark: bool = False


@dataclass(frozen=True, kw_only=True)
class FullAttentionOptions(TrainingAttentionOptions):
    """attention"""

    flash3: bool = False


@dataclass(frozen=True, kw_only=True)
class FullSwapOptions(BlockSwapOptions):
    """block swap"""

    blocks_to_swap: int | None = option(None, help="refused: trained blocks cannot be swapped", minimum=0)
    use_pinned_memory_for_block_swap: bool = False

    def __post_init__(self) -> None:
        if self.blocks_to_swap:
            raise UserError(
                f"--blocks_to_swap {self.blocks_to_swap}: only frozen blocks can be swapped; leave it out, and to "
                f"save memory {SAVE_MEMORY}"
            )


@dataclass(frozen=True, kw_only=True)
class FullTimestepOptions(TimestepOptions):
    """timesteps and loss weighting"""

    timestep_sampling: str = option(
        "sigma", help="distribution of the trained timesteps", choices=("sigma", "uniform", "sigmoid", "shift")
    )
    preserve_distribution_shape: bool = False
    num_timestep_buckets: int | None = None
    show_timesteps: str | None = None


@dataclass(frozen=True, kw_only=True)
class FullSaveOptions(SaveOptions):
    """saving and resuming"""

    save_precision: str | None = None
    save_format: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class FullMetadataOptions(MetadataOptions):
    """metadata"""

    no_metadata: bool = False
    training_comment: str | None = None
    metadata_reso: str | None = None
    metadata_arch: str | None = ARCHITECTURE
