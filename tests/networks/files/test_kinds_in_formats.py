"""LoHa, LoKr and DoRA in the formats that have them; the other formats refuse them."""

import pytest
import torch

from networks.factors import LohaFactors, LokrFactors, LoraFactors
from networks.files.format_table import FORMATS
from networks.files.formats import LoraWeights, from_tensors, to_tensors
from networks.files.rounding import rounded
from networks.files.split_fuse import low_rank_approximation, split_rows, stack_rows, truncated_svd
from networks.lora_ops import reduce_rank
from utils.errors import UserError

KINDS = {"loha": "LoHa", "lokr": "LoKr"}
QKV, PROJ, LINEAR1 = "double_blocks.0.img_attn_qkv", "double_blocks.0.img_attn_proj", "single_blocks.2.linear1"
ROWS = {QKV: 144, PROJ: 48, LINEAR1: 336}


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(shape)


def make(kind: str, rows: int):
    if kind == "loha":
        pairs = {f"w{i}_{side}": draw(rows, 3) if side == "a" else draw(3, 48) for i in (1, 2) for side in "ab"}
        return LohaFactors(**pairs, alpha=1.5)
    if kind == "lokr":
        return LokrFactors(w1=draw(6, 6), w2_a=draw(rows // 6, 2), w2_b=draw(2, 8), alpha=3.0)
    if kind == "lokr, whole":
        return LokrFactors(w1=draw(6, 6), w2=draw(rows // 6, 8), alpha=7.0)
    scale = {"dora": torch.rand(rows, 1) + 0.5, "dora, columns": torch.rand(1, 48) + 0.5}.get(kind)
    return LoraFactors(up=draw(rows, 3), down=draw(3, 48), alpha=1.5, dora_scale=scale)


def lora_of(kind: str) -> LoraWeights:
    torch.manual_seed(0)
    return LoraWeights({name: make(kind, rows) for name, rows in ROWS.items()})


@pytest.mark.parametrize("kind", ["loha", "lokr", "lokr, whole", "dora", "dora, columns"])
@pytest.mark.parametrize("target", FORMATS)
def test_there_and_back_or_refused(kind, target):
    lora, format_ = lora_of(kind), FORMATS[target]
    known = format_.dora is not None if kind.startswith("dora") else KINDS[kind[:4]] in format_.kinds
    splittable = not format_.splits or kind in ("loha", "dora")
    if not (known and splittable):
        with pytest.raises(UserError):
            to_tensors(lora, format_)
        return
    back = from_tensors(to_tensors(lora, format_), {}, "test")
    assert back.modules.keys() == lora.modules.keys()
    for name, factors in lora.modules.items():
        found, weight = back.modules[name], torch.randn(ROWS[name], 48)
        assert type(found) is type(factors)
        assert torch.allclose(found.apply(weight), factors.apply(weight), atol=1e-5)


def test_dora_in_diffusers_is_a_vector_for_each_part():
    lora = lora_of("dora")
    tensors = to_tensors(lora, FORMATS["diffusers"])
    stem = "transformer.transformer_blocks.0.attn"
    assert tensors[f"{stem}.to_k.lora_magnitude_vector"].shape == (48,)
    assert torch.equal(tensors[f"{stem}.to_k.lora_magnitude_vector"], lora.modules[QKV].dora_scale[48:96, 0])


@pytest.mark.parametrize("kind", ["loha", "lokr", "dora"])
def test_rank_makes_any_kind_a_lora(kind):
    lora = lora_of(kind)
    reduced = reduce_rank(lora, 12)
    for name, factors in lora.modules.items():
        found = reduced.modules[name]
        assert isinstance(found, LoraFactors) and found.rank <= 12
        assert torch.allclose(found.delta_weight(), factors.delta_weight(), atol=1e-4)  # their ranks are 9, 12 and 3
    if kind != "dora":
        to_tensors(reduced, FORMATS["diffusers"])


def test_lokr_has_scale_one_if_both_matrices_are_whole():
    torch.manual_seed(0)
    whole, product = make("lokr, whole", 144), make("lokr", 144)
    assert torch.allclose(whole.delta_weight(), torch.kron(whole.w1, whole.w2))
    assert torch.allclose(product.delta_weight(), 1.5 * torch.kron(product.w1, product.w2_a @ product.w2_b), atol=1e-5)


def test_dora_columns_as_older_lycoris_files_have():
    torch.manual_seed(0)
    factors, weight = make("dora, columns", 144), torch.randn(144, 48)
    direction = weight + 0.5 * factors.up @ factors.down
    expected = direction / direction.norm(dim=0) * factors.dora_scale[0]
    assert torch.allclose(factors.apply(weight), expected, atol=1e-5)


def test_fusing_is_block_diagonal_only_if_columns_differ():
    torch.manual_seed(0)
    shared = draw(2, 48)
    parts = [LoraFactors(up=draw(48, 2), down=shared, alpha=4.0) for _ in range(3)]
    fused = stack_rows(parts, [48] * 3)
    assert (fused.rank, fused.alpha) == (2, 4.0)
    parts = [LoraFactors(up=draw(48, rank), down=draw(rank, 48), alpha=2.0 * rank) for rank in (1, 2, 3)]
    fused = stack_rows(parts, [48] * 3)
    assert (fused.rank, fused.alpha) == (6, 12.0)
    assert torch.allclose(fused.delta_weight(), torch.cat([part.delta_weight() for part in parts]), atol=1e-5)
    for part, again in zip(parts, split_rows(fused, [48] * 3)):
        assert torch.equal(part.up, again.up) and torch.equal(part.down, again.down) and part.alpha == again.alpha


def test_an_untrained_lora_keeps_its_parts():
    parts = split_rows(LoraFactors(up=torch.zeros(144, 4), down=draw(4, 48)), [48] * 3)
    assert all(part.rank == 4 for part in parts)


def test_svd_is_the_best_of_its_rank():
    torch.manual_seed(0)
    factors = LoraFactors(up=draw(60, 8), down=draw(8, 48), alpha=3.0)
    update = factors.delta_weight()
    values = torch.linalg.svdvals(update)
    for found in (truncated_svd(factors, 5), low_rank_approximation(update, 5)):
        assert found.rank == 5
        error = (found.delta_weight() - update).norm()
        assert error == pytest.approx(values[5:8].square().sum().sqrt().item(), rel=1e-4)
    assert truncated_svd(factors, None).rank == 8
    assert (truncated_svd(factors, None).delta_weight() - update).norm() <= 1e-6 * update.norm()


def test_folding_rounds_once():
    torch.manual_seed(0)
    up = draw(48, 4).bfloat16()
    folded = rounded(LoraFactors(up=up, down=draw(4, 48).bfloat16(), alpha=0.3), fold_alpha=True)
    assert torch.equal(folded.up, (up.double() * (0.3 / 4)).bfloat16())
    assert folded.scale == 1.0


def test_factors_of_some_rows_have_the_update_of_these_rows():
    torch.manual_seed(0)
    for kind in ("loha", "dora"):
        factors, weight = make(kind, 144), torch.randn(144, 48)
        whole = factors.apply(weight, 0.3)
        assert torch.allclose(factors.rows(10, 50).apply(weight[10:50], 0.3), whole[10:50], atol=1e-5)
