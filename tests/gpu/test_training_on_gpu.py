"""hv_train_network.py and hv_train.py on a GPU: half precision, memory savings, and exact resume.

pytest tests/gpu -m gpu
"""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from tests.training_world import assert_same, log_of, train, tune, write_world

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA and -m gpu")]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return write_world(tmp_path_factory.mktemp("world"), items=5)


def losses(output):
    """Loss by step; float16 skips steps until its scale is found."""
    return {line["step"]: line["loss"] for line in log_of(output) if "loss" in line}


def assert_near(half, exact):
    assert losses(half)
    assert losses(half) == pytest.approx({step: losses(exact)[step] for step in losses(half)}, rel=0.05)


@pytest.mark.parametrize(
    "words",
    [
        ["--mixed_precision", "bf16"],
        ["--mixed_precision", "fp16", "--dit_dtype", "float16"],
        ["--mixed_precision", "bf16", "--fp8_base", "--blocks_to_swap", 2, "--gradient_checkpointing"],
        ["--mixed_precision", "bf16", "--selective_checkpointing", "--optimizer_type", "AdamW8bit"],
        ["--mixed_precision", "bf16", "--compile"],
    ],
    ids=lambda words: " ".join(map(str, words[1:])),
)
def test_losses_are_near_those_of_float32(world, tiny_models, tmp_path, words):
    train(world, tiny_models.dit, tmp_path / "exact", "--dit_dtype", "float32", "--mixed_precision", "no")
    train(world, tiny_models.dit, tmp_path / "half", *words)
    assert_near(tmp_path / "half", tmp_path / "exact")


@sdpa_kernel(SDPBackend.MATH)  # the others add up the gradient of q in an order that changes from run to run
def test_resumed_is_undisturbed(world, tiny_models, tmp_path):
    words = ["--mixed_precision", "bf16", "--max_train_steps", 6, "--save_every_n_steps", 3, "--save_state"]
    through = train(world, tiny_models.dit, tmp_path / "through", *words)
    state = tmp_path / "through" / "lora-step00000003-state"
    assert_same(train(world, tiny_models.dit, tmp_path / "again", *words, "--resume", state), through)


@pytest.mark.parametrize(
    "words",
    [
        ["--mixed_precision", "bf16", "--gradient_checkpointing"],
        ["--full_bf16", "--optimizer_type", "adafactor"],
        ["--mixed_precision", "bf16", "--trainable_modules", "single_blocks", "--dit_dtype", "bf16"],
    ],
    ids=lambda words: " ".join(map(str, words)),
)
def test_full_fine_tuning_has_losses_near_those_of_float32(world, tiny_models, tmp_path, words):
    tune(world, tiny_models.dit, tmp_path / "exact", "--learning_rate", 1e-5)
    tune(world, tiny_models.dit, tmp_path / "half", "--learning_rate", 1e-5, *words)
    assert_near(tmp_path / "half", tmp_path / "exact")


def test_full_fp16_finds_a_scale_and_learns(world, tiny_models, tmp_path):
    words = ["--full_fp16", "--mixed_precision", "fp16", "--optimizer_type", "adamw8bit", "--max_train_steps", 40]
    tuned = tune(world, tiny_models.dit, tmp_path, *words, "--max_nonfinite_steps", 20)
    found = list(losses(tmp_path).values())
    assert len(found) > 20 and sum(found[-5:]) < sum(found[:5])
    assert {tensor.dtype for tensor in tuned.values()} == {torch.float16}
