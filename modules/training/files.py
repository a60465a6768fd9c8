"""The files of a training run: their names, which of them are old, and the state to continue from.

{name}.safetensors  {name}-{epoch:06d}.safetensors  {name}-step{step:08d}.safetensors  {name}-best-step{step:08d}...
{name}-state        {name}-{epoch:06d}-state        {name}-step{step:08d}-state

A state may be on the Hugging Face Hub. The access token comes from --huggingface_token, or from HF_TOKEN or
`hf auth login`, and is given to huggingface_hub only. Importing this module does not import torch.
"""

import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import huggingface_hub

from utils.cli import option, unused_options
from utils.errors import UserError, one_line, printable
from utils.files import parse_json, read_text

PROGRESS_FILE = "train_state.json"
SETTINGS_FILE = "settings.toml"
STATE_SUFFIX = "-state"
COMPANIONS = r"(\.[\w-]+)?\.safetensors|\.settings\.toml"  # endings of the files of one checkpoint
STATE_VERSION = 1
WINDOWS_DEVICES = re.compile(r"(CON|PRN|AUX|NUL|COM\d|LPT\d)(\..*)?", re.I)
LONGEST_NAME = 150  # bytes; a file system allows 255, and step and ending are added
REPO_TYPES = ("model", "dataset", "space")


def require_file_name(option: str, name: str) -> None:
    """Checks that a text can be the first part of the name of a file on every system.

    Raises:
        UserError: it is empty or too long, names a folder or a device of Windows, or holds line breaks and the like.
    """
    problem = ""
    if not name.strip() or name in (".", ".."):
        problem = "is no name"
    elif "/" in name or "\\" in name:
        problem = "names a folder; give that as --output_dir"
    elif printable(name) != name:
        problem = "holds line breaks or other control characters"
    elif WINDOWS_DEVICES.fullmatch(name):
        problem = "is the name of a device on Windows"
    elif len(name.encode(errors="replace")) > LONGEST_NAME:
        problem = f"is longer than {LONGEST_NAME} bytes"
    if problem:
        raise UserError(f"{option} {printable(name)!r}: {problem}; a file name such as my-lora is expected")


@dataclass(frozen=True, kw_only=True)
class SaveOptions:
    """saving and resuming"""

    output_dir: Path | None = option(None, help="folder for checkpoints, states, previews and train_log.jsonl")
    output_name: str | None = option(None, help="first part of the name of every checkpoint and state")
    save_every_n_epochs: int | None = option(None, help="save a checkpoint every N epochs", minimum=1)
    save_every_n_steps: int | None = option(None, help="save a checkpoint every N steps", minimum=1)
    save_last_n_epochs: int | None = option(None, help="keep only the last N checkpoints of epochs", minimum=1)
    save_last_n_epochs_state: int | None = option(
        None, help="keep only the last N states of epochs; unset: as --save_last_n_epochs", minimum=1
    )
    save_last_n_steps: int | None = option(None, help="remove checkpoints that are more than N steps old", minimum=1)
    save_last_n_steps_state: int | None = option(
        None, help="remove states that are more than N steps old; unset: as --save_last_n_steps", minimum=1
    )
    save_state: bool = option(False, help="save a state to resume from with every checkpoint")
    save_state_on_train_end: bool = option(False, help="save a state at the end")
    resume: str | None = option(None, help="state folder to continue from; auto: the newest state of --output_name")

    def __post_init__(self) -> None:
        if self.output_name is not None:
            require_file_name("--output_name", self.output_name)
        for folder in (self.output_dir, *self.output_dir.parents) if self.output_dir is not None else ():
            if folder.is_file():
                raise UserError(f"--output_dir {self.output_dir}: {folder} is a file, a folder is expected")

    def ignored(self) -> list[str]:
        """The options that were changed but have no effect."""
        used = {}
        for unit, every in (("epochs", self.save_every_n_epochs), ("steps", self.save_every_n_steps)):
            used[f"save_last_n_{unit}"] = every is not None
            used[f"save_last_n_{unit}_state"] = every is not None and self.save_state
        return unused_options(self, used)


