"""The memory of a training step, and the settings with which it fits."""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from types import ModuleType

import torch
from torch import nn

from hunyuan_model import checkpoints
from hunyuan_model.block_swap import max_blocks_to_swap, swapped_blocks
from hunyuan_model.models import HYVideoDiffusionTransformer
from modules.blocks.activation_checkpointing import apply_activation_checkpointing
from modules.memory import plan as planner
from modules.memory.measure import measure_dit
from modules.memory.meter import ModelUsage
from modules.training.distributed import min_over_processes
from modules.training.network import OWN_MODULES, create_trial_network
from modules.training.optimizers import try_optimizer
from modules.training.options import FullTrainerOptions, LoraTrainerOptions
from modules.training.setup import TrainingSetup
from utils.cli import print_table
from utils.device_utils import DTYPES, default_dtype


def plan_memory(run: TrainingSetup[LoraTrainerOptions], module: ModuleType, trained: int) -> planner.MemoryPlan:
    """Predicts the memory of a step on the largest batch. With --vram_gb, chooses the settings that the user left open.

    Args:
        module: the network module.
        trained: number of trained weights.

    Raises:
        UserError: no settings fit, or the optimizer does not work with float32 weights.
    """
    options, accelerator = run.options, run.accelerator
    config = checkpoints.read_dit_config(options.dit.dit)
    batch, depths = run.train_set.largest_batch(), (config.depth_double, config.depth_single)
    shape = (len(batch.latents), config.in_channels, *batch.latents.shape[2:])
    text_tokens = int(batch.text_mask.sum(1).max())
    dtype = default_dtype(options.dit.dit_dtype, accelerator.device, on_gpu="bfloat16")
    state_bytes = try_optimizer(options.optimizer, torch.float32, accelerator.device)

    @functools.cache
    def measured(fp8: bool, checkpointing: str) -> ModelUsage:
        def prepare(dit: HYVideoDiffusionTransformer) -> nn.Module | None:
            return apply_for_measuring(options, module, dit, checkpointing, accelerator.device)

        return measure_dit(config, shape, text_tokens, dtype, fp8, True, prepare)

    def predicted(settings: planner.Settings) -> planner.Prediction:
        return planner.predict(
            measured(settings.fp8, settings.checkpointing),
            swapped_blocks(settings.blocks_to_swap, *depths),
            options.memory.block_swap_ring_size,
            trained,
            state_bytes,
            settings.checkpointing == "offload",
        )

    policy, swap = options.checkpointing.policy, options.swap.blocks_to_swap
    settings = planner.Settings(options.memory.fp8_base, policy or "none", swap or 0)
    ordered = planner.candidate_settings(max_blocks_to_swap(*depths, training=True), settings.fp8, policy, swap)
    free, main_memory = planner.free_device_memory(accelerator.device), min_over_processes(planner.free_main_memory())
    if free is not None:
        free = min_over_processes(free)
    limit = planner.memory_limit(options.memory.vram_gb, free)
    if limit is not None:
        settings = planner.fastest_that_fits(ordered, limit, predicted, host_limit=main_memory)
    size = "x".join(map(str, shape[2:]))
    plan = planner.MemoryPlan(settings, ordered, predicted, f"batch of {shape[0]}, latents {size}")
    if accelerator.is_main_process and (limit is not None or options.training.dry_run):
        plan.print()
    elif accelerator.is_main_process and free is not None:
        plan.warn_if_too_large(free)
    return plan


def apply_for_measuring(
    options: LoraTrainerOptions,
    module: ModuleType,
    dit: HYVideoDiffusionTransformer,
    checkpointing: str,
    device: torch.device,
) -> nn.Module | None:
    """Applies to a DiT without data what training will apply to the real one; returns the network.

    Networks of other projects may need data, so they are left out.

    Args:
        device: where training will run.
    """
    network = create_trial_network(module, dit, options.network) if module.__name__ in OWN_MODULES else None
    if network is not None:
        network.apply_to([], dit, False, True)
    swapped = bool(options.swap.blocks_to_swap)
    apply_activation_checkpointing(dit, checkpointing, device, options.compile.compile, swapped)
    return network


def with_settings(options: LoraTrainerOptions, settings: planner.Settings) -> LoraTrainerOptions:
    """The options with the settings that --vram_gb has chosen."""
    replace, offload = dataclasses.replace, settings.checkpointing == "offload"
    return replace(
        options,
        memory=replace(options.memory, fp8_base=settings.fp8, vram_gb=None),
        swap=replace(options.swap, blocks_to_swap=settings.blocks_to_swap or options.swap.blocks_to_swap),
        checkpointing=replace(
            options.checkpointing,
            gradient_checkpointing=offload or settings.checkpointing == "full",
            gradient_checkpointing_cpu_offload=offload,
            selective_checkpointing=settings.checkpointing == "selective",
        ),
    )


def print_weight_memory(
    run: TrainingSetup[FullTrainerOptions], shapes: Mapping[str, Sequence[int]], names: set[str]
) -> None:
    """Prints what weights, gradients and optimizer states of full fine-tuning need, without activations.

    Args:
        shapes: every parameter of the DiT.
        names: the trained ones.

    Raises:
        UserError: the optimizer does not work with the dtype of the trained weights.
    """
    trained, frozen = DTYPES[run.options.tuning.trained_dtype], DTYPES[run.options.saved_dtype]
    state_bytes = try_optimizer(run.options.optimizer, trained, run.accelerator.device)
    total, count = sum(map(math.prod, shapes.values())), sum(math.prod(shapes[name]) for name in names)
    rows = [
        ("trained weights", planner.format_bytes(count * trained.itemsize)),
        ("their gradients", planner.format_bytes(count * trained.itemsize)),
        ("their optimizer's states", planner.format_bytes(count * state_bytes)),
        ("frozen weights", planner.format_bytes((total - count) * frozen.itemsize)),
    ]
    print_table(f"memory without activations, {count / 1e6:,.1f} of {total / 1e6:,.1f} M weights are trained", rows)
