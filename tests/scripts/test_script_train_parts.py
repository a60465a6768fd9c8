"""hv_train_network.py with its parts: optimizers, schedules, timesteps, uploads, from command line to files."""

import huggingface_hub
import pytest
import torch

from tests.training_world import assert_same, log_of, run_training, train
from utils.errors import UserError


@pytest.fixture
def no_model(monkeypatch):
    """Fails the test if the DiT is loaded."""

    def load(*_, **__):
        raise AssertionError("the DiT was loaded")

    monkeypatch.setattr("hunyuan_model.checkpoints.load_dit", load)


@pytest.mark.parametrize(
    "words",
    [
        ["--optimizer_type", "adafactor"],
        ["--optimizer_type", "Lion8bit", "--lr_scheduler", "warmup_stable_decay", "--lr_decay_steps", "50%"],
        ["--optimizer_type", "torch.optim.NAdam", "--lr_scheduler", "rex", "--lr_warmup_steps", "0.25"],
        ["--optimizer_type", "sgd", "--optimizer_args", "momentum=0.9", "--timestep_sampling", "logsnr"],
        ["--lr_scheduler_type", "StepLR", "--lr_scheduler_args", "step_size=1", "--num_timestep_buckets", "3"],
    ],
    ids=lambda words: words[1],
)
def test_a_resumed_run_ends_like_an_undisturbed_one(world, tiny_models, tmp_path, words) -> None:
    dit, whole, rest = tiny_models.dit, tmp_path / "whole", tmp_path / "rest"
    lora = train(world, dit, whole, *words, "--save_every_n_steps", 2, "--save_state")
    resumed = train(world, dit, rest, *words, "--resume", whole / "lora-step00000002-state")
    assert_same(resumed, lora)
    rates = [[line["lr"] for line in log_of(folder) if "lr" in line] for folder in (whole, rest)]
    assert rates[0][2:] == rates[1] and rates[1][-1] > 0
    assert all(torch.isfinite(tensor).all() for tensor in lora.values())


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--optimizer_args", "weight_decy=0.1"], "did you mean 'weight_decay'"),
        (["--optimizer_args", "betas=3"], "AdamW refuses"),
        (["--lr_scheduler", "cosine", "--lr_warmup_steps", "5"], "the run has 4 steps"),
        (["--lr_scheduler", "rex", "--lr_scheduler_args", "waves=2"], "'waves'"),
        (["--lr_scheduler_type", "StepLR"], "step_size"),
        (["--huggingface_repo_id", "me/cats"], "--huggingface_repo_id me/cats: offline"),
    ],
)
def test_mistakes_are_found_before_a_model_is_loaded(world, tiny_models, tmp_path, no_model, monkeypatch, words, line):
    def refuse(*_, **__):
        raise ConnectionError("offline")

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", refuse)
    with pytest.raises(UserError, match=line):
        train(world, tiny_models.dit, tmp_path, *words)


def test_settings_without_effect_are_named(world, tiny_models, tmp_path, no_model, capsys) -> None:
    words = ["--dry_run", "--timestep_sampling", "uniform", "--discrete_flow_shift", 7, "--lr_warmup_steps", 2]
    words += ["--keep_best", 2, "--save_last_n_steps", 3, "--compile_mode", "max-autotune", "--block_swap_ring_size", 3]
    train(world, tiny_models.dit, tmp_path, *words, "--optimizer_type", "adafactor", "--lr_scheduler", "cosine")
    warned = [line.split()[1] for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]
    assert warned == [
        "--discrete_flow_shift", "--learning_rate", "--lr_scheduler", "--lr_warmup_steps", "--save_last_n_steps",
        "--keep_best", "--compile_mode", "--block_swap_ring_size",
    ]  # fmt: skip


def test_show_timesteps_needs_nothing_else(capsys) -> None:
    run_training(["--show_timesteps", "console", "--timestep_sampling", "shift"])
    assert "960-1000" in capsys.readouterr().out


@pytest.mark.parametrize("behind", [[], ["--async_upload"]])
def test_checkpoints_and_states_are_uploaded_and_the_token_stays_here(
    world, tiny_models, tmp_path, monkeypatch, capsys, behind
) -> None:
    sent, token = [], "hf_never_write_me"
    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", lambda self, *_, **__: sent.append(self.token))
    for kind in ("file", "folder"):
        place = {"file": "path_or_fileobj", "folder": "folder_path"}[kind]
        record = lambda self, *, path_in_repo, place=place, **call: sent.append((path_in_repo, call[place].exists()))  # noqa: E731
        monkeypatch.setattr(huggingface_hub.HfApi, f"upload_{kind}", record)
    words = ["--huggingface_repo_id", "me/cats", "--huggingface_token", token, "--huggingface_path_in_repo", "run"]
    words += ["--save_state_on_train_end", "--save_state_to_huggingface", *behind]
    train(world, tiny_models.dit, tmp_path, "--max_train_steps", 1, *words)
    assert sent[0] == token
    assert {("run/lora.safetensors", True), ("run/lora-state", True)} <= set(sent[1:])
    printed = capsys.readouterr()
    assert token not in printed.out + printed.err
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and token.encode() in path.read_bytes()]
