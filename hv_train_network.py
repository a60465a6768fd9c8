"""Trains a LoRA (or LoHa, LoKr, ...) for HunyuanVideo from caches.

Before: cache_latents.py and cache_text_encoder_outputs.py. After: hv_generate_video.py --lora_weight, convert_lora.py.

    accelerate launch --num_cpu_threads_per_process 1 --mixed_precision bf16 hv_train_network.py \
        --dit ckpts/hunyuan-video-t2v-720p/transformers/mp_rank_00_model_states.pt --dataset_config dataset.toml \
        --sdpa --mixed_precision bf16 --fp8_base --gradient_checkpointing \
        --optimizer_type adamw8bit --learning_rate 2e-4 --max_data_loader_n_workers 2 \
        --network_module networks.lora --network_dim 32 --network_alpha 16 \
        --timestep_sampling shift --discrete_flow_shift 7.0 --max_train_epochs 16 --save_every_n_epochs 1 --seed 42 \
        --output_dir output --output_name name-of-lora
"""

import contextlib
import dataclasses
import io
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from modules.optimizers import OptimizerOptions
from modules.schedulers import SchedulerOptions
from modules.timestep_plot import show_timesteps
from modules.timestep_sampling import TimestepOptions
from utils.cli import parse_options, print_table, run_script, settings_toml
from utils.errors import UserError, did_you_mean
from utils.huggingface_utils import HuggingFaceOptions, Uploader, download_state
from utils.metadata import MetadataOptions, RunFacts, checkpoint_metadata
from utils.option_groups import (
    BlockSwapOptions,
    CompileOptions,
    DitOptions,
    TextEncoderOptions,
    VaeOptions,
    require,
)
from utils.prompt_files import PREVIEW_DEFAULTS, Request, read_prompt_file, with_valid_size
from utils.training_files import TrainingFiles, find_state
from utils.training_options import (
    DatasetOptions,
    DistributedOptions,
    LogOptions,
    NetworkOptions,
    PreviewOptions,
    SaveOptions,
    TrainingAttentionOptions,
    TrainingMemoryOptions,
    TrainingOptions,
    ValidationOptions,
)

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator

    from dataset.image_video_dataset import TrainingDataset
    from hunyuan_model.models import HYVideoDiffusionTransformer
    from modules.network_module import TrainedNetwork
    from modules.previews import Decode, PreviewPrompt
    from modules.step_plan import StepPlan
    from modules.trainer import Trainer
    from modules.training_state import Progress


@dataclass(frozen=True)
class Options:
    """Every option of this script."""

    dit: DitOptions
    dataset: DatasetOptions
    network: NetworkOptions
    training: TrainingOptions
    optimizer: OptimizerOptions
    scheduler: SchedulerOptions
    timesteps: TimestepOptions
    attention: TrainingAttentionOptions
    memory: TrainingMemoryOptions
    swap: BlockSwapOptions
    compile: CompileOptions
    save: SaveOptions
    validation: ValidationOptions
    previews: PreviewOptions
    vae: VaeOptions
    text: TextEncoderOptions
    metadata: MetadataOptions
    hub: HuggingFaceOptions
    log: LogOptions
    distributed: DistributedOptions

    @classmethod
    def parse(cls, argv: Sequence[str] | None = None) -> "Options":
        groups = [group.type for group in dataclasses.fields(cls)]
        return cls(*parse_options(__doc__, *groups, argv=argv))

    def check(self) -> None:
        """What the options need of each other.

        Raises:
            UserError: an option is missing.
        """
        require(self.dit, "dit")
        require(self.dataset, "dataset_config")
        require(self.network, "network_module")
        require(self.save, "output_dir", "output_name")
        if self.previews.sample_prompts is not None:
            require(self.text, "text_encoder1", "text_encoder2")
            require(self.vae, "vae")

    @property
    def files(self) -> TrainingFiles:
        return TrainingFiles(self.save.output_dir, self.save.output_name)

    def preview_requests(self) -> list[Request]:
        """The prompts of `--sample_prompts`, with sizes that the model has."""
        if self.previews.sample_prompts is None:
            return []
        return [with_valid_size(r)[0] for r in read_prompt_file(self.previews.sample_prompts, PREVIEW_DEFAULTS)]

    def ignored(self) -> list[str]:
        """The options that were changed but have no effect."""
        own_rate = self.optimizer.adapts_own_rate
        return [*self.timesteps.ignored(), *self.optimizer.ignored(), *self.scheduler.ignored(own_rate)]

    def settings(self, seed: int) -> str:
        """All settings as TOML that --config_file takes, with the seed that was drawn; secrets are left out."""
        return settings_toml(*vars(self.with_seed(seed)).values())

    def with_seed(self, seed: int) -> "Options":
        return dataclasses.replace(self, training=dataclasses.replace(self.training, seed=seed))


