"""Writes weights in every layout in which the models are published, independently of the code that reads them.

ComfyUI's names of the DiT are written here a second time. Those of diffusers come from
hunyuan_model/checkpoints/names.py, because test_names.py checks them against diffusers' own class.
"""

import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file

from hunyuan_model.checkpoints.names import dit_from_official

Weights = dict[str, torch.Tensor]
FP8 = torch.float8_e4m3fn
BLOCK_LINEAR = ("attn_qkv.weight", "attn_proj.weight", "fc1.weight", "fc2.weight", "linear1.weight", "linear2.weight")


def prefixed(weights: Weights, prefix: str) -> Weights:
    return {prefix + name: tensor for name, tensor in weights.items()}


def _safetensors(path: Path, weights: Weights, metadata: dict[str, str] | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, path, metadata)
    return path


def _pt(path: Path, content: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(content, path)
    return path


def write_shards(folder: Path, weights: Weights, stem: str, config: dict | None = None, shards: int = 3) -> Path:
    """A Hugging Face folder: config.json, shards and their index."""
    names = list(weights)
    size = math.ceil(len(names) / shards)
    weight_map = {}
    for index in range(shards):
        file = f"{stem}-{index + 1:05d}-of-{shards:05d}.safetensors"
        members = names[index * size : (index + 1) * size]
        _safetensors(folder / file, {name: weights[name] for name in members})
        weight_map |= dict.fromkeys(members, file)
    index_file = folder / f"{stem}.safetensors.index.json"
    index_file.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}), encoding="utf-8")
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


# What ComfyUI calls the parts of a name, from its model; the first that fits is replaced.
_TO_COMFYUI = [
    (r"(time_in|guidance_in|txt_in\.t_embedder)\.mlp\.0\.", r"\1.in_layer."),
    (r"(time_in|guidance_in|txt_in\.t_embedder)\.mlp\.2\.", r"\1.out_layer."),
    (r"txt_in\.c_embedder\.linear_1\.", "txt_in.c_embedder.in_layer."),
    (r"txt_in\.c_embedder\.linear_2\.", "txt_in.c_embedder.out_layer."),
    (r"\.self_attn_(qkv|proj)\.", r".self_attn.\1."),
    (r"\.(img|txt)_attn_(qkv|proj)\.", r".\1_attn.\2."),
    (r"\.(img|txt)_attn_q_norm\.weight", r".\1_attn.norm.query_norm.scale"),
    (r"\.(img|txt)_attn_k_norm\.weight", r".\1_attn.norm.key_norm.scale"),
    (r"^(single_blocks\.\d+)\.q_norm\.weight", r"\1.norm.query_norm.scale"),
    (r"^(single_blocks\.\d+)\.k_norm\.weight", r"\1.norm.key_norm.scale"),
    (r"\.(img_mod|txt_mod|modulation)\.linear\.", r".\1.lin."),
    (r"\.(img_mlp|txt_mlp|mlp)\.fc1\.", r".\1.0."),
    (r"\.(img_mlp|txt_mlp|mlp)\.fc2\.", r".\1.2."),
]


def comfyui_name(name: str) -> str:
    """`double_blocks.0.img_attn_qkv.bias` -> `double_blocks.0.img_attn.qkv.bias`"""
    for pattern, replacement in _TO_COMFYUI:
        name, count = re.subn(pattern, replacement, name)
        if count:
            break
    return name


def comfyui_names(weights: Weights) -> Weights:
    return {comfyui_name(name): tensor for name, tensor in weights.items()}


DIT_LAYOUTS: dict[str, Callable[[Path, Weights], Path]] = {
    "official .pt, module": lambda folder, w: _pt(folder / "mp_rank_00_model_states.pt", {"module": w, "epoch": 3}),
    "bare .pt": lambda folder, w: _pt(folder / "dit.pt", w),
    ".pt, ema": lambda folder, w: _pt(folder / "dit.pt", {"ema": w}),
    "safetensors": lambda folder, w: _safetensors(folder / "dit.safetensors", w, {"format": "pt"}),
    "ComfyUI": lambda folder, w: _safetensors(folder / "c.safetensors", comfyui_names(w)),
    "ComfyUI, model.model.": lambda folder, w: _safetensors(
        folder / "hunyuan_video_t2v_720p_bf16.safetensors", prefixed(comfyui_names(w), "model.model.")
    ),
    "official, model.diffusion_model.": lambda folder, w: _safetensors(
        folder / "c.safetensors", prefixed(w, "model.diffusion_model.")
    ),
    "diffusers folder, shards": lambda folder, w: write_shards(
        folder / "transformer",
        dit_from_official(w, "diffusers"),
        "diffusion_pytorch_model",
        {"_class_name": "HunyuanVideoTransformer3DModel", "rope_axes_dim": [4, 14, 14]},
    ),
}


