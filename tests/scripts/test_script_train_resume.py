"""A killed and resumed run equals an undisturbed one, bit by bit; so do runs that are shared by processes."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.conftest import ROOT
from tests.platforms import needs_posix
from tests.training_world import assert_same, assert_same_course, command, log_of, train, write_world
from utils.errors import UserError
from utils.safetensors_utils import load_file, read_header

WORDS = [
    "--max_train_steps", 12, "--gradient_accumulation_steps", 2, "--max_data_loader_n_workers", 2,
    "--lr_scheduler", "cosine", "--lr_warmup_steps", 3, "--save_every_n_steps", 5, "--save_state",
    "--save_state_on_train_end", "--network_dropout", 0.1, "--network_args", "module_dropout=0.1",
]  # fmt: skip


# The script, with kill -9 of all its processes once step 7 is logged: from outside, a busy machine comes too late.
KILLED = """
import os, signal, sys
import hv_train_network
from modules.training.log import TrainingLog
log_step = TrainingLog.step
def step(log, number, *given, **named):
    log_step(log, number, *given, **named)
    if number == 7:
        os.killpg(0, signal.SIGKILL)
TrainingLog.step = step
hv_train_network.main(sys.argv[1:])
"""


def start(*words: object) -> subprocess.Popen:
    """Python in a process group of its own, with one thread."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    words = [sys.executable, *map(str, words)]
    return subprocess.Popen(words, cwd=ROOT, env=environment, start_new_session=True, stdout=subprocess.DEVNULL)


def run_in_two_processes(words: list[str]) -> None:
    """`accelerate launch` with two processes, as on a machine with two GPUs."""
    launch = ("-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0")
    process = start(*launch, "hv_train_network.py", *words)
    try:
        assert process.wait(timeout=1200) == 0
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


@needs_posix
@pytest.mark.parametrize("optimizer", ["adamw", pytest.param("adamw8bit", marks=pytest.mark.slow)])
def test_killed_and_resumed_is_undisturbed(world, tiny_models, tmp_path, optimizer):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red ball --w 32 --h 32 --s 2\n", encoding="utf-8")
    words = [*WORDS, "--optimizer_type", optimizer]
    if optimizer == "adamw":
        words += ["--sample_prompts", prompts, "--sample_every_n_steps", 4, "--vae", tiny_models.vae]
        words += ["--text_encoder1", tiny_models.text_encoder1, "--text_encoder2", tiny_models.text_encoder2]
    through, killed = tmp_path / "through", tmp_path / "killed"
    lora = train(world, tiny_models.dit, through, *words)

    process = start("-c", KILLED, *command(world, tiny_models.dit, killed, *words))
    assert process.wait(timeout=1200) == -signal.SIGKILL
    assert not (killed / "lora.safetensors").exists() and (killed / "lora-step00000005-state").is_dir()
    assert_same(train(world, tiny_models.dit, killed, *words, "--resume", "auto"), lora)
    assert log_of(killed) == log_of(through)
    assert_same_state(killed / "lora-state", through / "lora-state")
    if optimizer == "adamw":
        assert last_previews(killed) == last_previews(through)


def last_previews(output: Path) -> dict[str, bytes]:
    """Preview files by step; of two of the same step (before and after the kill) the later one."""
    files = sorted((output / "sample").iterdir())
    assert files
    return {path.name.split("_")[1]: path.read_bytes() for path in files}


def assert_same_state(first: Path, second: Path) -> None:
    assert_same(load_file(first / "trained.safetensors"), load_file(second / "trained.safetensors"))
    states = [torch.load(folder / "optimizer.pt", weights_only=True) for folder in (first, second)]
    assert flat(states[0]) == flat(states[1])