def main(argv: Sequence[str] | None = None) -> None:
    options = Options.parse(argv)
    if options.timesteps.show_timesteps is not None:
        show_timesteps(options.timesteps, options.save.output_dir or Path())
        return
    options.check()
    state = find_resumed_state(options)
    requests = options.preview_requests()

    from modules import training_setup
    from modules.network_module import import_network_module
    from modules.trainer import train
    from modules.training_state import load_state

    check_parts(options)
    check_files(options)
    network_module = import_network_module(options.network.network_module)
    accelerator = training_setup.create_accelerator(options.training, options.log, options.distributed)
    training_setup.silence_all_but_main(accelerator)
    progress = training_setup.first_progress(accelerator, options.training, state)
    data = load_datasets(options, progress.seed)
    plan = plan_steps(options, accelerator, len(data.train))
    check_optimizer(options, plan)
    check_model(options, network_module, data)
    if accelerator.is_main_process:
        training_setup.print_plan(plan, data.train.num_items, progress)
        for name in options.ignored():
            print(f"warning: --{name} has no effect together with the other settings", file=sys.stderr)
    if options.training.dry_run:
        print(options.settings(progress.seed))
        return
    training_setup.warn_of_differences(progress, plan, data.train.num_items)

    uploader = Uploader(options.hub if accelerator.is_main_process else HuggingFaceOptions())
    prompts = encode_previews(options, requests, accelerator)
    dit = load_model(options, accelerator)
    trained = create_trained(options, network_module, dit, accelerator, progress.seed)
    trainer = build_trainer(options, accelerator, plan, progress, dit, trained, data, prompts, uploader)
    if state is not None:
        load_state(state, trained.tensors, trainer.saver.stateful)
    training_setup.start_trackers(accelerator, options.log, options.settings(progress.seed))
    with trainer.log, trainer.requests:
        train(trainer)
    uploader.close()
    accelerator.end_training()
    report(trainer)


def find_resumed_state(options: Options) -> Path | None:
    """The state that --resume means, on this machine or on the Hugging Face Hub."""
    if not options.hub.resume_from_huggingface:
        return find_state(options.save.resume, options.files)
    if options.save.resume is None:
        raise UserError("--resume_from_huggingface needs --resume user/name/folder")
    return find_state(str(download_state(options.save.resume, options.hub)), options.files)


def check_parts(options: Options) -> None:
    """Optimizer, scheduler, attention and formats exist, before a model is loaded."""
    from hunyuan_model.attention import attention_backend
    from modules.optimizers import optimizer_class
    from modules.schedulers import scheduler_class
    from networks.format_table import FORMATS

    optimizer_class(options.optimizer)
    scheduler_class(options.scheduler)
    attention_backend(options.attention.mode)
    for name in options.save.save_format:
        if name not in FORMATS:
            raise UserError(f"--save_format {name}: unknown{did_you_mean(name, list(FORMATS))}; {', '.join(FORMATS)}")


@dataclass(frozen=True)
class Datasets:
    """What is trained on, and what is held out."""

    train: "TrainingDataset"
    validation: "TrainingDataset | None"


def load_datasets(options: Options, seed: int) -> Datasets:
    from dataset.config_utils import load_dataset_config
    from dataset.image_video_dataset import TrainingDataset

    config = load_dataset_config(options.dataset.dataset_config)
    split = options.validation.validation_split
    train_set = TrainingDataset(config, seed, subset="train", validation_split=split)
    if not split and not config.validation:
        return Datasets(train_set, None)
    return Datasets(train_set, TrainingDataset(config, seed, subset="validation", validation_split=split))


def plan_steps(options: Options, accelerator: "Accelerator", batches_per_epoch: int) -> "StepPlan":
    from modules.step_plan import StepPlan

    training = options.training
    return StepPlan.create(
        batches_per_epoch,
        training.gradient_accumulation_steps,
        accelerator.num_processes,
        training.max_train_steps,
        training.max_train_epochs,
    )


