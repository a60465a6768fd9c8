"""Name tables against diffusers' own class, against ComfyUI's published names, and there and back."""

import pytest
import torch

from examples.tiny_models import dit_shapes, random_weights
from hunyuan_model.checkpoints.names import (
    NAMINGS,
    dit_from_official,
    dit_naming,
    dit_official_name,
    dit_official_shapes,
    dit_parts,
    dit_to_official,
    vae_official_name,
)
from hunyuan_model.models import HunyuanVideoConfig, HYVideoDiffusionTransformer
from tests.conftest import ROOT
from tests.hunyuan_model.model_layouts import comfyui_name

Weights = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def weights() -> Weights:
    return random_weights(dit_shapes(depth_double=2, depth_single=2), seed=3)


def _back(converted: Weights, names: list[str], naming: str) -> Weights:
    return {
        name: dit_to_official(name, [converted[part] for part in dit_parts(name, naming)], naming) for name in names
    }


@pytest.mark.parametrize("naming", NAMINGS)
def test_there_and_back_is_bit_identical(weights: Weights, naming: str) -> None:
    converted = dit_from_official(weights, naming)
    assert dit_naming(converted) == naming
    back = _back(converted, list(weights), naming)
    assert all(torch.equal(back[name], weights[name]) for name in weights)
    shapes = dit_official_shapes({name: tuple(tensor.shape) for name, tensor in converted.items()}, naming)
    assert shapes == {name: tuple(tensor.shape) for name, tensor in weights.items()}


@pytest.mark.parametrize("naming", NAMINGS)
def test_all_856_official_names_survive(naming: str) -> None:
    lines = (ROOT / "tests" / "data" / "hunyuanvideo_dit_keys.tsv").read_text(encoding="utf-8").splitlines()
    names = [line.split("\t")[0] for line in lines]
    assert len(names) == 856
    parts = [part for name in names for part in dit_parts(name, naming)]
    assert len(set(parts)) == len(parts), "two official tensors share a name"
    assert {dit_official_name(part, naming) for part in parts} == set(names)
    if naming == "diffusers":
        assert not set(parts) & set(names), "diffusers renames every tensor"


def test_diffusers_class_takes_the_weights_strictly_and_gives_the_same_velocity(weights: Weights) -> None:
    from diffusers import HunyuanVideoTransformer3DModel

    theirs = HunyuanVideoTransformer3DModel(
        num_attention_heads=2, attention_head_dim=32, num_layers=2, num_single_layers=2, text_embed_dim=64,
        pooled_projection_dim=128, rope_axes_dim=(4, 14, 14),
    )  # fmt: skip
    theirs.load_state_dict(dit_from_official(weights, "diffusers"), strict=True)
    ours = HYVideoDiffusionTransformer(HunyuanVideoConfig.from_shapes({k: v.shape for k, v in weights.items()}))
    ours.load_state_dict(_back(theirs.state_dict(), list(weights), "diffusers"), strict=True)

    torch.manual_seed(0)
    latents, text, pooled = torch.randn(1, 16, 3, 4, 6), torch.randn(1, 7, 64), torch.randn(1, 128)
    timestep, guidance = torch.tensor([700.0]), torch.tensor([6000.0])
    mask = torch.ones(1, 7, dtype=torch.long)
    with torch.no_grad():
        expected = theirs.eval()(
            hidden_states=latents, timestep=timestep, encoder_hidden_states=text, encoder_attention_mask=mask,
            pooled_projections=pooled, guidance=guidance,
        ).sample  # fmt: skip
        found = ours.eval()(latents, timestep, text, mask, pooled, guidance)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


