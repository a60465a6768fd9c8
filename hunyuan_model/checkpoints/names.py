"""Names of the DiT's and the VAE's tensors in the three layouts in which they are published, as tables.

The layout "official" is Tencent's, and that of our modules. A table maps an official module name to the module names of
another layout, with `{}` for the number of the block. Where it lists several modules, the official tensor is their
tensors stacked along the rows, in this order. Sources: docs/formats.md 2.9 and 2.10, diffusers and ComfyUI.
"""

import re
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

NAMINGS = ("official", "diffusers", "ComfyUI")


def _attention(official: str, diffusers: str) -> dict[str, tuple[str, ...]]:
    return {official: tuple(f"{diffusers}{name}" for name in ("q", "k", "v"))}


_REFINER = "txt_in.individual_token_refiner.blocks.{}"
_REFINER_DIFFUSERS = "context_embedder.token_refiner.refiner_blocks.{}"
_TIME_TEXT = "context_embedder.time_text_embed"
_DOUBLE, _DOUBLE_DIFFUSERS = "double_blocks.{}", "transformer_blocks.{}"
_SINGLE, _SINGLE_DIFFUSERS = "single_blocks.{}", "single_transformer_blocks.{}"

DIT_TO_DIFFUSERS: dict[str, tuple[str, ...]] = {
    "img_in.proj": ("x_embedder.proj",),
    "time_in.mlp.0": ("time_text_embed.timestep_embedder.linear_1",),
    "time_in.mlp.2": ("time_text_embed.timestep_embedder.linear_2",),
    "guidance_in.mlp.0": ("time_text_embed.guidance_embedder.linear_1",),
    "guidance_in.mlp.2": ("time_text_embed.guidance_embedder.linear_2",),
    "vector_in.in_layer": ("time_text_embed.text_embedder.linear_1",),
    "vector_in.out_layer": ("time_text_embed.text_embedder.linear_2",),
    "txt_in.input_embedder": ("context_embedder.proj_in",),
    "txt_in.t_embedder.mlp.0": (f"{_TIME_TEXT}.timestep_embedder.linear_1",),
    "txt_in.t_embedder.mlp.2": (f"{_TIME_TEXT}.timestep_embedder.linear_2",),
    "txt_in.c_embedder.linear_1": (f"{_TIME_TEXT}.text_embedder.linear_1",),
    "txt_in.c_embedder.linear_2": (f"{_TIME_TEXT}.text_embedder.linear_2",),
    f"{_REFINER}.norm1": (f"{_REFINER_DIFFUSERS}.norm1",),
    f"{_REFINER}.norm2": (f"{_REFINER_DIFFUSERS}.norm2",),
    **_attention(f"{_REFINER}.self_attn_qkv", f"{_REFINER_DIFFUSERS}.attn.to_"),
    f"{_REFINER}.self_attn_proj": (f"{_REFINER_DIFFUSERS}.attn.to_out.0",),
    f"{_REFINER}.mlp.fc1": (f"{_REFINER_DIFFUSERS}.ff.net.0.proj",),
    f"{_REFINER}.mlp.fc2": (f"{_REFINER_DIFFUSERS}.ff.net.2",),
    f"{_REFINER}.adaLN_modulation.1": (f"{_REFINER_DIFFUSERS}.norm_out.linear",),
    f"{_DOUBLE}.img_mod.linear": (f"{_DOUBLE_DIFFUSERS}.norm1.linear",),
    f"{_DOUBLE}.txt_mod.linear": (f"{_DOUBLE_DIFFUSERS}.norm1_context.linear",),
    **_attention(f"{_DOUBLE}.img_attn_qkv", f"{_DOUBLE_DIFFUSERS}.attn.to_"),
    f"{_DOUBLE}.txt_attn_qkv": tuple(f"{_DOUBLE_DIFFUSERS}.attn.add_{name}_proj" for name in ("q", "k", "v")),
    f"{_DOUBLE}.img_attn_q_norm": (f"{_DOUBLE_DIFFUSERS}.attn.norm_q",),
    f"{_DOUBLE}.img_attn_k_norm": (f"{_DOUBLE_DIFFUSERS}.attn.norm_k",),
    f"{_DOUBLE}.txt_attn_q_norm": (f"{_DOUBLE_DIFFUSERS}.attn.norm_added_q",),
    f"{_DOUBLE}.txt_attn_k_norm": (f"{_DOUBLE_DIFFUSERS}.attn.norm_added_k",),
    f"{_DOUBLE}.img_attn_proj": (f"{_DOUBLE_DIFFUSERS}.attn.to_out.0",),
    f"{_DOUBLE}.txt_attn_proj": (f"{_DOUBLE_DIFFUSERS}.attn.to_add_out",),
    f"{_DOUBLE}.img_mlp.fc1": (f"{_DOUBLE_DIFFUSERS}.ff.net.0.proj",),
    f"{_DOUBLE}.img_mlp.fc2": (f"{_DOUBLE_DIFFUSERS}.ff.net.2",),
    f"{_DOUBLE}.txt_mlp.fc1": (f"{_DOUBLE_DIFFUSERS}.ff_context.net.0.proj",),
    f"{_DOUBLE}.txt_mlp.fc2": (f"{_DOUBLE_DIFFUSERS}.ff_context.net.2",),
    f"{_SINGLE}.linear1": (
        *(f"{_SINGLE_DIFFUSERS}.attn.to_{name}" for name in ("q", "k", "v")),
        f"{_SINGLE_DIFFUSERS}.proj_mlp",
    ),
    f"{_SINGLE}.linear2": (f"{_SINGLE_DIFFUSERS}.proj_out",),
    f"{_SINGLE}.q_norm": (f"{_SINGLE_DIFFUSERS}.attn.norm_q",),
    f"{_SINGLE}.k_norm": (f"{_SINGLE_DIFFUSERS}.attn.norm_k",),
    f"{_SINGLE}.modulation.linear": (f"{_SINGLE_DIFFUSERS}.norm.linear",),
    "final_layer.linear": ("proj_out",),
    "final_layer.adaLN_modulation.1": ("norm_out.linear",),
}

