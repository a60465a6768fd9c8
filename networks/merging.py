"""LoRA into weights, computed exactly: each weight in float32, with all its LoRAs, rounded once."""

import functools
import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from networks.factors import Factors
from networks.files.formats import LoraWeights
from networks.files.lora_files import read_lora
from utils.errors import UserError


@dataclass(frozen=True)
class MergeReport:
    """What became of one LoRA file: `matched` of its `total` modules are in the model, `leftover` keys in none."""

    path: str
    matched: int
    total: int
    leftover: int = 0

    def __str__(self) -> str:
        leftover = f", {self.leftover} keys belong to no module of HunyuanVideo's DiT" if self.leftover else ""
        return f"{self.path}: {self.matched} of {self.total} modules merged{leftover}"

    def announce(self) -> None:
        """Prints it, as a warning where something of the file is not used."""
        if self.matched < self.total or self.leftover:
            print(f"warning: {self}", file=sys.stderr)
        else:
            print(self)


def float32_weight(module: nn.Module) -> Tensor:
    """A copy of the weight of a Linear, plain or quantised, in float32."""
    if hasattr(module, "dequantized"):
        return module.dequantized(torch.float32)
    return module.weight.detach().to(torch.float32, copy=True)


# For each official module name, the LoRAs on it in the order in which they are applied.
LorasByModule = dict[str, list[tuple[Factors, float]]]


def read_loras(
    loras: Sequence[tuple[str | os.PathLike, float]], exclude_single_blocks: bool = False
) -> tuple[LorasByModule, list[LoraWeights]]:
    """The changes that LoRA files (path, multiplier) of any format make, and the files without what was excluded."""
    changes: LorasByModule = {}
    files = []
    for path, multiplier in loras:
        lora = read_lora(path, allow_partial=True)
        if exclude_single_blocks:
            lora.modules = {n: f for n, f in lora.modules.items() if not n.startswith("single_blocks.")}
        for name, factors in lora.modules.items():
            changes.setdefault(name, []).append((factors, multiplier))
        files.append(lora)
    return changes, files


# Numbers of a weight that are changed at a time: bounds the memory of the change, which is as large as the weight.
_CHUNK = 1 << 22


@torch.no_grad()
def merge_into_weight(name: str, weight: Tensor, changes: Sequence[tuple[Factors, float]]) -> Tensor:
    """Applies LoRAs to a float32 weight (out, in, ...) in place, and returns it.

    Raises:
        UserError: a LoRA is for a weight of another shape.
    """
    flat = weight.flatten(1)
    for factors, multiplier in changes:
        require_shape(name, factors, *flat.shape)
        factors = factors.map(lambda tensor: tensor.to(weight.device))
        if factors.rows(0, 1) is None:
            flat.copy_(factors.apply(flat, multiplier))
            continue
        count = max(1, _CHUNK // flat.shape[1])
        for start in range(0, len(flat), count):
            rows = flat[start : start + count]
            rows.copy_(factors.rows(start, start + count).apply(rows, multiplier))
    return weight


def require_shape(name: str, factors: Factors, rows: int, columns: int) -> None:
    """Whether a LoRA is for the weight (rows, columns) of this name.

    Raises:
        UserError: it is for another shape.
    """
    if (factors.out_features, factors.in_features) != (rows, columns):
        raise UserError(
            f"{name}: the LoRA is for a weight of {factors.out_features} x {factors.in_features}, "
            f"this DiT has {rows} x {columns}"
        )


def count_matches(
    paths: Sequence[str | os.PathLike], files: Sequence[LoraWeights], known: "set[str] | dict"
) -> list[MergeReport]:
    """How many modules of each file are among the `known` ones.

    Raises:
        UserError: a file has none of them.
    """
    reports = []
    for path, lora in zip(paths, files):
        matched = sum(name in known for name in lora.modules)
        if not matched:
            example = next(iter(lora.modules), "none, for all are excluded")
            raise UserError(f"{path}: none of its {len(lora.modules)} modules is in this DiT, such as {example}")
        reports.append(MergeReport(str(path), matched, len(lora.modules), len(lora.leftover)))
    return reports


def weight_changes(
    shapes: Mapping[str, Sequence[int]],
    loras: Sequence[tuple[str | os.PathLike, float]],
    exclude_single_blocks: bool = False,
) -> dict[str, Callable[[Tensor], Tensor]]:
    """What `load_dit` does to the weights of a DiT so that LoRA files of any format are merged into it.

    Args:
        shapes: of the DiT's tensors, by official name.
        loras: (path, multiplier).
        exclude_single_blocks: leave the single blocks as they are.

    Returns:
        By the name of each weight that changes, a function of its float32 form; it changes that in place.
        How many modules of each file are among them is printed.

    Raises:
        UserError: a file cannot be read, matches nothing, or is for other shapes.
    """
    changes, reports = match_loras(shapes, loras, exclude_single_blocks)
    for report in reports:
        report.announce()
    return {f"{name}.weight": functools.partial(merge_into_weight, name, changes=own) for name, own in changes.items()}


def match_loras(
    shapes: Mapping[str, Sequence[int]],
    loras: Sequence[tuple[str | os.PathLike, float]],
    exclude_single_blocks: bool = False,
) -> tuple[LorasByModule, list[MergeReport]]:
    """The changes of a DiT's own modules, and how many of each file these are; arguments and errors as above."""
    changes, files = read_loras(loras, exclude_single_blocks)
    changes = {name: own for name, own in changes.items() if f"{name}.weight" in shapes}
    reports = count_matches([path for path, _ in loras], files, changes)
    for (path, _), lora in zip(loras, files, strict=True):
        for name in (name for name in lora.modules if name in changes):
            rows, *columns = shapes[f"{name}.weight"]
            require_shape(f"{path}: {name}", lora.modules[name], rows, math.prod(columns))
    return changes, reports
