"""A stop that can be trusted: it breaks off previews and validation, saves, and prints the command that goes on."""

import shlex
import signal

import pytest
import torch

from hunyuan_model.models import HYVideoDiffusionTransformer
from modules.training.denoiser import Denoiser
from modules.training.saver import CheckpointSaver
from networks.adapters import AdapterNetwork
from tests.training_world import assert_same, log_of, run_training, train
from utils.errors import UserError
from utils.safetensors_utils import load_file

VALIDATED = ["--validation_split", 0.4, "--validate_every_n_steps", 2, "--save_every_n_steps", 2, "--keep_best", 1]


@pytest.fixture(scope="module")
def with_previews(tiny_models, tmp_path_factory):
    """Words for previews of 10 steps, after step 2 and step 4."""
    prompts = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    prompts.write_text("a ball --w 32 --h 32 --s 10\na cube --w 32 --h 32 --s 10\n", encoding="utf-8")
    return [
        "--sample_prompts", prompts, "--sample_every_n_steps", 2, "--vae", tiny_models.vae,
        "--text_encoder1", tiny_models.text_encoder1, "--text_encoder2", tiny_models.text_encoder2,
    ]  # fmt: skip


@pytest.fixture
def dit_calls(monkeypatch):
    """Something to do when the DiT is called for the n-th time outside of training; and the number of these calls."""
    original, actions, calls = HYVideoDiffusionTransformer.forward, {}, []

    def forward(dit, *given, **named):
        if not torch.is_grad_enabled():
            calls.append(1)
            actions.get(len(calls), lambda: None)()
        return original(dit, *given, **named)

    monkeypatch.setattr(HYVideoDiffusionTransformer, "forward", forward)
    return actions, calls


def printed_command(text: str) -> list[str]:
    """The words after the script in the last command that was printed."""
    python, script, *words = shlex.split(text.split("to continue:")[-1].strip().splitlines()[0])
    assert (python, script) == ("python", "hv_train_network.py")
    return words


@pytest.mark.parametrize("how", ["SIGINT", "save_quit"])
def test_a_stop_breaks_off_a_preview_at_the_next_call_and_the_command_continues(
    world, dit, tiny_models, tmp_path, capsys, with_previews, dit_calls, how
):
    through = train(world, dit, tmp_path / "through", "--network_dropout", 0.2)
    actions, calls = dit_calls
    if how == "save_quit":
        actions[7] = lambda: (tmp_path / "out" / "save_quit").touch()
    else:
        actions[7] = lambda: signal.raise_signal(signal.Signals[how])
    assert train(world, dit, tmp_path / "out", "--network_dropout", 0.2, *with_previews) == {}
    assert len(calls) == 7
    assert (tmp_path / "out" / "lora-step00000002-state").is_dir()
    words = printed_command(capsys.readouterr().out)
    run_training(words)
    assert_same(load_file(tmp_path / "out" / "lora.safetensors"), through)
    previews = [line["preview"] for line in log_of(tmp_path / "out") if "preview" in line]
    assert previews == [f"lora_{step:06d}_{index:02d}" for step in (2, 4) for index in (0, 1)]


@pytest.mark.parametrize("call", [12, 20])  # of the first validation: before training it takes 10 calls
def test_a_stop_breaks_off_validation_which_the_continued_run_makes(world, dit, tmp_path, capsys, dit_calls, call):
    through = train(world, dit, tmp_path / "through", *VALIDATED)
    actions, calls = dit_calls
    calls.clear()
    actions[call] = lambda: signal.raise_signal(signal.SIGTERM)
    train(world, dit, tmp_path / "out", *VALIDATED)
    assert len(calls) == call
    run_training(printed_command(capsys.readouterr().out))
    assert_same(load_file(tmp_path / "out" / "lora.safetensors"), through)
    assert log_of(tmp_path / "out") == log_of(tmp_path / "through")
    names = {path.name for path in (tmp_path / "through").glob("*.safetensors")}
    assert {path.name for path in (tmp_path / "out").glob("*.safetensors")} == names


