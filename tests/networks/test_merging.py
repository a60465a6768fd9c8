"""Merging is exact and counts modules; a LoRA that matches nothing or has other shapes is refused."""

import pytest
import torch

from networks import merging
from networks.factors import LohaFactors, LokrFactors, LoraFactors
from networks.merging import merge_into_weight, weight_changes
from utils.errors import UserError
from utils.safetensors_utils import save_file


def write_lora(path, *names, scale=1.0):
    tensors = {}
    for name in names:
        columns = 40 if name.endswith("linear2") else 16
        tensors[f"diffusion_model.{name}.lora_A.weight"] = torch.randn(2, columns) * scale
        tensors[f"diffusion_model.{name}.lora_B.weight"] = torch.randn(16, 2)
    save_file(tensors, path)
    return {name: tensors[f"diffusion_model.{name}.lora_B.weight"] @ tensors[f"diffusion_model.{name}.lora_A.weight"]
            for name in names}  # fmt: skip


PROJ, LINEAR2 = "double_blocks.0.img_attn_proj", "single_blocks.0.linear2"
SHAPES = {f"{PROJ}.weight": (16, 16), f"{PROJ}.bias": (16,), f"{LINEAR2}.weight": (16, 40)}


@pytest.mark.parametrize("chunk", [1, 100, 10**6])
@pytest.mark.parametrize("kind", ["lora", "dora", "loha", "lokr"])
def test_merging_in_chunks_is_merging_at_once(monkeypatch, chunk, kind):
    torch.manual_seed(0)
    if kind == "loha":
        factors = LohaFactors(w1_a=torch.randn(36, 2), w1_b=torch.randn(2, 24), w2_a=torch.randn(36, 2),
                              w2_b=torch.randn(2, 24), alpha=3.0)  # fmt: skip
    elif kind == "lokr":
        factors = LokrFactors(w1=torch.randn(6, 4), w2=torch.randn(6, 6))
    else:
        lengths = torch.rand(36, 1) if kind == "dora" else None
        factors = LoraFactors(up=torch.randn(36, 2), down=torch.randn(2, 24), alpha=3.0, dora_scale=lengths)
    weight = torch.randn(36, 24)
    expected = weight + 0.5 * factors.delta_weight()
    if kind == "dora":
        direction = weight + factors.delta_weight()
        expected = 0.5 * weight + 0.5 * lengths * direction / direction.norm(dim=1, keepdim=True)
    monkeypatch.setattr(merging, "_CHUNK", chunk)
    assert torch.allclose(merge_into_weight("x", weight.clone(), [(factors, 0.5)]), expected, atol=1e-5)


def test_a_convolution_of_a_keyframe_lora():
    torch.manual_seed(0)
    factors = LoraFactors(up=torch.randn(8, 2, 1, 1, 1), down=torch.randn(2, 3, 1, 2, 2))
    weight = torch.randn(8, 3, 1, 2, 2)
    expected = weight + torch.einsum("or,rcthw->octhw", factors.up[:, :, 0, 0, 0], factors.down)
    assert torch.allclose(merge_into_weight("img_in.proj", weight.clone(), [(factors, 1.0)]), expected, atol=1e-5)


def test_several_files_are_counted(tmp_path, capsys):
    torch.manual_seed(0)
    first = write_lora(tmp_path / "a.safetensors", PROJ, LINEAR2)
    second = write_lora(tmp_path / "b.safetensors", PROJ, "double_blocks.7.img_attn_proj", scale=1e-3)
    changes = weight_changes(SHAPES, [(tmp_path / "a.safetensors", 1.0), (tmp_path / "b.safetensors", -2.0)])
    said = capsys.readouterr()
    assert "a.safetensors: 2 of 2 modules merged" in said.out and "b.safetensors: 1 of 2 modules merged" in said.err
    assert changes.keys() == {f"{PROJ}.weight", f"{LINEAR2}.weight"}
    for name, dw in {PROJ: first[PROJ] - 2 * second[PROJ], LINEAR2: first[LINEAR2]}.items():
        weight = torch.randn(SHAPES[f"{name}.weight"])
        assert torch.allclose(changes[f"{name}.weight"](weight.clone()), weight + dw, atol=1e-6)


def test_without_single_blocks(tmp_path):
    write_lora(tmp_path / "a.safetensors", PROJ, LINEAR2)
    changes = weight_changes(SHAPES, [(tmp_path / "a.safetensors", 1.0)], exclude_single_blocks=True)
    assert changes.keys() == {f"{PROJ}.weight"}


def test_nothing_is_merged_if_one_file_matches_nothing(tmp_path):
    write_lora(tmp_path / "a.safetensors", PROJ)
    write_lora(tmp_path / "b.safetensors", "double_blocks.3.img_attn_proj")
    with pytest.raises(UserError, match="none of its 1 modules is in this DiT, such as double"):
        weight_changes(SHAPES, [(tmp_path / "a.safetensors", 1.0), (tmp_path / "b.safetensors", 1.0)])


def test_another_width_is_refused(tmp_path):
    save_file(
        {
            f"lora_unet_{PROJ.replace('.', '_')}.lora_down.weight": torch.ones(2, 24),
            f"lora_unet_{PROJ.replace('.', '_')}.lora_up.weight": torch.ones(24, 2),
        },
        tmp_path / "a.safetensors",
    )
    with pytest.raises(UserError, match="24 x 24, this DiT has 16 x 16"):
        weight_changes(SHAPES, [(tmp_path / "a.safetensors", 1.0)])
