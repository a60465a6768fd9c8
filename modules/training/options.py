"""The options of hv_train_network.py and hv_train.py; their names follow the reference tool (docs/options.md).

A group `Lora...` adds to the group that both scripts share what only LoRA training has; a group `Full...` has what only
full fine-tuning has. Options of optimizer, scheduler, timesteps and metadata are declared with the code that uses them.
Importing this module does not import torch.
"""

import dataclasses
import importlib.util
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Self

from modules.generation.requests import PREVIEW_DEFAULTS, Request, read_prompt_file, with_valid_size
from modules.options import (
    AttentionOptions,
    BlockSwapOptions,
    CheckpointingOptions,
    CompileOptions,
    DitOptions,
    FullDitOptions,
    FullSwapOptions,
    LoraAttentionOptions,
    LoraCheckpointingOptions,
    TextEncoderOptions,
    VaeOptions,
    require,
)
from modules.training.files import (
    HuggingFaceOptions,
    LoraSaveOptions,
    SaveOptions,
    TrainingFiles,
    download_state,
    find_state,
)
from modules.training.optimizers import OptimizerOptions
from modules.training.schedulers import SchedulerOptions
from modules.training.timesteps import LoraTimestepOptions, TimestepOptions
from networks.files.metadata import LoraMetadataOptions, MetadataOptions
from utils.cli import one_value_each, option, parse_options, settings_toml, unused_options
from utils.errors import UserError
from utils.processes import process_share

AUTOCAST = ("no", "fp16", "bf16")


@dataclass(frozen=True, kw_only=True)
class DatasetOptions:
    """dataset"""

    dataset_config: Path | None = option(None, help="dataset config (.toml or .json)", path="file")
    max_data_loader_n_workers: int = option(
        8, help="largest number of processes that load caches; 0: load in the main process", minimum=0
    )
    persistent_data_loader_workers: bool = option(False, help="accepted, without effect: workers always persist")


@dataclass(frozen=True, kw_only=True)
class TrainingOptions:
    """training"""

    max_train_steps: int = option(1600, help="optimizer steps", minimum=1)
    max_train_epochs: int | None = option(None, help="epochs; replaces --max_train_steps", minimum=1)
    seed: int | None = option(
        None, help="seed of data order, noise, timesteps and dropout; random if unset", minimum=0, maximum=2**63 - 1
    )
    gradient_accumulation_steps: int = option(1, help="batches per process in one optimizer step", minimum=1)
    guidance_scale: float = option(1.0, help="embedded guidance, on the scale of --embedded_cfg_scale", minimum=0)
    max_grad_norm: float = option(1.0, help="clip the gradient to this norm; 0: never", minimum=0)
    max_nonfinite_steps: int = option(
        5, help="stop after this many consecutive steps whose loss or gradient is not finite", minimum=1
    )
    dry_run: bool = option(False, help="print the plan of steps and memory and all settings, then stop")


@dataclass(frozen=True, kw_only=True)
class LoraPrecisionOptions:
    """precision"""

    mixed_precision: str | None = option(
        None, help="autocast dtype; unset: that of accelerate launch", choices=AUTOCAST
    )
    cuda_allow_tf32: bool = option(False, help="allow TF32 matrix products on Ampere GPUs and later")
    cuda_cudnn_benchmark: bool = option(False, help="let cuDNN measure and choose its algorithms")


@dataclass(frozen=True, kw_only=True)
class FullPrecisionOptions:
    """precision"""

    cuda_allow_tf32 = cuda_cudnn_benchmark = False  # not options of full fine-tuning

    mixed_precision: str = option("no", help="autocast dtype", choices=AUTOCAST)


@dataclass(frozen=True, kw_only=True)
class LoraMemoryOptions:
    """memory of the frozen model"""

    fp8_base: bool = option(False, help="keep the Linear weights of the blocks as float8, with one scale per channel")
    block_swap_h2d_only: bool = option(
        False, help="accepted, without effect: frozen blocks are only ever copied to the GPU, never back"
    )
    block_swap_ring_size: int = option(2, help="number of swapped blocks that the GPU holds at a time", minimum=1)
    vram_gb: float | None = option(
        None,
        help="choose --fp8_base, checkpointing and --blocks_to_swap so that training fits into this many GiB; "
        "0: into the free memory",
        minimum=0,
    )


