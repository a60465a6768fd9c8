"""What `identify` says of files, told from names and shapes."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from examples.tiny_models import dit_shapes, random_weights
from hunyuan_model.checkpoints.identification import identify
from hunyuan_model.checkpoints.tensors import open_checkpoint
from tests.hunyuan_model.model_layouts import DIT_LAYOUTS, FP8_LAYOUTS, quantized

SMALL = {"depth_double": 1, "depth_single": 2}


@pytest.mark.parametrize(
    ("channels", "file", "variant"),
    [
        (16, "dit.safetensors", "T2V"),
        (16, "hunyuan-video-i2v-720p/transformers/mp_rank_00_model_states.safetensors", "I2V, token replace"),
        (32, "skyreels_hunyuan_i2v_bf16.safetensors", "SkyReels I2V"),
        (33, "dit.safetensors", "I2V, latent concat"),
        (20, "dit.safetensors", "20 input channels"),
    ],
)
@pytest.mark.parametrize("layout", ["safetensors", "diffusers folder, shards"])
def test_variant_of_a_dit(channels: int, file: str, variant: str, layout: str, tmp_path: Path) -> None:
    weights = random_weights(dit_shapes(in_channels=channels, **SMALL), seed=0)
    path = DIT_LAYOUTS[layout]((tmp_path / file).parent, weights)
    found = identify(path)
    assert (found.what, found.variant) == ("DiT", variant)
    assert found.depths == {"double blocks": 1, "single blocks": 2}
    assert found.parameters == sum(tensor.numel() for tensor in weights.values())


@pytest.mark.parametrize(
    ("layout", "description"),
    [
        ("official .pt, module", ".pt (key module), official names"),
        ("bare .pt", "bare .pt, official names"),
        (".pt, ema", ".pt (key ema), official names"),
        ("safetensors", "safetensors, official names"),
        ("ComfyUI", "safetensors, ComfyUI names"),
        ("ComfyUI, model.model.", "safetensors, ComfyUI names, prefix model.model."),
        ("official, model.diffusion_model.", "safetensors, official names, prefix model.diffusion_model."),
        ("diffusers folder, shards", "folder of 3 shards, diffusers names"),
    ],
)
def test_layout_of_a_dit(layout: str, description: str, tmp_path: Path) -> None:
    found = identify(DIT_LAYOUTS[layout](tmp_path, random_weights(dit_shapes(**SMALL), seed=0)))
    assert found.layout == description
    assert found.summary().startswith(f"DiT: T2V, {description}, float32, ")


@pytest.mark.parametrize("kind", FP8_LAYOUTS)
def test_kind_and_dtypes_of_an_fp8_file(kind: str, tmp_path: Path) -> None:
    stored, scales, _ = quantized(random_weights(dit_shapes(**SMALL), seed=0))
    found = identify(FP8_LAYOUTS[kind](tmp_path, stored, scales))
    assert found.fp8 == kind and set(found.dtype.split(" + ")) == {"float8_e4m3fn", "float32"}
    assert found.parameters == sum(tensor.numel() for tensor in stored.values()), "scales are no parameters"
    assert f"fp8 {kind}" in found.summary()


@pytest.mark.parametrize(
    ("module", "format_name"),
    [
        ("lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight", "musubi native"),
        ("lora_unet_double_blocks_0_img_attn_qkv.hada_w1_a", "musubi native"),
        ("lora_unet_double_blocks_0_img_attn_qkv.lokr_w1", "musubi native"),
        ("diffusion_model.double_blocks.0.img_attn_qkv.lora_A.weight", "ComfyUI"),
        ("transformer.double_blocks.0.img_attn_qkv.lora_A.weight", "diffusion-pipe"),
        ("transformer.transformer_blocks.0.attn.to_q.lora_A.weight", "diffusers"),
        ("transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight", "diffusers"),
        ("Hunyuan_video_I2V_lora_double_blocks_0_img_attn_qkv.lora_down.weight", "HunyuanVideo-I2V trainer"),
        ("lora_transformer_transformer_blocks_0_attn_to_q.lora_down.weight", "OneTrainer legacy"),
        ("double_blocks.0.img_attn_qkv.lora_A.weight", "official names"),
        ("something.lora_A.weight", "unknown format"),
    ],
)
def test_format_of_a_lora(module: str, format_name: str, tmp_path: Path) -> None:
    save_file({module: torch.zeros(4, 8)}, tmp_path / "lora.safetensors")
    found = identify(tmp_path / "lora.safetensors")
    assert (found.what, found.variant) == ("LoRA", format_name)


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("latents_1x4x4_float32", "latent cache of this program"),
        ("llm_float16", "text encoder cache of this program"),
        ("state.exp_avg", "training state (optimizer)"),
        ("clean_x_embedder.proj.weight", "FramePack DiT"),
        ("transformer_blocks.0.attn1.to_q.weight", "LTX or CogVideoX DiT"),
    ],
)
def test_other_files_of_this_world(name: str, what: str, tmp_path: Path) -> None:
    save_file({name: torch.zeros(2)}, tmp_path / "x.safetensors")
    assert identify(tmp_path / "x.safetensors").what == what


def test_a_header_whose_length_is_spelled_pk_does_not_make_a_pt_file(tmp_path: Path) -> None:
    text = json.dumps({"x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode().ljust(0x4B50)
    (tmp_path / "a.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(4))
    assert open_checkpoint(tmp_path / "a.safetensors").container == "safetensors"
