"""The commands of lora_tool.py: each reads LoRAs or DiTs, does its work and prints what it did."""

import math
import os
import sys

from networks.comparison import worst_difference
from networks.conversion import notes
from networks.extraction import extract_lora
from networks.files.format_table import FORMATS, NATIVE
from networks.files.formats import LoraWeights
from networks.files.lora_files import read_lora, write_lora
from networks.inspection import block_table, draw_norms
from networks.lora_command_options import (
    EmaOptions,
    ExtractOptions,
    InfoOptions,
    MergeOptions,
    ResizeOptions,
)
from networks.lora_ops import concatenate, ema_decays, moving_average, reduce_rank
from utils.cli import print_table
from utils.device_utils import DTYPES
from utils.errors import printable


def info(options: InfoOptions) -> None:
    """Prints ranks, alphas, norms and training metadata."""
    (path,) = options.path
    lora = read_lora(path, allow_partial=True)
    if lora.leftover:
        print(
            printable(
                f"warning: {path}: {len(lora.leftover)} keys belong to no module of HunyuanVideo's DiT, such as "
                f"{lora.leftover[0]}; they are left out here"
            ),
            file=sys.stderr,
        )
    infinite = [name for name, factors in lora.modules.items() if not math.isfinite(factors.norm())]
    if infinite:
        print(
            f"warning: {printable(path)}: dW of {len(infinite)} modules is not finite, such as {infinite[0]}; "
            "the file is damaged",
            file=sys.stderr,
        )
    if lora.vectors:
        print(f"{len(lora.vectors)} changes of biases and norms, such as {min(lora.vectors)}")
    if options.png is not None:
        draw_norms(lora, options.png)
    print_table(f"{path}: {lora.format.title}", sorted(lora.metadata.items()) or [("metadata", "none")])
    print_table("blocks", block_table(lora), ("block", "modules", "rank", "alpha", "norm", "largest"))


def merge(options: MergeOptions) -> None:
    """Writes the weighted sum of several LoRAs as one LoRA."""
    multipliers = options.multipliers()
    lora = concatenate([read_lora(path) for path in options.path], multipliers)
    if options.rank is not None:
        lora = reduce_rank(lora, options.rank)
    weighted = zip(options.path, multipliers, strict=True)
    _write(lora, options, "sum", [(path.name, f"x {multiplier:g}") for path, multiplier in weighted])


def resize(options: ResizeOptions) -> None:
    """Writes a LoRA with lower ranks."""
    (path,) = options.path
    lora = read_lora(path)
    smaller = reduce_rank(lora, options.rank, options.energy)
    difference, name = worst_difference(lora, smaller, str(path))
    _write(smaller, options, "resize", [("largest relative change of dW", f"{difference:.2e} ({name})")])


def extract(options: ExtractOptions) -> None:
    """Writes the difference of two DiTs as a LoRA."""
    lora, left = extract_lora(options.base, options.tuned, options.rank, options.energy)
    rows = [("differ, but not in a LoRA", f"{len(left)} tensors, such as {left[0]}")] if left else []
    _write(lora, options, "extraction", rows)


def ema(options: EmaOptions) -> None:
    """Writes the moving average of checkpoints of one training."""
    paths = options.path if options.no_sort else sorted(options.path, key=os.path.getmtime)
    decays = ema_decays(len(paths), options.beta, options.beta2, options.sigma_rel)
    lora = moving_average([read_lora(path) for path in paths], decays)
    rows = [(paths[0].name, "start")]
    rows += [(path.name, f"{1 - decay:.4f} added") for path, decay in zip(paths[1:], decays, strict=True)]
    _write(lora, options, "average", rows)


def _write(
    lora: LoraWeights,
    options: MergeOptions | ResizeOptions | ExtractOptions | EmaOptions,
    title: str,
    rows: list[tuple[str, object]],
) -> None:
    """Writes the LoRA and prints the rows, with what was written below them."""
    # A spelling of another program that is only read has no name.
    format_ = FORMATS[options.target or lora.format.name or NATIVE.name]
    dtype = None if options.dtype is None else DTYPES[options.dtype]
    rows += notes(lora, write_lora(lora, options.output_file, format_, dtype), format_)
    ranks = sorted({factors.rank for factors in lora.modules.values()})
    shown = f"{ranks[0]} to {ranks[-1]}" if len(ranks) > 1 else "".join(map(str, ranks)) or "none"
    rows += [("modules", len(lora.modules)), ("rank", shown), ("written", f"{options.output_file}: {format_.title}")]
    print_table(title, rows)
