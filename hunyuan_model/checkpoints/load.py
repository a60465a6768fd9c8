"""Loads the DiT and the VAE from every layout in which they are published.

Each loader prints one line that says what the file is.
"""

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import nn

from hunyuan_model.block_swap import swapped_blocks
from hunyuan_model.checkpoints.identification import identify
from hunyuan_model.checkpoints.stored_tensors import (
    Change,
    Device,
    Devices,
    DitTensors,
    Dtypes,
    VaeTensors,
    errors_naming,
)
from hunyuan_model.models import HunyuanVideoConfig, HYVideoDiffusionTransformer
from hunyuan_model.quantization import quantize_linears
from hunyuan_model.vae import AutoencoderKLCausal3D, VaeConfig


def load_dit(
    path: str | Path,
    device: Devices = "cpu",
    dtype: Dtypes = torch.bfloat16,
    fp8: bool = False,
    attention: str = "torch",
    split_attention: bool = False,
    compute_device: Device | None = None,
    changes: Mapping[str, Change] | None = None,
) -> HYVideoDiffusionTransformer:
    """A frozen DiT.

    Args:
        path: file or folder in any published layout.
        device: of all weights, or a function of a weight's official name; see `block_swap_placement`.
        dtype: of all weights that are not float8, or a function of a weight's official name.
        fp8: keep the weights of the blocks' linear layers, modulation excepted, as float8. Those that the file holds
            as float8 are taken as they are.
        attention: the attention backend, a value of --attn_mode.
        split_attention: compute attention for one item of the batch after the other.
        compute_device: where a weight is changed and quantised; by default its own device.
        changes: functions by official name of a weight. Each gets the weight in float32 and returns another, which is
            then rounded to its dtype.

    Raises:
        UserError: not a HunyuanVideo DiT, or a broken or incomplete one.
    """
    tensors = open_dit(path)
    with errors_naming(path):
        with torch.device("meta"):
            model = HYVideoDiffusionTransformer(_dit_config(tensors))
        model.set_attention(attention, split_attention)
    tensors.check_exact(model)
    if fp8:
        quantize_linears(model, is_quantized_in_dit)
    return tensors.fill(model, device, dtype, compute_device, changes)


def open_dit(path: str | Path) -> DitTensors:
    """A DiT file whose tensors are read one at a time, for programs that never need the whole model.

    Raises:
        UserError: not a HunyuanVideo DiT.
    """
    return DitTensors(identify(path))


def read_dit_config(path: str | Path) -> HunyuanVideoConfig:
    """The sizes of a DiT, from headers only.

    Raises:
        UserError: not a HunyuanVideo DiT.
    """
    tensors = open_dit(path)
    with errors_naming(path):
        return _dit_config(tensors)


def _dit_config(tensors: DitTensors) -> HunyuanVideoConfig:
    given = tensors.file.checkpoint.config
    return HunyuanVideoConfig.from_shapes(tensors.shapes, given.get("rope_dims") or given.get("rope_axes_dim"))


def block_swap_placement(config: HunyuanVideoConfig, blocks_to_swap: int, device: Device) -> Callable[[str], Device]:
    """The `device` of `load_dit` for block swap: the CPU for the blocks to be swapped, `device` for all other weights.

    Raises:
        UserError: more blocks than the model can swap.
    """
    blocks = [f"double_blocks.{index}." for index in range(config.depth_double)]
    blocks += [f"single_blocks.{index}." for index in range(config.depth_single)]
    on_cpu = tuple(blocks[index] for index in swapped_blocks(blocks_to_swap, config.depth_double, config.depth_single))
    return lambda name: "cpu" if name.startswith(on_cpu) else device


def is_quantized_in_dit(name: str) -> bool:
    """Whether fp8 keeps the linear layer of this dotted name as float8. Rounding hurts modulation most."""
    return name.startswith(("double_blocks.", "single_blocks.")) and "mod" not in name.split(".", 2)[2]


def load_vae(path: str | Path, device: Device = "cpu", dtype: torch.dtype = torch.float32) -> nn.Module:
    """A frozen VAE.

    Raises:
        UserError: not the HunyuanVideo VAE, or a broken or incomplete one.
    """
    tensors = VaeTensors(identify(path))
    with errors_naming(path), torch.device("meta"):
        model = AutoencoderKLCausal3D(_vae_config(tensors))
    tensors.check_exact(model)
    return tensors.fill(model, device, dtype)


def read_vae_config(path: str | Path) -> VaeConfig:
    """The sizes of a VAE, from headers only.

    Raises:
        UserError: not the HunyuanVideo VAE.
    """
    tensors = VaeTensors(identify(path))
    with errors_naming(path):
        return _vae_config(tensors)


def _vae_config(tensors: VaeTensors) -> VaeConfig:
    return VaeConfig.from_shapes(tensors.shapes, tensors.file.checkpoint.config)