def quantized(weights: Weights, scaled: bool = True) -> tuple[Weights, dict[str, float], Weights]:
    """Float8 weights of the blocks' linear layers, one scale each, and what they stand for in float32."""
    stored, scales, meant = dict(weights), {}, dict(weights)
    for index, name in enumerate(name for name in weights if name.endswith(BLOCK_LINEAR) and "blocks." in name):
        if name.startswith("txt_in."):
            continue
        scales[name] = 0.37 / 448 * (1 + index % 3) if scaled else 1.0  # no power of two, as in published files
        stored[name] = (weights[name] / scales[name]).to(FP8)
        meant[name] = stored[name].float() * torch.tensor(scales[name], dtype=torch.float32)
    return stored, scales, meant


def _official_fp8(folder: Path, stored: Weights, scales: dict[str, float]) -> Path:
    _pt(
        folder / "mp_rank_00_model_states_fp8_map.pt",
        {name.removesuffix(".weight"): torch.tensor(scale) for name, scale in scales.items()},
    )
    return _pt(folder / "mp_rank_00_model_states_fp8.pt", {"module": stored})


def _comfyui_fp8(folder: Path, stored: Weights, scales: dict[str, float]) -> Path:
    weights = comfyui_names(stored)
    for name, scale in scales.items():
        renamed = comfyui_name(name)
        weights[f"{renamed.removesuffix('.weight')}.scale_weight"] = torch.tensor(scale)
        weights[f"{renamed.removesuffix('.weight')}.scale_input"] = torch.tensor(1.0)
    weights["scaled_fp8"] = torch.empty(2, dtype=FP8)
    return _safetensors(folder / "hunyuan_fp8_scaled.safetensors", prefixed(weights, "model.diffusion_model."))


def _kijai_fp8(folder: Path, stored: Weights, scales: dict[str, float]) -> Path:
    extra = {f"{name.removesuffix('.weight')}.fp8_scale": torch.tensor(scale) for name, scale in scales.items()}
    return _safetensors(folder / "hunyuan_fp8_e4m3fn_scaled_kj.safetensors", stored | extra)


FP8_LAYOUTS: dict[str, Callable[[Path, Weights, dict[str, float]], Path]] = {
    "plain": lambda folder, stored, _: _safetensors(folder / "hunyuan_fp8_e4m3fn.safetensors", stored),
    "official": _official_fp8,
    "ComfyUI scaled": _comfyui_fp8,
    "kijai": _kijai_fp8,
}


def _vae_comfyui_names(weights: Weights) -> Weights:
    renamed = {}
    for name, tensor in weights.items():
        for old, new in (
            ("conv_shortcut", "nin_shortcut"), ("conv_norm_out", "norm_out"), ("mid_block.resnets.0", "mid.block_1"),
            ("mid_block.resnets.1", "mid.block_2"), ("mid_block.attentions.0.group_norm", "mid.attn_1.norm"),
            ("mid_block.attentions.0.to_out.0", "mid.attn_1.proj_out"), ("mid_block.attentions.0.to_", "mid.attn_1."),
            (".downsamplers.0.", ".downsample."), (".upsamplers.0.", ".upsample."), (".resnets.", ".block."),
            ("up_blocks.0", "up.3"), ("up_blocks.1", "up.2"), ("up_blocks.2", "up.1"), ("up_blocks.3", "up.0"),
            ("down_blocks.", "down."),
        ):  # fmt: skip
            name = name.replace(old, new)
        is_matrix = ".attn_1." in name and tensor.ndim == 2
        renamed[name] = tensor.reshape(*tensor.shape, 1, 1, 1) if is_matrix else tensor
    return renamed


VAE_CONFIG = {"norm_num_groups": 4}
_VAE_METADATA = {"config": json.dumps(VAE_CONFIG)}


def _vae_pt(folder: Path, content: object) -> Path:
    path = _pt(folder / "pytorch_model.pt", content)
    (folder / "config.json").write_text(json.dumps(VAE_CONFIG), encoding="utf-8")
    return path


