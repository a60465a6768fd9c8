"""A whole run of hv_train_network.py against figures that are computed by hand: weights, rates, metadata."""

from pathlib import Path

import numpy as np
import pytest
import torch

from modules.training.loop import Trainer
from tests.training_world import World, log_of, train
from utils.safetensors_utils import load_file, read_header

RATE, LIMIT, STEPS = 0.01, 0.02, 6


@pytest.fixture(scope="module")
def run(world: World, dit: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict], dict]:
    """Two epochs of three steps: folder, gradients of each step before they are clipped, and weights at the start."""
    output, gradients, start = tmp_path_factory.mktemp("run"), [], {}
    update = Trainer.update

    def noting(trainer: Trainer, *given: object) -> None:
        if not gradients:
            start.update({name: tensor.detach().clone() for name, tensor in trainer.trained.tensors.items()})
        gradients.append({name: tensor.grad.clone() for name, tensor in trainer.trained.tensors.items()})
        update(trainer, *given)

    words = ["--max_train_epochs", 2, "--gradient_accumulation_steps", 2, "--save_every_n_epochs", 1]
    words += ["--lr_scheduler", "linear", "--max_grad_norm", LIMIT, "--optimizer_args", "weight_decay=0.1", "eps=1e-6"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "update", noting)
        train(world, dit, output, *words, "--save_every_n_steps", 4)
    return output, gradients, start


def adamw_by_hand(start: dict, gradients: list[dict]) -> dict[str, np.ndarray]:
    """AdamW (arXiv 1711.05101, algorithm 2) in float64, each gradient scaled down to the norm `LIMIT`."""
    weights = {name: tensor.numpy().astype(np.float64) for name, tensor in start.items()}
    first = {name: np.zeros_like(weight) for name, weight in weights.items()}
    second = {name: np.zeros_like(weight) for name, weight in weights.items()}
    for step, given in enumerate(gradients, start=1):
        rate = RATE * (1 - (step - 1) / STEPS)
        norm = np.sqrt(sum((tensor.double() ** 2).sum().item() for tensor in given.values()))
        for name, tensor in given.items():
            gradient = tensor.numpy().astype(np.float64) * min(1, LIMIT / norm)
            first[name] = 0.9 * first[name] + 0.1 * gradient
            second[name] = 0.999 * second[name] + 0.001 * gradient**2
            move = first[name] / (1 - 0.9**step) / (np.sqrt(second[name] / (1 - 0.999**step)) + 1e-6)
            weights[name] = weights[name] * (1 - rate * 0.1) - rate * move
    return weights


def test_the_lora_is_that_of_adamw_in_numpy(run: tuple[Path, list[dict], dict]) -> None:
    output, gradients, start = run
    assert len(gradients) == STEPS
    norms = [line["gradient_norm"] for line in log_of(output)]
    assert max(norms) > LIMIT  # so some are clipped
    saved = load_file(output / "lora.safetensors")
    for name, expected in adamw_by_hand(start, gradients).items():
        # The gradients are small: an error of float32 in one changes a move by up to a thousandth of the rate.
        np.testing.assert_allclose(saved[name].numpy(), expected, rtol=1e-4, atol=2e-5, err_msg=name)


def test_the_initial_weights_belong_to_the_seed(run: tuple[Path, list[dict], dict]) -> None:
    """The factors are drawn in the order of the modules, `lora_down` first with PyTorch's own, which is drawn over."""
    _, _, start = run
    torch.manual_seed(7)
    name, weight = next(iter(start.items()))
    rank, inputs = weight.shape
    down, _ = torch.nn.Linear(inputs, rank, bias=False), torch.nn.Linear(rank, inputs * 3, bias=False)
    torch.nn.init.uniform_(down.weight, -(inputs**-0.5), inputs**-0.5)
    assert name == "lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight"
    torch.testing.assert_close(weight, down.weight.detach())


def test_the_rates_count_optimizer_steps(run: tuple[Path, list[dict], dict]) -> None:
    assert [line["lr"] for line in log_of(run[0])] == pytest.approx([RATE * (6 - step) / 6 for step in range(6)])
    assert [line["epoch"] for line in log_of(run[0])] == [1, 1, 1, 2, 2, 2]


@pytest.mark.parametrize(
    ("file", "epoch", "steps"), [("lora-000001", 1, 3), ("lora-step00000004", 2, 4), ("lora", 2, 6)]
)
def test_the_metadata_of_an_epoch(run: tuple[Path, list[dict], dict], file: str, epoch: int, steps: int) -> None:
    _, metadata = read_header(run[0] / f"{file}.safetensors")
    expected = {
        "ss_epoch": epoch,
        "ss_steps": steps,
        "ss_num_epochs": 2,
        "ss_max_train_steps": 6,
        "ss_num_batches_per_epoch": 5,
        "ss_num_train_items": 5,
        "ss_gradient_accumulation_steps": 2,
        "ss_seed": 7,
        "ss_learning_rate": 0.01,
        "ss_network_dim": 4,
        "ss_network_alpha": 4.0,
        "ss_max_grad_norm": LIMIT,
        "ss_lr_scheduler": "linear",
    }
    assert {key: metadata[key] for key in expected} == {key: str(value) for key, value in expected.items()}
