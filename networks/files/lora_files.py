"""LoRA files of the trainer: written in the native format, read from any."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from networks.files.format_table import FORMATS, NATIVE
from networks.files.formats import from_tensors, read_lora, save_lora_file, to_tensors, write_lora
from networks.files.names import block_template
from utils.errors import UserError


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


def require_formats(shapes: Mapping[str, Sequence[int]], formats: Sequence[str]) -> None:
    """Tries to write a network in formats, on one module of each kind.

    Args:
        shapes: of the network's tensors, by native key.

    Raises:
        UserError: a format cannot hold it.
    """
    modules = {block_template(key.split(".")[0]): key.split(".")[0] for key in reversed(shapes)}.values()
    tensors = {key: torch.ones(tuple(shape)) for key, shape in shapes.items() if key.split(".")[0] in modules}
    tensors |= {f"{module}.alpha": torch.ones(()) for module in modules}
    lora = from_tensors(tensors, {}, "--network_module")
    for name in formats:
        try:
            to_tensors(lora, FORMATS[name])
        except UserError as error:
            raise UserError(f"--save_format {name}: {error}") from None


def write_formats(path: Path, formats: Sequence[str]) -> list[Path]:
    """Writes a native file in other formats beside it, as {stem}.{format}.safetensors; returns their paths."""
    others = [name for name in formats if FORMATS[name] is not NATIVE]
    written = [path.with_name(f"{path.stem}.{name}.safetensors") for name in others]
    lora = read_lora(path) if others else None
    for name, other in zip(others, written, strict=True):
        write_lora(lora, other, FORMATS[name])
    return written