# Read from ComfyUI's model and from files that it publishes.
COMFYUI_DIT = {
    "img_in.proj.bias": "img_in.proj.bias",
    "time_in.mlp.2.weight": "time_in.out_layer.weight",
    "guidance_in.mlp.0.bias": "guidance_in.in_layer.bias",
    "vector_in.in_layer.weight": "vector_in.in_layer.weight",
    "txt_in.input_embedder.weight": "txt_in.input_embedder.weight",
    "txt_in.t_embedder.mlp.0.weight": "txt_in.t_embedder.in_layer.weight",
    "txt_in.c_embedder.linear_2.bias": "txt_in.c_embedder.out_layer.bias",
    "txt_in.individual_token_refiner.blocks.1.norm1.weight": "txt_in.individual_token_refiner.blocks.1.norm1.weight",
    "txt_in.individual_token_refiner.blocks.0.self_attn_qkv.weight": (
        "txt_in.individual_token_refiner.blocks.0.self_attn.qkv.weight"
    ),
    "txt_in.individual_token_refiner.blocks.0.mlp.fc2.bias": "txt_in.individual_token_refiner.blocks.0.mlp.2.bias",
    "double_blocks.11.img_mod.linear.weight": "double_blocks.11.img_mod.lin.weight",
    "double_blocks.11.txt_attn_qkv.weight": "double_blocks.11.txt_attn.qkv.weight",
    "double_blocks.11.img_attn_q_norm.weight": "double_blocks.11.img_attn.norm.query_norm.scale",
    "double_blocks.11.txt_attn_k_norm.weight": "double_blocks.11.txt_attn.norm.key_norm.scale",
    "double_blocks.11.img_mlp.fc1.bias": "double_blocks.11.img_mlp.0.bias",
    "single_blocks.39.linear1.weight": "single_blocks.39.linear1.weight",
    "single_blocks.39.q_norm.weight": "single_blocks.39.norm.query_norm.scale",
    "single_blocks.39.modulation.linear.bias": "single_blocks.39.modulation.lin.bias",
    "final_layer.adaLN_modulation.1.weight": "final_layer.adaLN_modulation.1.weight",
}


def test_every_comfyui_name_is_that_of_a_second_table() -> None:
    names = list(dit_shapes(depth_double=2, depth_single=2))
    assert {name: dit_parts(name, "ComfyUI") for name in names} == {name: (comfyui_name(name),) for name in names}


@pytest.mark.parametrize(("official", "theirs"), COMFYUI_DIT.items())
def test_comfyui_names_of_the_dit(official: str, theirs: str) -> None:
    assert dit_parts(official, "ComfyUI") == (theirs,)
    assert dit_official_name(theirs, "ComfyUI") == official


COMFYUI_VAE = {
    "encoder.down_blocks.1.resnets.0.conv_shortcut.conv.weight": "encoder.down.1.block.0.nin_shortcut.conv.weight",
    "encoder.down_blocks.0.downsamplers.0.conv.conv.bias": "encoder.down.0.downsample.conv.conv.bias",
    "encoder.mid_block.resnets.0.norm1.weight": "encoder.mid.block_1.norm1.weight",
    "decoder.mid_block.resnets.1.conv2.conv.bias": "decoder.mid.block_2.conv2.conv.bias",
    "decoder.mid_block.attentions.0.group_norm.weight": "decoder.mid.attn_1.norm.weight",
    "decoder.mid_block.attentions.0.to_q.bias": "decoder.mid.attn_1.q.bias",
    "encoder.mid_block.attentions.0.to_out.0.weight": "encoder.mid.attn_1.proj_out.weight",
    "decoder.up_blocks.0.resnets.2.norm2.bias": "decoder.up.3.block.2.norm2.bias",
    "decoder.up_blocks.2.upsamplers.0.conv.conv.weight": "decoder.up.1.upsample.conv.conv.weight",
    "decoder.conv_norm_out.weight": "decoder.norm_out.weight",
    "quant_conv.weight": "quant_conv.weight",
}


@pytest.mark.parametrize(("official", "theirs"), COMFYUI_VAE.items())
def test_comfyui_names_of_the_vae(official: str, theirs: str) -> None:
    assert vae_official_name(theirs) == official
    assert vae_official_name(official) == official