# Modules that have their official names in ComfyUI are not listed.
DIT_TO_COMFYUI: dict[str, tuple[str, ...]] = {
    "time_in.mlp.0": ("time_in.in_layer",),
    "time_in.mlp.2": ("time_in.out_layer",),
    "guidance_in.mlp.0": ("guidance_in.in_layer",),
    "guidance_in.mlp.2": ("guidance_in.out_layer",),
    "txt_in.t_embedder.mlp.0": ("txt_in.t_embedder.in_layer",),
    "txt_in.t_embedder.mlp.2": ("txt_in.t_embedder.out_layer",),
    "txt_in.c_embedder.linear_1": ("txt_in.c_embedder.in_layer",),
    "txt_in.c_embedder.linear_2": ("txt_in.c_embedder.out_layer",),
    f"{_REFINER}.self_attn_qkv": (f"{_REFINER}.self_attn.qkv",),
    f"{_REFINER}.self_attn_proj": (f"{_REFINER}.self_attn.proj",),
    f"{_REFINER}.mlp.fc1": (f"{_REFINER}.mlp.0",),
    f"{_REFINER}.mlp.fc2": (f"{_REFINER}.mlp.2",),
    f"{_DOUBLE}.img_mod.linear": (f"{_DOUBLE}.img_mod.lin",),
    f"{_DOUBLE}.txt_mod.linear": (f"{_DOUBLE}.txt_mod.lin",),
    f"{_DOUBLE}.img_attn_qkv": (f"{_DOUBLE}.img_attn.qkv",),
    f"{_DOUBLE}.txt_attn_qkv": (f"{_DOUBLE}.txt_attn.qkv",),
    f"{_DOUBLE}.img_attn_q_norm": (f"{_DOUBLE}.img_attn.norm.query_norm",),
    f"{_DOUBLE}.img_attn_k_norm": (f"{_DOUBLE}.img_attn.norm.key_norm",),
    f"{_DOUBLE}.txt_attn_q_norm": (f"{_DOUBLE}.txt_attn.norm.query_norm",),
    f"{_DOUBLE}.txt_attn_k_norm": (f"{_DOUBLE}.txt_attn.norm.key_norm",),
    f"{_DOUBLE}.img_attn_proj": (f"{_DOUBLE}.img_attn.proj",),
    f"{_DOUBLE}.txt_attn_proj": (f"{_DOUBLE}.txt_attn.proj",),
    f"{_DOUBLE}.img_mlp.fc1": (f"{_DOUBLE}.img_mlp.0",),
    f"{_DOUBLE}.img_mlp.fc2": (f"{_DOUBLE}.img_mlp.2",),
    f"{_DOUBLE}.txt_mlp.fc1": (f"{_DOUBLE}.txt_mlp.0",),
    f"{_DOUBLE}.txt_mlp.fc2": (f"{_DOUBLE}.txt_mlp.2",),
    f"{_SINGLE}.q_norm": (f"{_SINGLE}.norm.query_norm",),
    f"{_SINGLE}.k_norm": (f"{_SINGLE}.norm.key_norm",),
    f"{_SINGLE}.modulation.linear": (f"{_SINGLE}.modulation.lin",),
}

_TABLES = {"official": {}, "diffusers": DIT_TO_DIFFUSERS, "ComfyUI": DIT_TO_COMFYUI}
_REVERSED = {
    naming: {part: official for official, parts in table.items() for part in parts} for naming, table in _TABLES.items()
}
_BLOCK_NUMBER = re.compile(r"(?<=blocks\.)\d+")


