"""LoRAs beside the weights compute what merging them into the weights does."""

from pathlib import Path

import pytest
import torch

from networks.hooks import LoraHooks
from networks.merging import weight_changes
from tests.small_dit import random_dit, small_config
from utils.safetensors_utils import save_file

QKV, MLP, NORM = "double_blocks.0.img_attn_qkv", "single_blocks.1.linear2", "double_blocks.0.img_attn_q_norm"


def write_lora(path: Path, seed: int, dora: bool) -> Path:
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, (rows, columns) in {QKV: (96, 32), MLP: (32, 96)}.items():
        tensors[f"diffusion_model.{name}.lora_down.weight"] = torch.randn(2, columns, generator=generator) / 4
        tensors[f"diffusion_model.{name}.lora_up.weight"] = torch.randn(rows, 2, generator=generator) / 4
        tensors[f"diffusion_model.{name}.diff_b"] = torch.randn(rows, generator=generator)
        if dora:
            tensors[f"diffusion_model.{name}.dora_scale"] = torch.rand(rows, 1, generator=generator) + 0.5
    tensors[f"diffusion_model.{NORM}.diff"] = torch.randn(16, generator=generator)
    save_file(tensors, path)
    return path


def outputs(dit: torch.nn.Module) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(9)
    inputs = {QKV: (3, 32), MLP: (3, 96), NORM: (3, 16)}
    return [dit.get_submodule(name)(torch.randn(shape, generator=generator)) for name, shape in inputs.items()]


@pytest.mark.parametrize("kinds", [(False,), (True,), (False, True), (True, False)])
def test_beside_the_weights_as_in_the_weights(tmp_path: Path, kinds: tuple[bool, ...]) -> None:
    """DoRA depends on the weight that it finds, so the order of the files counts (T4)."""
    loras = [(write_lora(tmp_path / f"{i}.safetensors", i, dora), 0.7 + i) for i, dora in enumerate(kinds)]
    beside, merged = random_dit(small_config()), random_dit(small_config())
    plain = outputs(beside)
    hooks = LoraHooks(beside)
    hooks.use(loras)
    shapes = {name: tuple(tensor.shape) for name, tensor in merged.named_parameters()}
    for name, change in weight_changes(shapes, loras).items():
        parameter = merged.get_parameter(name)
        parameter.data = change(parameter.data.clone())
    for found, expected, before in zip(outputs(beside), outputs(merged), plain):
        assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()
        assert (before - expected).abs().max() > 0.05 * expected.abs().max()
    hooks.use([])
    assert all(torch.equal(found, before) for found, before in zip(outputs(beside), plain))
