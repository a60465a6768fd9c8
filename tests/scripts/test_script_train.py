"""hv_train_network.py: what a run leaves on disk, and what it does not depend on."""

import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from networks.files.lora_files import read_lora
from tests.conftest import ROOT
from tests.platforms import needs_posix
from tests.training_world import (
    assert_same,
    assert_same_course,
    command,
    log_of,
    run_training,
    train,
    write_world,
)
from utils.errors import UserError
from utils.safetensors_utils import load_file, read_header


@pytest.fixture(scope="module")
def plain(world, dit, tmp_path_factory):
    """A run without anything special: its folder and its LoRA."""
    output = tmp_path_factory.mktemp("plain")
    return output, train(world, dit, output)


def test_names_of_checkpoints_states_and_settings(world, dit, tmp_path):
    train(
        world, dit, tmp_path, "--max_train_epochs", 2, "--save_every_n_epochs", 1, "--save_every_n_steps", 4,
        "--save_state",
    )  # fmt: skip
    stems = ["lora", "lora-000001", "lora-step00000004", "lora-step00000008"]
    expected = {f"{stem}{ending}" for stem in stems for ending in (".safetensors", ".settings.toml", "-state")}
    assert {path.name for path in tmp_path.iterdir()} == expected | {"train_log.jsonl"}
    assert read_header(tmp_path / "lora-000001.safetensors")[1]["modelspec.title"] == "lora"


def test_metadata_and_tensors_of_the_lora(plain, dit):
    output, lora = plain
    infos, metadata = read_header(output / "lora.safetensors")
    assert metadata["ss_steps"] == "4" and metadata["ss_network_dim"] == "4" and metadata["ss_seed"] == "7"
    assert metadata["modelspec.architecture"] == "hunyuan-video/lora" and len(metadata["sshs_model_hash"]) == 64
    assert all(info.dtype == torch.float32 for info in infos.values())
    assert not [value for value in metadata.values() if str(output.parent) in value or str(dit.parent) in value]
    assert '"image_directory": "absent", "cache_directory": "cache"' in metadata["ss_datasets"]
    assert any(lora[name].any() for name in lora if "lora_up" in name)


def test_the_saved_settings_make_the_same_lora(plain, tmp_path):
    output, lora = plain
    run_training(["--config_file", output / "lora.settings.toml", "--output_dir", tmp_path])
    assert_same(load_file(tmp_path / "lora.safetensors"), lora)


def test_neither_workers_nor_checkpointing_nor_logs_change_the_lora(world, dit, plain, tmp_path):
    words = ["--max_data_loader_n_workers", 2, "--gradient_checkpointing", "--logging_dir", tmp_path / "logs"]
    assert_same(train(world, dit, tmp_path, *words, "--log_config"), plain[1])
    (name,) = {path.parent for path in (tmp_path / "logs").glob("*/network_train/events.out.tfevents.*")}
    logged = EventAccumulator(str(name)).Reload()
    wanted = {"loss", "loss/smoothed", "gradient_norm", "seconds_per_step", "memory/peak_gib", "lr/0"}
    assert wanted < set(logged.Tags()["scalars"])
    assert [round(event.value, 4) for event in logged.Scalars("loss")] == [
        round(line["loss"], 4) for line in log_of(tmp_path)
    ]


def test_items_of_a_batch_one_by_one_give_the_same_lora(dit, tmp_path):
    world = write_world(tmp_path, items=4, batch_size=2)
    together = train(world, dit, tmp_path / "a", "--learning_rate", 1e-3)
    apart = train(world, dit, tmp_path / "b", "--learning_rate", 1e-3, "--split_attn")
    torch.testing.assert_close(apart, together, rtol=0, atol=1e-5)


def test_accumulated_batches_count_as_one_batch(dit, tmp_path):
    world = write_world(tmp_path / "two", items=2, batch_size=2)
    same = write_world(tmp_path / "one", items=2, batch_size=1)
    words = ["--max_train_steps", 5, "--learning_rate", 1e-4]
    together = train(world, dit, tmp_path / "a", *words)
    apart = train(same, dit, tmp_path / "b", *words, "--gradient_accumulation_steps", 2)
    torch.testing.assert_close(apart, together, rtol=0, atol=1e-5)
    assert_same_course(tmp_path / "a", tmp_path / "b")


def test_dry_run_prints_the_plan_and_the_settings_and_writes_nothing(world, dit, tmp_path, capsys):
    output = tmp_path / "absent"
    train(world, dit, output, "--dry_run", "--max_train_epochs", 3, "--gradient_accumulation_steps", 2)
    printed = capsys.readouterr().out
    assert "steps per epoch      3" in printed and "steps                9" in printed
    assert 'network_module = "networks.lora"' in printed
    assert not output.exists()


