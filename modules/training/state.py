"""What a run must remember to continue exactly: counters as JSON, tensors beside it, in one folder that is whole.

Noise, timesteps, dropout and data order are functions of (seed, step), so no random state is kept.
"""

import dataclasses
import errno
import json
import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from modules.training.files import PROGRESS_FILE, SETTINGS_FILE, STATE_VERSION, damaged, read_progress
from utils.errors import UserError, one_line
from utils.files import atomic_folder, atomic_path, write_text
from utils.safetensors_utils import iterate_tensors, read_header, streamed_file

TRAINED_FILE = "trained.safetensors"
OPTIMIZER_FILE = "optimizer.pt"


@dataclass
class Progress:
    """The counters of a run: what changes from step to step besides tensors."""

    seed: int
    step: int = 0
    samples: int = 0
    nonfinite_in_a_row: int = 0
    smoothed_loss: float | None = None
    first_losses: list[float] = field(default_factory=list)
    recent_losses: list[float] = field(default_factory=list)
    loss_by_band: dict[str, float] = field(default_factory=dict)
    base_validation_loss: float | None = None
    validation_loss: float | None = None
    validation_step: int | None = None
    best: list[tuple[float, int]] = field(default_factory=list)  # (validation loss, step), best first
    session_id: int = 0
    started_at: float = 0.0
    arithmetic: dict[str, Any] = field(default_factory=dict)  # what the steps mean: batches per step, per epoch, data

    @classmethod
    def load(cls, folder: Path) -> "Progress":
        """Reads the counters of a state folder; UserError as `modules.training.files.read_progress`."""
        values = read_progress(folder)
        names = {known.name for known in dataclasses.fields(cls)}
        progress = cls(**{name: value for name, value in values.items() if name in names})
        try:
            progress.best = [(loss, step) for loss, step in progress.best]
        except (TypeError, ValueError):
            raise damaged(folder / PROGRESS_FILE) from None
        return progress

    def validation_facts(self) -> dict[str, float]:
        """What validation found so far, for the metadata."""
        facts = {
            "loss": self.validation_loss,
            "base_loss": self.base_validation_loss,
            "step": self.validation_step,
            "best_loss": self.best[0][0] if self.best else None,
            "best_step": self.best[0][1] if self.best else None,
        }
        return {name: value for name, value in facts.items() if value is not None}

    def differences(self, arithmetic: Mapping[str, Any]) -> list[str]:
        """What the current run counts otherwise than the one that saved this state, in words."""
        return [
            f"{name} was {self.arithmetic[name]}, is {value}"
            for name, value in arithmetic.items()
            if name in self.arithmetic and self.arithmetic[name] != value
        ]


def save_state(
    folder: Path, progress: Progress, trained: Mapping[str, Tensor], stateful: Mapping[str, Any], settings: str
) -> None:
    """Writes a state folder, whole or not at all.

    Args:
        trained: every trained tensor by name.
        stateful: optimizer, scheduler, ... by name: objects with `state_dict()`.
        settings: the run's resolved settings, as TOML.
    """
    with atomic_folder(folder) as temporary:
        layout = {name: (tensor.dtype, tensor.shape) for name, tensor in trained.items()}
        with streamed_file(temporary / TRAINED_FILE, layout) as write:
            for name, tensor in trained.items():
                write(name, tensor)
        with atomic_path(temporary / OPTIMIZER_FILE) as path:
            states = {name: part.state_dict() for name, part in stateful.items()}
            try:
                torch.save(states, path)
            except RuntimeError as error:  # what torch makes of a full disk
                raise OSError(errno.EIO, one_line(error), str(path)) from error
        write_text(temporary / SETTINGS_FILE, settings)
        content = {"version": STATE_VERSION, **dataclasses.asdict(progress)}
        write_text(temporary / PROGRESS_FILE, json.dumps(content, indent=2, allow_nan=False) + "\n")


def check_network(folder: Path, shapes: Mapping[str, Sequence[int]]) -> None:
    """Compares the trained tensors of a state, by their header, with those of this run.

    Raises:
        UserError: they are of another network.
    """
    shapes = {name: tuple(shape) for name, shape in shapes.items()}
    found = {name: tuple(info.shape) for name, info in read_header(folder / TRAINED_FILE)[0].items()}
    if shapes != found:
        different = min(name for name in shapes.keys() | found.keys() if shapes.get(name) != found.get(name))
        raise UserError(
            f"{folder}: saved from another network: {different} is {found.get(different, 'absent')} in the state "
            f"and {shapes.get(different, 'absent')} here; use the saved run's --network_* or --trainable_modules"
        )


def load_state(folder: Path, trained: Mapping[str, Tensor], stateful: Mapping[str, Any]) -> None:
    """Puts the tensors of a state folder back, in place.

    Raises:
        UserError: the state belongs to another network or optimizer, or is damaged.
    """
    check_network(folder, {name: tensor.shape for name, tensor in trained.items()})
    with torch.no_grad():
        for name, saved in iterate_tensors(folder / TRAINED_FILE):
            trained[name].copy_(saved)
    try:
        # Mapped, for every process reads it, and with full fine-tuning it has twice the size of the model.
        states = torch.load(folder / OPTIMIZER_FILE, map_location="cpu", weights_only=True, mmap=True)
    except (RuntimeError, OSError, EOFError, ValueError, pickle.UnpicklingError):
        raise damaged(folder / OPTIMIZER_FILE) from None
    try:
        for name, part in stateful.items():
            _keep_kernels(part, states[name])
            part.load_state_dict(states[name])
            _leave_file(part)
    except (KeyError, ValueError, RuntimeError, TypeError) as error:
        raise UserError(
            f"{folder}: its optimizer state does not fit: {one_line(error)}; use --optimizer_type and the --network_* "
            "or --trainable_modules of the saved run"
        ) from None


def _keep_kernels(part: Any, saved: Mapping[str, Any]) -> None:
    """Which kernels an optimizer uses is up to the device that it runs on, not to the one that it was saved on."""
    for group, own in zip(saved.get("param_groups", ()), getattr(part, "param_groups", ())):
        group.update({name: own[name] for name in ("foreach", "fused") if name in own})


def _leave_file(part: Any) -> None:
    """Copies what an optimizer keeps in main memory out of the mapped file, which may be deleted or overwritten."""
    for state in getattr(part, "state", {}).values():
        state.update({k: v.clone() for k, v in state.items() if isinstance(v, Tensor) and v.device.type == "cpu"})
