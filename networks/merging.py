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
from utils.errors import UserError

# For each official module name the LoRAs on it, as (factors, multiplier), in the order in which they are applied.
LorasByModule = dict[str, list[tuple[Factors, float]]]
# The most values of a weight that are changed at a time. Their update in float32 takes as much memory as they do.
_CHUNK = 1 << 22


@dataclass(frozen=True)
class MergeReport:
    """How much of a LoRA file is used.

    Attributes:
        path: the file.
        matched: how many of its modules the DiT has.
        total: how many modules of the DiT's architecture it has.
        leftover: how many of its keys belong to no such module.
    """

    path: str
    matched: int
    total: int
    leftover: int = 0

    def __str__(self) -> str:
        leftover = f", {self.leftover} keys belong to no module of HunyuanVideo's DiT" if self.leftover else ""
        return f"{self.path}: {self.matched} of {self.total} modules merged{leftover}"

    def announce(self) -> None:
        """Prints the report, as a warning if part of the file is not used."""
        if self.matched < self.total or self.leftover:
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
) -> tuple[LorasByModule, list[LoraWeights]]:
    """Reads LoRA files (path, multiplier) of any format.

    Returns:
        Their LoRAs by module, and the content of each file; both without excluded modules.
    """
    by_module: LorasByModule = {}
    files = []
    for path, multiplier in loras:
        lora = read_lora(path, allow_partial=True)
        if exclude_single_blocks:
            lora.modules = {n: f for n, f in lora.modules.items() if not n.startswith("single_blocks.")}
        for name, factors in lora.modules.items():
            by_module.setdefault(name, []).append((factors, multiplier))
        files.append(lora)
    return by_module, files


@torch.no_grad()
def merge_into_weight(name: str, weight: Tensor, loras: Sequence[tuple[Factors, float]]) -> Tensor:
    """Merges LoRAs (factors, multiplier) into a float32 weight (out, in, ...) in place, and returns it.

    Args:
        name: the name of the weight in errors.

    Raises:
        UserError: a LoRA is for a weight of another shape.
    """
    flat = weight.flatten(1)
    for factors, multiplier in loras:
        require_shape(name, factors, *flat.shape)
        factors = factors.map(lambda tensor: tensor.to(weight.device))
        if not factors.has_separable_rows:
            flat.copy_(factors.apply(flat, multiplier))
            continue
        count = max(1, _CHUNK // flat.shape[1])
        for start in range(0, len(flat), count):
            rows = flat[start : start + count]
            rows.copy_(factors.rows(start, start + count).apply(rows, multiplier))
    return weight


def require_shape(name: str, factors: Factors, rows: int, columns: int) -> None:
    """Checks that a LoRA is for a weight (rows, columns).

    Raises:
        UserError: it is for another shape; `name` names the weight.
    """
    if (factors.out_features, factors.in_features) != (rows, columns):
        raise UserError(
            f"{name}: the LoRA is for a weight of {factors.out_features} x {factors.in_features}, "
            f"this DiT has {rows} x {columns}"
        )


def count_matches(
    paths: Sequence[str | os.PathLike], files: Sequence[LoraWeights], known: Collection[str]
) -> list[MergeReport]:
    """Counts the modules of each file that are among the `known` ones.

    Raises:
        UserError: none of a file's modules is.
    """
    reports = []
    for path, lora in zip(paths, files):
        matched = sum(name in known for name in lora.modules)
        if not matched:
            example = next(iter(lora.modules), "none (all of them are excluded)")
            raise UserError(f"{path}: none of its {len(lora.modules)} modules is in this DiT, such as {example}")
        reports.append(MergeReport(str(path), matched, len(lora.modules), len(lora.leftover)))
    return reports


def match_loras(
    shapes: Mapping[str, Sequence[int]],
    loras: Sequence[tuple[str | os.PathLike, float]],
    exclude_single_blocks: bool = False,
) -> tuple[LorasByModule, list[MergeReport]]:
    """Reads LoRA files and checks them against the shapes of a DiT.

    Args:
        shapes: shapes of the DiT's tensors, by official name.
        loras: (path, multiplier) of LoRA files of any format.
        exclude_single_blocks: leave the single blocks as they are.

    Returns:
        The LoRAs on modules that the DiT has, and a report on each file.

    Raises:
        UserError: a file cannot be read, has no module of the DiT, or is for other shapes.
    """
    by_module, files = read_loras(loras, exclude_single_blocks)
    by_module = {name: own for name, own in by_module.items() if f"{name}.weight" in shapes}
    reports = count_matches([path for path, _ in loras], files, by_module)
    for (path, _), lora in zip(loras, files, strict=True):
        for name in (name for name in lora.modules if name in by_module):
            rows, *columns = shapes[f"{name}.weight"]
            require_shape(f"{path}: {name}", lora.modules[name], rows, math.prod(columns))
    return by_module, reports


def weight_changes(
    shapes: Mapping[str, Sequence[int]],
    loras: Sequence[tuple[str | os.PathLike, float]],
    exclude_single_blocks: bool = False,
) -> dict[str, Callable[[Tensor], Tensor]]:
    """The argument `changes` of `load_dit` with which it merges LoRA files while it loads a DiT; prints the reports.

    Arguments and errors are those of `match_loras`.

    Returns:
        For the name of each weight that changes, a function that changes its float32 form in place and returns it.
    """
    by_module, reports = match_loras(shapes, loras, exclude_single_blocks)
    for report in reports:
        report.announce()
    return {f"{name}.weight": functools.partial(merge_into_weight, name, loras=own) for name, own in by_module.items()}
