"""Merges LoRA files into a DiT file, one tensor at a time: memory holds one tensor and the LoRAs."""

import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from hunyuan_model.checkpoints import DitTensors, open_dit
from hunyuan_model.quantization import FP8, FP8_MAX
from networks.merging import Changes, ChangesByTensor, MergeReport, match_loras, merge_into_weight
from utils.safetensors_utils import streamed_file

# ComfyUI's scaled fp8 (docs/formats.md 2.8a): a marker, and one float32 scale beside the weight of every Linear layer.
MARKER, SCALE = "scaled_fp8", "scale_weight"


@dataclass(frozen=True)
class _Stored:
    """How a tensor is written: its dtype, and whether it is stored divided by its scale."""

    dtype: torch.dtype
    scaled: bool


def merge_files(
    dit_path: str | os.PathLike,
    loras: Sequence[tuple[str | os.PathLike, float]],
    output: str | os.PathLike,
    dtype: torch.dtype | None = None,
    fp8: bool = False,
    device: torch.device | str = "cpu",
    exclude_single_blocks: bool = False,
) -> list[MergeReport]:
    """Writes a DiT file with official names in which the LoRAs are merged.

    Args:
        dit_path: DiT file in any layout; fp8 with or without scales. If its fp8 has scales and `dtype` is None, the
            weights of all Linear layers are written as scaled fp8, as with `fp8`.
        loras: (path, multiplier) of LoRA files of any format.
        output: safetensors file.
        dtype: dtype of the output's tensors that are not fp8; None keeps the dtype of each tensor, fp8 included.
        fp8: write the weights of all Linear layers as scaled fp8.
        device: device that computes.
        exclude_single_blocks: leave the single blocks as they are.

    Returns:
        A report on each LoRA file.

    Raises:
        UserError: a file cannot be read, or a LoRA has no module of the DiT or is for other shapes. Then nothing is
            written.
    """
    dit = open_dit(dit_path)
    by_tensor, reports = match_loras(dit.shapes, loras, exclude_single_blocks)
    stored = {name: _stored(dit, name, dtype, fp8) for name in dit.shapes}
    layout = {name: (stored[name].dtype, shape) for name, shape in dit.shapes.items()}
    scaled = [name for name in stored if stored[name].scaled]
    layout |= {_scale_name(name): (torch.float32, ()) for name in scaled}
    if scaled:
        layout[MARKER] = (FP8, (0,))
    _warn_of_rounding(dit, dit_path, by_tensor, stored)
    with streamed_file(output, layout, _metadata(dit, loras)) as write:
        for name in tqdm(dit.shapes, desc="merging", unit="tensor"):
            _write(dit, name, by_tensor.get(name, []), stored[name], device, write)
        if scaled:
            write(MARKER, torch.empty(0, dtype=FP8))
    return reports


def _metadata(dit: DitTensors, loras: Sequence[tuple[str | os.PathLike, float]]) -> dict[str, str]:
    """The metadata of the source, without entries about its tensors; a config file beside it is included."""
    checkpoint = dit.file.checkpoint
    stale = ("modelspec.hash", "sshs_", "_quantization")
    metadata = {key: text for key, text in checkpoint.files[0].metadata.items() if not key.startswith(stale)}
    if checkpoint.config:
        metadata["config"] = json.dumps(checkpoint.config)
    if loras:
        names = [f"{Path(path).name} x {multiplier:g}" for path, multiplier in loras]
        metadata["modelspec.merged_from"] = ", ".join(names)
    return metadata


def _warn_of_rounding(
    dit: DitTensors, path: str | os.PathLike, by_tensor: ChangesByTensor, stored: dict[str, _Stored]
) -> None:
    """Warns if weights are fp8 before and after merging.

    Neighbouring fp8 numbers differ by 1/8 of their power of two; most changes by a LoRA are smaller.
    """
    if any(dit.dtype(name).itemsize == 1 and stored[name].dtype == FP8 for name in by_tensor):
        print(
            f"warning: {path}: is fp8 and stays fp8, so rounding removes most of what the LoRA changes; "
            "--dtype bfloat16 keeps it",
            file=sys.stderr,
        )


def _module(name: str) -> str:
    return name.removesuffix(".weight")


def _scale_name(name: str) -> str:
    return f"{_module(name)}.{SCALE}"


def _stored(dit: DitTensors, name: str, dtype: torch.dtype | None, fp8: bool) -> _Stored:
    """How the tensor `name` will be written; `dtype` and `fp8` as in `merge_files`."""
    source = dit.dtype(name)
    kept = dit.file.fp8 if dtype is None and not fp8 else "none"
    # Under the marker, older ComfyUI casts the weight of every Linear to fp8, so none can be left without a scale.
    if (fp8 or kept not in ("none", "plain")) and len(dit.shapes[name]) == 2:
        return _Stored(FP8, True)
    if source.itemsize == 1:
        return _Stored(FP8 if kept == "plain" else dtype or torch.bfloat16, False)
    return _Stored(dtype or source, False)


def _write(
    dit: DitTensors,
    name: str,
    loras: Changes,
    stored: _Stored,
    device: torch.device | str,
    write: Callable[[str, Tensor], None],
) -> None:
    """Writes one tensor of the DiT with the LoRAs (factors, multiplier) on it."""
    tensor, scale = dit.read(name)
    if not loras and tensor.dtype == stored.dtype and scale is None and not stored.scaled:
        write(name, tensor)
        return
    if not loras and tensor.dtype == FP8 and stored.scaled and scale is not None and scale.numel() == 1:
        write(name, tensor)
        write(_scale_name(name), scale.reshape(()))
        return
    weight = tensor.to(device, torch.float32, copy=True)
    if scale is not None:
        weight.mul_(scale.to(device))
    del tensor
    if loras:
        merge_into_weight(_module(name), weight, loras)
    if stored.scaled:
        # ComfyUI reads only one scale per tensor.
        scale = (torch.linalg.vector_norm(weight, float("inf")) / FP8_MAX).clamp_min(torch.finfo(torch.float32).tiny)
        weight.div_(scale)
        write(_scale_name(name), scale)
    write(name, weight.clamp_(-FP8_MAX, FP8_MAX).to(FP8) if stored.dtype == FP8 else weight.to(stored.dtype))
