"""Converts a LoRA file from any format to any other: the work of convert_lora.py."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from networks.comparison import float16_loss, worst_difference
from networks.files.coverage import coverage_rows
from networks.files.format_table import Format
from networks.files.formats import LoraWeights, from_tensors
from networks.files.lora_files import read_lora, write_lora
from networks.lora_ops import reduce_rank
from utils.errors import UserError
from utils.files import atomic_path
from utils.safetensors_utils import load_file, read_header


def convert_file(
    source: Path,
    output: Path,
    target: Format,
    rank: int | None = None,
    dtype: torch.dtype | None = None,
    verify: bool = False,
    allow_partial: bool = False,
) -> list[tuple[str, str]]:
    """Writes the LoRA of one file in the format `target`.

    Args:
        source: LoRA file of any format.
        output: file to write.
        target: format to write.
        rank: reduce every module to at most this rank.
        dtype: dtype of the output; None keeps each tensor's own dtype.
        verify: read the output again and compare it with the input.
        allow_partial: leave out keys that belong to no module instead of raising.

    Returns:
        Rows for a table: input, output, and how many modules each program will load.

    Raises:
        UserError: the file is no LoRA for HunyuanVideo, the format cannot hold it, or the comparison failed. Then
            nothing is written.
    """
    lora = read_lora(source, allow_partial)
    source_format = lora.format
    if rank is not None:
        lora = reduce_rank(lora, rank)
    with atomic_path(output) as temporary:
        tensors = write_lora(lora, temporary, target, dtype)
        verified = [("verified", _verify(lora, temporary, str(output), target))] if verify else []
    rows = [
        ("input", f"{source}: {source_format.title}"),
        ("output", f"{output}: {target.title}, {len(lora.modules)} modules, {len(tensors)} keys"),
    ]
    if lora.leftover:
        rows.append(("left out", f"{len(lora.leftover)} keys, such as {lora.leftover[0]}"))
    return rows + notes(lora, tensors, target) + verified + coverage_rows(tensors, target)


def notes(lora: LoraWeights, tensors: Mapping[str, Tensor], target: Format) -> list[tuple[str, str]]:
    """Rows about what a file does not hold, or holds less exactly, of a LoRA.

    Args:
        lora: what was to be written.
        tensors: the tensors of the file.
        target: the format of the file.
    """
    rows = []
    if lora.vectors and not target.differences:
        count, name = len(lora.vectors), min(lora.vectors)
        rows.append(("left out", f"{count} changes of biases and norms, such as {name}: not known in this format"))
    if all(factors.is_zero() for factors in lora.modules.values()) and not any(map(torch.any, lora.vectors.values())):
        rows.append(("effect", "none: alpha or the factors are 0 in every module"))
    return rows + _rounding(lora, tensors, target)


def _rounding(lora: LoraWeights, tensors: Mapping[str, Tensor], target: Format) -> list[tuple[str, str]]:
    """A row about the modules that float16 cannot hold, if there are any."""
    if not any(tensor.dtype == torch.float16 for tensor in tensors.values()):
        return []
    loss = float16_loss(lora, from_tensors(tensors, {}, "output", format_=target))
    return [("rounding", f"{loss}; --dtype float32 keeps it")] if loss else []


def _verify(lora: LoraWeights, written: Path, output: str, target: Format) -> str:
    """Compares the file `written` with the LoRA; returns the result as a sentence. `output` names it in errors.

    Raises:
        UserError: they differ by more than the rounding of the file's dtype.
    """
    again = from_tensors(load_file(written), read_header(written)[1], output, format_=target)
    difference, name = worst_difference(lora, again, output)
    coarsest = max(torch.finfo(t.dtype).eps for f in again.modules.values() for t in f.tensors().values())
    # Twice, because both factors are rounded; alpha / rank may have been multiplied into one of them.
    if difference > max(1e-6, 2 * coarsest):
        raise UserError(f"{output}: dW of {name} differs by {difference:.1e} (relative); not written")
    return f"dW of all {len(lora.modules)} modules is equal: relative difference at most {difference:.1e} ({name})"
