"""Loads the DiT, the VAE and the text encoders from every layout in which they are published.

A model is built without memory and its tensors are then read one by one, straight to their device and dtype: the peak
of host memory is the final size plus one tensor.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from hunyuan_model.key_maps import (
    dit_naming,
    dit_official_shapes,
    dit_parts,
    dit_to_official,
    vae_official_name,
)
from hunyuan_model.models import HunyuanVideoConfig, HYVideoDiffusionTransformer
from hunyuan_model.tensor_files import Checkpoint, open_checkpoint
from utils.errors import UserError

Device = torch.device | str


def load_dit(
    path: str | Path,
    device: Device = "cpu",
    dtype: torch.dtype = torch.bfloat16,
    fp8: bool = False,
    attention: str = "torch",
) -> HYVideoDiffusionTransformer:
    """A frozen DiT from any published layout.

    Raises:
        UserError: not a HunyuanVideo DiT, or a broken or incomplete one.
    """
    checkpoint = open_checkpoint(path)
    prefix = _prefix(checkpoint, ("img_in.proj.weight", "x_embedder.proj.weight"), "HunyuanVideo DiT")
    found = _shapes(checkpoint, prefix)
    naming = dit_naming(found)
    shapes = dit_official_shapes(found, naming)
    config = HunyuanVideoConfig.from_shapes(shapes, checkpoint.config.get("rope_dims"))
    with torch.device("meta"):
        model = HYVideoDiffusionTransformer(config)
    _check_names(path, model, shapes)

    def read(name: str) -> Tensor:
        return dit_to_official(name, [checkpoint.read(prefix + part) for part in dit_parts(name, naming)], naming)

    _fill(path, model, read, device, dtype)
    model.set_attention(attention)
    return model


def load_vae(path: str | Path, device: Device = "cpu", dtype: torch.dtype = torch.float32) -> nn.Module:
    """A frozen VAE from any published layout.

    Raises:
        UserError: not the HunyuanVideo VAE, or a broken or incomplete one.
    """
    from hunyuan_model.vae import AutoencoderKLCausal3D, VaeConfig

    checkpoint = open_checkpoint(path)
    prefix = _prefix(checkpoint, ("decoder.conv_in.conv.weight",), "HunyuanVideo VAE")
    found = _shapes(checkpoint, prefix)
    names = {vae_official_name(name): name for name in found}
    shapes = {official: _without_kernel(official, found[name]) for official, name in names.items()}
    config = VaeConfig.from_shapes(shapes, checkpoint.config)
    with torch.device("meta"):
        model = AutoencoderKLCausal3D(config)
    _check_names(path, model, shapes)
    _fill(path, model, lambda name: checkpoint.read(prefix + names[name]).reshape(shapes[name]), device, dtype)
    return model


def _without_kernel(name: str, shape: Sequence[int]) -> tuple[int, ...]:
    """ComfyUI keeps the four attention matrices of the VAE as 1x1x1 convolutions."""
    return tuple(shape[:2]) if ".attentions." in name else tuple(shape)


def _prefix(checkpoint: Checkpoint, markers: Sequence[str], what: str) -> str:
    """What precedes the names of a model's tensors in this file."""
    for name in checkpoint.infos:
        for marker in markers:
            if name == marker or name.endswith("." + marker):
                return name.removesuffix(marker)
    raise UserError(f"{checkpoint.path}: not a {what}: it has no tensor {markers[0]}")


def _shapes(checkpoint: Checkpoint, prefix: str) -> dict[str, tuple[int, ...]]:
    infos = checkpoint.infos.items()
    return {name.removeprefix(prefix): info.shape for name, info in infos if name.startswith(prefix)}


def _check_names(path: str | Path, model: nn.Module, shapes: Mapping[str, Sequence[int]]) -> None:
    """Every tensor of the model is there with its shape, and no other."""
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    for complaint, names in {
        "tensors are missing": [name for name in expected if name not in shapes],
        "tensors do not belong to this model": [name for name in shapes if name not in expected],
    }.items():
        if names:
            raise UserError(f"{path}: {len(names)} {complaint}, the first is {names[0]}")
    for name, shape in expected.items():
        if tuple(shapes[name]) != shape:
            raise UserError(f"{path}: {name} has shape {tuple(shapes[name])}, {shape} is expected")


def _fill(
    path: str | Path, model: nn.Module, read: Callable[[str], Tensor], device: Device, dtype: torch.dtype
) -> None:
    """Gives every parameter of a model on the meta device its tensor, frozen."""
    for name, _ in list(model.named_parameters()):
        owner, _, leaf = name.rpartition(".")
        tensor = read(name).to(device, dtype, copy=True)
        setattr(model.get_submodule(owner), leaf, nn.Parameter(tensor, requires_grad=False))
    model.eval()
