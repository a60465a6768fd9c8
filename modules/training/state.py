"""The state from which a run continues exactly: a folder with counters, settings, trained tensors and optimizer states.

Noise, timesteps, dropout and data order are functions of (seed, step), so no random state is saved.
"""

import dataclasses
import errno
import json
import time
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, TypeVar

import torch
from pydantic import ConfigDict, Field, NonNegativeInt, TypeAdapter, ValidationError
from torch import Tensor

from modules.training.files import PROGRESS_FILE, SETTINGS_FILE, STATE_VERSION, damaged, read_progress
from modules.training.optimizers import OptimizerOptions
from modules.training.options import TrainerOptions
from utils.errors import UserError, one_line
from utils.files import atomic_folder, atomic_path, has_right_checksums, read_toml, write_text
from utils.safetensors_utils import iterate_tensors, read_header, streamed_file

TRAINED_FILE = "trained.safetensors"
OPTIMIZER_FILE = "optimizer.pt"

Options = TypeVar("Options", bound=TrainerOptions)
# Every option influences the weights, a new one too, except those of these groups and these. Some of them change the
# rounding. Of seed, length and batches of the run, others tell.
_WITHOUT_INFLUENCE = {
    "groups": [
        "save",
        "previews",
        "metadata",
        "hub",
        "log",
        "distributed",
        "vae",
        "text",
        "swap",
        "checkpointing",
        "compile",
        "attention",
    ],
    "options": [
        "max_data_loader_n_workers",
        "persistent_data_loader_workers",
        "max_train_steps",
        "max_train_epochs",
        "seed",
        "dry_run",
        "gradient_accumulation_steps",
        "max_nonfinite_steps",
        "cuda_cudnn_benchmark",
        "validate_every_n_steps",
        "keep_best",
        "show_timesteps",
        "block_swap_h2d_only",
        "block_swap_ring_size",
        "vram_gb",
    ],
}
_COMPARED_AS_CLASSES = ("optimizer_type", "lr_scheduler", "lr_scheduler_type")
# What is read of the settings of a state, and its types.
_READ = {"learning_rate": (int, float), "optimizer_args": list, "lr_scheduler_args": list}
_READ |= dict.fromkeys(_COMPARED_AS_CLASSES, str)
_KEPT = "the saved value stays"
_TAKES_EFFECT = "takes effect from here on"


@dataclass
class Progress:
    """The counters of a run: everything that changes from step to step and is not a tensor."""

    __pydantic_config__ = ConfigDict(allow_inf_nan=False)

    seed: Annotated[int, Field(ge=0, lt=2**63)]
    step: NonNegativeInt = 0
    samples: NonNegativeInt = 0
    nonfinite_in_a_row: NonNegativeInt = 0
    smoothed_loss: float | None = None
    first_losses: list[float] = field(default_factory=list)
    recent_losses: list[float] = field(default_factory=list)
    loss_by_band: dict[str, float] = field(default_factory=dict)
    base_validation_loss: float | None = None
    validation_loss: float | None = None
    validation_step: NonNegativeInt | None = None
    best: list[tuple[float, int]] = field(default_factory=list)  # (validation loss, step), best first
    evaluation_is_due: bool = False  # validation and previews of this step were broken off
    session_id: NonNegativeInt = 0
    started_at: float = 0.0
    arithmetic: dict[str, Any] = field(default_factory=dict)  # batches per step, batches per epoch, items

    @classmethod
    def load(cls, folder: Path) -> "Progress":
        """Reads the counters of a state folder; raises what `modules.training.files.read_progress` raises."""
        values = read_progress(folder)
        try:
            return TypeAdapter(cls).validate_python(values)
        except ValidationError:
            raise damaged(folder / PROGRESS_FILE) from None

    def validation_facts(self) -> dict[str, float]:
        """The results of validation so far, for the metadata."""
        facts = {
            "loss": self.validation_loss,
            "base_loss": self.base_validation_loss,
            "step": self.validation_step,
            "best_loss": self.best[0][0] if self.best else None,
            "best_step": self.best[0][1] if self.best else None,
        }
        return {name: value for name, value in facts.items() if value is not None}

    def differences(self, arithmetic: Mapping[str, Any]) -> list[str]:
        """How the current run's numbers of batches and items differ from those in the saved state, in words."""
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
        content = {"version": STATE_VERSION, "saved_at": time.time(), **dataclasses.asdict(progress)}
        write_text(temporary / PROGRESS_FILE, json.dumps(content, indent=2, allow_nan=False) + "\n")