def check_optimizer(options: Options, plan: "StepPlan") -> None:
    """Tries optimizer and schedule on a parameter, so that what they refuse is known before a model is loaded."""
    import torch

    from modules.optimizers import create_optimizer
    from modules.schedulers import create_scheduler

    optimizer = create_optimizer(options.optimizer, [{"params": [torch.nn.Parameter(torch.zeros(2, 2))]}])
    create_scheduler(options.scheduler, optimizer, plan.total_steps)


def check_model(options: Options, module: ModuleType, data: Datasets) -> None:
    """Reads the sizes of the DiT and tries the network on a DiT without weights.

    Raises:
        UserError: not a HunyuanVideo DiT, caches of other text encoders, or a network that does not fit.
    """
    import torch

    from hunyuan_model.block_swap import swapped_blocks
    from hunyuan_model.checkpoints import read_dit_config
    from hunyuan_model.models import HYVideoDiffusionTransformer
    from modules.network_module import create_network

    config, network = read_dit_config(options.dit.dit), options.network
    channels, batch = options.dit.dit_in_channels, data.train[0]
    if channels is not None and channels != config.in_channels:
        raise UserError(f"--dit_in_channels {channels}: {options.dit.dit} has {config.in_channels}")
    dims = (batch.text_states.shape[-1], batch.text_states_2.shape[-1])
    if dims != (config.text_dim, config.text_dim_2):
        raise UserError(
            f"{options.dataset.dataset_config}: text caches have {dims[0]} and {dims[1]} channels, {options.dit.dit} "
            f"takes {config.text_dim} and {config.text_dim_2}; run cache_text_encoder_outputs.py with its encoders"
        )
    swapped_blocks(options.swap.blocks_to_swap or 0, config.depth_double, config.depth_single, training=True)
    with torch.device("meta"), contextlib.redirect_stdout(io.StringIO()):
        dit = HYVideoDiffusionTransformer(config)
        dim, alpha, dropout = network.network_dim, network.network_alpha, network.network_dropout
        create_network(module, dit, dim, alpha, dropout, network.arguments)


def check_files(options: Options) -> None:
    """Every model and LoRA file is what its option says, by headers.

    Raises:
        UserError: one is not.
    """
    from hunyuan_model.model_files import CLIP, LLM, VAE, identify
    from networks.formats import read_lora

    if options.previews.sample_prompts is not None:
        identify(options.vae.vae).tensors(VAE)
        identify(options.text.text_encoder1).tensors(LLM)
        identify(options.text.text_encoder2).tensors(CLIP)
    for path in options.network.base_weights:
        read_lora(path)
    weights, wanted = options.network.network_weights, options.network.network_dim or 4
    if weights is not None:
        ranks = {factors.rank for factors in read_lora(weights).modules.values()}
        if not options.network.dim_from_weights and ranks != {wanted}:
            raise UserError(
                f"--network_weights {weights}: has rank {', '.join(map(str, sorted(ranks)))}, --network_dim is "
                f"{wanted}; give --dim_from_weights instead"
            )


def load_model(options: Options, accelerator: "Accelerator") -> "HYVideoDiffusionTransformer":
    """The frozen DiT with --base_weights merged; on the CPU where block swap will place it."""
    from hunyuan_model.attention import verify_attention
    from hunyuan_model.checkpoints import is_quantized_in_dit, load_dit, read_dit_config

    device = "cpu" if options.swap.blocks_to_swap else accelerator.device
    fp8 = options.memory.fp8_base
    merges = list(zip(options.network.base_weights, options.network.base_multipliers, strict=True))
    dtype = dtype_of(options.dit.dit_dtype, accelerator, on_gpu="bfloat16")
    head_dim = read_dit_config(options.dit.dit).head_dim
    verify_attention(options.attention.mode, accelerator.device, dtype, head_dim)
    dit = load_dit(options.dit.dit, device, dtype, fp8 and not merges, options.attention.mode)
    if merges:
        from networks.merging import merge_lora_into
        from utils.fp8 import quantize_linears

        merge_lora_into(dit, merges)
        if fp8:
            quantize_linears(dit, is_quantized_in_dit)
    return dit