def _lookup(module: str, table: Mapping[str, tuple[str, ...] | str]) -> tuple[str, ...] | str | None:
    """The table's entry for a module, with the number of its block."""
    number = _BLOCK_NUMBER.search(module)
    entry = table.get(_BLOCK_NUMBER.sub("{}", module, count=1))
    if entry is None or number is None:
        return entry
    return entry.format(number[0]) if isinstance(entry, str) else tuple(part.format(number[0]) for part in entry)


def dit_parts(name: str, naming: str) -> tuple[str, ...]:
    """The tensors of another layout that give the official tensor `name` when their rows are stacked."""
    module, _, leaf = name.rpartition(".")
    parts = _lookup(module, _TABLES[naming]) or (module,)
    if naming == "ComfyUI" and parts[0].endswith(("query_norm", "key_norm")):
        leaf = "scale"
    return tuple(f"{part}.{leaf}" for part in parts)


def dit_official_name(name: str, naming: str) -> str:
    """The official name of the tensor `name` of another layout, or of the tensor whose rows it holds.

    Unknown names are returned unchanged.
    """
    module, _, leaf = name.rpartition(".")
    if naming == "ComfyUI" and leaf == "scale" and module.endswith(("query_norm", "key_norm")):
        leaf = "weight"
    return f"{_lookup(module, _REVERSED[naming]) or module}.{leaf}"


def dit_official_shapes(shapes: Mapping[str, Sequence[int]], naming: str) -> dict[str, tuple[int, ...]]:
    """Shapes of another layout -> shapes by official name; unknown names are kept."""
    official: dict[str, tuple[int, ...]] = {}
    for name, shape in shapes.items():
        key = dit_official_name(name, naming)
        rows = official[key][0] if key in official and shape else 0
        official[key] = (rows + shape[0], *shape[1:]) if shape else ()
    return official


def _swaps_halves(name: str, naming: str) -> bool:
    """Whether the tensor's halves are swapped: (shift, scale) of the final layer is (scale, shift) in diffusers."""
    return naming == "diffusers" and name.startswith("final_layer.adaLN_modulation.1.")


def dit_to_official(name: str, parts: Sequence[Tensor], naming: str) -> Tensor:
    """The official tensor `name` from the tensors that `dit_parts` lists."""
    tensor = parts[0] if len(parts) == 1 else torch.cat(tuple(parts))
    return torch.cat(tensor.chunk(2)[::-1]) if _swaps_halves(name, naming) else tensor


def dit_from_official(weights: Mapping[str, Tensor], naming: str) -> dict[str, Tensor]:
    """An official state dict -> the same in another layout; `dit_to_official` reverts it exactly."""
    hidden = weights["img_in.proj.weight"].shape[0]
    converted: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        parts = dit_parts(name, naming)
        rows = [hidden] * min(len(parts), 3) if len(parts) > 1 else [tensor.shape[0]]
        rows += [tensor.shape[0] - sum(rows)] if len(parts) > 3 else []
        source = torch.cat(tensor.chunk(2)[::-1]) if _swaps_halves(name, naming) else tensor
        converted.update(zip(parts, source.split(rows), strict=True))
    return converted


def dit_naming(names: Iterable[str]) -> str:
    """The layout, one of `NAMINGS`, of these tensor names without prefix."""
    for name in names:
        if name.startswith(("transformer_blocks.", "x_embedder.")):
            return "diffusers"
        if ".img_attn.qkv." in name or name.startswith("time_in.in_layer."):
            return "ComfyUI"
    return "official"


# How a part of ComfyUI's VAE names becomes official. diffusers has the official names.
_VAE_FROM_COMFYUI = [
    (re.compile(r"\bmid\.block_([12])\b"), lambda m: f"mid_block.resnets.{int(m[1]) - 1}"),
    (re.compile(r"\bmid\.attn_1\.norm\b"), lambda m: "mid_block.attentions.0.group_norm"),
    (re.compile(r"\bmid\.attn_1\.([qkv])\b"), lambda m: f"mid_block.attentions.0.to_{m[1]}"),
    (re.compile(r"\bmid\.attn_1\.proj_out\b"), lambda m: "mid_block.attentions.0.to_out.0"),
    (re.compile(r"\bdown\.(\d)\.block\b"), lambda m: f"down_blocks.{m[1]}.resnets"),
    (re.compile(r"\bdown\.(\d)\.downsample\b"), lambda m: f"down_blocks.{m[1]}.downsamplers.0"),
    (re.compile(r"\bup\.(\d)\.block\b"), lambda m: f"up_blocks.{3 - int(m[1])}.resnets"),
    (re.compile(r"\bup\.(\d)\.upsample\b"), lambda m: f"up_blocks.{3 - int(m[1])}.upsamplers.0"),
    (re.compile(r"\bnin_shortcut\b"), lambda m: "conv_shortcut"),
    (re.compile(r"(?<=coder\.)norm_out\b"), lambda m: "conv_norm_out"),
]


def vae_official_name(name: str) -> str:
    """The official name of a VAE tensor in any layout."""
    for pattern, replacement in _VAE_FROM_COMFYUI:
        name = pattern.sub(replacement, name)
    return name
