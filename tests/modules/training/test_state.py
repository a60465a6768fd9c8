"""States: which one is continued, and what a damaged or foreign one says."""

import os

import torch

from modules.training.files import TrainingFiles, find_state
from modules.training.state import Progress, save_state

WEIGHT = {"weight": torch.zeros(2)}


def save(folder, name, step):
    save_state(folder / name, Progress(seed=1, step=step), WEIGHT, {}, "")
    return folder / name


def test_auto_takes_the_state_that_was_saved_last_not_the_one_with_most_steps(tmp_path):
    """The folder may hold a longer run of the same name from last week."""
    save(tmp_path, "lora-step00000900-state", 900)
    newest = save(tmp_path, "lora-step00000020-state", 20)
    save(tmp_path, "other-state", 30)
    assert find_state("auto", TrainingFiles(tmp_path, "lora")) == newest


def test_of_states_that_do_not_say_when_they_were_saved_auto_takes_the_newest_file(tmp_path):
    for step, time in ((900, 1_000_000), (20, 2_000_000)):
        file = save(tmp_path, f"lora-step{step:08d}-state", step) / "train_state.json"
        lines = file.read_text(encoding="utf-8").splitlines()
        file.write_text("\n".join(line for line in lines if "saved_at" not in line), encoding="utf-8")
        os.utime(file, (time, time))
    assert find_state("auto", TrainingFiles(tmp_path, "lora")) == tmp_path / "lora-step00000020-state"
