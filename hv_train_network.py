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
import functools
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from modules.options import CompileOptions, require
from modules.training.hunyuan_options import HunyuanTrainerOptions
from modules.training.timestep_plot import show_timesteps
from modules.training.training_options import NetworkOptions, TrainingMemoryOptions
from networks.files.metadata import checkpoint_metadata
from utils.cli import run_script, unused_options
from utils.errors import UserError, did_you_mean

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator

    from hunyuan_model.models import HunyuanVideoConfig, HYVideoDiffusionTransformer
    from modules.memory.meter import ModelUsage
    from modules.memory.plan import MemoryPlan, Settings
    from modules.training.network import TrainedNetwork
    from modules.training.setup import Run
    from modules.training.state import Progress


@dataclass(frozen=True)
class Options(HunyuanTrainerOptions):
    """Every option of this script."""

    network: NetworkOptions
    memory: TrainingMemoryOptions
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


def main(argv: Sequence[str] | None = None) -> None:
    options = Options.parse(__doc__, argv)
    if options.timesteps.show_timesteps is not None:
        show_timesteps(options.timesteps, options.save.output_dir or Path())
        return
    options.check()
    state = options.find_state()
    requests = options.preview_requests()

    from modules.training.hunyuan_video import check_choices, create_previewer, load_datasets, training_model
    from modules.training.loop import rehearse, train
    from modules.training.network import import_network_module
    from modules.training.setup import build_trainer, close_run, prepare_run
    from networks.files.lora_files import write_formats

    check_choices(options)
    check_own_choices(options)
    network_module = import_network_module(options.network.network_module)
    run = prepare_run(options, state, lambda seed: load_datasets(options, seed))
    options = run.options
    run.check_optimizer()
    trained_count = check_model(options, network_module, run)
    plan = plan_memory(options, network_module, run, trained_count)
    run.options = options = with_settings(options, plan.settings)
    run.print_plan()
    if options.training.dry_run:
        print(run.settings)
        return

    run.open_outputs()
    with plan.explain_out_of_memory("while the models are loaded"):
        previewer = create_previewer(options, requests, run)
        dit = load_model(options, run.accelerator)
        trained = create_trained(options, network_module, dit, run)
        trainer = build_trainer(
            run,
            training_model(options, dit, run.accelerator),
            trained,
            previewer(dit),
            lambda progress: metadata(options, run, trained, progress),
            lambda path: write_formats(path, options.save.save_format),
        )
    with trainer.log, trainer.requests:
        with plan.explain_out_of_memory("on the largest batch, tried before training"):
            rehearse(trainer, run.train_set.largest_batch())
        with plan.explain_out_of_memory("in training"):
            train(trainer)
    close_run(trainer)


def check_own_choices(options: Options) -> None:
    """The compiler's backend and the file formats exist, and every LoRA file is one, by its header.

    Raises:
        UserError: one is not.
    """
    from modules.blocks.compilation import require_backend
    from networks.files.format_table import FORMATS
    from networks.files.lora_files import read_lora

    if options.compile.compile:
        require_backend(options.compile.compile_backend)
    for name in options.save.save_format:
        if name not in FORMATS:
            raise UserError(f"--save_format {name}: unknown{did_you_mean(name, list(FORMATS))}; {', '.join(FORMATS)}")
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


def check_model(options: Options, module: ModuleType, run: "Run") -> int:
    """Reads the sizes of the DiT and tries the network on a DiT without weights; returns how many numbers it trains.

    Raises:
        UserError: not a HunyuanVideo DiT, caches of other text encoders, or a network or state that does not fit.
    """
    from hunyuan_model.block_swap import swapped_blocks
    from modules.training.hunyuan_video import read_dit_config
    from modules.training.network import OWN_MODULES
    from modules.training.state import check_network
    from networks.files.lora_files import require_formats

    config = read_dit_config(options, run)
    swapped_blocks(options.swap.blocks_to_swap or 0, config.depth_double, config.depth_single, training=True)
    shapes = trained_shapes(options, module, config)
    if module.__name__ in OWN_MODULES:
        require_formats(shapes, options.save.save_format)
        if run.state is not None:
            check_network(run.state, shapes)
    return sum(map(math.prod, shapes.values()))


