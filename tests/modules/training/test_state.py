"""States: which one is continued, and what a damaged or foreign one says."""

import json
import os

import pytest
import torch
from safetensors.torch import save_file

from modules.training.files import SaveOptions, TrainingFiles, find_state
from modules.training.saver import without_folders
from modules.training.state import Progress, load_state, save_state
from utils.errors import UserError

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


@pytest.mark.parametrize(
    "change",
    [
        {"step": -1}, {"step": 1.5}, {"seed": -3}, {"seed": 2**64}, {"samples": "many"},
        {"smoothed_loss": "low"}, {"first_losses": 3}, {"loss_by_band": []}, {"best": [1]}, {"arithmetic": None},
        {"recent_losses": [float("nan")]}, {"started_at": {}},
    ],
)  # fmt: skip
def test_a_counter_of_the_wrong_kind_is_one_line(tmp_path, change):
    file = save(tmp_path, "lora-state", 3) / "train_state.json"
    file.write_text(json.dumps(json.loads(file.read_text(encoding="utf-8")) | change), encoding="utf-8")
    with pytest.raises(UserError, match=r"train_state.json: is damaged; resume from another state$"):
        Progress.load(file.parent)


def test_flipped_bytes_in_an_optimizer_state_are_one_line(tmp_path):
    """The unpickler raises KeyError, IndexError, AttributeError and others, depending on the place."""
    parameter = torch.nn.Parameter(torch.ones(4))
    parameter.grad = torch.ones(4)
    optimizer = torch.optim.AdamW([parameter])
    optimizer.step()
    save_state(tmp_path / "state", Progress(seed=1), WEIGHT, {"optimizer": optimizer}, "")
    file, said = tmp_path / "state" / "optimizer.pt", []
    good = file.read_bytes()
    start = good.index(b"data.pkl") + 60
    for place in range(start, start + 120, 3):
        file.write_bytes(good[:place] + b"\xff" + good[place + 1 :])
        try:
            load_state(tmp_path / "state", WEIGHT, {"optimizer": optimizer})
        except UserError as error:
            said.append(str(error))
    assert len(said) > 20 and all("\n" not in line for line in said)


def test_one_flipped_byte_of_a_moment_is_one_line(tmp_path):
    """It was a moment with another value, because torch.load does not compare checksums (R8)."""
    parameter = torch.nn.Parameter(torch.ones(4))
    parameter.grad = torch.tensor([1.0, 2.0, 3.0, 4.0])
    optimizer = torch.optim.AdamW([parameter])
    optimizer.step()
    save_state(tmp_path / "state", Progress(seed=1), WEIGHT, {"optimizer": optimizer}, "")
    load_state(tmp_path / "state", WEIGHT, {"optimizer": optimizer})
    file = tmp_path / "state" / "optimizer.pt"
    content = bytearray(file.read_bytes())
    content[content.index(optimizer.state[parameter]["exp_avg"].numpy().tobytes())] ^= 1
    file.write_bytes(content)
    with pytest.raises(UserError, match=r"optimizer.pt: is damaged; resume from another state$"):
        load_state(tmp_path / "state", WEIGHT, {"optimizer": optimizer})


def test_infinite_weights_in_a_state_are_one_line(tmp_path):
    infinite = {"weight": torch.full((2,), float("inf"))}
    with pytest.raises(UserError, match=r"not written: weight would have values that are not finite"):
        save_state(tmp_path / "state", Progress(seed=1), infinite, {}, "")
    assert not list(tmp_path.iterdir())
    save_state(tmp_path / "state", Progress(seed=1), {"weight": torch.zeros(2)}, {}, "")
    save_file(infinite, tmp_path / "state" / "trained.safetensors")
    with pytest.raises(UserError, match=r"trained.safetensors: is damaged"):
        load_state(tmp_path / "state", WEIGHT, {})


@pytest.mark.parametrize("name", ["", " ", ".", "..", "a\nb", "a\x1b[31m", "CON", "nul.txt", "a/b", "a\\b", "x" * 151])
def test_a_name_that_is_no_file_name_is_refused(name):
    with pytest.raises(UserError, match=r"^--output_name .*; a file name such as my-lora is expected$") as raised:
        SaveOptions(output_name=name)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("name", ["my-lora", "Kätzchen v2.1", "console", "x" * 150])
def test_other_names_are_taken(name):
    assert SaveOptions(output_name=name).output_name == name


def test_metadata_name_files_and_folders_without_their_paths():
    given = {
        "datasets": [{"image_directory": "/home/me/cats/", "video_jsonl_file": "C:\\me\\a.jsonl", "num_repeats": 2}]
    }
    named = {"datasets": [{"image_directory": "cats", "video_jsonl_file": "a.jsonl", "num_repeats": 2}]}
    assert without_folders(given) == named