def test_a_stop_before_the_first_step_saves_nothing(world, dit, tmp_path, capsys, dit_calls):
    dit_calls[0][3] = lambda: signal.raise_signal(signal.SIGTERM)
    train(world, dit, tmp_path, *VALIDATED)
    assert not list(tmp_path.glob("lora*"))
    assert "stopped before anything was trained; give the same command again" in capsys.readouterr().out


def at_the_third_step(monkeypatch, action):
    """Does something in the forward pass of step 3; the first call tries the largest batch."""
    original, calls = Denoiser.velocity, []

    def velocity(*given):
        calls.append(1)
        if len(calls) == 4:
            action()
        return original(*given)

    monkeypatch.setattr(Denoiser, "velocity", velocity)


def ctrl_c_twice():
    signal.raise_signal(signal.SIGINT)
    signal.raise_signal(signal.SIGINT)


def failure():
    raise RuntimeError("a kernel failed")


@pytest.mark.parametrize(("action", "error"), [(ctrl_c_twice, KeyboardInterrupt), (failure, RuntimeError)])
def test_whatever_ends_a_step_those_before_it_are_saved(world, dit, tmp_path, monkeypatch, capsys, action, error):
    through = train(world, dit, tmp_path / "through")
    with monkeypatch.context() as patch:
        at_the_third_step(patch, action)
        with pytest.raises(error):
            train(world, dit, tmp_path / "out")
    printed = capsys.readouterr().err
    assert "step 2 is saved as lora-step00000002; to continue:" in printed
    run_training(printed_command(printed))
    assert_same(load_file(tmp_path / "out" / "lora.safetensors"), through)


def test_ctrl_c_while_a_file_is_written_interrupts_nothing(world, dit, tmp_path, monkeypatch):
    write = CheckpointSaver.write

    def interrupted(saver, *given, **named):
        ctrl_c_twice()
        write(saver, *given, **named)

    monkeypatch.setattr(CheckpointSaver, "write", interrupted)
    train(world, dit, tmp_path, "--save_every_n_steps", 2)
    assert (tmp_path / "lora-step00000002-state").is_dir() and log_of(tmp_path)[-1]["step"] == 2


def test_an_update_that_fails_half_way_is_saved_without_a_state(world, dit, tmp_path, monkeypatch, capsys):
    step, calls = torch.optim.AdamW.step, []

    def fails(optimizer, *given):
        if len(optimizer.param_groups[0]["params"]) > 1:  # not the trials before training, which have one parameter
            calls.append(1)
        if len(calls) > 2:
            raise RuntimeError("a kernel failed")
        return step(optimizer, *given)

    monkeypatch.setattr(torch.optim.AdamW, "step", fails)
    with pytest.raises(RuntimeError, match="a kernel failed"):
        train(world, dit, tmp_path)
    assert (tmp_path / "lora-step00000002.safetensors").exists() and not list(tmp_path.glob("*-state"))


def test_a_run_that_trained_nothing_does_not_end_as_if_it_had(world, dit, tmp_path, monkeypatch):
    load = AdapterNetwork.load_weights

    def overflowing(network, file):
        load(network, file)
        for parameter in network.parameters():
            parameter.data.fill_(2e38)

    start = tmp_path / "start"
    train(world, dit, start, "--max_train_steps", 1)
    monkeypatch.setattr(AdapterNetwork, "load_weights", overflowing)
    words = ["--network_weights", start / "lora.safetensors", "--max_train_steps", 2]
    with pytest.raises(UserError, match=r"^nothing was trained and nothing is written: .* of all 2 steps was not fin"):
        train(world, dit, tmp_path / "out", *words)
    assert not list((tmp_path / "out").glob("*.safetensors"))