def plan_memory(options: Options, module: ModuleType, run: "Run", trained: int) -> "MemoryPlan":
    """What a step on the largest batch needs; --vram_gb chooses what the user has not.

    Raises:
        UserError: nothing fits.
    """
    from hunyuan_model.block_swap import max_blocks_to_swap, swapped_blocks
    from hunyuan_model.checkpoints import read_dit_config
    from modules.memory import plan as planner
    from modules.memory.measure import measure_dit
    from modules.training.distributed import least_of_processes
    from utils.device_utils import default_dtype

    config, batch, device = read_dit_config(options.dit.dit), run.train_set.largest_batch(), run.accelerator.device
    depths, text_tokens = (config.depth_double, config.depth_single), int(batch.text_mask.sum(1).max())
    shape = (len(batch.latents), config.in_channels, *batch.latents.shape[2:])
    dtype = default_dtype(options.dit.dit_dtype, device, on_gpu="bfloat16")
    swap, policy = options.swap.blocks_to_swap, options.training.checkpointing_policy
    moments = planner.MOMENTS_8BIT if "8bit" in options.optimizer.optimizer_type.lower() else planner.MOMENTS

    @functools.cache
    def measured(fp8: bool, checkpointing: str) -> "ModelUsage":
        return measure_dit(
            config,
            shape,
            text_tokens,
            dtype,
            fp8,
            True,
            lambda dit: prepare(options, module, dit, checkpointing, device),
        )

    def predicted(settings: planner.Settings) -> planner.Prediction:
        return planner.predict(
            measured(settings.fp8, settings.checkpointing),
            swapped_blocks(settings.blocks_to_swap, *depths),
            options.memory.block_swap_ring_size,
            trained,
            moments,
            settings.checkpointing == "offload",
        )

    settings = planner.Settings(options.memory.fp8_base, policy or "none", swap or 0)
    ordered = planner.candidate_settings(max_blocks_to_swap(*depths, training=True), settings.fp8, policy, swap)
    free, host_free = planner.free_device_memory(device), least_of_processes(planner.free_main_memory())
    if free is not None:
        free = least_of_processes(free)
    limit = planner.memory_limit(options.memory.vram_gb, free)
    if limit is not None:
        settings = planner.fastest_that_fits(ordered, limit, predicted, host_limit=host_free)
    size = "x".join(map(str, shape[2:]))
    plan = planner.MemoryPlan(settings, ordered, predicted, f"batch of {shape[0]}, latents {size}")
    if run.accelerator.is_main_process and (limit is not None or options.training.dry_run):
        plan.print()
    elif run.accelerator.is_main_process and free is not None:
        plan.warn_if_too_large(free)
    return plan


def prepare(
    options: Options,
    module: ModuleType,
    dit: "HYVideoDiffusionTransformer",
    checkpointing: str,
    device: "torch.device",
) -> "torch.nn.Module | None":
    """Applies to a DiT without data what `create_trained` applies to the real one."""
    from modules.blocks.activation_checkpointing import apply_activation_checkpointing
    from modules.training.network import OWN_MODULES

    made = new_network(options, module, dit) if module.__name__ in OWN_MODULES else None
    if made is not None:
        made.apply_to([], dit, False, True)
    apply_activation_checkpointing(
        dit, checkpointing, device, options.compile.compile, bool(options.swap.blocks_to_swap)
    )
    return made


def trained_shapes(options: Options, module: ModuleType, config: "HunyuanVideoConfig") -> dict[str, Sequence[int]]:
    """What is trained; of other people's modules only what they show before they are applied."""
    import torch

    from hunyuan_model.models import HYVideoDiffusionTransformer
    from networks.files.lora_files import load_native

    if options.network.dim_from_weights:
        tensors = load_native(options.network.network_weights)
        return {name: tensor.shape for name, tensor in tensors.items() if not name.endswith(".alpha")}
    with torch.device("meta"):
        made = new_network(options, module, HYVideoDiffusionTransformer(config))
    return {name: parameter.shape for name, parameter in made.named_parameters()}


def new_network(options: Options, module: ModuleType, dit: "HYVideoDiffusionTransformer") -> "torch.nn.Module":
    """A network by the options, without a word."""
    from modules.training.network import create_network

    network = options.network
    with contextlib.redirect_stdout(io.StringIO()):
        return create_network(
            module, dit, network.network_dim, network.network_alpha, network.network_dropout, network.arguments
        )


