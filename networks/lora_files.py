"""Native LoRA files: kohya's flattened names, float32 computing, the metadata hashes that other tools look at."""

import os
from collections.abc import Mapping

import torch

from utils.safetensors_utils import load_file, save_file


def save_native(
    tensors: Mapping[str, torch.Tensor],
    path: str | os.PathLike,
    dtype: torch.dtype | None = None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes tensors with native keys in `dtype` (None: as they are)."""
    cast = {name: tensor.detach().to("cpu", dtype or tensor.dtype) for name, tensor in tensors.items()}
    save_file(cast, path, metadata)


def load_native(path: str | os.PathLike) -> dict[str, torch.Tensor]:
    """Tensors of a LoRA file under native keys."""
    return load_file(path)
