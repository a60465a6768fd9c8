"""Small float16 factors keep their update in every conversion (T1); what float16 cannot hold is said."""

import pytest
import torch

from networks.comparison import relative_difference
from networks.factors import LoraFactors
from networks.files.format_table import FORMATS
from networks.files.formats import LoraWeights, from_tensors, to_tensors
from networks.files.rounding import rounded

QKV, LINEAR1, PROJ = "double_blocks.0.img_attn_qkv", "single_blocks.0.linear1", "double_blocks.0.img_attn_proj"
ROWS = {QKV: 3 * 1024, LINEAR1: 3 * 1024 + 4096, PROJ: 1024}


def small_lora(rank: int, up: float, dtype: torch.dtype = torch.float16) -> LoraWeights:
    """alpha 1, `down` as the trainer initialises it, `up` of this standard deviation."""
    generator = torch.Generator().manual_seed(rank)
    modules = {}
    for name, rows in ROWS.items():
        down = (torch.rand(rank, 1024, generator=generator) * 2 - 1) / 1024**0.5
        ups = torch.randn(rows, rank, generator=generator) * up
        modules[name] = LoraFactors(down=down.to(dtype), up=ups.to(dtype), alpha=1.0)
    return LoraWeights(modules)


def change(factors: LoraFactors, other: LoraFactors) -> float:
    """|dW - dW'| / |dW| in float64, from the matrices themselves."""
    first, second = (f.scale * f.up.double() @ f.down.double() for f in (factors, other))
    return float((first - second).norm() / first.norm())


@pytest.mark.parametrize("rank", [32, 64, 128])
@pytest.mark.parametrize("up", [1e-3, 3e-4, 1e-4])
def test_folding_alpha_in_float16_changes_little(rank: int, up: float) -> None:
    for name, factors in small_lora(rank, up).modules.items():
        found = rounded(factors, fold_alpha=True)
        assert found.scale == 1 and found.up.dtype == found.down.dtype == torch.float16
        assert change(factors, found) <= 2e-4, name
        # All of it on `up`, as before, loses far more.
        naive = LoraFactors(down=factors.down, up=factors.up * factors.scale)
        assert change(factors, naive) > 5 * change(factors, found)


@pytest.mark.parametrize("target", FORMATS)
def test_every_format_keeps_a_small_float16_lora(target: str) -> None:
    lora = small_lora(128, 1e-4)
    back = from_tensors(to_tensors(lora, FORMATS[target]), {}, "test", format_=FORMATS[target])
    assert max(relative_difference(lora.modules[name], back.modules[name]) for name in ROWS) <= 2e-4


@pytest.mark.parametrize("alpha", [1.0, 3.0, 0.3, -2.0, 100.0])
def test_other_scales_and_casts_to_float16(alpha: float) -> None:
    lora = small_lora(24, 3e-5, torch.float32)
    factors = LoraFactors(down=lora.modules[PROJ].down, up=lora.modules[PROJ].up, alpha=alpha)
    for fold in (False, True):
        found = rounded(factors, torch.float16, fold)
        assert change(factors, found) < 4e-4, "what rounding to 11 bits costs"
    assert change(factors, rounded(factors, torch.float32, True)) < 1e-7


def test_large_factors_stay_within_the_range_of_float16() -> None:
    factors = LoraFactors(down=torch.full((2, 8), 6e4).half(), up=torch.full((8, 2), 1e-4).half(), alpha=64.0)
    found = rounded(factors, fold_alpha=True)
    assert found.down.isfinite().all() and found.up.isfinite().all()
    assert change(factors, found) < 1e-3


def test_nothing_is_touched_where_nothing_is_to_be_done() -> None:
    factors = small_lora(8, 1e-4).modules[PROJ]
    found = rounded(factors)
    assert found.down is factors.down and found.up is factors.up and found.alpha == 1.0
    zero = rounded(LoraFactors(down=factors.down, up=factors.up, alpha=0.0), fold_alpha=True)
    assert not zero.delta_weight().any()
