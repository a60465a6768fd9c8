"""Merges LoRAs into weights: each weight is computed in float32 with all its LoRAs and rounded once."""

import functools
import math
import os
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from networks.factors import Factors
from networks.files.formats import LoraWeights
from networks.files.lora_files import read_lora
from utils.errors import UserError, printable
from utils.safetensors_utils import is_finite

# For each official tensor name what is applied to it, as (factors, multiplier), in this order. A bias and the weight of
# a norm have a vector (out,) instead of factors.
Changes = list[tuple[Factors | Tensor, float]]
ChangesByTensor = dict[str, Changes]
# The most values of a weight that are changed at a time. Their update in float32 takes as much memory as they do.
_CHUNK = 1 << 22


@dataclass(frozen=True)
class MergeReport:
    """How much of a LoRA file is used.

    Attributes:
        path: the file.
        matched: how many of its modules the DiT has.
        total: how many modules of the DiT's architecture it has.
        vectors_matched: how many of its changes of biases and norms the DiT has.
        vectors: how many changes of biases and norms it has.
        leftover: how many of its keys belong to no such module.
        without_effect: how many of the matched modules it leaves as they are.
    """

    path: str
    matched: int
    total: int
    vectors_matched: int = 0
    vectors: int = 0
    leftover: int = 0
    without_effect: int = 0

    @property
    def changes_nothing(self) -> bool:
        return self.without_effect == self.matched + self.vectors_matched

    def __str__(self) -> str:
        parts = [f"{self.matched} of {self.total} modules merged"]
        if self.vectors:
            parts.append(f"{self.vectors_matched} of {self.vectors} biases and norms merged")
        if self.leftover:
            parts.append(f"{self.leftover} keys belong to no module of HunyuanVideo's DiT")
        if self.changes_nothing:
            parts.append("it changes nothing: alpha, the factors or the multiplier are 0")
        elif self.without_effect:
            parts.append(f"{self.without_effect} of them change nothing (alpha or factors are 0)")
        return printable(f"{self.path}: {', '.join(parts)}")

    def announce(self) -> None:
        """Prints the report, as a warning if part of the file is not used or has no effect."""
        if (self.matched, self.vectors_matched) < (self.total, self.vectors) or self.leftover or self.changes_nothing:
            print(f"warning: {self}", file=sys.stderr)
        else:
            print(self)


def float32_weight(module: nn.Module) -> Tensor:
    """A float32 copy of the weight of a Linear, plain or quantised."""
    if hasattr(module, "dequantized"):
        return module.dequantized(torch.float32)
    return module.weight.detach().to(torch.float32, copy=True)


def read_loras(
    loras: Sequence[tuple[str | os.PathLike, float]], exclude_single_blocks: bool = False
) -> tuple[ChangesByTensor, list[LoraWeights]]:
    """Reads LoRA files (path, multiplier) of any format.

    Returns:
        Their changes by tensor, and the content of each file; both without excluded modules.
    """
    by_tensor: ChangesByTensor = {}
    files = []
    for path, multiplier in loras:
        lora = read_lora(path, allow_partial=True)
        if exclude_single_blocks:
            lora.modules = {n: f for n, f in lora.modules.items() if not n.startswith("single_blocks.")}
            lora.vectors = {n: v for n, v in lora.vectors.items() if not n.startswith("single_blocks.")}
        for name, change in lora.changes().items():
            by_tensor.setdefault(name, []).append((change, multiplier))
        files.append(lora)
    return by_tensor, files


@torch.no_grad()
def merge_into_weight(name: str, weight: Tensor, loras: Changes) -> Tensor:
    """Merges LoRAs (factors, multiplier) into a float32 weight (out, in, ...) in place, and returns it.

    Args:
        name: the name of the weight in errors.

    Raises:
        UserError: a LoRA is for a weight of another shape, or the merged values are not finite.
    """
    was_finite = is_finite(weight)
    if weight.dim() == 1:
        for vector, multiplier in loras:
            weight.add_(vector.to(weight.device), alpha=multiplier)
    else:
        _merge_factors(name, weight.flatten(1), loras)
    if was_finite and not is_finite(weight):
        raise UserError(f"{name}: with the LoRA, values are not finite: it is damaged, or its multiplier is too large")
    return weight