@dataclass(frozen=True, kw_only=True)
class FineTuningOptions:
    """full fine-tuning"""

    trainable_modules: list[str] = option(
        ["."], help="train the parameters whose names contain one of these, e.g. single_blocks.; a dot means all"
    )
    full_fp16: bool = option(False, help="keep weights, gradients and optimizer states in float16")
    full_bf16: bool = option(False, help="keep weights, gradients and optimizer states in bfloat16")

    def __post_init__(self) -> None:
        if self.full_fp16 and self.full_bf16:
            raise UserError("--full_fp16 and --full_bf16 exclude each other; give one")
        if not self.trainable_modules:
            raise UserError("--trainable_modules: parts of names are expected, or a dot for all")

    @property
    def trained_dtype(self) -> str:
        return "float16" if self.full_fp16 else "bfloat16" if self.full_bf16 else "float32"


@dataclass(frozen=True, kw_only=True)
class NetworkOptions:
    """network"""

    network_module: str | None = option(None, help="networks.lora, networks.loha, networks.lokr, lycoris.kohya, ...")
    network_dim: int | None = option(None, help="rank; unset: 4", minimum=1)
    network_alpha: float = option(1.0, help="the weight change is scaled by alpha / rank; 0: alpha = rank", minimum=0)
    network_dropout: float | None = option(
        None, help="dropout between the factors of the weight change", minimum=0, maximum=1
    )
    network_args: list[str] = option([], help="key=value arguments of the network module")
    network_weights: Path | None = option(None, help="start from the weights of this LoRA file", path="file")
    dim_from_weights: bool = option(False, help="take rank and alpha from --network_weights")
    scale_weight_norms: float | None = option(None, help="scale weight changes down to this norm; 0: off", minimum=0)
    base_weights: list[Path] = option([], help="LoRA files to merge into the model before training", path="file")
    base_weights_multiplier: list[float] = option([], help="multiplier of each --base_weights; unset: 1")

    def __post_init__(self) -> None:
        if self.dim_from_weights and self.network_weights is None:
            raise UserError("--dim_from_weights needs --network_weights, the file to read the rank from")
        if self.dim_from_weights and self.network_dim is not None:
            raise UserError("--dim_from_weights and --network_dim contradict each other; give one of them")
        for name in ("network_args", "network_dropout") if self.dim_from_weights else ():
            if getattr(self, name):
                raise UserError(
                    f"--dim_from_weights: takes no --{name}; give --network_dim and --network_alpha instead"
                )
        self.base_multipliers()  # checks their number
        if self.base_weights_multiplier and not self.base_weights:
            raise UserError("--base_weights_multiplier needs --base_weights")
        for pair in self.network_args:
            key, separator, _ = pair.partition("=")
            if not separator or not key.isidentifier():
                raise UserError(f"--network_args {pair}: expected key=value, for example rank_dropout=0.1")

    @property
    def arguments(self) -> dict[str, str]:
        """`network_args` by key; the values stay text, the network module converts them."""
        return {key: value for key, _, value in (pair.partition("=") for pair in self.network_args)}

    def base_multipliers(self) -> list[float]:
        """One multiplier per file of `base_weights`.

        Raises:
            UserError: their number does not fit.
        """
        files = len(self.base_weights)
        return one_value_each("--base_weights_multiplier", self.base_weights_multiplier, files, "--base_weights")