def test_rotation_keeps_the_last_checkpoints_and_other_files(world, dit, tmp_path):
    (tmp_path / "other-000001.safetensors").write_bytes(b"mine")
    (tmp_path / "lora-notes.txt").write_bytes(b"mine")
    (tmp_path / "lora-000001_comfyui.safetensors").write_bytes(b"mine")
    train(
        world, dit, tmp_path, "--max_train_epochs", 5, "--gradient_accumulation_steps", 5, "--save_every_n_epochs", 1,
        "--save_last_n_epochs", 2, "--save_state", "--save_last_n_epochs_state", 1,
    )  # fmt: skip
    assert sorted(path.name for path in tmp_path.glob("*.safetensors")) == [
        "lora-000001_comfyui.safetensors", "lora-000003.safetensors", "lora-000004.safetensors", "lora.safetensors",
        "other-000001.safetensors",
    ]  # fmt: skip
    assert sorted(path.name for path in tmp_path.glob("*-state")) == ["lora-000004-state", "lora-state"]
    assert (tmp_path / "lora-notes.txt").exists()


def test_a_removed_output_folder_is_made_again(world, dit, tmp_path, monkeypatch):
    ask(monkeypatch, {2: lambda: shutil.rmtree(tmp_path / "out")})
    words = ["--validation_split", 0.4, "--validate_every_n_steps", 1, "--keep_best", 1, "--save_last_n_steps", 1]
    assert train(world, dit, tmp_path / "out", *words, "--save_every_n_steps", 1)


def test_step_checkpoints_live_for_some_steps(world, dit, tmp_path):
    train(world, dit, tmp_path, "--max_train_steps", 6, "--save_every_n_steps", 1, "--save_last_n_steps", 2)
    assert sorted(path.stem for path in tmp_path.glob("lora-step*.safetensors")) == [
        f"lora-step{step:08d}" for step in (4, 5, 6)
    ]


def test_a_file_save_makes_a_checkpoint_and_save_quit_ends_the_run(world, dit, tmp_path, monkeypatch):
    ask(monkeypatch, {2: lambda: (tmp_path / "save").touch(), 4: lambda: (tmp_path / "save_quit").touch()})
    assert train(world, dit, tmp_path, "--max_train_steps", 9, "--save_every_n_steps", 3) == {}
    states = sorted(path.name for path in tmp_path.glob("*-state"))
    assert states == ["lora-step00000003-state", "lora-step00000004-state"]
    assert not (tmp_path / "save").exists() and not (tmp_path / "save_quit").exists()
    assert [line["step"] for line in log_of(tmp_path)] == [1, 2, 3, 4]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_the_resumed_run_equals_an_undisturbed_one(world, dit, plain, tmp_path, monkeypatch, number):
    ask(monkeypatch, {2: lambda: signal.raise_signal(number)})
    assert train(world, dit, tmp_path) == {}
    monkeypatch.undo()
    assert [line["step"] for line in log_of(tmp_path)] == [1, 2]  # it came within the update of step 2
    assert (tmp_path / "lora-step00000002.safetensors").exists()
    assert_same(train(world, dit, tmp_path, "--resume", "auto"), plain[1])


@needs_posix
def test_sigterm_for_all_processes_saves_too(world, dit, tmp_path):
    """As launchers, systemd and SLURM send it: to the workers of the DataLoader as well."""
    words = command(world, dit, tmp_path, "--max_train_steps", 100_000, "--max_data_loader_n_workers", 1)
    script = [sys.executable, str(ROOT / "hv_train_network.py"), *words]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(script, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True) as run:
        try:
            while not (tmp_path / "train_log.jsonl").exists() or not log_of(tmp_path):
                assert run.poll() is None, run.stderr.read()
                time.sleep(0.2)
            os.killpg(run.pid, signal.SIGTERM)
            message = run.communicate(timeout=600)[1]
        finally:
            run.kill()
    assert run.returncode == 0, message
    assert len(list(tmp_path.glob("lora-step*-state"))) == 1
    with pytest.raises(ProcessLookupError):
        os.killpg(run.pid, 0)


def ask(monkeypatch, actions):
    """Does something once a step (from 1) is logged."""
    from modules.training.log import TrainingLog

    original = TrainingLog.step

    def step(self, number, *arguments, **extra):
        original(self, number, *arguments, **extra)
        actions.get(number, lambda: None)()

    monkeypatch.setattr(TrainingLog, "step", step)


