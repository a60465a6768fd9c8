"""Writes checkpoints and states under the names of `modules.training.files`, and removes the old ones."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from modules.training.denoiser import Trained
from modules.training.files import TrainingFiles
from modules.training.huggingface_utils import Uploader
from modules.training.optimizers import averaged_weights
from modules.training.state import Progress, save_state
from modules.training.training_options import SaveOptions
from utils.errors import UserError, one_line
from utils.files import write_text


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns the failure of a write into one line; what was there before is still there."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{path}: cannot be written: {one_line(error)}; the files before it are intact: "
            "make room and continue with --resume auto"
        ) from error


class CheckpointSaver:
    """Saves on the main process; the others wait.

    Args:
        stateful: optimizer, scheduler, ... by name: objects with `state_dict()`.
        settings: the run's resolved settings, as TOML.
        keep_best: how many checkpoints of the best validation losses are kept.
        metadata: of a checkpoint.
        extra_formats: writes the other layouts of a saved file and returns their paths.
        uploader: is given each written path (a file, or a state's folder).
    """

    def __init__(
        self,
        files: TrainingFiles,
        options: SaveOptions,
        dtype: torch.dtype,
        accelerator: Accelerator,
        trained: Trained,
        stateful: Mapping[str, Any],
        settings: str,
        keep_best: int,
        metadata: Callable[[Progress], Mapping[str, str]],
        extra_formats: Callable[[Path], Sequence[Path]],
        uploader: Uploader,
    ) -> None:
        self.files, self.options, self.dtype, self.accelerator = files, options, dtype, accelerator
        self.trained, self.stateful, self.settings, self.keep_best = trained, stateful, settings, keep_best
        self.metadata, self.extra_formats, self.uploader = metadata, extra_formats, uploader
        self.written: list[Path] = []

    def save(self, stem: str, progress: Progress, state: bool) -> None:
        """Writes {stem}.safetensors with the settings beside it, and with `state` the folder to resume from.

        Raises:
            UserError: the weights are not finite, or the disk is full.
        """
        if self.accelerator.is_main_process:
            # The state comes second: schedule-free optimizers change the weights on their way to the average and back.
            with averaged_weights(self.stateful["optimizer"]):
                self._save_checkpoint(stem, progress)
            if state:
                self._save_state(stem, progress)
        self.accelerator.wait_for_everyone()

    def save_epoch(self, epoch: int, progress: Progress) -> None:
        """The checkpoint of an epoch (from 1), then rotation."""
        options = self.options
        self.save(self.files.of_epoch(epoch), progress, options.save_state)
        kept = options.save_last_n_epochs
        kept_states = options.save_last_n_epochs_state or kept
        every = options.save_every_n_epochs
        self._rotate("epoch", kept and epoch - every * kept + 1, kept_states and epoch - every * kept_states + 1)

    def save_step(self, progress: Progress, with_state: bool = False) -> None:
        """The checkpoint of a step, and its state if that is wanted now or always, then rotation."""
        options = self.options
        self.save(self.files.of_step(progress.step), progress, with_state or options.save_state)
        kept = options.save_last_n_steps
        kept_states = options.save_last_n_steps_state or kept
        self._rotate("step", kept and progress.step - kept, kept_states and progress.step - kept_states)

    def save_best(self, progress: Progress) -> None:
        """Keeps this step's checkpoint if its validation loss is among the best."""
        ranked = sorted([*progress.best, (progress.validation_loss, progress.step)])
        progress.best, dropped = ranked[: self.keep_best], ranked[self.keep_best :]
        if any(step == progress.step for _, step in progress.best):
            self.save(self.files.best_of_step(progress.step), progress, state=False)
        for _, step in dropped if self.accelerator.is_main_process else []:
            self.files.remove_best(step)

    def _rotate(self, kind: str, oldest_kept: int | None, oldest_state_kept: int | None) -> None:
        if not self.accelerator.is_main_process:
            return
        if oldest_kept is not None:
            self.files.remove_checkpoints(kind, oldest_kept)
        if oldest_state_kept is not None:
            self.files.remove_states(kind, oldest_state_kept)

    def _save_checkpoint(self, stem: str, progress: Progress) -> None:
        for name, tensor in self.trained.tensors.items():
            if not torch.isfinite(tensor).all():
                raise UserError(f"step {progress.step}: {name} is not finite, so nothing was written; lower the rate")
        path = self.files.folder / f"{stem}.safetensors"
        with writing(path):
            self.trained.save(path, self.dtype, self.metadata(progress))
            write_text(self.files.settings(stem), self.settings)
            paths = [path, *self.extra_formats(path)]
        self.written += [written for written in paths if written not in self.written]
        for written in paths:
            self.uploader.upload(written)

    def _save_state(self, stem: str, progress: Progress) -> None:
        folder = self.files.state(stem)
        with writing(folder):
            save_state(folder, progress, self.trained.tensors, self.stateful, self.settings)
        self.uploader.upload(folder)
