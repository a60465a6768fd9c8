"""Merges LoRAs of any format into a DiT file, one tensor at a time: memory holds one tensor and the LoRAs.

Before: hv_train_network.py wrote a LoRA. After: the merged file is a DiT for hv_generate_video.py, ComfyUI, ...

    python merge_lora.py --dit dit.safetensors --lora_weight lora.safetensors --save_merged_model merged.safetensors
"""

from dataclasses import dataclass
from pathlib import Path

from networks.files.format_table import MAX_MULTIPLIER
from utils.cli import one_value_each, option, parse_options, print_table, run_script
from utils.dtype_names import DTYPE_NAMES
from utils.errors import UserError
from utils.files import require_output, require_suffix


@dataclass(frozen=True, kw_only=True)
class MergeOptions:
    """merging"""

    dit: Path = option(help="DiT checkpoint in any layout, also fp8", path="any")
    dit_in_channels: int | None = option(None, help="input channels of the DiT; must agree with the file", minimum=1)
    lora_weight: list[Path] = option([], help="LoRA, LoHa or LoKr files in any format", path="file")
    lora_multiplier: list[float] = option(
        [],
        help="one per --lora_weight, or one for all; 1.0 when omitted",
        minimum=-MAX_MULTIPLIER,
        maximum=MAX_MULTIPLIER,
    )
    save_merged_model: Path = option(help="file to write (.safetensors)")
    exclude_single_blocks: bool = option(False, help="do not apply LoRAs to the single blocks")
    dtype: str | None = option(None, help="dtype of the output; unset: that of the checkpoint", choices=DTYPE_NAMES)
    fp8: bool = option(
        False,
        help="write the weights of all Linear layers as fp8 with scales, for every ComfyUI; for this repository's "
        "scripts, write bfloat16 instead and give them --fp8 or --fp8_base, which keep modulation exact",
    )
    device: str | None = option(None, help="device that computes; CUDA if available, else the CPU")

    def __post_init__(self) -> None:
        self.loras()  # checks the number of multipliers
        require_suffix("--save_merged_model", self.save_merged_model, ".safetensors")
        require_output("--save_merged_model", self.save_merged_model, [self.dit, *self.lora_weight])

    def loras(self) -> list[tuple[Path, float]]:
        """The LoRA files with their multipliers.

        Raises:
            UserError: the number of multipliers does not fit.
        """
        files = self.lora_weight
        multipliers = one_value_each("--lora_multiplier", self.lora_multiplier, len(files), "--lora_weight")
        return list(zip(files, multipliers, strict=True))


def main() -> None:
    (options,) = parse_options(__doc__, MergeOptions)

    from hunyuan_model.checkpoints import read_dit_config
    from networks.files.merged_files import merge_files
    from utils.device_utils import DTYPES, resolve_device

    device = resolve_device(options.device)
    channels = read_dit_config(options.dit).in_channels
    if options.dit_in_channels not in (None, channels):
        raise UserError(f"--dit_in_channels {options.dit_in_channels}: {options.dit} has {channels} input channels")
    reports = merge_files(
        options.dit,
        options.loras(),
        options.save_merged_model,
        dtype=None if options.dtype is None else DTYPES[options.dtype],
        fp8=options.fp8,
        device=device,
        exclude_single_blocks=options.exclude_single_blocks,
    )
    for report in reports:
        report.announce()
    size = options.save_merged_model.stat().st_size / 1e9
    print_table("merge", [("DiT", options.dit), ("written", f"{options.save_merged_model} ({size:.2f} GB)")])


if __name__ == "__main__":
    run_script(main)