@dataclass(frozen=True, kw_only=True)
class PreviewOptions:
    """previews"""

    sample_prompts: Path | None = option(None, help="prompts of the previews (.txt, .toml or .json)", path="file")
    sample_every_n_steps: int | None = option(None, help="make previews every N steps", minimum=1)
    sample_every_n_epochs: int | None = option(None, help="make previews every N epochs instead", minimum=1)
    sample_at_first: bool = option(False, help="make previews before the first step")

    def __post_init__(self) -> None:
        times = "--sample_every_n_steps, --sample_every_n_epochs, --sample_at_first"
        wanted = self.sample_every_n_steps or self.sample_every_n_epochs or self.sample_at_first
        if wanted and self.sample_prompts is None:
            raise UserError(f"{times}: need --sample_prompts")
        if self.sample_prompts is not None and not wanted:
            raise UserError(f"--sample_prompts: needs one of {times}")

    def requests(self) -> list[Request]:
        """The prompts of --sample_prompts, with sizes that the model has.

        Raises:
            UserError: the file is wrong, or asks for what previews cannot do.
        """
        path, requests = self.sample_prompts, []
        for number, asked in enumerate(read_prompt_file(path, PREVIEW_DEFAULTS) if path is not None else [], start=1):
            if asked.image_path is not None or asked.video_path is not None:
                raise UserError(f"{path}: prompt {number}: previews cannot start from an image or video; take it out")
            request, warnings = with_valid_size(asked)
            for warning in warnings if process_share()[0] == 0 else []:
                print(f"warning: {path}: prompt {number}: {warning}", file=sys.stderr)
            requests.append(request)
        return requests


@dataclass(frozen=True, kw_only=True)
class ValidationOptions:
    """validation"""

    validation_split: float = option(
        0.0, help="share of the sources to hold out, in addition to any [[validation]] set", minimum=0, maximum=0.9
    )
    validate_every_n_steps: int | None = option(None, help="validate every N steps; unset: every epoch", minimum=1)
    keep_best: int = option(0, help="keep the checkpoints with the N lowest validation losses", minimum=0)


@dataclass(frozen=True, kw_only=True)
class LogOptions:
    """logs"""

    logging_dir: Path | None = option(None, help="folder for TensorBoard logs")
    log_with: str | None = option(
        None, help="tracker; unset: tensorboard with --logging_dir, else none", choices=("tensorboard", "wandb", "all")
    )
    log_prefix: str | None = option(None, help="first part of the name of the log folder")
    log_tracker_name: str | None = option(None, help="project name in the tracker; unset: network_train")
    wandb_run_name: str | None = option(None, help="name of the wandb run")
    log_tracker_config: Path | None = option(None, help="TOML file with arguments of the trackers", path="file")
    wandb_api_key: str | None = option(
        None, help="wandb key; better: the environment variable WANDB_API_KEY", secret=True
    )
    log_config: bool = option(False, help="log the settings to the trackers")

    def __post_init__(self) -> None:
        if self.log_with in ("tensorboard", "all") and self.logging_dir is None:
            raise UserError(f"--log_with {self.log_with} needs --logging_dir")
        for name in self.trackers:
            if importlib.util.find_spec(name) is None:
                option = f"--log_with {name}" if self.log_with else "--logging_dir"
                raise UserError(f"{option}: the package {name} is not installed; pip install {name}")

    @property
    def trackers(self) -> list[str]:
        """Names of accelerate's trackers."""
        if self.log_with is None:
            return ["tensorboard"] if self.logging_dir is not None else []
        return ["tensorboard", "wandb"] if self.log_with == "all" else [self.log_with]


@dataclass(frozen=True, kw_only=True)
class DistributedOptions:
    """several processes"""

    ddp_timeout: int = option(
        24 * 60,
        help="minutes after which a process that does not answer ends the run; all wait while one makes previews",
        minimum=1,
    )
    ddp_gradient_as_bucket_view: bool = option(
        False, help="accepted, without effect: gradients are averaged once per step, in one buffer"
    )
    ddp_static_graph: bool = option(False, help="accepted, without effect: the graph need not be static")


