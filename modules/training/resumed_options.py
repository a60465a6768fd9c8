"""What a resumed run is asked for otherwise than the run that saved its state. Importing this needs no torch."""

import dataclasses
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from modules.training.files import SETTINGS_FILE
from modules.training.optimizers import OptimizerOptions
from modules.training.trainer_options import TrainerOptions
from utils.errors import UserError
from utils.files import read_toml

Options = TypeVar("Options", bound=TrainerOptions)
_GROUPS = ("optimizer", "scheduler", "timesteps", "network", "tuning", "dit")
_TRAINING = ("guidance_scale", "max_grad_norm", "mixed_precision")
_COMPARED_AS_CLASSES = ("optimizer_type", "lr_scheduler", "lr_scheduler_type")
_KEPT = "the saved value stays"
_TAKES_EFFECT = "takes effect from here on"


def continued(options: Options, state: Path | None) -> tuple[Options, list[str]]:
    """The options with what the state's optimizer and schedule keep of the run that saved it, and a line for each
    option that influences the weights and differs.

    Raises:
        UserError: the state is of another optimizer or schedule.
    """
    if state is None:
        return options, []
    saved, now = _flat(read_toml(state / SETTINGS_FILE, "settings of the state")), _settings(options)
    _check_kinds(options, saved, state)
    kept = {"optimizer": ["learning_rate", "optimizer_args"]}
    if options.scheduler.lr_scheduler_type:
        kept["scheduler"] = ["lr_scheduler_args"]
    effects = {name: _KEPT for names in (*kept.values(), ["network_weights", "dim_from_weights"]) for name in names}
    effects["network_args"] = f"{_TAKES_EFFECT}, but for learning rates"
    notes = [
        f"--resume: {name} is {now.get(name, 'unset')} and was {saved.get(name, 'unset')}: "
        f"{effects.get(name, _TAKES_EFFECT)}"
        for name in _names(options)
        if now.get(name) != saved.get(name)
    ]
    groups = {
        group: dataclasses.replace(getattr(options, group), **{name: saved[name] for name in names if name in saved})
        for group, names in kept.items()
    }
    return dataclasses.replace(options, **groups), notes


def _check_kinds(options: TrainerOptions, saved: Mapping[str, Any], state: Path) -> None:
    kind = OptimizerOptions(optimizer_type=saved.get("optimizer_type", "")).path
    if options.optimizer.path != kind:
        raise UserError(
            f"--optimizer_type {options.optimizer.path}: the state {state} is of {kind}; give that, or start anew from "
            "its checkpoint"
        )
    schedule = saved.get("lr_scheduler_type") or saved.get("lr_scheduler")
    if options.scheduler.description != schedule:
        raise UserError(
            f"--lr_scheduler {options.scheduler.description}: the state {state} is of {schedule}; give that, or start "
            "anew from its checkpoint"
        )


def _settings(options: TrainerOptions) -> dict[str, Any]:
    return _flat(tomllib.loads(options.settings(seed=0)))


def _flat(sections: Mapping[str, Any]) -> dict[str, Any]:
    """Settings by name; sections are only headings."""
    tables = [section for section in sections.values() if isinstance(section, dict)]
    return {name: value for table in tables for name, value in table.items()}


def _names(options: TrainerOptions) -> list[str]:
    """The options that influence the weights."""
    groups = [vars(options)[name] for name in _GROUPS if name in vars(options)]
    names = [field.name for group in groups for field in dataclasses.fields(group)]
    return [name for name in (*names, *_TRAINING) if name not in _COMPARED_AS_CLASSES]
