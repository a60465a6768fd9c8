"""What full fine-tuning trains, and with which optimizers in half precision."""

import math

import pytest
import torch
from torch import nn

from modules.training.full_model import HalfGradScaler, TrainedModel, trained_names
from modules.training.optimizers import OptimizerOptions, try_optimizer
from utils.errors import UserError
from utils.safetensors_utils import read_header

NAMES = ["img_in.weight", "single_blocks.1.norm.weight", "single_blocks.10.norm.weight", "final.bias"]
CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("parts", "found"),
    [
        (["."], NAMES),
        (["single_blocks.1"], NAMES[1:3]),
        (["single_blocks.1."], NAMES[1:2]),
        (["bias", "img_in"], [NAMES[0], NAMES[3]]),
    ],
)
def test_names_are_chosen_by_their_parts(parts, found):
    assert trained_names(NAMES, parts) == set(found)


def test_every_part_must_be_in_some_name_and_the_error_shows_names():
    with pytest.raises(UserError, match=r"--trainable_modules blocks_1: .*single_blocks\.1\.norm\.weight"):
        trained_names(NAMES, ["img_in", "blocks_1"])


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.Linear(4, 4))


def test_only_what_is_named_has_gradients_and_goes_to_the_optimizer(model):
    trained = TrainedModel(model.requires_grad_(False), {"2.weight"})
    model(torch.ones(1, 4)).sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is not None] == ["2.weight"]
    assert trained.parameter_groups(0.5) == [{"params": [model[2].weight], "lr": 0.5}]
    assert trained.tensors.keys() == {"2.weight"}


def test_dropout_rests_in_evaluation(model):
    trained, given = TrainedModel(model, {"2.weight"}), torch.ones(1, 4)
    trained.start_epoch()
    with trained.evaluation():
        assert torch.equal(model(given), model(given))
    assert model.training


def test_the_model_before_training_is_gone_after_the_first_update(model):
    trained = TrainedModel(model, {"2.weight"})
    with trained.switched_off():
        pass
    trained.after_update()
    for changed in (trained, TrainedModel(model, {"2.weight"}, untouched=False)):
        with pytest.raises(RuntimeError, match="before training are gone"), changed.switched_off():
            pass


@pytest.mark.parametrize("dtype", [None, torch.float16])
def test_the_file_holds_every_weight(model, tmp_path, dtype):
    path = tmp_path / "model.safetensors"
    written = TrainedModel(model.to(torch.bfloat16), {"2.weight"}, dtype).save(path, {"title": "T"})
    assert written == [path]
    infos, metadata = read_header(path)
    assert {name: (info.shape, info.dtype) for name, info in infos.items()} == {
        name: (tuple(p.shape), dtype or torch.bfloat16) for name, p in model.named_parameters()
    }
    assert metadata == {"title": "T"}


@pytest.mark.parametrize(
    ("name", "dtype", "state_bytes"),
    [
        ("adamw", torch.float32, 8),
        ("adamw", torch.bfloat16, 4),
        ("adamw8bit", torch.float16, 2),
        ("adafactor", torch.float16, 0),
        ("sgd", torch.float16, 0),
    ],
)
def test_what_an_optimizer_keeps_of_each_weight(name, dtype, state_bytes):
    assert try_optimizer(OptimizerOptions(optimizer_type=name), dtype, CPU) == pytest.approx(state_bytes, abs=0.1)


def test_an_optimizer_whose_states_underflow_is_refused():
    with pytest.raises(UserError, match="AdamW: does not work with float16 weights: its states underflow"):
        try_optimizer(OptimizerOptions(), torch.float16, CPU)
    assert try_optimizer(OptimizerOptions(optimizer_args=["eps=1e-4"]), torch.float16, CPU) == pytest.approx(4, abs=0.1)


def test_the_scaler_unscales_float16_gradients_and_skips_infinite_ones():
    weight = nn.Parameter(torch.ones(2, dtype=torch.float16))
    optimizer, scaler = torch.optim.SGD([weight], lr=0.5), HalfGradScaler("cpu", init_scale=1024.0)
    scaler.scale((weight * torch.tensor([1.0, 4.0])).sum()).backward()
    assert weight.grad.tolist() == [1024, 4096]
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    scaler.update()
    assert weight.tolist() == [0.5, -1.0]
    weight.grad = torch.tensor([math.inf, 0.0], dtype=torch.float16)
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    scaler.update()
    assert weight.tolist() == [0.5, -1.0] and scaler.get_scale() == 512
