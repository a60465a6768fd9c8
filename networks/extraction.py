"""The difference of two DiT files as a LoRA; both files are read side by side, one tensor at a time."""

import os

import torch
from torch import Tensor
from tqdm import tqdm

from hunyuan_model.checkpoints import DitTensors, open_dit
from hunyuan_model.checkpoints.names import DIT_TO_DIFFUSERS
from networks.files.formats import LoraWeights
from networks.files.names import block_template
from networks.files.split_fuse import low_rank_approximation, truncated_svd
from networks.lora_ops import with_rank_metadata
from utils.errors import UserError


def extract_lora(
    base_path: str | os.PathLike, tuned_path: str | os.PathLike, rank: int, energy: float = 1.0
) -> tuple[LoraWeights, list[str]]:
    """The LoRA nearest to the difference tuned - base.

    Args:
        base_path: DiT file.
        tuned_path: fine-tuned DiT file.
        rank: the largest rank of a module.
        energy: share of the squared Frobenius norm of each rank-`rank` approximation that the LoRA must keep.

    Returns:
        The LoRA, and the names of tensors that differ but cannot be part of a LoRA (biases, norms).

    Raises:
        UserError: the files have different tensors, or no matrix differs.
    """
    base, tuned = open_dit(base_path), open_dit(tuned_path)
    if dict(base.shapes) != dict(tuned.shapes):
        raise UserError(f"{tuned_path}: its tensors or their shapes are not those of {base_path}")
    modules, left = {}, []
    for name in tqdm(base.shapes, desc="comparing", unit="tensor"):
        difference = _read_float32(tuned, name) - _read_float32(base, name)
        if not difference.any():
            continue
        module = name.removesuffix(".weight")
        if module != name and difference.dim() == 2 and block_template(module) in DIT_TO_DIFFUSERS:
            modules[module] = truncated_svd(low_rank_approximation(difference, rank), rank, energy)
        else:
            left.append(name)
    if not modules:
        raise UserError(f"{tuned_path}: no matrix differs from {base_path}")
    metadata = {"ss_base_model_version": "hunyuan_video", "ss_network_module": "networks.lora"}
    return with_rank_metadata(LoraWeights(modules, metadata)), left


def _read_float32(dit: DitTensors, name: str) -> Tensor:
    tensor, scale = dit.read(name)
    tensor = tensor.to(torch.float32, copy=True)
    return tensor if scale is None else tensor * scale
