"""The options that every training script has, whatever it trains. Importing this module does not import torch."""

import dataclasses
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from modules.generation.requests import PREVIEW_DEFAULTS, Request, read_prompt_file, with_valid_size
from modules.options import require
from modules.training.files import TrainingFiles, find_state
from modules.training.huggingface_utils import HuggingFaceOptions, download_state
from modules.training.optimizers import OptimizerOptions
from modules.training.schedulers import SchedulerOptions
from modules.training.timesteps import TimestepOptions
from modules.training.training_options import (
    DatasetOptions,
    DistributedOptions,
    LogOptions,
    PreviewOptions,
    SaveOptions,
    TrainingOptions,
    ValidationOptions,
)
from networks.files.metadata import MetadataOptions
from utils.cli import parse_options, settings_toml, unused_options
from utils.errors import UserError
from utils.processes import process_share


@dataclass(frozen=True)
class TrainerOptions:
    """Groups of options; a script's own groups are the fields of a subclass."""

    dataset: DatasetOptions
    training: TrainingOptions
    optimizer: OptimizerOptions
    scheduler: SchedulerOptions
    timesteps: TimestepOptions
    save: SaveOptions
    validation: ValidationOptions
    previews: PreviewOptions
    metadata: MetadataOptions
    hub: HuggingFaceOptions
    log: LogOptions
    distributed: DistributedOptions

    @classmethod
    def parse(cls, description: str, argv: Sequence[str] | None = None) -> Self:
        return cls(*parse_options(description, *[group.type for group in dataclasses.fields(cls)], argv=argv))

    def check(self) -> None:
        """What the options need of each other.

        Raises:
            UserError: an option is missing.
        """
        require(self.dataset, "dataset_config")
        require(self.save, "output_dir", "output_name")

    @property
    def saved_dtype(self) -> str:
        """Of checkpoints, in a word."""
        return self.save.save_precision or "float32"

    @property
    def files(self) -> TrainingFiles:
        return TrainingFiles(self.save.output_dir, self.save.output_name)

    def find_state(self) -> Path | None:
        """The state that --resume means, on this machine or on the Hugging Face Hub."""
        if not self.hub.resume_from_huggingface:
            return find_state(self.save.resume, self.files)
        if self.save.resume is None:
            raise UserError("--resume_from_huggingface needs --resume user/name/folder")
        return find_state(str(download_state(self.save.resume, self.hub)), self.files)

    def preview_requests(self) -> list[Request]:
        """The prompts of --sample_prompts, with sizes that the model has.

        Raises:
            UserError: the file is wrong, or asks for what previews cannot do.
        """
        path = self.previews.sample_prompts
        requests = []
        for number, asked in enumerate(read_prompt_file(path, PREVIEW_DEFAULTS) if path is not None else [], start=1):
            if asked.image_path is not None or asked.video_path is not None:
                raise UserError(f"{path}: prompt {number}: previews start from no image or video; take that out")
            request, warnings = with_valid_size(asked)
            for warning in warnings if process_share()[0] == 0 else []:
                print(f"warning: {path}: prompt {number}: {warning}", file=sys.stderr)
            requests.append(request)
        return requests

    def ignored(self, validates: bool) -> list[str]:
        """Names of the options that were changed but have no effect; `validates`: there is a validation set."""
        return [
            *self.timesteps.ignored(),
            *self.optimizer.ignored(),
            *self.scheduler.ignored(self.optimizer.adapts_own_rate),
            *self.save.ignored(),
            *unused_options(self.validation, {"validate_every_n_steps": validates, "keep_best": validates}),
        ]

    def settings(self, seed: int) -> str:
        """All settings as TOML that --config_file takes, with the seed that was drawn; secrets are left out."""
        seeded = dataclasses.replace(self, training=dataclasses.replace(self.training, seed=seed))
        return settings_toml(*vars(seeded).values())
