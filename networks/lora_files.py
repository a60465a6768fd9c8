"""LoRA files of the trainer: written in the native format, read from any."""

import os
from collections.abc import Mapping

import torch
from torch import Tensor

from networks.format_table import NATIVE
from networks.formats import from_tensors, read_lora, save_lora_file, to_tensors


def save_native(
    tensors: Mapping[str, Tensor],
    path: str | os.PathLike,
    dtype: torch.dtype | None = None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes tensors with native keys in `dtype` (None: as they are)."""
    cast = {name: tensor.detach().to("cpu", dtype or tensor.dtype) for name, tensor in tensors.items()}
    save_lora_file(cast, path, metadata or {})


def load_native(path: str | os.PathLike) -> dict[str, Tensor]:
    """The tensors of a LoRA file of any format under native keys."""
    return to_tensors(read_lora(path), NATIVE)


def native_tensors(tensors: Mapping[str, Tensor], source: str = "weights") -> dict[str, Tensor]:
    """Tensors with the keys of any format under native keys."""
    return to_tensors(from_tensors(tensors, {}, source), NATIVE)