@needs_posix
def test_a_full_disk_ends_in_one_line_with_the_last_checkpoint_whole(world, dit, tmp_path, monkeypatch):
    import resource

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    ask(monkeypatch, {3: lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, limits[1]))})
    try:
        with pytest.raises(UserError, match=r"lora-step00000004.safetensors: cannot be written.*--resume auto"):
            train(world, dit, tmp_path, "--save_every_n_steps", 2, "--save_state")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    monkeypatch.undo()
    good = {path.name for path in tmp_path.iterdir()} - {"train_log.jsonl"}
    assert good == {f"lora-step00000002{ending}" for ending in (".safetensors", ".settings.toml", "-state")}
    assert train(world, dit, tmp_path, "--resume", "auto")


def test_what_killed_runs_left_half_written_is_removed(world, dit, tmp_path):
    for name in ("lora.safetensors", "lora-best-step00000004.comfyui.safetensors", "lora-000002.settings.toml"):
        (tmp_path / f"{name}.4194305.partial").touch()
    for name in ("lora-step00000002-state.4194305", "lora-step00000003-state.old", "lora-step00000004-state.old"):
        (tmp_path / f"{name}.partial" / "deep").mkdir(parents=True)
    (tmp_path / "lora-step00000003-state").mkdir()
    others = {"lora.txt.partial", f"lora.v2.safetensors.{os.getppid()}.partial"}
    for name in others:
        (tmp_path / name).touch()
    train(world, dit, tmp_path, "--max_train_steps", 1)
    assert {path.name for path in tmp_path.glob("*.partial")} == others
    assert (tmp_path / "lora-step00000004-state" / "deep").is_dir(), "a run died between taking it away and the new one"


def test_extra_formats_and_precision(world, dit, tmp_path, monkeypatch):
    read = []
    monkeypatch.setattr("networks.files.lora_files.read_lora", lambda path: (read.append(path), read_lora(path))[1])
    words = ["--max_train_steps", 1, "--save_format", "default", "other", "comfyui", "--save_precision", "bf16"]
    train(world, dit, tmp_path, *words)
    assert len(read) == 1 and (tmp_path / "lora.comfyui.safetensors").exists()
    infos, _ = read_header(tmp_path / "lora.safetensors")
    others, _ = read_header(tmp_path / "lora.other.safetensors")
    assert {info.dtype for info in infos.values()} == {torch.bfloat16}
    assert all(name.startswith("diffusion_model.") for name in others)


@pytest.fixture(scope="module")
def state(world, dit, tmp_path_factory):
    """The state of a run after its second of four steps."""
    output = tmp_path_factory.mktemp("state")
    train(world, dit, output, "--save_every_n_steps", 2, "--save_state")
    return output / "lora-step00000002-state"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--network_dim", 8], r"saved from another network: .*lora_down.weight is \(4, 64\) in the state"),
        (["--network_module", "networks.loha"], "saved from another network: .* is absent"),
        (["--optimizer_type", "SGD"], r"--optimizer_type .*: the state .* was saved with torch\.optim\.AdamW"),
        (["--optimizer_type", "AdamW8bit"], r"--optimizer_type .*: the state .* was saved with torch\.optim\.AdamW"),
    ],
)
def test_a_state_of_another_run_is_refused(world, dit, state, tmp_path, words, message):
    with pytest.raises(UserError, match=message):
        train(world, dit, tmp_path, "--resume", state, *words)


def test_a_resumed_run_that_counts_otherwise_says_so_and_goes_on(world, dit, state, tmp_path, capsys):
    train(world, dit, tmp_path, "--resume", state, "--gradient_accumulation_steps", 2)
    assert "warning: --resume: batches per step was 1, is 2" in capsys.readouterr().err
    assert [line["step"] for line in log_of(tmp_path)] == [3, 4]


def test_a_damaged_state_is_one_line(world, dit, state, tmp_path):
    damaged = tmp_path / "lora-state"
    shutil.copytree(state, damaged)
    (damaged / "optimizer.pt").write_bytes((damaged / "optimizer.pt").read_bytes()[:1000])
    with pytest.raises(UserError, match=r"optimizer\.pt: is damaged"):
        train(world, dit, tmp_path / "out", "--resume", damaged)
    (damaged / "train_state.json").write_text("{", encoding="utf-8")
    with pytest.raises(UserError, match=r"train_state\.json: is damaged"):
        train(world, dit, tmp_path / "out", "--resume", damaged)
