"""Looks into LoRAs and makes LoRAs from LoRAs, of any format, on a CPU, without a model.

    python lora_tool.py info lora.safetensors --png norms.png
    python lora_tool.py merge a.safetensors b.safetensors --multiplier 1 0.5 --output_file both.safetensors
    python lora_tool.py resize lora.safetensors --rank 16 --output_file small.safetensors
    python lora_tool.py extract --base dit.safetensors --tuned tuned.safetensors --rank 32 --output_file l.safetensors
    python lora_tool.py ema out/my-lora-*.safetensors --output_file my-lora-ema.safetensors

`python lora_tool.py COMMAND --help` lists the options of a command.
"""

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from networks.files.format_table import FORMATS
from utils.cli import option, parse_options, print_table, run_script
from utils.dtype_names import DTYPE_NAMES
from utils.errors import UserError, did_you_mean
from utils.files import refuse_overwriting

if TYPE_CHECKING:
    from networks.files.formats import LoraWeights


@dataclass(frozen=True, kw_only=True)
class InputOptions:
    """input"""

    path: list[Path] = option(
        [], help="LoRA files of any format; may stand before the options without --path", path="file"
    )

    def __post_init__(self) -> None:
        if not self.path:
            raise UserError("no LoRA file is given")

    @property
    def only(self) -> Path:
        if len(self.path) > 1:
            raise UserError(f"one LoRA file is expected, {len(self.path)} are given")
        return self.path[0]


@dataclass(frozen=True, kw_only=True)
class OutputOptions:
    """output"""

    output_file: Path = option(help="LoRA file to write")
    target: str | None = option(None, help="its format; that of the first input if unset", choices=[*FORMATS])
    dtype: str | None = option(None, help="its dtype; that of the input if unset", choices=DTYPE_NAMES)

    def __post_init__(self) -> None:
        if self.output_file.suffix != ".safetensors":
            raise UserError(f"--output_file {self.output_file}: a name that ends in .safetensors is expected")

    def write(self, lora: "LoraWeights", title: str, rows: list[tuple[str, object]]) -> None:
        """Writes the LoRA and prints what was done."""
        from networks.files.formats import write_lora
        from utils.device_utils import DTYPES

        format_ = lora.format if self.target is None else FORMATS[self.target]
        write_lora(lora, self.output_file, format_, None if self.dtype is None else DTYPES[self.dtype])
        ranks = sorted({factors.rank for factors in lora.modules.values()})
        shown = f"{ranks[0]}" if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
        rows += [("modules", len(lora.modules)), ("rank", shown), ("written", f"{self.output_file}: {format_.title}")]
        print_table(title, rows)


@dataclass(frozen=True, kw_only=True)
class InfoOptions:
    """info"""

    png: Path | None = option(None, help="draw the norm of every module into this PNG")


@dataclass(frozen=True, kw_only=True)
class SumOptions:
    """merge"""

    multiplier: list[float] = option([], help="one per file, or one for all; 1.0 when omitted")
    rank: int | None = option(
        None, help="reduce the sum to this rank by SVD; exact, with ranks added up, if unset", minimum=1
    )


@dataclass(frozen=True, kw_only=True)
class ResizeOptions:
    """resize"""

    rank: int | None = option(None, help="largest rank of a module", minimum=1)
    energy: float = option(1.0, help="share of the squared norm of a module that must stay", minimum=0, maximum=1)


@dataclass(frozen=True, kw_only=True)
class ExtractOptions:
    """extract"""

    base: Path = option(help="DiT checkpoint without what is to be extracted", path="any")
    tuned: Path = option(help="DiT checkpoint with it", path="any")
    rank: int = option(32, help="largest rank of a module", minimum=1)
    energy: float = option(1.0, help="share of the squared norm of a module that must stay", minimum=0, maximum=1)


@dataclass(frozen=True, kw_only=True)
class EmaOptions:
    """ema"""

    no_sort: bool = option(False, help="take the files as given, not by time of modification")
    beta: float = option(0.95, help="how much of the average stays when a file is added", minimum=0, maximum=1)
    beta2: float | None = option(None, help="go evenly from --beta to this", minimum=0, maximum=1)
    sigma_rel: float | None = option(
        None, help="power-function average of this relative width", minimum=0.001, maximum=0.28
    )