def _vae_folder(folder: Path, weights: Weights) -> Path:
    _safetensors(folder / "diffusion_pytorch_model.safetensors", weights)
    (folder / "config.json").write_text(json.dumps(VAE_CONFIG), encoding="utf-8")
    return folder


VAE_LAYOUTS: dict[str, Callable[[Path, Weights], Path]] = {
    "official .pt": lambda folder, w: _vae_pt(folder, {"state_dict": w}),
    "official .pt, vae.": lambda folder, w: _vae_pt(folder, {"state_dict": prefixed(w, "vae.")}),
    "bare .pt": _vae_pt,
    "safetensors": lambda folder, w: _safetensors(folder / "vae.safetensors", w, _VAE_METADATA),
    "ComfyUI": lambda folder, w: _safetensors(
        folder / "hunyuan_video_vae_bf16.safetensors", _vae_comfyui_names(w), _VAE_METADATA
    ),
    "ComfyUI, vae.": lambda folder, w: _safetensors(
        folder / "all.safetensors", prefixed(_vae_comfyui_names(w), "vae."), _VAE_METADATA
    ),
    "diffusers folder": _vae_folder,
}


def _vision_tower() -> Weights:
    return {
        "vision_tower.vision_model.encoder.layers.0.layer_norm1.weight": torch.ones(4),
        "multi_modal_projector.linear_1.weight": torch.ones(4, 4),
    }


def single_file(folder: Path, source: Path, weights: Weights, file: str) -> Path:
    """One file, its tokenizer in a folder of the same name."""
    _safetensors(folder / file, weights)
    (folder / Path(file).stem).mkdir()
    shutil.copy(source / "tokenizer.json", folder / Path(file).stem)
    return folder / file


def _hf_folder(folder: Path, source: Path, weights: Weights, config: dict | None = None) -> Path:
    config = config or json.loads((source / "config.json").read_text(encoding="utf-8"))
    write_shards(folder / "llm", weights, "model", config, shards=2)
    shutil.copy(source / "tokenizer.json", folder / "llm")
    return folder / "llm"


def _bin_folder(folder: Path, source: Path, weights: Weights) -> Path:
    shutil.copytree(source, folder / "llm", ignore=shutil.ignore_patterns("*.safetensors"))
    _pt(folder / "llm" / "pytorch_model.bin", weights)
    return folder / "llm"


def _llava_folder(folder: Path, source: Path, weights: Weights, prefix: str) -> Path:
    text = json.loads((source / "config.json").read_text(encoding="utf-8"))
    config = {"model_type": "llava", "architectures": ["LlavaForConditionalGeneration"], "text_config": text}
    return _hf_folder(folder, source, prefixed(weights, prefix) | _vision_tower(), config)


LLM_LAYOUTS: dict[str, Callable[[Path, Path, Weights], Path]] = {
    "folder": lambda folder, source, w: source,
    "shards": _hf_folder,
    "pytorch_model.bin": _bin_folder,
    "single file": lambda folder, source, w: single_file(folder, source, w, "llava_llama3_fp16.safetensors"),
    "single file with its tokenizer": lambda folder, source, w: single_file(
        folder, source, w | {"tokenizer": torch.zeros(3, dtype=torch.uint8)}, "llava_llama3_fp16.safetensors"
    ),
    "full checkpoint": lambda folder, source, w: single_file(
        folder, source, prefixed(w, "text_encoders.llama.transformer."), "all.safetensors"
    ),
    "LLaVA folder": lambda folder, source, w: _llava_folder(folder, source, w, "language_model."),
    "LLaVA folder of transformers 5": lambda folder, source, w: _llava_folder(
        folder, source, {name.replace("model.", "model.language_model.", 1): w[name] for name in w}, ""
    ),
}


CLIP_LAYOUTS: dict[str, Callable[[Path, Path, Weights], Path]] = {
    "folder": lambda folder, source, w: source,
    "shards": _hf_folder,
    "clip_l.safetensors": lambda folder, source, w: single_file(folder, source, w, "clip_l.safetensors"),
    "whole CLIP": lambda folder, source, w: single_file(
        folder,
        source,
        w | {"vision_model.encoder.layers.0.mlp.fc1.weight": torch.ones(2), "logit_scale": torch.tensor(1.0)},
        "model.safetensors",
    ),
    "full checkpoint": lambda folder, source, w: single_file(
        folder, source, prefixed(w, "text_encoders.clip_l.transformer."), "all.safetensors"
    ),
}
