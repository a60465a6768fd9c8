"""Small DiTs with random weights, for tests of what is put around a DiT."""

from typing import Any

import torch
from torch import nn

from hunyuan_model.models import HunyuanVideoConfig, HYVideoDiffusionTransformer
from modules.blocks.activation_checkpointing import checkpoint_activations
from modules.blocks.rematerialization import rematerialize_pointwise
from networks.lora import create_arch_network


def small_config(**changes: Any) -> HunyuanVideoConfig:
    """Two heads of 16 channels, 4 double and 8 single blocks, unless `changes` say otherwise."""
    sizes = {
        "hidden_size": 32,
        "heads": 2,
        "mlp_hidden": 64,
        "depth_double": 4,
        "depth_single": 8,
        "depth_refiner": 1,
        "text_dim": 64,
        "text_dim_2": 64,
        "rope_dims": (4, 6, 6),
    }
    return HunyuanVideoConfig(**sizes | changes)


def random_dit(
    config: HunyuanVideoConfig, std: float = 0.3, dtype: torch.dtype = torch.float32
) -> HYVideoDiffusionTransformer:
    """A frozen DiT in which no parameter is zero; the same for the same config."""
    torch.manual_seed(0)
    dit = HYVideoDiffusionTransformer(config).requires_grad_(False)
    for parameter in dit.parameters():
        parameter.normal_(std=std)
    return dit.to(dtype)


def prepare(dit: HYVideoDiffusionTransformer, checkpointing: str, rank: int = 4) -> nn.Module:
    """Applies a LoRA and activation checkpointing, as a training run does; returns the LoRA."""
    network = create_arch_network(1.0, rank, rank, None, None, dit)
    network.apply_to(None, dit, False, True)
    if checkpointing == "none":
        rematerialize_pointwise(dit.blocks)
    else:
        checkpoint_activations(dit.blocks, checkpointing)
    return network
