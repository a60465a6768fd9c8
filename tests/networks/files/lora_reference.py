"""The dW of a LoRA file of any format, implemented from docs/formats.md 2.4 and 2.9 without networks.files."""

import torch

HIDDEN, MLP = 48, 192
# Rows x columns of every module that the tests adapt, by official name.
SHAPES = {
    **{
        f"double_blocks.7.{stream}_{name}": shape
        for stream in ("img", "txt")
        for name, shape in {
            "attn_qkv": (3 * HIDDEN, HIDDEN),
            "attn_proj": (HIDDEN, HIDDEN),
            "mlp.fc1": (MLP, HIDDEN),
            "mlp.fc2": (HIDDEN, MLP),
            "mod.linear": (6 * HIDDEN, HIDDEN),
        }.items()
    },
    **{
        f"single_blocks.11.{name}": shape
        for name, shape in {
            "linear1": (3 * HIDDEN + MLP, HIDDEN),
            "linear2": (HIDDEN, HIDDEN + MLP),
            "modulation.linear": (3 * HIDDEN, HIDDEN),
        }.items()
    },
    "txt_in.individual_token_refiner.blocks.1.self_attn_qkv": (3 * HIDDEN, HIDDEN),
    "txt_in.individual_token_refiner.blocks.1.mlp.fc1": (MLP, HIDDEN),
    "time_in.mlp.0": (HIDDEN, 24),
    "vector_in.out_layer": (HIDDEN, HIDDEN),
    "final_layer.linear": (64, HIDDEN),
    "final_layer.adaLN_modulation.1": (2 * HIDDEN, HIDDEN),
}

DIFFUSERS = {
    "img_attn_qkv": ["attn.to_q", "attn.to_k", "attn.to_v"],
    "txt_attn_qkv": ["attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"],
    "img_attn_proj": ["attn.to_out.0"],
    "txt_attn_proj": ["attn.to_add_out"],
    "img_mlp.fc1": ["ff.net.0.proj"],
    "img_mlp.fc2": ["ff.net.2"],
    "txt_mlp.fc1": ["ff_context.net.0.proj"],
    "txt_mlp.fc2": ["ff_context.net.2"],
    "img_mod.linear": ["norm1.linear"],
    "txt_mod.linear": ["norm1_context.linear"],
    "linear1": ["attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"],
    "linear2": ["proj_out"],
    "modulation.linear": ["norm.linear"],
}
DIFFUSERS_ELSEWHERE = {
    "txt_in.individual_token_refiner.blocks.1.self_attn_qkv": [
        f"context_embedder.token_refiner.refiner_blocks.1.attn.to_{x}" for x in "qkv"
    ],
    "txt_in.individual_token_refiner.blocks.1.mlp.fc1": [
        "context_embedder.token_refiner.refiner_blocks.1.ff.net.0.proj"
    ],
    "time_in.mlp.0": ["time_text_embed.timestep_embedder.linear_1"],
    "vector_in.out_layer": ["time_text_embed.text_embedder.linear_2"],
    "final_layer.linear": ["proj_out"],
    "final_layer.adaLN_modulation.1": ["norm_out.linear"],
}
COMFYUI = {
    "img_attn_qkv": "img_attn.qkv",
    "txt_attn_qkv": "txt_attn.qkv",
    "img_attn_proj": "img_attn.proj",
    "txt_attn_proj": "txt_attn.proj",
    "img_mlp.fc1": "img_mlp.0",
    "img_mlp.fc2": "img_mlp.2",
    "txt_mlp.fc1": "txt_mlp.0",
    "txt_mlp.fc2": "txt_mlp.2",
    "img_mod.linear": "img_mod.lin",
    "txt_mod.linear": "txt_mod.lin",
    "linear1": "linear1",
    "linear2": "linear2",
    "modulation.linear": "modulation.lin",
}
COMFYUI_ELSEWHERE = {
    "txt_in.individual_token_refiner.blocks.1.self_attn_qkv": "txt_in.individual_token_refiner.blocks.1.self_attn.qkv",
    "txt_in.individual_token_refiner.blocks.1.mlp.fc1": "txt_in.individual_token_refiner.blocks.1.mlp.0",
    "time_in.mlp.0": "time_in.in_layer",
    "vector_in.out_layer": "vector_in.out_layer",
    "final_layer.linear": "final_layer.linear",
    "final_layer.adaLN_modulation.1": "final_layer.adaLN_modulation.1",
}


def diffusers_names(official: str) -> list[str]:
    if official in DIFFUSERS_ELSEWHERE:
        return DIFFUSERS_ELSEWHERE[official]
    blocks, number, name = official.split(".", 2)
    stem = {"double_blocks": "transformer_blocks", "single_blocks": "single_transformer_blocks"}[blocks]
    return [f"{stem}.{number}.{part}" for part in DIFFUSERS[name]]


