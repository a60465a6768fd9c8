"""train_log.jsonl: whose lines stay when a run starts, and what is said of losses."""

from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator

from modules.training.files import TrainingFiles
from modules.training.log import StepResult, StepSummary, TrainingLog
from modules.training.loop import Trainer
from modules.training.state import Progress
from tests.training_world import log_of


def write(folder, name, first, last):
    """A run of this name that logs the steps after `first` up to `last`."""
    with TrainingLog(TrainingFiles(folder, name), Accelerator(cpu=True), Progress(seed=0, step=first), last) as log:
        for step in range(first + 1, last + 1):
            log.record(step, last=last)


def test_a_new_run_keeps_the_lines_of_others_and_a_resumed_one_its_own_up_to_its_step(tmp_path):
    write(tmp_path, "a", 0, 2)
    write(tmp_path, "b", 0, 3)
    with open(tmp_path / "train_log.jsonl", "a", encoding="utf-8") as file:
        file.write('{"run": "b", "st')  # killed while it wrote
    write(tmp_path, "a", 0, 1)
    write(tmp_path, "b", 2, 4)
    lines = [(line["run"], line["step"], line["last"]) for line in log_of(tmp_path)]
    assert lines == [("b", 1, 3), ("b", 2, 3), ("a", 1, 1), ("b", 3, 4), ("b", 4, 4)]


@dataclass
class Logged:
    """What the log made of a run's steps: the lines that it said, its last rows, the end of its bar."""

    said: list[str]
    rows: dict[str, object]
    bar: str


def logged(folder, losses: Sequence[float], errors: Sequence[float]) -> Logged:
    """The log of steps with these losses, and these losses without weights."""
    progress, said = Progress(seed=0), []
    with TrainingLog(TrainingFiles(folder, "a"), Accelerator(cpu=True), progress, len(losses)) as log:
        log.say = said.append
        run = SimpleNamespace(progress=progress, log=log, plan=SimpleNamespace(epoch_of=lambda step: 0))
        for loss, error in zip(losses, errors, strict=True):
            one = [torch.tensor([value]) for value in (loss, error, 0.5)]
            result = StepResult(one[:1], one[1:2], one[2:], ["cat"])
            Trainer.log_update(run, result, StepSummary(loss, error, {}, False), 1.0, [1e-3], {})
            progress.step += 1
        return Logged(said, dict(log.summary()), log.bar.postfix)


def test_hint_and_spikes_do_not_look_at_the_weight_of_the_loss(tmp_path):
    """With sigma_sqrt a loss was 38,856 (T10)."""
    weighted = [0.5, 38856.0] * 10
    assert logged(tmp_path, weighted, [0.9] * 20).said == []
    assert not any("spike" in line for line in log_of(tmp_path))
    (hint,) = logged(tmp_path, [0.5] * 20, [1.2] * 19 + [6.0]).said
    assert hint.startswith("hint: the mean loss of the first 10 steps is 1.20;")
    spikes = {line["step"]: line["spike"] for line in log_of(tmp_path) if "spike" in line}
    assert spikes == {20: ["cat at timestep 500: loss 0.5"]}


@pytest.mark.parametrize(
    ("steps", "row"), [(1, None), (2, (1, "1.0000 -> 2.0000")), (5, (2, "1.5000 -> 4.5000")),
                       (19, (9, "5.0000 -> 15.0000")), (30, (10, "5.5000 -> 25.5000"))]
)  # fmt: skip
def test_the_first_and_the_last_losses_do_not_overlap(tmp_path, steps, row):
    """It said '2.8720 -> 2.8720' after a short run (N7)."""
    numbers = [float(number + 1) for number in range(steps)]
    rows = logged(tmp_path, [9.0] * steps, numbers).rows
    found = [(name, value) for name, value in rows.items() if "loss" in name]
    assert found == ([(f"loss, mean of the first and of the last {row[0]} steps", row[1])] if row else [])


def test_the_bar_shows_the_mean_of_the_last_ten_losses(tmp_path):
    """It was an average over hundreds of steps (N7)."""
    assert logged(tmp_path, [9.0] * 40, [float(number + 1) for number in range(40)]).bar.endswith(", loss 35.5000")
