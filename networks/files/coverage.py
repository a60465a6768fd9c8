"""How many modules of a LoRA file each program will load, according to the keys it accepts (docs/formats.md 2.8)."""

import functools
from collections.abc import Iterable

from hunyuan_model.checkpoints.names import DIT_TO_COMFYUI, DIT_TO_DIFFUSERS
from hunyuan_model.models import HunyuanVideoConfig
from networks.factors import SUFFIXES
from networks.files.format_table import FORMATS, Format
from networks.files.names import block_template, official_part, split_key

# The suffixes that each program knows; a module with any other suffix counts as not loaded.
KOHYA = {"lora_down.weight", "lora_up.weight", "alpha"}
PEFT = {"lora_A.weight", "lora_B.weight"}
OTHER_KINDS = {suffix for suffix in SUFFIXES if suffix.startswith(("hada_", "lokr_"))}
KNOWN_SUFFIXES = {
    "ComfyUI": KOHYA | PEFT | OTHER_KINDS | {"dora_scale", "lora.down.weight", "lora.up.weight", "diff", "diff_b"},
    "diffusers": PEFT | {"lora_magnitude_vector"},
    "musubi": KOHYA,  # it generates and merges with its networks.lora only
    "OneTrainer": KOHYA | PEFT | OTHER_KINDS | {"dora_scale", "lora_magnitude_vector"},
}
# The formats that OneTrainer recognises.
ONETRAINER = {"default", "other", "diffusion-pipe", "diffusers", *(name for name in FORMATS if "onetrainer" in name)}
COMFYUI_DORA = "DoRA acts differently there (divided by |W| instead of |W + dW|); merge_lora.py is exact"
# The number of blocks of the published model, the only one that these programs load.
DEPTHS = {
    "double_blocks.": HunyuanVideoConfig.depth_double,
    "single_blocks.": HunyuanVideoConfig.depth_single,
    "txt_in.individual_token_refiner.blocks.": HunyuanVideoConfig.depth_refiner,
}


def _flat(name: str) -> str:
    return name.replace(".", "_")


@functools.cache
def accepted_modules(program: str) -> frozenset[str]:
    """The module names, with prefix, that a program maps to a module of HunyuanVideo; `{}` is the block number."""
    modules = [
        name for name in DIT_TO_DIFFUSERS if not name.rpartition(".")[2].startswith(("norm", "q_norm", "k_norm"))
    ]
    if program == "musubi":
        return frozenset(f"lora_unet_{_flat(name)}" for name in modules if name.startswith(("double_", "single_")))
    if program == "ComfyUI":
        comfyui = {name: DIT_TO_COMFYUI.get(name, (name,))[0] for name in modules}
        # Its map of LoRA keys lacks the embedders of timestep, guidance and pooled text.
        mapped = {name: own for name, own in comfyui.items() if not own.endswith(("in_layer", "out_layer"))}
        official = {f"{prefix}{name}" for prefix in ("transformer.", "diffusion_model.") for name in mapped}
        own_names = {f"diffusion_model.{own}" for own in mapped.values()}
        return frozenset(official | own_names | {f"lora_unet_{_flat(own)}" for own in mapped.values()})
    split = {f"transformer.{part}" for name in modules for part in DIT_TO_DIFFUSERS[name]}
    # Bug of diffusers: converting official names, it splits lora_A of these two modules too, and they are lost.
    broken = ("self_attn_qkv", "final_layer.adaLN_modulation.1")
    whole = [name for name in modules if not name.endswith(broken)]
    official = {f"{prefix}{name}" for prefix in ("transformer.", "diffusion_model.") for name in whole}
    return frozenset(split | official)


def coverage(keys: Iterable[str], format_: Format) -> dict[str, tuple[int, int]]:
    """Program -> (modules that it will load, modules in the file); q, k, v (and mlp) count as one module.

    Args:
        keys: the keys of a LoRA file.
        format_: the format of the file.
    """
    per_official: dict[str, dict[str, set[str]]] = {}
    for key in keys:
        module, suffix = split_key(key)
        official, _ = official_part(module, format_)
        per_official.setdefault(official, {}).setdefault(module, set()).add(suffix)
    in_model = [parts for official, parts in per_official.items() if _in_model(official)]
    total = len(per_official)
    return {program: (sum(_loads(program, parts, format_) for parts in in_model), total) for program in KNOWN_SUFFIXES}


def coverage_rows(keys: Iterable[str], format_: Format) -> list[tuple[str, str]]:
    """`coverage` as rows of a table, with what acts differently in a program."""
    keys = list(keys)
    rows = []
    for program, (loaded, total) in coverage(keys, format_).items():
        text = f"{loaded} of {total} modules will load"
        if program == "ComfyUI" and loaded and any(key.endswith(".dora_scale") for key in keys):
            text += f", but {COMFYUI_DORA}"
        rows.append((program, text))
    return rows


def _in_model(official: str) -> bool:
    """Whether the published model has the block of this module."""
    return all(
        int(official.removeprefix(prefix).split(".")[0]) < depth
        for prefix, depth in DEPTHS.items()
        if official.startswith(prefix)
    )


def _loads(program: str, parts: dict[str, set[str]], format_: Format) -> bool:
    suffixes = KNOWN_SUFFIXES[program]
    if program == "OneTrainer":
        known = FORMATS.get(format_.name) == format_ and format_.name in ONETRAINER
        if format_.dora == "lora_magnitude_vector":  # it expects .weight behind it
            suffixes = suffixes - {"lora_magnitude_vector"}
        return known and all(found <= suffixes for found in parts.values())
    accepted = accepted_modules(program)
    return all(block_template(module) in accepted and found <= suffixes for module, found in parts.items())
