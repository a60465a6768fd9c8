"""Option groups of the training scripts; names and meaning follow the reference tool (docs/options.md).

Groups of single parts (timesteps, optimizer, scheduler, metadata, upload) are declared with those parts.
"""

import importlib.util
from dataclasses import dataclass
from pathlib import Path

from hunyuan_model.attention_modes import require_attention
from utils.cli import option, unused_options
from utils.errors import UserError


@dataclass(frozen=True, kw_only=True)
class DatasetOptions:
    """dataset"""

    dataset_config: Path | None = option(None, help="dataset config (.toml or .json)", path="file")
    max_data_loader_n_workers: int = option(8, help="most processes that load caches; 0: the main process", minimum=0)
    persistent_data_loader_workers: bool = option(
        False, help="accepted: the workers of a run always live until its end"
    )


@dataclass(frozen=True, kw_only=True)
class TrainingAttentionOptions:
    """attention"""

    sdpa: bool = option(False, help="PyTorch's attention (default)")
    flash_attn: bool = option(False, help="FlashAttention, needs the package flash-attn")
    flash3: bool = option(False, help="FlashAttention 3, needs its package")
    sage_attn: bool = option(False, help="refused: SageAttention cannot be trained through")
    xformers: bool = option(False, help="xformers, needs the package xformers")
    split_attn: bool = option(False, help="run the items of a batch one by one, without an attention mask")

    def __post_init__(self) -> None:
        if self.sage_attn:
            raise UserError("--sage_attn: SageAttention has no backward pass; train with --sdpa or --flash_attn")
        if len(self._chosen()) > 1:
            raise UserError(f"{' and '.join(f'--{name}' for name in self._chosen())}: choose one attention backend")
        require_attention(self.mode)

    def _chosen(self) -> list[str]:
        return [name for name in ("sdpa", "flash_attn", "flash3", "xformers") if getattr(self, name)]

    @property
    def mode(self) -> str:
        """The backend's name for `hunyuan_model.attention.attention_backend`."""
        chosen = next(iter(self._chosen()), "torch")
        return "flash" if chosen == "flash_attn" else chosen


@dataclass(frozen=True, kw_only=True)
class TrainingOptions:
    """training"""

    max_train_steps: int = option(1600, help="optimizer steps", minimum=1)
    max_train_epochs: int | None = option(None, help="epochs; wins over --max_train_steps", minimum=1)
    seed: int | None = option(
        None, help="seed of data order, noise, timesteps and dropout; random if unset", minimum=0, maximum=2**63 - 1
    )
    gradient_accumulation_steps: int = option(1, help="batches of each process in one optimizer step", minimum=1)
    gradient_checkpointing: bool = option(False, help="recompute activations in the backward pass to save memory")
    gradient_checkpointing_cpu_offload: bool = option(
        False, help="keep what gradient checkpointing keeps in host memory"
    )
    selective_checkpointing: bool = option(
        False, help="recompute all but large matrix products and attention: faster, and saves less memory"
    )
    mixed_precision: str | None = option(
        None, help="autocast dtype; what accelerate launch was given if unset", choices=("no", "fp16", "bf16")
    )
    guidance_scale: float = option(1.0, help="embedded guidance in the unit of --embedded_cfg_scale", minimum=0)
    max_grad_norm: float = option(1.0, help="gradients are scaled down to this norm; 0: never", minimum=0)
    max_nonfinite_steps: int = option(
        5, help="stop after so many steps in a row with a loss or gradient that is not finite", minimum=1
    )
    cuda_allow_tf32: bool = option(False, help="allow TF32 matrix products on Ampere GPUs and later")
    cuda_cudnn_benchmark: bool = option(False, help="let cuDNN measure and choose its algorithms")
    dry_run: bool = option(False, help="print the settings, the step arithmetic and the plan, and end")

    def __post_init__(self) -> None:
        if self.gradient_checkpointing_cpu_offload and not self.gradient_checkpointing:
            raise UserError("--gradient_checkpointing_cpu_offload needs --gradient_checkpointing")
        if self.selective_checkpointing and self.gradient_checkpointing:
            raise UserError("--selective_checkpointing and --gradient_checkpointing exclude each other; give one")

    @property
    def checkpointing_policy(self) -> str | None:
        """What `modules.blocks.activation_checkpointing` does, None for nothing."""
        if self.selective_checkpointing:
            return "selective"
        if self.gradient_checkpointing:
            return "offload" if self.gradient_checkpointing_cpu_offload else "full"
        return None


@dataclass(frozen=True, kw_only=True)
class TrainingMemoryOptions:
    """memory of the frozen model"""

    fp8_base: bool = option(False, help="keep the Linear weights of the blocks as float8, with one scale per channel")
    block_swap_h2d_only: bool = option(
        False, help="accepted: frozen blocks are always copied to the GPU only, never back"
    )
    block_swap_ring_size: int = option(2, help="blocks that have a place on the GPU while swapping", minimum=1)
    vram_gb: float | None = option(
        None,
        help="choose --fp8_base, checkpointing and --blocks_to_swap so that training fits so many GiB; 0: what is free",
        minimum=0,
    )


@dataclass(frozen=True, kw_only=True)
class DistributedOptions:
    """several processes"""

    ddp_timeout: int = option(
        24 * 60, help="minutes until a silent process ends the run; the others wait for previews and uploads", minimum=1
    )
    ddp_gradient_as_bucket_view: bool = option(
        False, help="accepted: gradients are averaged once per step, in one buffer"
    )
    ddp_static_graph: bool = option(False, help="accepted: nothing depends on the graph being static")


