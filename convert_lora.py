"""Stage 5: converts a LoRA between the formats of all programs that use HunyuanVideo, on a CPU, without a model.

Before: hv_train_network.py wrote a native file. After: the output is loaded by ComfyUI, diffusers, OneTrainer, ...

    python convert_lora.py --input lora.safetensors --output lora_comfy.safetensors --target other --verify
    python convert_lora.py --input pytorch_lora_weights.safetensors --output lora.safetensors --target default
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from networks.files.format_table import FORMATS, Format
from utils.cli import option, parse_options, print_table, run_script
from utils.dtype_names import DTYPE_NAMES
from utils.errors import UserError
from utils.files import require_output, require_suffix


@dataclass(frozen=True, kw_only=True)
class ConvertOptions:
    """conversion"""

    input: Path = option(help="LoRA file of any format", path="file")
    output: Path = option(help="LoRA file to write")
    target: str = option(
        help="format to write: default is this trainer's own; ComfyUI loads other completely", choices=[*FORMATS]
    )
    diffusers_prefix: str | None = option(
        None, help="prefix of module names instead of that of the target, for example diffusion_model; '' for none"
    )
    rank: int | None = option(None, help="reduce every module to at most this rank by SVD", minimum=1)
    dtype: str | None = option(None, help="dtype of the output; unset: that of the input", choices=DTYPE_NAMES)
    verify: bool = option(False, help="read the output again and compare the dW of every module with the input")
    allow_partial: bool = option(False, help="leave out keys that belong to no module of the DiT, instead of stopping")

    def __post_init__(self) -> None:
        require_output("--output", self.output, [self.input])
        require_suffix("--output", self.output, ".safetensors")
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

    from networks.conversion import convert_file
    from utils.device_utils import DTYPES

    rows = convert_file(
        options.input,
        options.output,
        options.format,
        rank=options.rank,
        dtype=None if options.dtype is None else DTYPES[options.dtype],
        verify=options.verify,
        allow_partial=options.allow_partial,
    )
    print_table("conversion", rows)


if __name__ == "__main__":
    run_script(main)