def flat(value: object) -> object:
    """A nested state in which tensors are comparable."""
    if isinstance(value, dict):
        return {key: flat(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [flat(item) for item in value]
    return (value.dtype, value.tolist()) if isinstance(value, torch.Tensor) else value


@needs_posix
def test_two_processes_with_a_batch_of_one_are_one_process_with_a_batch_of_two(tiny_models, tmp_path):
    one = write_world(tmp_path / "one", items=2, batch_size=1)
    two = write_world(tmp_path / "two", items=2, batch_size=2)
    words = ["--max_train_steps", 5, "--learning_rate", 1e-4]
    together = train(two, tiny_models.dit, tmp_path / "together", *words)
    shared = tmp_path / "shared"
    run_in_two_processes(command(one, tiny_models.dit, shared, *words))
    torch.testing.assert_close(load_file(shared / "lora.safetensors"), together, rtol=0, atol=1e-5)
    assert_same_course(shared, tmp_path / "together")


@needs_posix
@pytest.mark.slow
def test_uneven_tails_over_two_processes_with_accumulation(tiny_models, tmp_path):
    """5 batches: of the second step of an epoch rank 1 has one batch less, or none."""
    world = write_world(tmp_path / "world", items=5)
    words = ["--max_train_epochs", 3, "--learning_rate", 1e-4]
    alone = train(world, tiny_models.dit, tmp_path / "alone", *words, "--gradient_accumulation_steps", 4)
    run_in_two_processes(
        command(world, tiny_models.dit, tmp_path / "shared", *words, "--gradient_accumulation_steps", 2)
    )
    shared = load_file(tmp_path / "shared" / "lora.safetensors")
    torch.testing.assert_close(shared, alone, rtol=0, atol=1e-5)
    assert_same_course(tmp_path / "shared", tmp_path / "alone")


def test_a_resumed_run_keeps_the_rate_of_its_optimizer_and_says_so(world, tiny_models, tmp_path, capsys):
    train(world, tiny_models.dit, tmp_path, "--max_train_steps", 2, "--save_state_on_train_end")
    words = ["--resume", "auto", "--max_train_steps", 3, "--learning_rate", 5e-5, "--discrete_flow_shift", 7]
    train(world, tiny_models.dit, tmp_path, *words)
    warned = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: --resume")]
    assert warned == [
        "warning: --resume: learning_rate is 5e-05 and was 0.01: the saved value stays",
        "warning: --resume: discrete_flow_shift is 7.0 and was 1.0: takes effect from here on",
    ]
    assert log_of(tmp_path)[-1]["lr"] == 0.01
    assert read_header(tmp_path / "lora.safetensors")[1]["ss_learning_rate"] == "0.01"


def test_a_resumed_run_takes_the_rates_of_its_longer_schedule(world, dit, tmp_path):
    words = ["--lr_scheduler", "linear"]
    train(world, dit, tmp_path, *words, "--max_train_steps", 2, "--save_state_on_train_end")
    train(world, dit, tmp_path, *words, "--max_train_steps", 4, "--resume", "auto")
    rates = [line["lr"] for line in log_of(tmp_path)]
    assert rates == pytest.approx([0.01, 0.005, 0.005, 0.0025])  # 1, 1/2 of two steps; 2/4, 1/4 of four


def test_a_state_beyond_the_end_of_the_run_is_one_line(world, dit, tmp_path):
    train(world, dit, tmp_path, "--max_train_steps", 3, "--save_state_on_train_end")
    with pytest.raises(UserError, match=r"^--max_train_steps or --max_train_epochs: 2 steps, and .* at step 3; give"):
        train(world, dit, tmp_path, "--max_train_steps", 2, "--resume", "auto")


def test_a_limit_of_checkpoints_that_a_resumed_run_is_given_removes_one_per_save(world, dit, tmp_path):
    """As in the reference tool. Nobody asked for the removal of the older ones."""
    words = ["--save_every_n_steps", 1]
    train(world, dit, tmp_path, *words, "--max_train_steps", 4, "--save_state")
    train(world, dit, tmp_path, *words, "--max_train_steps", 6, "--resume", "auto", "--save_last_n_steps", 1)
    assert sorted(path.stem for path in tmp_path.glob("lora-step*.safetensors")) == [
        f"lora-step{step:08d}" for step in (1, 2, 5, 6)
    ]
    assert sorted(path.name for path in tmp_path.glob("lora-step*-state")) == [
        f"lora-step{step:08d}-state" for step in (1, 2)
    ]


def test_a_schedule_that_is_too_short_is_found_before_the_first_step(world, dit, tmp_path):
    words = ["--lr_scheduler_type", "OneCycleLR", "--lr_scheduler_args", "max_lr=0.1"]
    with pytest.raises(UserError, match=r"OneCycleLR with max_lr=0.1 total_steps=2: has no rate after step 3 of 4"):
        train(world, dit, tmp_path, *words, "total_steps=2")
    assert train(world, dit, tmp_path, *words, "total_steps=4")


def test_every_option_that_influences_the_weights_is_named_and_no_other(world, dit, tmp_path, capsys):
    train(world, dit, tmp_path, "--max_train_steps", 2, "--save_state_on_train_end")
    capsys.readouterr()
    words = ["--resume", "auto", "--max_train_steps", 3, "--fp8_base", "--cuda_allow_tf32", "--network_dropout", 0.1]
    neutral = [
        "--save_precision",
        "bf16",
        "--gradient_checkpointing",
        "--max_nonfinite_steps",
        3,
        "--metadata_author",
        "A",
    ]
    train(world, dit, tmp_path, *words, *neutral)
    warned = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: --resume")]
    assert warned == [
        "warning: --resume: cuda_allow_tf32 is True and was False: takes effect from here on",
        "warning: --resume: network_dropout is 0.1 and was unset: takes effect from here on",
        "warning: --resume: fp8_base is True and was False: takes effect from here on",
    ]