def info(argv: list[str]) -> None:
    """Ranks, alphas, norms and training metadata."""
    files, options = parse_options(__doc__, InputOptions, InfoOptions, argv=argv)
    if options.png is not None:
        refuse_overwriting("--png", options.png, files.path)

    from networks.files.formats import read_lora
    from networks.inspection import block_table, draw_norms

    lora = read_lora(files.only, allow_partial=True)
    if lora.leftover:
        print(
            f"warning: {files.only}: {len(lora.leftover)} keys belong to no module of HunyuanVideo's DiT, such as "
            f"{lora.leftover[0]}; they are left out here",
            file=sys.stderr,
        )
    if options.png is not None:
        draw_norms(lora, options.png)
    print_table(f"{files.only}: {lora.format.title}", sorted(lora.metadata.items()) or [("metadata", "none")])
    print_table("blocks", block_table(lora), ("block", "modules", "rank", "alpha", "norm", "largest"))


def merge(argv: list[str]) -> None:
    """The weighted sum of several LoRAs as one."""
    files, output, options = parse_options(__doc__, InputOptions, OutputOptions, SumOptions, argv=argv)
    refuse_overwriting("--output_file", output.output_file, files.path)
    given = options.multiplier or [1.0]
    multipliers = given * len(files.path) if len(given) == 1 else given
    if len(multipliers) != len(files.path):
        raise UserError(f"--multiplier: {len(given)} values for {len(files.path)} files; give one each, or one")

    from networks.files.formats import read_lora
    from networks.lora_ops import concatenate, reduce_rank

    lora = concatenate([read_lora(path) for path in files.path], multipliers)
    if options.rank is not None:
        lora = reduce_rank(lora, options.rank)
    output.write(lora, "sum", [(path.name, f"x {m:g}") for path, m in zip(files.path, multipliers, strict=True)])


def resize(argv: list[str]) -> None:
    """Lower ranks by SVD."""
    files, output, options = parse_options(__doc__, InputOptions, OutputOptions, ResizeOptions, argv=argv)
    refuse_overwriting("--output_file", output.output_file, files.path)

    from networks.comparison import worst_difference
    from networks.files.formats import read_lora
    from networks.lora_ops import reduce_rank

    lora = read_lora(files.only)
    smaller = reduce_rank(lora, options.rank, options.energy)
    difference, name = worst_difference(lora, smaller, str(files.only))
    output.write(smaller, "resize", [("largest relative change of dW", f"{difference:.2e} ({name})")])


def extract(argv: list[str]) -> None:
    """The difference of two DiTs as a LoRA."""
    output, options = parse_options(__doc__, OutputOptions, ExtractOptions, argv=argv)
    refuse_overwriting("--output_file", output.output_file, [options.base, options.tuned])

    from networks.extraction import extract_lora

    lora, left = extract_lora(options.base, options.tuned, options.rank, options.energy)
    rows = [("differ, but not in a LoRA", f"{len(left)} tensors, such as {left[0]}")] if left else []
    output.write(lora, "extraction", rows)


def ema(argv: list[str]) -> None:
    """The moving average of one training's checkpoints."""
    files, output, options = parse_options(__doc__, InputOptions, OutputOptions, EmaOptions, argv=argv)
    refuse_overwriting("--output_file", output.output_file, files.path)
    if len(files.path) < 2:
        raise UserError("ema: two files or more are expected")

    from networks.files.formats import read_lora
    from networks.lora_ops import average, ema_decays

    paths = files.path if options.no_sort else sorted(files.path, key=os.path.getmtime)
    keep = ema_decays(len(paths), options.beta, options.beta2, options.sigma_rel)
    lora = average([read_lora(path) for path in paths], keep)
    rows = [
        (path.name, "start" if beta is None else f"{1 - beta:.4f} added") for path, beta in zip(paths, [None, *keep])
    ]
    output.write(lora, "average", rows)


COMMANDS = {"info": info, "merge": merge, "resize": resize, "extract": extract, "ema": ema}


def main() -> None:
    command, *words = sys.argv[1:] or ["--help"]
    if command in ("-h", "--help"):
        print(__doc__)
        return
    if command not in COMMANDS:
        raise UserError(f"unknown command {command}{did_you_mean(command, list(COMMANDS))}; {', '.join(COMMANDS)}")
    words = expanded(words)
    COMMANDS[command](["--path", *words] if words and not words[0].startswith("-") else words)


def expanded(words: list[str]) -> list[str]:
    """Patterns such as out/*.safetensors as the files they mean, because the shells of Windows leave them as typed."""
    files: list[str] = []
    for word in words:
        folder, pattern = Path(word).parent, Path(word).name
        matches = sorted(map(str, folder.glob(pattern))) if "*" in pattern else []
        files += matches or [word]
    return files


if __name__ == "__main__":
    run_script(main)
