"""The comparison of two LoRAs, which shows that a conversion is right, finds every kind of difference."""

import dataclasses

import pytest
import torch

from networks.comparison import relative_difference, worst_difference
from networks.factors import LohaFactors, LoraFactors
from networks.files.formats import LoraWeights
from utils.errors import UserError


def lora_factors(rank: int = 3, **more) -> LoraFactors:
    return LoraFactors(up=torch.randn(40, rank), down=torch.randn(rank, 24), **more)


@pytest.mark.parametrize("size", [1.0, 1e-3, 1e-6])
def test_is_the_dense_difference(size):
    torch.manual_seed(0)
    first = lora_factors(alpha=2.0)
    second = dataclasses.replace(first, up=first.up + size * torch.randn(40, 3))
    dense = [f.scale * f.up.double() @ f.down.double() for f in (first, second)]
    expected = ((dense[0] - dense[1]).norm() / dense[0].norm()).item()
    assert relative_difference(first, second) == pytest.approx(expected, rel=1e-2)


def test_of_other_ranks_kinds_and_dora_norms():
    torch.manual_seed(0)
    first = lora_factors()
    # The same matrix with other factors and another rank.
    same = LoraFactors(up=torch.cat([first.up, first.up], 1), down=torch.cat([first.down, first.down]) / 2, alpha=6.0)
    assert relative_difference(first, same) < 1e-7
    loha = LohaFactors(w1_a=first.up, w1_b=first.down, w2_a=torch.ones(40, 1), w2_b=torch.ones(1, 24))
    assert relative_difference(loha, first) < 1e-6
    assert relative_difference(loha, dataclasses.replace(first, alpha=6.0)) == pytest.approx(1.0, rel=1e-5)
    lengths = torch.rand(40, 1)
    dora = dataclasses.replace(first, dora_scale=lengths)
    assert relative_difference(dora, first) == 1.0
    assert relative_difference(dora, dataclasses.replace(first, dora_scale=lengths * 1.01)) == pytest.approx(
        0.01, rel=1e-3
    )


def test_a_lost_module_is_a_difference():
    factors, nothing = lora_factors(), LoraFactors(up=torch.zeros(40, 3), down=torch.randn(3, 24))
    both = LoraWeights({"a": factors, "b": factors})
    with pytest.raises(UserError, match="x: 1 modules are missing in it or in the original, such as b"):
        worst_difference(both, LoraWeights({"a": factors}), "x")
    assert worst_difference(LoraWeights({"a": factors, "b": nothing}), LoraWeights({"a": factors}), "x") == (0.0, "a")
