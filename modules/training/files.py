"""Names of the files that training leaves, which of them are old, and which state to continue from.

{name}.safetensors  {name}-{epoch:06d}.safetensors  {name}-step{step:08d}.safetensors  {name}-best-step{step:08d}...
{name}-state        {name}-{epoch:06d}-state        {name}-step{step:08d}-state
"""

import json
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import psutil

from utils.errors import UserError
from utils.files import REPLACED, TEMPORARY_SUFFIX, read_text

PROGRESS_FILE = "train_state.json"
SETTINGS_FILE = "settings.toml"
STATE_SUFFIX = "-state"
COMPANIONS = r"(\.[\w-]+)?\.safetensors|\.settings\.toml"  # endings of what is written for one checkpoint
STATE_VERSION = 1


@dataclass(frozen=True)
class TrainingFiles:
    """The files of one run, by output folder and name."""

    folder: Path
    name: str

    def last(self) -> str:
        return self.name

    def of_epoch(self, epoch: int) -> str:
        return f"{self.name}-{epoch:06d}"

    def of_step(self, step: int) -> str:
        return f"{self.name}-step{step:08d}"

    def best_of_step(self, step: int) -> str:
        return f"{self.name}-best-step{step:08d}"

    def state(self, stem: str) -> Path:
        return self.folder / f"{stem}{STATE_SUFFIX}"

    def settings(self, stem: str) -> Path:
        """Not {stem}.toml, which may be the config file that a user keeps beside the results."""
        return self.folder / f"{stem}.{SETTINGS_FILE}"

    @property
    def log(self) -> Path:
        return self.folder / "train_log.jsonl"

    @property
    def previews(self) -> Path:
        return self.folder / "sample"

    def states(self) -> list[Path]:
        """Every complete state of this name, in no order."""
        pattern = re.compile(re.escape(self.name) + r"(-\d{6}|-step\d{8})?" + STATE_SUFFIX)
        folders = self.folder.iterdir() if self.folder.is_dir() else []
        return [path for path in folders if pattern.fullmatch(path.name) and (path / PROGRESS_FILE).is_file()]

    def remove_checkpoints(self, kind: str, oldest_kept: int) -> None:
        """Removes checkpoints and their companions with a number below `oldest_kept`; kind: "epoch" or "step"."""
        for path, number in self._numbered(kind, COMPANIONS):
            if number < oldest_kept:
                path.unlink(missing_ok=True)

    def remove_states(self, kind: str, oldest_kept: int) -> None:
        """Removes states with a number below `oldest_kept`; kind: "epoch" or "step"."""
        for path, number in self._numbered(kind, STATE_SUFFIX):
            if number < oldest_kept:
                shutil.rmtree(path, ignore_errors=True)

    def remove_best(self, step: int) -> None:
        """Removes the checkpoint that was among the best until now."""
        pattern = re.compile(f"{re.escape(self.best_of_step(step))}({COMPANIONS})")
        for path in self.folder.iterdir():
            if pattern.fullmatch(path.name):
                path.unlink(missing_ok=True)

    def remove_leftovers(self) -> None:
        """Removes what killed runs of this name left half written, and puts a state back that was to be replaced."""
        stem = re.escape(self.name) + r"(-\d{6}|(-best)?-step\d{8})?"
        name = rf"(?P<name>{stem}({COMPANIONS}|{STATE_SUFFIX}))"
        pattern = re.compile(rf"{name}\.(?P<owner>\w+){re.escape(TEMPORARY_SUFFIX)}")
        for path in list(self.folder.iterdir()):
            found = pattern.fullmatch(path.name)
            if found is None or _is_of_another_run(found["owner"]):
                continue
            if found["owner"] == REPLACED and not (self.folder / found["name"]).exists():
                path.rename(self.folder / found["name"])
            elif path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)

    def _numbered(self, kind: str, ending: str) -> list[tuple[Path, int]]:
        number = {"epoch": r"-(\d{6})", "step": r"-step(\d{8})"}[kind]
        pattern = re.compile(f"{re.escape(self.name)}{number}({ending})")
        matches = [(path, pattern.fullmatch(path.name)) for path in self.folder.iterdir()]
        return [(path, int(match[1])) for path, match in matches if match]


def _is_of_another_run(owner: str) -> bool:
    """Whether a process other than this one, by its number, may be writing: a run with a similar name."""
    return owner.isdigit() and int(owner) != os.getpid() and psutil.pid_exists(int(owner))


def read_progress(state: Path) -> dict:
    """The counters of a state folder.

    Raises:
        UserError: the folder is missing or no complete state of this trainer.
    """
    if not state.exists():
        raise UserError(f"--resume {state}: no such folder; give a folder whose name ends in {STATE_SUFFIX}, or auto")
    if not state.is_dir():
        hint = "a LoRA file has no optimizer state; continue from it with --network_weights"
        raise UserError(f"--resume {state}: is a file, a state folder is expected ({hint})")
    if not (state / PROGRESS_FILE).is_file():
        raise UserError(f"--resume {state}: no {PROGRESS_FILE} in it; it is no state that this trainer saved")
    try:
        progress = json.loads(read_text(state / PROGRESS_FILE, "training state"))
        version = progress["version"]
    except (json.JSONDecodeError, KeyError, TypeError):
        raise damaged(state / PROGRESS_FILE) from None
    if version != STATE_VERSION:
        raise UserError(f"{state}: state version {version}, this trainer reads version {STATE_VERSION}")
    if not all(isinstance(progress.get(name), int) for name in ("step", "seed")):
        raise damaged(state / PROGRESS_FILE)
    return progress


def damaged(file: Path) -> UserError:
    """The error for a file of a state that cannot be read."""
    return UserError(f"{file}: is damaged; resume from another state")


def find_state(resume: str | None, files: TrainingFiles) -> Path | None:
    """The state folder that --resume means; None to start anew, also for `auto` where there is no state yet."""
    if resume is None:
        return None
    if resume == "auto":
        return max(files.states(), key=lambda state: read_progress(state)["step"], default=None)
    read_progress(Path(resume))
    return Path(resume)