def comfyui_name(official: str) -> str:
    if official in COMFYUI_ELSEWHERE:
        return COMFYUI_ELSEWHERE[official]
    blocks, number, name = official.split(".", 2)
    return f"{blocks}.{number}.{COMFYUI[name]}"


def flat(name: str) -> str:
    return name.replace(".", "_")


# Format -> (names of a module's parts in the file, down suffix, up suffix, whether alpha is stored).
KOHYA, PEFT = ("lora_down", "lora_up"), ("lora_A", "lora_B")
LAYOUTS = {
    "default": (lambda n: ["lora_unet_" + flat(n)], KOHYA, True),
    "onetrainer-kohya": (lambda n: ["lora_unet_" + flat(n)], KOHYA, True),
    "hunyuan-i2v": (lambda n: ["Hunyuan_video_I2V_lora_" + flat(n)], KOHYA, False),
    "other": (lambda n: ["diffusion_model." + n], PEFT, False),
    "onetrainer-comfy": (lambda n: ["diffusion_model." + n], PEFT, True),
    "onetrainer-original": (lambda n: [n], PEFT, True),
    "diffusion-pipe": (lambda n: ["transformer." + n], PEFT, False),
    "diffusers": (lambda n: ["transformer." + part for part in diffusers_names(n)], PEFT, False),
    "onetrainer-diffusers": (lambda n: ["transformer." + part for part in diffusers_names(n)], PEFT, False),
    "onetrainer-legacy": (lambda n: ["lora_transformer_" + flat(part) for part in diffusers_names(n)], KOHYA, True),
    "comfyui-flat": (lambda n: ["lora_unet_" + flat(comfyui_name(n))], KOHYA, True),
    "comfyui": (lambda n: ["diffusion_model." + comfyui_name(n)], PEFT, True),
}
SPLIT = ("diffusers", "onetrainer-diffusers", "onetrainer-legacy")


def part_rows(official: str, format_name: str) -> list[int]:
    rows = SHAPES[official][0]
    if format_name not in SPLIT or official.rsplit(".", 1)[1] not in ("linear1", *_QKV):
        return [rows]
    return [HIDDEN] * 3 + ([MLP] if official.endswith("linear1") else [])


_QKV = ("img_attn_qkv", "txt_attn_qkv", "self_attn_qkv")


def updates(tensors: dict[str, torch.Tensor], format_name: str) -> dict[str, torch.Tensor]:
    """dW in float64 of every module in a file of this format, by official name; fails if a key is left over."""
    names, (down, up), has_alpha = LAYOUTS[format_name]
    unused = set(tensors)
    found = {}
    for official, (_, columns) in SHAPES.items():
        blocks, present = [], False
        for name, rows in zip(names(official), part_rows(official, format_name), strict=True):
            keys = [f"{name}.{down}.weight", f"{name}.{up}.weight"] + ([f"{name}.alpha"] if has_alpha else [])
            if keys[0] not in tensors:
                blocks.append(torch.zeros(rows, columns, dtype=torch.float64))
                continue
            present = True
            unused -= set(keys)
            a, b = tensors[keys[0]].double(), tensors[keys[1]].double()
            scale = tensors[keys[2]].double() / a.shape[0] if has_alpha else 1.0
            blocks.append(scale * b @ a)
        if present:
            dw = torch.cat(blocks)
            if official == "final_layer.adaLN_modulation.1" and format_name in SPLIT:
                scale_half, shift_half = dw.chunk(2)
                dw = torch.cat([shift_half, scale_half])
            found[official] = dw
    assert not unused, sorted(unused)[:5]
    return found


def random_file(
    format_name: str, seed: int, ranks=(1, 8, 32), missing: float = 0.2, dtype=torch.float32
) -> dict[str, torch.Tensor]:
    """A random LoRA file: mixed ranks and alphas; some modules and some parts of modules are missing."""
    generator = torch.Generator().manual_seed(seed)

    def draw(n: int) -> int:
        return int(torch.randint(n, (), generator=generator))

    names, (down, up), has_alpha = LAYOUTS[format_name]
    tensors = {}
    for official, (_, columns) in SHAPES.items():
        for name, rows in zip(names(official), part_rows(official, format_name), strict=True):
            if float(torch.rand((), generator=generator)) < missing:
                continue
            rank = ranks[draw(len(ranks))]
            tensors[f"{name}.{down}.weight"] = torch.randn(rank, columns, generator=generator).to(dtype)
            tensors[f"{name}.{up}.weight"] = torch.randn(rows, rank, generator=generator).to(dtype)
            if has_alpha:
                alpha = (1.0, float(rank), 2.5)[draw(3)]
                tensors[f"{name}.alpha"] = torch.tensor(alpha).to(dtype)
    return tensors