@dataclass(frozen=True, kw_only=True)
class LoraSaveOptions(SaveOptions):
    """saving and resuming"""

    save_precision: str | None = option(
        None, help="dtype of saved checkpoints; unset: float32", choices=("float", "fp32", "fp16", "bf16")
    )
    save_format: list[str] = option(
        ["default"], help="LoRA file formats to write: default, other (ComfyUI), diffusers, ..."
    )


@dataclass(frozen=True, kw_only=True)
class HuggingFaceOptions:
    """Hugging Face Hub"""

    huggingface_repo_id: str | None = option(None, help="repository to upload to, user/name")
    huggingface_repo_type: str | None = option(None, help="kind of the repository; unset: model", choices=REPO_TYPES)
    huggingface_path_in_repo: str | None = option(None, help="folder in the repository; unset: its root")
    huggingface_token: str | None = option(None, help="access token; better: the variable HF_TOKEN", secret=True)
    huggingface_repo_visibility: str | None = option(
        None, help="visibility of a repository that must be created; unset: private", choices=("public", "private")
    )
    save_state_to_huggingface: bool = option(False, help="upload the states as well")
    resume_from_huggingface: bool = option(
        False, help="--resume is user/name/folder[:revision[:repo_type]] on the Hub instead of a local folder"
    )
    async_upload: bool = option(False, help="upload in the background while training goes on")

    def __post_init__(self) -> None:
        if self.huggingface_repo_id is None:
            if self.save_state_to_huggingface:
                raise UserError("--save_state_to_huggingface needs --huggingface_repo_id, the repository to upload to")
        elif self.huggingface_repo_id.count("/") != 1 or not all(self.huggingface_repo_id.split("/")):
            raise UserError(f"--huggingface_repo_id {self.huggingface_repo_id}: user/name is expected")

    def message_of(self, error: Exception) -> str:
        """What huggingface_hub says, in one line and without the token."""
        text = one_line(error) or type(error).__name__
        return text.replace(self.huggingface_token, "***") if self.huggingface_token else text


@dataclass(frozen=True)
class TrainingFiles:
    """The files of one run: --output_dir and --output_name."""

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
        """Not {stem}.toml: that may be a config file of the user."""
        return self.folder / f"{stem}.{SETTINGS_FILE}"

    @property
    def log(self) -> Path:
        return self.folder / "train_log.jsonl"

    @property
    def previews(self) -> Path:
        return self.folder / "sample"

    def states(self) -> list[Path]:
        """Every complete state of this name, in any order."""
        pattern = re.compile(re.escape(self.name) + r"(-\d{6}|-step\d{8})?" + STATE_SUFFIX)
        folders = self.folder.iterdir() if self.folder.is_dir() else []
        return [path for path in folders if pattern.fullmatch(path.name) and (path / PROGRESS_FILE).is_file()]

    def remove_checkpoints(self, kind: str, numbers: range) -> None:
        """Removes checkpoints and their companions; kind: "epoch" or "step"."""
        for path, number in self._numbered(kind, COMPANIONS):
            if number in numbers:
                path.unlink(missing_ok=True)

    def remove_states(self, kind: str, numbers: range) -> None:
        """Removes states; kind: "epoch" or "step"."""
        for path, number in self._numbered(kind, STATE_SUFFIX):
            if number in numbers:
                shutil.rmtree(path, ignore_errors=True)

    def remove_best(self, step: int) -> None:
        """Removes the checkpoint of a step that no longer has one of the lowest validation losses."""
        pattern = re.compile(f"{re.escape(self.best_of_step(step))}({COMPANIONS})")
        for path in self.folder.iterdir() if self.folder.is_dir() else ():
            if pattern.fullmatch(path.name):
                path.unlink(missing_ok=True)

    def _numbered(self, kind: str, ending: str) -> list[tuple[Path, int]]:
        number = {"epoch": r"-(\d{6})", "step": r"-step(\d{8})"}[kind]
        pattern = re.compile(f"{re.escape(self.name)}{number}({ending})")
        matches = [(path, pattern.fullmatch(path.name)) for path in self.folder.iterdir()]
        return [(path, int(match[1])) for path, match in matches if match]


