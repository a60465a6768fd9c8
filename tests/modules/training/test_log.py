"""train_log.jsonl: whose lines stay when a run starts."""

from accelerate import Accelerator

from modules.training.files import TrainingFiles
from modules.training.log import TrainingLog
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