@dataclass(frozen=True, kw_only=True)
class NetworkOptions:
    """network"""

    network_module: str | None = option(None, help="networks.lora, networks.loha, networks.lokr, lycoris.kohya, ...")
    network_dim: int | None = option(None, help="rank; 4 if unset", minimum=1)
    network_alpha: float = option(1.0, help="the weights are scaled by alpha / rank; 0: rank", minimum=0)
    network_dropout: float | None = option(
        None, help="probability with which a neuron is dropped", minimum=0, maximum=1
    )
    network_args: list[str] = option([], help="key=value arguments of the network module")
    network_weights: Path | None = option(None, help="continue from the weights of this LoRA", path="file")
    dim_from_weights: bool = option(False, help="take rank and alpha from --network_weights")
    scale_weight_norms: float | None = option(None, help="largest norm of a module's weight change", minimum=0)
    base_weights: list[Path] = option([], help="LoRAs that are merged into the model before training", path="file")
    base_weights_multiplier: list[float] = option([], help="multiplier of each --base_weights; 1 if unset")

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
        given, files = len(self.base_weights_multiplier), len(self.base_weights)
        if given not in (0, 1, files) or given > files:
            raise UserError(f"--base_weights_multiplier: {given} values for {files} --base_weights; give one for each")
        for pair in self.network_args:
            key, separator, _ = pair.partition("=")
            if not separator or not key.isidentifier():
                raise UserError(f"--network_args {pair}: expected key=value, for example rank_dropout=0.1")

    @property
    def arguments(self) -> dict[str, str]:
        """`network_args` by key; the values stay text, the network module converts them."""
        return {key: value for key, _, value in (pair.partition("=") for pair in self.network_args)}

    @property
    def base_multipliers(self) -> list[float]:
        """One multiplier per file of `base_weights`."""
        given = self.base_weights_multiplier or [1.0]
        return given if len(given) == len(self.base_weights) else given * len(self.base_weights)


@dataclass(frozen=True, kw_only=True)
class SaveOptions:
    """saving and resuming"""

    output_dir: Path | None = option(None, help="folder for checkpoints, states, previews and train_log.jsonl")
    output_name: str | None = option(None, help="first part of every checkpoint's name")
    save_every_n_epochs: int | None = option(None, help="save a checkpoint every N epochs", minimum=1)
    save_every_n_steps: int | None = option(None, help="save a checkpoint every N steps", minimum=1)
    save_last_n_epochs: int | None = option(None, help="keep the last N checkpoints of epochs", minimum=1)
    save_last_n_epochs_state: int | None = option(None, help="the same for states", minimum=1)
    save_last_n_steps: int | None = option(None, help="remove checkpoints of steps that are N steps old", minimum=1)
    save_last_n_steps_state: int | None = option(None, help="the same for states", minimum=1)
    save_state: bool = option(False, help="save the state to resume from with every checkpoint")
    save_state_on_train_end: bool = option(False, help="save the state at the end")
    save_precision: str | None = option(
        None, help="dtype of saved checkpoints; float32 if unset", choices=("float", "fp32", "fp16", "bf16")
    )
    save_format: list[str] = option(
        ["default"], help="LoRA file layouts to write: default, other (ComfyUI), diffusers, ..."
    )
    resume: str | None = option(None, help="state folder to continue from, or auto: the newest of this output name")

    def __post_init__(self) -> None:
        if self.output_name is not None and Path(self.output_name).name != self.output_name:
            raise UserError(f"--output_name {self.output_name}: a file name without folders is expected")
        for folder in (self.output_dir, *self.output_dir.parents) if self.output_dir is not None else ():
            if folder.is_file():
                raise UserError(f"--output_dir {self.output_dir}: {folder} is a file, a folder is expected")

    def ignored(self) -> list[str]:
        """The options that were changed but have no effect."""
        used = {}
        for unit, every in (("epochs", self.save_every_n_epochs), ("steps", self.save_every_n_steps)):
            used[f"save_last_n_{unit}"] = every is not None
            used[f"save_last_n_{unit}_state"] = every is not None and self.save_state
        return unused_options(self, used)


@dataclass(frozen=True, kw_only=True)
class LogOptions:
    """logs"""

    logging_dir: Path | None = option(None, help="TensorBoard logs go below this folder")
    log_with: str | None = option(
        None, help="tensorboard if only --logging_dir is given", choices=("tensorboard", "wandb", "all")
    )
    log_prefix: str | None = option(None, help="first part of the name of the log folder")
    log_tracker_name: str | None = option(None, help="name of the tracker's project; network_train if unset")
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
class PreviewOptions:
    """previews"""

    sample_prompts: Path | None = option(None, help="prompts of the previews (.txt, .toml or .json)", path="file")
    sample_every_n_steps: int | None = option(None, help="previews every N steps", minimum=1)
    sample_every_n_epochs: int | None = option(None, help="previews every N epochs; wins over steps", minimum=1)
    sample_at_first: bool = option(False, help="previews before the first step")

    def __post_init__(self) -> None:
        wanted = self.sample_every_n_steps or self.sample_every_n_epochs or self.sample_at_first
        if wanted and self.sample_prompts is None:
            raise UserError("--sample_every_n_steps, --sample_every_n_epochs, --sample_at_first: need --sample_prompts")
        if self.sample_prompts is not None and not wanted:
            raise UserError(
                "--sample_prompts: needs --sample_every_n_steps, --sample_every_n_epochs, --sample_at_first"
            )


@dataclass(frozen=True, kw_only=True)
class ValidationOptions:
    """validation"""

    validation_split: float = option(
        0.0, help="share of the sources that is held out, beside any [[validation]] set", minimum=0, maximum=0.9
    )
    validate_every_n_steps: int | None = option(None, help="validate every N steps; every epoch if unset", minimum=1)
    keep_best: int = option(0, help="keep the checkpoints of the N best validation losses", minimum=0)