def check_tensors(folder: Path, shapes: Mapping[str, Sequence[int]]) -> None:
    """Compares the trained tensors of a state with those of this run; reads the header of the file only.

    Raises:
        UserError: names or shapes differ.
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
    """Loads the tensors of a state folder into the trained tensors and into optimizer, scheduler, ..., in place.

    Raises:
        UserError: the state belongs to another network or optimizer, or is damaged.
    """
    check_tensors(folder, {name: tensor.shape for name, tensor in trained.items()})
    with torch.no_grad():
        for name, saved in iterate_tensors(folder / TRAINED_FILE):
            if not torch.isfinite(saved).all():
                raise damaged(folder / TRAINED_FILE)
            trained[name].copy_(saved)
    if not has_right_checksums(folder / OPTIMIZER_FILE):
        raise damaged(folder / OPTIMIZER_FILE)
    try:
        # Memory-mapped: every process reads it, and in full fine-tuning it is twice as large as the model.
        states = torch.load(folder / OPTIMIZER_FILE, map_location="cpu", weights_only=True, mmap=True)
    except Exception:  # what the unpickler raises depends on where the file is damaged
        raise damaged(folder / OPTIMIZER_FILE) from None
    try:
        for name, part in stateful.items():
            _keep_kernels(part, states[name])
            part.load_state_dict(states[name])
            _leave_file(part)
    except Exception as error:  # so does what optimizers raise, of any library
        raise UserError(
            f"{folder}: its optimizer state does not fit: {one_line(error)}; use --optimizer_type and the --network_* "
            "or --trainable_modules of the saved run"
        ) from None


def _keep_kernels(part: Any, saved: Mapping[str, Any]) -> None:
    """Keeps the kernels that were chosen for this device; the state may come from another one."""
    for group, own in zip(saved.get("param_groups", ()), getattr(part, "param_groups", ())):
        group.update({name: own[name] for name in ("foreach", "fused") if name in own})


def _leave_file(part: Any) -> None:
    """Copies optimizer states on the CPU out of the memory-mapped file, which may be deleted or overwritten later."""
    for state in getattr(part, "state", {}).values():
        state.update({k: v.clone() for k, v in state.items() if isinstance(v, Tensor) and v.device.type == "cpu"})


def resumed_options(options: Options, state: Path | None) -> tuple[Options, list[str]]:
    """The options of a resumed run: learning rate and optimizer arguments stay those of the saved run.

    Returns:
        The options, and a line for each option that influences the weights and differs from the saved run.

    Raises:
        UserError: the state was saved with another optimizer or schedule.
    """
    if state is None:
        return options, []
    saved, now = _flat(read_toml(state / SETTINGS_FILE, "settings of the state")), _settings(options)
    kept = {"optimizer": ["learning_rate", "optimizer_args"]}
    if options.scheduler.lr_scheduler_type:
        kept["scheduler"] = ["lr_scheduler_args"]
    if any(name in saved and not isinstance(saved[name], kind) for name, kind in _READ.items()):
        raise damaged(state / SETTINGS_FILE)
    _check_classes(options, saved, state)
    effects = {name: _KEPT for names in (*kept.values(), ["network_weights", "dim_from_weights"]) for name in names}
    effects["network_args"] = f"{_TAKES_EFFECT}, except learning rates"
    notes = [
        f"--resume: {name} is {now.get(name, 'unset')} and was {saved.get(name, 'unset')}: "
        f"{effects.get(name, _TAKES_EFFECT)}"
        for name, unsaid in _defaults(options, now).items()
        if now.get(name) != saved.get(name, unsaid)
    ]
    groups = {
        group: dataclasses.replace(getattr(options, group), **{name: saved[name] for name in names if name in saved})
        for group, names in kept.items()
    }
    return dataclasses.replace(options, **groups), notes


def _check_classes(options: TrainerOptions, saved: Mapping[str, Any], state: Path) -> None:
    kind = OptimizerOptions(optimizer_type=saved.get("optimizer_type", "")).path
    if options.optimizer.path != kind:
        raise UserError(
            f"--optimizer_type {options.optimizer.path}: the state {state} was saved with {kind}; give that, or start "
            "a new run from its checkpoint"
        )
    schedule = saved.get("lr_scheduler_type") or saved.get("lr_scheduler")
    if options.scheduler.description != schedule:
        raise UserError(
            f"--lr_scheduler {options.scheduler.description}: the state {state} was saved with {schedule}; give that, "
            "or start a new run from its checkpoint"
        )


def _settings(options: TrainerOptions) -> dict[str, Any]:
    return _flat(tomllib.loads(options.settings(seed=0)))


def _flat(sections: Mapping[str, Any]) -> dict[str, Any]:
    """Settings by name; sections are only headings."""
    tables = [section for section in sections.values() if isinstance(section, dict)]
    return {name: value for table in tables for name, value in table.items()}


def _defaults(options: TrainerOptions, now: Mapping[str, Any]) -> dict[str, Any]:
    """The options that influence the weights, apart from those that `_check_classes` compares.

    Their values are what a state that does not name them was saved with: the default.
    """
    chosen = {"fp8_base"} if getattr(options, "memory", None) and options.memory.vram_gb is not None else set()
    without = {*_WITHOUT_INFLUENCE["options"], *_COMPARED_AS_CLASSES, *chosen}
    groups = [group for name, group in vars(options).items() if name not in _WITHOUT_INFLUENCE["groups"]]
    known = [(group, field) for group in groups for field in dataclasses.fields(group) if field.name not in without]
    return {
        field.name: now.get(field.name) if getattr(group, field.name) == field.default else None
        for group, field in known
    }
