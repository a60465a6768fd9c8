"""Metadata of trained files: kohya's `ss_*` keys and ModelSpec's `modelspec.*` keys.

Sources: kohya-ss/sd-scripts and musubi-tuner for the names of keys, https://github.com/Stability-AI/ModelSpec for
`modelspec.*`. Of the options only those listed here are written, so that no token or API key can get into a file.
`networks.files.lora_files` adds the hashes (`sshs_*`).
"""

import dataclasses
import datetime
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from utils.cli import option
from utils.errors import UserError

ARCHITECTURE = "hunyuan-video"
IMPLEMENTATION = "https://github.com/Tencent/HunyuanVideo"
BASE_MODEL_VERSION = "hunyuan_video"
RESOLUTION = "1280,720"
# Other programs need these to use a file; they are written even with --no_metadata.
MINIMUM_KEYS = ("ss_base_model_version", "ss_network_module", "ss_network_dim", "ss_network_alpha", "ss_network_args")
_OPTION_NAMES = (
    "output_name learning_rate gradient_checkpointing gradient_checkpointing_cpu_offload gradient_accumulation_steps "
    "network_module network_dropout training_comment max_grad_norm scale_weight_norms fp8_base guidance_scale "
    "timestep_sampling discrete_flow_shift sigmoid_scale weighting_scheme logit_mean logit_std mode_scale min_timestep "
    "max_timestep preserve_distribution_shape num_timestep_buckets trainable_modules full_fp16 full_bf16"
)

# The values that are written for options that this training script does not have.
_OF_OTHER_SCRIPTS = {
    "gradient_checkpointing_cpu_offload": False,
    "training_comment": None,
    "preserve_distribution_shape": False,
    "num_timestep_buckets": None,
}


@dataclass(frozen=True, kw_only=True)
class MetadataOptions:
    """metadata"""

    no_metadata = False  # an option of LoRA training only

    metadata_title: str | None = option(None, help="title; unset: --output_name")
    metadata_author: str | None = option(None, help="author")
    metadata_description: str | None = option(None, help="description")
    metadata_license: str | None = option(None, help="license")
    metadata_tags: str | None = option(None, help="tags, separated by commas")

    @property
    def architecture(self) -> str:
        return ARCHITECTURE

    @property
    def resolution(self) -> str:
        """`WIDTHxHEIGHT`."""
        return RESOLUTION.replace(",", "x")


@dataclass(frozen=True, kw_only=True)
class LoraMetadataOptions(MetadataOptions):
    """metadata"""

    no_metadata: bool = option(False, help="write only the metadata that other programs need to use the file")
    training_comment: str | None = option(None, help="any text, stored as ss_training_comment")
    metadata_reso: str | None = option(None, help=f"resolution, such as 1280,720 or 1024; unset: {RESOLUTION}")
    metadata_arch: str | None = option(None, help=f"architecture; unset: {ARCHITECTURE}/lora")

    def __post_init__(self) -> None:
        if not re.fullmatch(r"\d+([,x]\d+)?", self.metadata_reso or "1024"):
            raise UserError(f"--metadata_reso {self.metadata_reso}: WIDTH,HEIGHT or one number is expected")

    @property
    def architecture(self) -> str:
        return self.metadata_arch or f"{ARCHITECTURE}/lora"

    @property
    def resolution(self) -> str:
        width, _, height = (self.metadata_reso or RESOLUTION).replace("x", ",").partition(",")
        return f"{width}x{height or width}"


@dataclass(frozen=True, kw_only=True)
class RunFacts:
    """Facts about a training run that are not options; each checkpoint gets its own with the current values.

    A field becomes the key `ss_{name}`, a number in `validation` the key `ss_validation_{name}`. `network_args` is None
    where no network is trained; then the fields `network_*` are left out. Times are seconds since 1970.
    """

    session_id: int
    training_started_at: float
    training_finished_at: float
    num_train_items: int
    num_batches_per_epoch: int
    num_epochs: int
    max_train_steps: int
    steps: int
    epoch: int
    seed: int
    optimizer: str
    lr_scheduler: str
    lr_warmup_steps: int
    mixed_precision: str
    datasets: Any
    sd_model_name: str | None
    vae_name: str | None
    network_dim: int | str | None = None
    network_alpha: float | str | None = None
    network_args: Mapping[str, str] | None = None
    validation: Mapping[str, float] = dataclasses.field(default_factory=dict)


def checkpoint_metadata(facts: RunFacts, options: MetadataOptions, *groups: Any, title: str) -> dict[str, str]:
    """All metadata of a trained file, except the hashes of a LoRA.

    Args:
        facts: facts about the run.
        options: the metadata options.
        groups: the other groups of options of the run.
        title: the title if the options have none.
    """
    settings = {field.name: getattr(group, field.name) for group in groups for field in dataclasses.fields(group)}
    training = training_metadata(facts, settings | dataclasses.asdict(options))
    if options.no_metadata:
        training = {key: value for key, value in training.items() if key in MINIMUM_KEYS}
    window = settings.get("min_timestep"), settings.get("max_timestep")
    return training | modelspec_metadata(options, title, facts.training_finished_at, window)


def training_metadata(facts: RunFacts, settings: Mapping[str, Any]) -> dict[str, str]:
    """The `ss_*` keys; of `settings` (options by name) only those in _OPTION_NAMES are used."""
    values = {"full_fp16": False, "full_bf16": False}
    settings = _OF_OTHER_SCRIPTS | settings
    values |= {name: settings[name] for name in _OPTION_NAMES.split() if name in settings}
    values |= {field.name: getattr(facts, field.name) for field in dataclasses.fields(facts)}
    values |= {f"validation_{name}": value for name, value in values.pop("validation").items()}
    if facts.network_args is None:
        values = {name: value for name, value in values.items() if not name.startswith("network_")}
    for name in values.keys() & {"network_args", "datasets", "trainable_modules"}:
        values[name] = json.dumps(values[name], ensure_ascii=False)
    for name in ("sd_model_name", "vae_name"):
        values[name] = values[name] and Path(values[name]).name
    values["base_model_version"] = BASE_MODEL_VERSION
    return {f"ss_{name}": str(value) for name, value in values.items()}


def modelspec_metadata(
    options: MetadataOptions, title: str, timestamp: float, timesteps: Sequence[int | None] = (None, None)
) -> dict[str, str]:
    """The `modelspec.*` keys of a LoRA or of a fine-tuned model."""
    date = datetime.datetime.fromtimestamp(int(timestamp), datetime.UTC)
    low, high = timesteps
    values = {
        "sai_model_spec": "1.0.0",
        "architecture": options.architecture,
        "implementation": IMPLEMENTATION,
        "title": options.metadata_title or title,
        "date": date.isoformat(),
        "resolution": options.resolution,
        "author": options.metadata_author,
        "description": options.metadata_description,
        "license": options.metadata_license,
        "tags": options.metadata_tags,
        "timestep_range": None if low is None and high is None else f"{low or 0},{high or 1000}",
    }
    return {f"modelspec.{name}": value for name, value in values.items() if value is not None}