def dtype_of(word: str | None, accelerator: "Accelerator", on_gpu: str) -> "torch.dtype":
    """A dtype by its word; unset it is float32 on a CPU and `on_gpu` elsewhere."""
    from utils.device_utils import DTYPES

    return DTYPES[word or ("float32" if accelerator.device.type == "cpu" else on_gpu)]


def create_trained(
    options: Options, module: ModuleType, dit: "HYVideoDiffusionTransformer", accelerator: "Accelerator", seed: int
) -> "TrainedNetwork":
    """The network, applied to the DiT, with what saves memory and time around the DiT's blocks."""
    import torch

    from hunyuan_model.block_swap import enable_block_swap, offload_embedders
    from modules.activation_checkpointing import checkpoint_activations
    from modules.compilation import compile_blocks
    from modules.network_module import TrainedNetwork, create_network, create_network_from_weights
    from networks.format_table import FORMATS
    from networks.formats import read_lora, to_tensors

    network = options.network
    torch.manual_seed(seed)
    if network.dim_from_weights:
        weights = to_tensors(read_lora(network.network_weights), FORMATS["default"])
        made = create_network_from_weights(module, dit, weights)
    else:
        dim, alpha, dropout = network.network_dim, network.network_alpha, network.network_dropout
        made = create_network(module, dit, dim, alpha, dropout, network.arguments)
    trained = TrainedNetwork(made, dit, accelerator.device)
    if network.network_weights is not None:
        made.load_weights(str(network.network_weights))
    if options.compile.compile:
        compile_blocks(dit.blocks, options.compile)
    if options.swap.blocks_to_swap:
        ring, pin = options.memory.block_swap_ring_size, options.swap.use_pinned_memory_for_block_swap
        enable_block_swap(dit, options.swap.blocks_to_swap, accelerator.device, ring, training=True, pin=pin or None)
    if options.swap.img_in_txt_in_offloading:
        offload_embedders(dit, accelerator.device)
    if options.training.checkpointing_policy is not None:
        checkpoint_activations(dit.blocks, options.training.checkpointing_policy, options.compile.compile)
        trained.enable_gradient_checkpointing()
    return trained


def encode_previews(options: Options, requests: Sequence[Request], accelerator: "Accelerator") -> "list[PreviewPrompt]":
    """The prompts of the previews with their embeddings; the text encoders are gone before the DiT is loaded."""
    from hunyuan_model.checkpoints import load_text_encoder_1, load_text_encoder_2
    from modules.previews import encode_prompts

    if not requests or not accelerator.is_main_process:
        return []
    text, device = options.text, accelerator.device
    dtype = dtype_of(text.text_encoder_dtype, accelerator, on_gpu="float16")
    return encode_prompts(
        requests,
        lambda: load_text_encoder_1(text.text_encoder1, device, dtype, text.fp8_llm, text.tokenizer1),
        lambda: load_text_encoder_2(text.text_encoder2, device, dtype, text.tokenizer2),
        device,
    )


def load_decoder(options: Options, accelerator: "Accelerator") -> "Decode":
    """The VAE's decoder; the VAE is on the GPU only while it decodes."""
    from hunyuan_model.checkpoints import load_vae
    from hunyuan_model.vae import SCALING_FACTOR

    dtype = dtype_of(options.vae.vae_dtype, accelerator, on_gpu="float16")
    vae = load_vae(options.vae.vae, "cpu", dtype)
    vae.configure_memory(options.vae.vae_chunk_size, options.vae.tile_size)

    def decode(latents: "torch.Tensor") -> "torch.Tensor":
        vae.to(accelerator.device)
        try:
            pixels = vae.decode((latents / SCALING_FACTOR).to(accelerator.device, dtype))
            return (pixels[0].float() / 2 + 0.5).clamp(0, 1).cpu()
        finally:
            vae.to("cpu")

    return decode


