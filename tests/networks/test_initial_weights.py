"""How the factors of an untrained network are distributed: the bounds and deviations of the reference tools."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from networks.loha import LohaModule
from networks.lokr import LokrModule
from networks.lora import LoraModule

TARGET, RANK = nn.Linear(900, 1200), 64


def uniform(tensor: Tensor, bound: float) -> bool:
    """Whether the numbers look drawn evenly from -bound to bound: their range, deviation and mean."""
    largest, deviation = tensor.abs().max().item(), tensor.std().item()
    near = pytest.approx(bound, rel=0.01) == largest and pytest.approx(bound / math.sqrt(3), rel=0.05) == deviation
    return near and largest <= bound and abs(tensor.mean().item()) < 0.1 * bound


def normal(tensor: Tensor, deviation: float) -> bool:
    return pytest.approx(deviation, rel=0.02) == tensor.std().item() and tensor.abs().max() > 3 * deviation


def weights(module: nn.Module) -> dict[str, Tensor]:
    return {name.removesuffix(".weight"): parameter.detach() for name, parameter in module.named_parameters()}


def test_lora_starts_with_even_values_up_to_the_root_of_its_inputs() -> None:
    """Kaiming's initialisation with a = sqrt(5), as a Linear of PyTorch: bound 1 / sqrt(inputs)."""
    torch.manual_seed(0)
    given = weights(LoraModule(TARGET, RANK, 1.0))
    assert given.keys() == {"lora_down", "lora_up"} and not given["lora_up"].any()
    assert uniform(given["lora_down"], 1 / 30)


def test_dora_starts_with_the_norms_of_the_rows() -> None:
    given = weights(LoraModule(TARGET, RANK, 1.0, use_dora=True))
    torch.testing.assert_close(given["dora_scale"].flatten(), TARGET.weight.detach().square().sum(1).sqrt())


def test_loha_starts_with_the_deviations_of_lycoris() -> None:
    torch.manual_seed(0)
    given = weights(LohaModule(TARGET, RANK, 1.0))
    assert given.keys() == {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"} and not given["hada_w2_a"].any()
    assert normal(given["hada_w1_a"], 0.1) and normal(given["hada_w1_b"], 1) and normal(given["hada_w2_b"], 1)


def test_lokr_starts_with_even_values_and_a_second_matrix_of_zeros() -> None:
    """12000 is 100 x 120 and 10000 is 100 x 100: w1 is (100, 100), w2 (120, 100) as (120, 8) times (8, 100)."""
    torch.manual_seed(0)
    given = weights(LokrModule(SimpleNamespace(in_features=10_000, out_features=12_000), 8, 1.0))
    shapes = {name: tuple(tensor.shape) for name, tensor in given.items()}
    assert shapes == {"lokr_w1": (100, 100), "lokr_w2_a": (120, 8), "lokr_w2_b": (8, 100)}
    assert uniform(given["lokr_w1"], 100**-0.5) and not given["lokr_w2_b"].any()
    assert uniform(given["lokr_w2_a"], 8**-0.5)
