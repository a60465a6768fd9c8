"""Stage 5: converts a LoRA between the formats of all programs that use HunyuanVideo, on a CPU, without a model.

Before: hv_train_network.py wrote a native file. After: the output is loaded by ComfyUI, diffusers, OneTrainer, ...

    python convert_lora.py --input lora.safetensors --output lora_comfy.safetensors --target other --verify
    python convert_lora.py --input pytorch_lora_weights.safetensors --output lora.safetensors --target default
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from networks.files.format_table import FORMATS, Format
from utils.cli import option, parse_options, print_table, run_script
from utils.dtype_names import DTYPE_NAMES
from utils.errors import UserError
from utils.files import atomic_path, refuse_overwriting

if TYPE_CHECKING:
    from networks.files.formats import LoraWeights


@dataclass(frozen=True, kw_only=True)
class ConvertOptions:
    """conversion"""

    input: Path = option(help="LoRA file of any format", path="file")
    output: Path = option(help="LoRA file to write")
    target: str = option(
        help="format to write; default is the native one, other is safe for ComfyUI", choices=[*FORMATS]
    )
    diffusers_prefix: str | None = option(
        None, help="prefix of the module names instead of the target's, such as diffusion_model, or '' for none"
    )
    rank: int | None = option(None, help="reduce every module to at most this rank by SVD", minimum=1)
    dtype: str | None = option(None, help="dtype of the output; that of the input if unset", choices=DTYPE_NAMES)
    verify: bool = option(False, help="read the output again and compare what every module does to its weight")
    allow_partial: bool = option(False, help="leave out keys that belong to no module instead of stopping")

    def __post_init__(self) -> None:
        refuse_overwriting("--output", self.output, [self.input])
        if self.output.suffix != ".safetensors":
            raise UserError(f"--output {self.output}: a name that ends in .safetensors is expected")
        if self.diffusers_prefix is not None and self.format.flat:
            raise UserError(f"--diffusers_prefix: --target {self.target} has no prefix to choose; --target other has")

    @property
    def format(self) -> Format:
        target = FORMATS[self.target]
        if self.diffusers_prefix is None:
            return target
        prefix = self.diffusers_prefix.rstrip(".")
        return dataclasses.replace(target, prefix=prefix and f"{prefix}.")


def main() -> None:
    (options,) = parse_options(__doc__, ConvertOptions)

    from networks.files.coverage import coverage
    from networks.files.formats import read_lora, write_lora
    from networks.lora_ops import reduce_rank
    from utils.device_utils import DTYPES

    lora = read_lora(options.input, options.allow_partial)
    source = lora.format
    if options.rank is not None:
        lora = reduce_rank(lora, options.rank)
    dtype = None if options.dtype is None else DTYPES[options.dtype]
    with atomic_path(options.output) as temporary:
        tensors = write_lora(lora, temporary, options.format, dtype)
        verified = [("verified", verify(lora, temporary, options))] if options.verify else []
    rows = [
        ("input", f"{options.input}: {source.title}"),
        ("output", f"{options.output}: {options.format.title}, {len(lora.modules)} modules, {len(tensors)} keys"),
    ]
    if lora.leftover:
        rows.append(("left out", f"{len(lora.leftover)} keys, such as {lora.leftover[0]}"))
    rows += verified
    for program, (loaded, total) in coverage(tensors, options.format).items():
        rows.append((program, f"{loaded} of {total} modules will load"))
    print_table("conversion", rows)


def verify(lora: "LoraWeights", written: Path, options: ConvertOptions) -> str:
    """Compares the written file with what was to be written.

    Raises:
        UserError: it differs by more than the rounding of its dtype.
    """
    import torch

    from networks.comparison import worst_difference
    from networks.files.formats import from_tensors
    from utils.safetensors_utils import load_file, read_header

    output = str(options.output)
    again = from_tensors(load_file(written), read_header(written)[1], output, format_=options.format)
    difference, name = worst_difference(lora, again, output)
    coarsest = max(torch.finfo(t.dtype).eps for f in again.modules.values() for t in f.tensors().values())
    # Both factors are rounded, and alpha / rank is folded into one of them.
    if difference > max(1e-6, 2 * coarsest):
        raise UserError(f"{output}: dW of {name} differs by {difference:.1e} (relative); not written")
    return f"dW of all {len(lora.modules)} modules is equal: relative difference at most {difference:.1e} ({name})"


if __name__ == "__main__":
    run_script(main)