def build_trainer(
    options: Options,
    accelerator: "Accelerator",
    plan: "StepPlan",
    progress: "Progress",
    dit: "HYVideoDiffusionTransformer",
    trained: "TrainedNetwork",
    data: Datasets,
    prompts: "Sequence[PreviewPrompt]",
    uploader: Uploader,
) -> "Trainer":
    from hunyuan_model.vae import SCALING_FACTOR
    from modules.checkpoint_saver import CheckpointSaver
    from modules.optimizers import create_optimizer
    from modules.previews import Previewer
    from modules.schedulers import create_scheduler
    from modules.step_plan import batch_loader
    from modules.stop_requests import StopRequests
    from modules.trainer import Trainer, TrainerOptions
    from modules.training_log import TrainingLog
    from modules.training_model import TrainingModel
    from modules.training_setup import loader_workers
    from utils.device_utils import DTYPES

    optimizer = create_optimizer(options.optimizer, trained.parameter_groups(options.optimizer.learning_rate))
    scheduler = create_scheduler(options.scheduler, optimizer, plan.total_steps)
    stateful = {"optimizer": optimizer, "scheduler": scheduler}
    if accelerator.scaler is not None:
        stateful["scaler"] = accelerator.scaler
    saver = CheckpointSaver(
        options.files,
        options.save,
        accelerator,
        trained,
        stateful,
        settings=options.settings(progress.seed),
        dtype=DTYPES[options.save.save_precision or "float"],
        keep_best=options.validation.keep_best,
        metadata=lambda at, title: metadata_of(options, trained, data, plan, at, title, accelerator.mixed_precision),
        extra_formats=lambda path: write_extra_formats(path, options.save.save_format),
        upload=uploader.upload,
    )
    previewer = None
    if prompts:
        decode = load_decoder(options, accelerator)
        previewer = Previewer(dit, prompts, decode, options.files, accelerator, progress.seed)
    workers = loader_workers(options.dataset.max_data_loader_n_workers)
    return Trainer(
        TrainerOptions(
            options.training,
            options.timesteps,
            options.save,
            options.previews,
            options.validation,
            options.network.scale_weight_norms,
        ),
        accelerator,
        plan,
        progress,
        TrainingModel(
            dit, SCALING_FACTOR, options.training.guidance_scale, accelerator.device, options.attention.split_attn
        ),
        trained,
        optimizer,
        scheduler,
        batch_loader(data.train, plan, accelerator.process_index, progress.step, workers),
        TrainingLog(options.files.log, accelerator, progress, plan.total_steps),
        saver,
        StopRequests(options.save.output_dir),
        data.validation,
        previewer,
    )


def metadata_of(
    options: Options,
    trained: "TrainedNetwork",
    data: Datasets,
    plan: "StepPlan",
    progress: "Progress",
    title: str,
    mixed_precision: str,
) -> dict[str, str]:
    """The metadata of a checkpoint."""
    network, given = options.network, (options.network.network_dim, options.network.network_alpha)
    dim, alpha = trained.sizes() or given
    facts = RunFacts(
        session_id=progress.session_id,
        training_started_at=progress.started_at,
        training_finished_at=time.time(),
        num_train_items=data.train.num_items,
        num_batches_per_epoch=plan.batches_per_epoch,
        num_epochs=plan.total_epochs,
        max_train_steps=plan.total_steps,
        steps=progress.step,
        epoch=plan.epoch_of(max(progress.step - 1, 0)) + 1,
        seed=progress.seed,
        optimizer=options.optimizer.description,
        lr_scheduler=options.scheduler.description,
        lr_warmup_steps=options.scheduler.lr_warmup_steps.of(plan.total_steps),
        mixed_precision=mixed_precision,
        network_dim=dim,
        network_alpha=alpha,
        network_args=network.arguments,
        datasets=data.train.description(),
        sd_model_name=str(options.dit.dit),
        vae_name=options.vae.vae and str(options.vae.vae),
        validation=progress.validation_facts(),
    )
    return checkpoint_metadata(facts, options.metadata, *vars(options).values(), title=title)


def write_extra_formats(path: Path, formats: Sequence[str]) -> list[Path]:
    """Writes the layouts beside `default` as {stem}.{format}.safetensors."""
    from networks.format_table import FORMATS
    from networks.formats import read_lora, write_lora

    written = []
    for name in formats:
        if name != "default":
            written.append(path.with_name(f"{path.stem}.{name}.safetensors"))
            write_lora(read_lora(path), written[-1], FORMATS[name])
    return written


def report(trainer: "Trainer") -> None:
    """The table at the end."""
    if not trainer.accelerator.is_main_process:
        return
    progress = trainer.progress
    rows = [("steps", f"{progress.step} of {trainer.plan.total_steps}"), *trainer.log.summary()]
    rows += [("written", path) for path in trainer.saver.written]
    print_table("training", rows)


if __name__ == "__main__":
    run_script(main)