@dataclass(frozen=True)
class TrainerOptions:
    """The groups that every training script has; a script adds its own groups in a subclass."""

    script: ClassVar[str]
    dataset: DatasetOptions
    training: TrainingOptions
    checkpointing: CheckpointingOptions
    precision: LoraPrecisionOptions | FullPrecisionOptions
    optimizer: OptimizerOptions
    scheduler: SchedulerOptions
    timesteps: TimestepOptions
    save: SaveOptions
    validation: ValidationOptions
    previews: PreviewOptions
    metadata: MetadataOptions
    hub: HuggingFaceOptions
    log: LogOptions
    distributed: DistributedOptions
    dit: DitOptions
    attention: AttentionOptions
    swap: BlockSwapOptions
    vae: VaeOptions
    text: TextEncoderOptions

    @classmethod
    def parse(cls, description: str, argv: Sequence[str] | None = None) -> Self:
        return cls(*parse_options(description, *[group.type for group in dataclasses.fields(cls)], argv=argv))

    def check(self) -> None:
        """Checks that required options are given, also those that other options require.

        Raises:
            UserError: an option is missing.
        """
        require(self.dit, "dit")
        require(self.dataset, "dataset_config")
        require(self.save, "output_dir", "output_name")
        if self.previews.sample_prompts is not None:
            require(self.text, "text_encoder1", "text_encoder2")
            require(self.vae, "vae")

    @property
    def files(self) -> TrainingFiles:
        return TrainingFiles(self.save.output_dir, self.save.output_name)

    def find_state(self) -> Path | None:
        """The state folder of --resume, downloaded first with --resume_from_huggingface."""
        if not self.hub.resume_from_huggingface:
            return find_state(self.save.resume, self.files)
        if self.save.resume is None:
            raise UserError("--resume_from_huggingface needs --resume user/name/folder")
        return find_state(str(download_state(self.save.resume, self.hub)), self.files)

    def ignored(self, validates: bool) -> list[str]:
        """Names of the options that were changed but have no effect; `validates`: there is a validation set."""
        return [
            *self.timesteps.ignored(),
            *self.optimizer.ignored(),
            *self.scheduler.ignored(self.optimizer.adapts_own_rate),
            *self.save.ignored(),
            *unused_options(self.validation, {"validate_every_n_steps": validates, "keep_best": validates}),
        ]

    def settings(self, seed: int) -> str:
        """All options as TOML for --config_file, with the seed of the run; without secrets and --resume."""
        training, save = dataclasses.replace(self.training, seed=seed), dataclasses.replace(self.save, resume=None)
        hub = dataclasses.replace(self.hub, resume_from_huggingface=False)
        return settings_toml(*vars(dataclasses.replace(self, training=training, save=save, hub=hub)).values())


@dataclass(frozen=True)
class LoraTrainerOptions(TrainerOptions):
    """Every option of hv_train_network.py."""

    script = "hv_train_network.py"
    checkpointing: LoraCheckpointingOptions
    precision: LoraPrecisionOptions
    timesteps: LoraTimestepOptions
    save: LoraSaveOptions
    metadata: LoraMetadataOptions
    attention: LoraAttentionOptions
    network: NetworkOptions
    memory: LoraMemoryOptions
    compile: CompileOptions

    def check(self) -> None:
        super().check()
        require(self.network, "network_module")

    def ignored(self, validates: bool) -> list[str]:
        compiled, swapped = self.compile.compile, bool(self.swap.blocks_to_swap)
        details = [field.name for field in dataclasses.fields(self.compile) if field.name != "compile"]
        return [
            *super().ignored(validates),
            *unused_options(self.compile, dict.fromkeys(details, compiled)),
            *unused_options(self.swap, {"use_pinned_memory_for_block_swap": swapped}),
            *unused_options(self.memory, {"block_swap_ring_size": swapped}),
        ]


@dataclass(frozen=True)
class FullTrainerOptions(TrainerOptions):
    """Every option of hv_train.py."""

    script = "hv_train.py"
    precision: FullPrecisionOptions
    dit: FullDitOptions
    swap: FullSwapOptions
    tuning: FineTuningOptions

    @property
    def saved_dtype(self) -> str:
        """Of saved checkpoints and of frozen weights."""
        return self.dit.dit_dtype or self.tuning.trained_dtype