def read_progress(state: Path) -> dict:
    """The counters of a state folder.

    Raises:
        UserError: the folder is missing or is not a complete state of this trainer.
    """
    if not state.exists():
        raise UserError(f"--resume {state}: no such folder; give a folder whose name ends in {STATE_SUFFIX}, or auto")
    if not state.is_dir():
        hint = "a LoRA file has no optimizer state; continue from it with --network_weights"
        raise UserError(f"--resume {state}: is a file, a state folder is expected ({hint})")
    if not (state / PROGRESS_FILE).is_file():
        raise UserError(f"--resume {state}: no {PROGRESS_FILE} in it; it is not a state that this trainer saved")
    text = read_text(state / PROGRESS_FILE, "training state")
    try:
        progress = parse_json(text)
        version = progress["version"]
    except (ValueError, KeyError, TypeError):
        raise damaged(state / PROGRESS_FILE) from None
    if version != STATE_VERSION:
        raise UserError(f"{state}: state version {version}, this trainer reads version {STATE_VERSION}")
    if not all(isinstance(progress.get(name), int) for name in ("step", "seed")):
        raise damaged(state / PROGRESS_FILE)
    return progress


def _saved_at(state: Path) -> tuple[float, int]:
    """When a state was saved; of older versions, which did not note it, the time of its file."""
    progress = read_progress(state)
    noted = progress.get("saved_at")
    return noted if isinstance(noted, float) else (state / PROGRESS_FILE).stat().st_mtime, progress["step"]


def damaged(file: Path) -> UserError:
    """The error for a file of a state that cannot be read."""
    return UserError(f"{file}: is damaged; resume from another state")


def find_state(resume: str | None, files: TrainingFiles) -> Path | None:
    """The state folder of --resume; None to start a new run, also with `auto` when there is no state yet."""
    if resume is None:
        return None
    if resume == "auto":
        return max(files.states(), key=_saved_at, default=None)
    read_progress(Path(resume))
    return Path(resume)


@dataclass(frozen=True)
class RemoteState:
    """A state folder on the Hub."""

    repo_id: str
    folder: str
    revision: str | None
    repo_type: str

    @classmethod
    def parse(cls, text: str) -> "RemoteState":
        """Reads `user/name/folder[:revision[:repo_type]]`.

        Raises:
            UserError: another form.
        """
        place, *rest = text.split(":")
        user, _, place = place.partition("/")
        name, _, folder = place.partition("/")
        revision, repo_type = (*rest, "", "")[:2]
        if not (user and name and folder) or len(rest) > 2 or (repo_type or "model") not in REPO_TYPES:
            raise UserError(f"--resume {text}: user/name/folder[:revision[:repo_type]] is expected")
        return cls(f"{user}/{name}", folder.strip("/"), revision or None, repo_type or "model")


def download_state(text: str, options: HuggingFaceOptions) -> Path:
    """Downloads the state of `--resume` with `--resume_from_huggingface`; returns its local folder.

    Raises:
        UserError: the text has another form, or the download fails.
    """
    state = RemoteState.parse(text)
    try:
        root = huggingface_hub.snapshot_download(
            state.repo_id,
            repo_type=state.repo_type,
            revision=state.revision,
            allow_patterns=f"{state.folder}/**",
            token=options.huggingface_token,
        )
    except Exception as error:  # the library passes on the errors of several HTTP and file libraries
        raise UserError(f"--resume {text}: {options.message_of(error)}") from None
    folder = Path(root, state.folder)
    if not folder.is_dir():
        raise UserError(f"--resume {text}: {state.repo_id} has no folder {state.folder}")
    return folder
