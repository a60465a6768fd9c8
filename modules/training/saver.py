"""Writes checkpoints and states under the names of `modules.training.files`, removes old ones, uploads new ones."""

import contextlib
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
from accelerate import Accelerator

from dataset.image_video_dataset import TrainingDataset
from modules.training.denoiser import Trained
from modules.training.files import HuggingFaceOptions
from modules.training.optimizers import averaged_weights
from modules.training.options import TrainerOptions
from modules.training.state import Progress, save_state
from modules.training.step_plan import StepPlan
from networks.files.metadata import RunFacts, checkpoint_metadata
from utils.errors import UserError, one_line
from utils.files import write_text


def without_folders(settings: Any) -> Any:
    """Settings of datasets with the names of files and folders instead of their paths, which concern nobody else."""
    if isinstance(settings, list):
        return [without_folders(value) for value in settings]
    if not isinstance(settings, dict):
        return settings
    return {
        key: re.split(r"[\\/]", value.rstrip("\\/"))[-1]
        if isinstance(value, str) and key.endswith(("_directory", "_file"))
        else without_folders(value)
        for key, value in settings.items()
    }


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns a failed write into one line; files that were complete before stay complete."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{path}: cannot be written: {error.strerror or one_line(error)}; the files before it are intact: "
            "make room and continue with --resume auto"
        ) from error


class Uploader:
    """Uploads files and folders to the Hugging Face Hub, one after another; with --async_upload in the background.

    A failed upload is a warning and does not end the training: the files are on disk.
    """

    def __init__(self, options: HuggingFaceOptions) -> None:
        """Creates the repository if it does not exist.

        Raises:
            UserError: the Hub refuses, for example because of the token.
        """
        self.options = options
        self.failures: list[Path] = []
        self._pool = ThreadPoolExecutor(1) if options.async_upload else None
        self._api = self._open_repository() if options.huggingface_repo_id is not None else None

    def _open_repository(self) -> "huggingface_hub.HfApi":
        options = self.options
        try:
            huggingface_hub.utils.disable_progress_bars()
            api = huggingface_hub.HfApi(token=options.huggingface_token)
            api.create_repo(
                options.huggingface_repo_id,
                repo_type=options.huggingface_repo_type,
                private=options.huggingface_repo_visibility != "public",
                exist_ok=True,
            )
        except Exception as error:  # the library passes on the errors of several HTTP and file libraries
            raise UserError(
                f"--huggingface_repo_id {options.huggingface_repo_id}: {options.message_of(error)}"
            ) from None
        return api

    def upload(self, path: Path) -> None:
        """Uploads a file under its own name, and the folder of a state with --save_state_to_huggingface."""
        if self._api is None or (path.is_dir() and not self.options.save_state_to_huggingface):
            return
        if self._pool is None:
            self._send(path)
        else:
            self._pool.submit(self._send, path)

    def close(self) -> None:
        """Waits for uploads in the background, and lists those that failed."""
        if self._pool is not None:
            self._pool.shutdown(wait=True)
        if self.failures:
            print(f"warning: on disk but not uploaded: {', '.join(map(str, self.failures))}", file=sys.stderr)

    def _send(self, path: Path) -> None:
        options = self.options
        target = "/".join(part for part in (options.huggingface_path_in_repo, path.name) if part).strip("/")
        place: dict[str, Any] = {
            "repo_id": options.huggingface_repo_id,
            "repo_type": options.huggingface_repo_type,
            "path_in_repo": target,
            "commit_message": f"Upload {path.name}",
        }
        try:
            if path.is_dir():
                self._api.upload_folder(folder_path=path, **place)
            else:
                self._api.upload_file(path_or_fileobj=path, **place)
        except Exception as error:  # no error of the library, the network or the file system may end a run
            self.failures.append(path)
            print(f"warning: not uploaded: {path}: {options.message_of(error)}", file=sys.stderr)