def _merge_factors(name: str, flat: Tensor, loras: Changes) -> None:
    """Merges LoRAs into a float32 matrix in place, some rows at a time."""
    for factors, multiplier in loras:
        require_shape(name, factors, *flat.shape)
        factors = factors.map(lambda tensor: tensor.to(flat.device))
        if not factors.has_separable_rows:
            flat.copy_(factors.apply(flat, multiplier))
            continue
        count = max(1, _CHUNK // flat.shape[1])
        for start in range(0, len(flat), count):
            rows = flat[start : start + count]
            rows.copy_(factors.rows(start, start + count).apply(rows, multiplier))


def require_shape(name: str, factors: Factors | Tensor, rows: int, columns: int = 1) -> None:
    """Checks that a LoRA is for a weight (rows, columns), or what is added to a vector for one of that length.

    Raises:
        UserError: it is for another shape; `name` names the weight.
    """
    if isinstance(factors, Tensor):
        if len(factors) != rows:
            raise UserError(f"{name}: the LoRA has {len(factors)} values, this DiT has {rows}")
    elif (factors.out_features, factors.in_features) != (rows, columns):
        raise UserError(
            f"{name}: the LoRA is for a weight of {factors.out_features} x {factors.in_features}, "
            f"this DiT has {rows} x {columns}"
        )


def count_matches(
    loras: Sequence[tuple[str | os.PathLike, float]], files: Sequence[LoraWeights], known: Collection[str]
) -> list[MergeReport]:
    """Counts the modules of each file (path, multiplier) that are among the `known` tensors.

    Raises:
        UserError: none of a file's modules is.
    """
    reports = []
    for (path, multiplier), lora in zip(loras, files):
        matched = [name for name in lora.modules if f"{name}.weight" in known]
        vectors = [name for name in lora.vectors if name in known]
        if not matched and not vectors:
            example = next(iter([*lora.modules, *lora.vectors]), "none (all of them are excluded)")
            total = len(lora.modules) + len(lora.vectors)
            raise UserError(f"{path}: none of its {total} modules is in this DiT, such as {example}")
        idle = sum(multiplier == 0 or lora.modules[name].is_zero() for name in matched)
        idle += sum(multiplier == 0 or not lora.vectors[name].any() for name in vectors)
        counts = (len(matched), len(lora.modules), len(vectors), len(lora.vectors), len(lora.leftover), idle)
        reports.append(MergeReport(str(path), *counts))
    return reports


def match_loras(
    shapes: Mapping[str, Sequence[int]],
    loras: Sequence[tuple[str | os.PathLike, float]],
    exclude_single_blocks: bool = False,
) -> tuple[ChangesByTensor, list[MergeReport]]:
    """Reads LoRA files and checks them against the shapes of a DiT.

    Args:
        shapes: shapes of the DiT's tensors, by official name.
        loras: (path, multiplier) of LoRA files of any format.
        exclude_single_blocks: leave the single blocks as they are.

    Returns:
        The changes of tensors that the DiT has, and a report on each file.

    Raises:
        UserError: a file cannot be read, has no module of the DiT, or is for other shapes.
    """
    by_tensor, files = read_loras(loras, exclude_single_blocks)
    by_tensor = {name: own for name, own in by_tensor.items() if name in shapes}
    reports = count_matches(loras, files, by_tensor)
    for (path, _), lora in zip(loras, files, strict=True):
        for name, change in lora.changes().items():
            if name in by_tensor:
                rows, *columns = shapes[name]
                require_shape(f"{path}: {name.removesuffix('.weight')}", change, rows, math.prod(columns))
    return by_tensor, reports


def weight_changes(
    shapes: Mapping[str, Sequence[int]],
    loras: Sequence[tuple[str | os.PathLike, float]],
    exclude_single_blocks: bool = False,
) -> dict[str, Callable[[Tensor], Tensor]]:
    """The argument `changes` of `load_dit` with which it merges LoRA files while it loads a DiT; prints the reports.

    Arguments and errors are those of `match_loras`.

    Returns:
        For the name of each tensor that changes, a function that changes its float32 form in place and returns it.
    """
    by_tensor, reports = match_loras(shapes, loras, exclude_single_blocks)
    for report in reports:
        report.announce()
    return {name: functools.partial(merge_into_weight, name, loras=own) for name, own in by_tensor.items()}
