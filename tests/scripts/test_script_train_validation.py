"""Validation of hv_train_network.py: a curve that means something, and the checkpoints that it chooses."""

import pytest
import torch

from examples.tiny_models import dit_shapes, random_weights
from tests.training_world import assert_same, log_of, train, write_world
from utils.safetensors_utils import load_file, read_header


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return write_world(tmp_path_factory.mktemp("world"), items=6)


def validations(output, name="validation_loss"):
    return [(line["step"], line[name]) for line in log_of(output) if name in line]


def test_nothing_changes_where_nothing_is_learned(world, dit, tmp_path, capsys):
    words = ["--validation_split", 0.3, "--validate_every_n_steps", 1, "--learning_rate", 0]
    train(world, dit, tmp_path, *words)
    ((step, base),) = validations(tmp_path, "base_validation_loss")
    assert step == 0 and validations(tmp_path) == [(number, base) for number in (1, 2, 3, 4)]
    assert "validation:   0%" in capsys.readouterr().err


def test_held_out_items_are_not_trained_and_validation_changes_nothing(world, dit, tmp_path):
    words = ["--validation_split", 0.3, "--max_train_epochs", 2, "--network_dropout", 0.2]
    often = train(world, dit, tmp_path / "often", *words, "--validate_every_n_steps", 1)
    seldom = train(world, dit, tmp_path / "seldom", *words)
    assert_same(often, seldom)
    assert [step for step, _ in validations(tmp_path / "seldom")] == [4, 8]
    assert log_of(tmp_path / "often")[-2]["step"] == 8


def test_best_checkpoints_are_kept_also_over_a_resume(world, dit, tmp_path):
    """The learning rate is so high that early steps are the best."""
    words = ["--validation_split", 0.3, "--validate_every_n_steps", 1, "--keep_best", 2, "--learning_rate", 0.05]
    words += ["--save_every_n_steps", 3, "--save_state", "--max_train_steps", 6]
    train(world, dit, tmp_path / "a", *words)
    ranked = sorted(validations(tmp_path / "a"), key=lambda entry: entry[1])[:2]
    best = {path.name for path in (tmp_path / "a").glob("lora-best-*.safetensors")}
    assert best == {f"lora-best-step{step:08d}.safetensors" for step, _ in ranked}

    _, metadata = read_header(tmp_path / "a" / "lora.safetensors")
    ((_, base),) = validations(tmp_path / "a", "base_validation_loss")
    assert float(metadata["ss_validation_base_loss"]) == base
    assert float(metadata["ss_validation_loss"]) == validations(tmp_path / "a")[-1][1]
    assert metadata["ss_validation_step"] == "6" and int(metadata["ss_validation_best_step"]) == ranked[0][0]

    state = tmp_path / "a" / "lora-step00000003-state"
    train(world, dit, tmp_path / "b", *words, "--resume", state)
    assert validations(tmp_path / "b") == [entry for entry in validations(tmp_path / "a") if entry[0] > 3]


def test_the_base_line_is_the_model_without_the_network(world, dit, tmp_path):
    """Also where training starts from weights."""
    words = ["--validation_split", 0.3, "--max_train_steps", 1]
    train(world, dit, tmp_path / "a", *words, "--learning_rate", 0.05)
    weights = tmp_path / "a" / "lora.safetensors"
    assert any(tensor.any() for name, tensor in load_file(weights).items() if "lora_up" in name)
    train(world, dit, tmp_path / "b", *words, "--network_weights", weights)
    assert validations(tmp_path / "b", "base_validation_loss") == validations(tmp_path / "a", "base_validation_loss")
    assert validations(tmp_path / "b") != validations(tmp_path / "b", "base_validation_loss")


@pytest.mark.slow
def test_a_lora_of_rank_8_overfits_one_clip(tmp_path):
    """The mean loss over fixed quantiles falls below 0.35 of what the base model has, within 300 steps.

    The DiT is wide enough to cancel what a random model makes of the noise; the noise itself stays: loss 1.
    """
    shapes = dit_shapes(hidden_size=256, mlp_hidden=1024, depth_double=1, depth_single=2)
    torch.save({"module": random_weights(shapes, seed=0)}, tmp_path / "dit.pt")
    world = write_world(tmp_path / "world", items=1, batch_size=8, size=(32, 32), frames=5)
    same = write_world(tmp_path / "same", items=1, size=(32, 32), frames=5)
    train_section = world.config.read_text(encoding="utf-8")
    held_out = same.config.read_text(encoding="utf-8").replace("[[datasets]]", "[[validation]]")
    text = train_section.replace("[[datasets]]", "[[datasets]]\nnum_repeats = 8") + held_out.partition("\n[[")[1]
    world.config.write_text(text + held_out.partition("\n[[")[2], encoding="utf-8")
    train(
        world, tmp_path / "dit.pt", tmp_path / "out", "--network_dim", 8, "--network_alpha", 8,
        "--max_train_steps", 300, "--validate_every_n_steps", 300, "--learning_rate", 5e-3, "--lr_scheduler", "cosine",
    )  # fmt: skip
    ((_, base),) = validations(tmp_path / "out", "base_validation_loss")
    assert validations(tmp_path / "out")[-1][1] < 0.35 * base