class CheckpointSaver:
    """Writes checkpoints and states on the main process, while the other processes wait.

    Args:
        progress: the counters of the run, which the trainer advances.
        train_set: what the run trains on, for the metadata.
        stateful: optimizer, scheduler, ... by name: objects with `state_dict()`.
        uploader: is given every file and every state folder that is written.
    """

    def __init__(
        self,
        options: TrainerOptions,
        accelerator: Accelerator,
        plan: StepPlan,
        progress: Progress,
        train_set: TrainingDataset,
        trained: Trained,
        stateful: Mapping[str, Any],
        uploader: Uploader,
    ) -> None:
        self.options, self.accelerator, self.plan, self.progress = options, accelerator, plan, progress
        self.train_set, self.trained, self.stateful, self.uploader = train_set, trained, stateful, uploader
        self.files, self.settings = options.files, options.settings(progress.seed)
        self.written: list[Path] = []

    def save(self, stem: str, state: bool) -> None:
        """Writes the checkpoint {stem}.safetensors with its settings, and the state {stem}-state if `state` is set.

        Raises:
            UserError: the weights are not finite, or a file cannot be written.
        """
        if self.accelerator.is_main_process:
            self.write(stem, state)
        self.accelerator.wait_for_everyone()

    def write(self, stem: str, state: bool) -> None:
        """As `save`, on this process alone."""
        # Before the state, because `averaged_weights` changes schedule-free optimizers and then restores them.
        with averaged_weights(self.stateful["optimizer"]):
            self._save_checkpoint(stem)
        if state:
            self._save_state(stem)

    def command(self) -> str:
        """The command line that continues from the state of the current step."""
        stem, accelerator, given = self.files.of_step(self.progress.step), self.accelerator, self.options.precision
        launch = ["accelerate", "launch", "--num_processes", str(accelerator.num_processes)]
        words = ["python"] if accelerator.num_processes == 1 else launch
        words += [sys.argv[0] if Path(sys.argv[0]).name == self.options.script else self.options.script]
        words += ["--config_file", str(self.files.settings(stem)), "--resume", str(self.files.state(stem))]
        if given.mixed_precision is None:  # it came from accelerate launch
            words += ["--mixed_precision", accelerator.mixed_precision]
        return subprocess.list2cmdline(words) if os.name == "nt" else shlex.join(words)

    def save_epoch(self, epoch: int) -> None:
        """Saves after an epoch (from 1), then removes what --save_last_n_epochs has just ceased to keep."""
        options = self.options.save
        self.save(self.files.of_epoch(epoch), options.save_state)
        every, kept = options.save_every_n_epochs, options.save_last_n_epochs
        kept_states = options.save_last_n_epochs_state or kept
        self._remove_old("epoch", every, kept and epoch - every * kept, kept_states and epoch - every * kept_states)

    def save_step(self, with_state: bool = False) -> None:
        """Saves after a step, then removes what --save_last_n_steps has just ceased to keep.

        Args:
            with_state: save the state also without --save_state.
        """
        options, step = self.options.save, self.progress.step
        self.save(self.files.of_step(step), with_state or options.save_state)
        kept = options.save_last_n_steps
        kept_states = options.save_last_n_steps_state or kept
        every = options.save_every_n_steps
        self._remove_old("step", every, kept and step - kept - 1, kept_states and step - kept_states - 1)

    def save_best(self) -> None:
        """Saves after a validation if its loss is among the --keep_best lowest, and removes what no longer is."""
        progress, keep = self.progress, self.options.validation.keep_best
        ranked = sorted([*progress.best, (progress.validation_loss, progress.step)])
        progress.best, dropped = ranked[:keep], ranked[keep:]
        if any(step == progress.step for _, step in progress.best):
            self.save(self.files.best_of_step(progress.step), state=False)
        for _, step in dropped if self.accelerator.is_main_process else []:
            self.files.remove_best(step)

    def _remove_old(self, kind: str, every: int, newest: int | None, newest_state: int | None) -> None:
        """Removes what has become too old since the save before: the last `every` numbers up to `newest`.

        Older files stay. They are those of a run without the limit, and nobody asked for their removal.
        """
        if not self.accelerator.is_main_process:
            return
        if newest is not None:
            self.files.remove_checkpoints(kind, range(newest - every + 1, newest + 1))
        if newest_state is not None:
            self.files.remove_states(kind, range(newest_state - every + 1, newest_state + 1))

    def _save_checkpoint(self, stem: str) -> None:
        for name, tensor in self.trained.tensors.items():
            if not torch.isfinite(tensor).all():
                raise UserError(
                    f"step {self.progress.step}: {name} is not finite, so nothing was written; lower --learning_rate"
                )
        path = self.files.folder / f"{stem}.safetensors"
        with writing(path):
            paths = self.trained.save(path, self.metadata())
            write_text(self.files.settings(stem), self.settings)
        self.written += [written for written in paths if written not in self.written]
        for written in paths:
            self.uploader.upload(written)

    def _save_state(self, stem: str) -> None:
        folder = self.files.state(stem)
        with writing(folder):
            save_state(folder, self.progress, self.trained.tensors, self.stateful, self.settings)
        self.uploader.upload(folder)

    def metadata(self) -> dict[str, str]:
        """The metadata of a checkpoint that is written now."""
        options, plan, progress = self.options, self.plan, self.progress
        facts = RunFacts(
            session_id=progress.session_id,
            training_started_at=progress.started_at,
            training_finished_at=time.time(),
            num_train_items=self.train_set.num_items,
            num_batches_per_epoch=plan.batches_per_epoch,
            num_epochs=plan.total_epochs,
            max_train_steps=plan.total_steps,
            steps=progress.step,
            epoch=plan.epoch_of(max(progress.step - 1, 0)) + 1,
            seed=progress.seed,
            optimizer=options.optimizer.description,
            lr_scheduler=options.scheduler.description,
            lr_warmup_steps=options.scheduler.lr_warmup_steps.of(plan.total_steps),
            mixed_precision=self.accelerator.mixed_precision,
            datasets=without_folders(self.train_set.description()),
            sd_model_name=str(options.dit.dit),
            vae_name=options.vae.vae and str(options.vae.vae),
            validation=progress.validation_facts(),
            **self.trained.facts,
        )
        return checkpoint_metadata(facts, options.metadata, *vars(options).values(), title=options.save.output_name)
