"""The options of each command of lora_tool.py. Nothing heavy is imported here: wrong options are reported at once."""

from dataclasses import dataclass
from pathlib import Path

from networks.files.format_table import FORMATS, MAX_MULTIPLIER
from utils.cli import one_value_each, option
from utils.dtype_names import DTYPE_NAMES
from utils.errors import UserError
from utils.files import require_output, require_suffix


@dataclass(frozen=True, kw_only=True)
class _InputOptions:
    path: list[Path] = option(
        [], help="LoRA files of any format; --path may be left out if they come before all options", path="file"
    )

    def __post_init__(self) -> None:
        if not self.path:
            raise UserError("no LoRA file is given")

    def require_one(self) -> None:
        if len(self.path) > 1:
            raise UserError(f"one LoRA file is expected, {len(self.path)} are given")


@dataclass(frozen=True, kw_only=True)
class _OutputOptions:
    output_file: Path = option(help="LoRA file to write")
    target: str | None = option(None, help="format of the output; unset: that of the first input", choices=[*FORMATS])
    dtype: str | None = option(None, help="dtype of the output; unset: that of the input", choices=DTYPE_NAMES)

    def require_output(self, inputs: list[Path]) -> None:
        require_suffix("--output_file", self.output_file, ".safetensors")
        require_output("--output_file", self.output_file, inputs)


@dataclass(frozen=True, kw_only=True)
class InfoOptions(_InputOptions):
    """info: ranks, alphas, norms and training metadata"""

    png: Path | None = option(None, help="draw the norm of every module into this PNG")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.png is not None:
            require_output("--png", self.png, self.path)
        self.require_one()


@dataclass(frozen=True, kw_only=True)
class MergeOptions(_OutputOptions, _InputOptions):
    """merge: the weighted sum of several LoRAs as one LoRA"""

    multiplier: list[float] = option(
        [], help="one per file, or one for all; 1.0 when omitted", minimum=-MAX_MULTIPLIER, maximum=MAX_MULTIPLIER
    )
    rank: int | None = option(
        None, help="reduce the sum to this rank by SVD; if unset the sum is exact and ranks add up", minimum=1
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_output(self.path)
        self.multipliers()  # checks their number

    def multipliers(self) -> list[float]:
        """One multiplier per file.

        Raises:
            UserError: their number does not fit.
        """
        return one_value_each("--multiplier", self.multiplier, len(self.path), "files")


@dataclass(frozen=True, kw_only=True)
class ResizeOptions(_OutputOptions, _InputOptions):
    """resize: lower ranks by SVD"""

    rank: int | None = option(None, help="largest rank of a module", minimum=1)
    energy: float = option(1.0, help="share of a module's squared norm that must be kept", minimum=0, maximum=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_output(self.path)
        self.require_one()


@dataclass(frozen=True, kw_only=True)
class ExtractOptions(_OutputOptions):
    """extract: the difference of two DiTs as a LoRA"""

    base: Path = option(help="DiT checkpoint before fine-tuning", path="any")
    tuned: Path = option(help="fine-tuned DiT checkpoint", path="any")
    rank: int = option(32, help="largest rank of a module", minimum=1)
    energy: float = option(1.0, help="share of a module's squared norm that must be kept", minimum=0, maximum=1)

    def __post_init__(self) -> None:
        self.require_output([self.base, self.tuned])


@dataclass(frozen=True, kw_only=True)
class EmaOptions(_OutputOptions, _InputOptions):
    """ema: the moving average of checkpoints of one training"""

    no_sort: bool = option(False, help="take the files in the given order instead of sorting by modification time")
    beta: float = option(0.95, help="decay: how much of the average is kept when a file is added", minimum=0, maximum=1)
    beta2: float | None = option(None, help="last decay; decays go linearly from --beta to it", minimum=0, maximum=1)
    sigma_rel: float | None = option(
        None, help="power-function average of this relative width, instead of --beta", minimum=0.001, maximum=0.28
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_output(self.path)
        if len(self.path) < 2:
            raise UserError("ema: two files or more are expected")


COMMANDS = {
    "info": InfoOptions,
    "merge": MergeOptions,
    "resize": ResizeOptions,
    "extract": ExtractOptions,
    "ema": EmaOptions,
}
