"""A LoRA from two DiT files, read side by side, one tensor at a time."""

import os
from collections.abc import Iterator

import torch
from torch import Tensor
from tqdm import tqdm

from hunyuan_model.checkpoints import DitTensors, open_dit
from hunyuan_model.checkpoints.names import DIT_TO_DIFFUSERS
from networks.files.formats import LoraWeights
from networks.files.names import block_template
from networks.lora_ops import extract, with_rank_metadata
from utils.errors import UserError


def extract_lora(
    base_path: str | os.PathLike, tuned_path: str | os.PathLike, rank: int, energy: float = 1.0
) -> tuple[LoraWeights, list[str]]:
    """The LoRA nearest to tuned - base, and the tensors that differ but cannot be in one (biases, norms).

    Raises:
        UserError: the files are not of the same DiT, or are equal.
    """
    base, tuned = open_dit(base_path), open_dit(tuned_path)
    if dict(base.shapes) != dict(tuned.shapes):
        raise UserError(f"{tuned_path}: has other tensors or shapes than {base_path}")
    names = {name for name in map(_module, base.shapes) if block_template(name) in DIT_TO_DIFFUSERS}
    modules, left = extract(_pairs(base, tuned), names, rank, energy)
    if not modules:
        raise UserError(f"{tuned_path}: no matrix differs from {base_path}")
    metadata = {"ss_base_model_version": "hunyuan_video", "ss_network_module": "networks.lora"}
    return with_rank_metadata(LoraWeights(modules, metadata)), left


def _module(name: str) -> str:
    return name.removesuffix(".weight")


def _pairs(base: DitTensors, tuned: DitTensors) -> Iterator[tuple[str, Tensor, Tensor]]:
    for name in tqdm(base.shapes, desc="comparing", unit="tensor"):
        yield name, _wide(base, name), _wide(tuned, name)


def _wide(dit: DitTensors, name: str) -> Tensor:
    tensor, scale = dit.read(name)
    tensor = tensor.to(torch.float32, copy=True)
    return tensor if scale is None else tensor * scale