def with_settings(options: Options, settings: "Settings") -> Options:
    """The options with what --vram_gb has chosen."""
    replace, offload = dataclasses.replace, settings.checkpointing == "offload"
    return replace(
        options,
        memory=replace(options.memory, fp8_base=settings.fp8, vram_gb=None),
        swap=replace(options.swap, blocks_to_swap=settings.blocks_to_swap or options.swap.blocks_to_swap),
        training=replace(
            options.training,
            gradient_checkpointing=offload or settings.checkpointing == "full",
            gradient_checkpointing_cpu_offload=offload,
            selective_checkpointing=settings.checkpointing == "selective",
        ),
    )


def load_model(options: Options, accelerator: "Accelerator") -> "HYVideoDiffusionTransformer":
    """The frozen DiT with --base_weights merged; the blocks that will be swapped are on the CPU."""
    from hunyuan_model.checkpoints import block_swap_placement, load_dit, open_dit, read_dit_config
    from modules.training.hunyuan_video import verify_attention
    from networks.merging import weight_changes
    from utils.device_utils import default_dtype

    path, swap, device = options.dit.dit, options.swap.blocks_to_swap or 0, accelerator.device
    merges = list(zip(options.network.base_weights, options.network.base_multipliers, strict=True))
    dtype = default_dtype(options.dit.dit_dtype, device, on_gpu="bfloat16")
    verify_attention(options, accelerator, dtype)
    changes = weight_changes(open_dit(path).shapes, merges) if merges else None
    place, attention = block_swap_placement(read_dit_config(path), swap, device), options.attention.mode
    return load_dit(path, place, dtype, options.memory.fp8_base, attention, compute_device=device, changes=changes)


def create_trained(
    options: Options, module: ModuleType, dit: "HYVideoDiffusionTransformer", run: "Run"
) -> "TrainedNetwork":
    """The network, applied to the DiT, with what saves memory and time around the DiT's blocks."""
    import torch

    from hunyuan_model.block_swap import enable_block_swap, offload_embedders
    from modules.blocks.activation_checkpointing import apply_activation_checkpointing
    from modules.blocks.compilation import compile_blocks
    from modules.training.network import TrainedNetwork, create_network, create_network_from_weights
    from networks.files.format_table import FORMATS
    from networks.files.formats import to_tensors
    from networks.files.lora_files import read_lora

    network, device = options.network, run.accelerator.device
    torch.manual_seed(run.progress.seed)
    if network.dim_from_weights:
        weights = to_tensors(read_lora(network.network_weights), FORMATS["default"])
        made = create_network_from_weights(module, dit, weights)
    else:
        dim, alpha, dropout = network.network_dim, network.network_alpha, network.network_dropout
        made = create_network(module, dit, dim, alpha, dropout, network.arguments)
    trained = TrainedNetwork(made, dit, device, network.scale_weight_norms)
    if network.network_weights is not None:
        made.load_weights(str(network.network_weights))
    if options.compile.compile:
        compile_blocks(dit.blocks, options.compile)
    if options.swap.blocks_to_swap:
        ring, pin = options.memory.block_swap_ring_size, options.swap.use_pinned_memory_for_block_swap
        enable_block_swap(dit, options.swap.blocks_to_swap, device, ring, training=True, pin=pin or None)
    if options.swap.img_in_txt_in_offloading:
        offload_embedders(dit, device)
    policy, swapped = options.training.checkpointing_policy, bool(options.swap.blocks_to_swap)
    apply_activation_checkpointing(dit, policy or "none", device, options.compile.compile, swapped)
    if policy is not None:
        trained.enable_gradient_checkpointing()
    return trained


def metadata(options: Options, run: "Run", trained: "TrainedNetwork", progress: "Progress") -> Mapping[str, str]:
    """The metadata of a checkpoint."""
    network = options.network
    dim, alpha = trained.sizes() or (network.network_dim, network.network_alpha)
    facts = run.facts(
        progress,
        network_dim=dim,
        network_alpha=alpha,
        network_args=network.arguments,
        sd_model_name=str(options.dit.dit),
        vae_name=options.vae.vae and str(options.vae.vae),
    )
    return checkpoint_metadata(facts, options.metadata, *vars(options).values(), title=options.save.output_name)


if __name__ == "__main__":
    run_script(main)
