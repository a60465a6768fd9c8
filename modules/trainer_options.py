"""The options that every training script has, whatever it trains. Importing this module does not import torch."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from modules.optimizers import OptimizerOptions
from modules.schedulers import SchedulerOptions
from modules.timestep_sampling import TimestepOptions
from utils.cli import parse_options, settings_toml
from utils.errors import UserError
from utils.huggingface_utils import HuggingFaceOptions, download_state
from utils.metadata import MetadataOptions
from utils.option_groups import require
from utils.prompt_files import PREVIEW_DEFAULTS, Request, read_prompt_file, with_valid_size
from utils.training_files import TrainingFiles, find_state
from utils.training_options import (
    DatasetOptions,
    DistributedOptions,
    LogOptions,
    PreviewOptions,
    SaveOptions,
    TrainingOptions,
    ValidationOptions,
)


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
        """The prompts of --sample_prompts, with sizes that the model has."""
        if self.previews.sample_prompts is None:
            return []
        return [with_valid_size(r)[0] for r in read_prompt_file(self.previews.sample_prompts, PREVIEW_DEFAULTS)]

    def ignored(self) -> list[str]:
        """Names of the options that were changed but have no effect."""
        own_rate = self.optimizer.adapts_own_rate
        return [*self.timesteps.ignored(), *self.optimizer.ignored(), *self.scheduler.ignored(own_rate)]

    def settings(self, seed: int) -> str:
        """All settings as TOML that --config_file takes, with the seed that was drawn; secrets are left out."""
        seeded = dataclasses.replace(self, training=dataclasses.replace(self.training, seed=seed))
        return settings_toml(*vars(seeded).values())
