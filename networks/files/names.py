"""The names of modules and keys in every LoRA format.

Names are looked up in tables: a flattened name such as `lora_unet_double_blocks_0_img_mlp_fc1` cannot be split at its
underscores, because module names contain underscores too.
"""

import functools
import re
from collections.abc import Iterator, Sequence

from hunyuan_model.checkpoints.names import DIT_TO_COMFYUI, DIT_TO_DIFFUSERS
from networks.factors import SUFFIXES, VECTOR_SUFFIXES
from networks.files.format_table import FORMATS, Format


def _names_of(official: str, naming: str) -> tuple[str, ...]:
    """A module's names in a naming; a name that is not in the table is the official one."""
    table = {"official": {}, "diffusers": DIT_TO_DIFFUSERS, "ComfyUI": DIT_TO_COMFYUI}[naming]
    return table.get(official, (official,))


@functools.cache
def _name_table(naming: str, flat: bool) -> dict[str, tuple[str, int]]:
    """Module name in a file, with `{}` for the number of the block -> (official name, index of the part)."""
    return {
        name.replace(".", "_") if flat else name: (official, part)
        for official in DIT_TO_DIFFUSERS
        for part, name in enumerate(_names_of(official, naming))
    }


_BLOCK_NUMBER = re.compile(r"(?<=blocks[._])\d+")


def block_template(name: str) -> str:
    """A module name with `{}` in place of the number of its block."""
    return _BLOCK_NUMBER.sub("{}", name, count=1)


def _filled(template: str, like: str) -> str:
    """A template with the block number of the name `like` filled in."""
    number = _BLOCK_NUMBER.search(like)
    return template if number is None else template.format(number[0])


def part_names(official: str, format_: Format) -> tuple[str, ...]:
    """The names of a module in a format, with prefix: one, or one for each part (q, k, v, mlp)."""
    names = [_filled(name, official) for name in _names_of(block_template(official), format_.naming)]
    return tuple(format_.prefix + (name.replace(".", "_") if format_.flat else name) for name in names)


def official_part(name: str, format_: Format) -> tuple[str, int] | None:
    """(official name, index of the part) of a module name in a file; None if the format has no such module."""
    if not name.startswith(format_.prefix):
        return None
    name = name.removeprefix(format_.prefix)
    found = _name_table(format_.naming, format_.flat).get(block_template(name))
    return None if found is None else (_filled(found[0], name), found[1])


_SUFFIX = re.compile(rf"\.({'|'.join(map(re.escape, sorted([*SUFFIXES, *VECTOR_SUFFIXES], key=len, reverse=True)))})$")
# PEFT puts the name of the adapter behind the name of a factor; files of some programs keep it.
_ADAPTER_NAME = re.compile(
    r"(?<=\.)(lora_[AB]|lora_magnitude_vector|hada_w\d_[ab]|lokr_w\d(?:_[ab])?)(?:\.(?!weight$|bias$)[^.]+)?(\.weight|\.bias)?$"
)


def split_key(key: str) -> tuple[str, str] | None:
    """(module, suffix) of a key, the suffix without PEFT's adapter name.

    None if the suffix is not one of `SUFFIXES` or `VECTOR_SUFFIXES`.
    """
    named = _ADAPTER_NAME.search(key)
    if named is not None:
        ending = "" if named[1] == "lora_magnitude_vector" else named[2] or ""
        key = key[: named.start()] + named[1] + ending
    found = _SUFFIX.search(key)
    return None if found is None else (key[: found.start()], found[1])


# What stands before the names of modules in files of other programs, in any combination.
_DOTTED_PREFIX = re.compile(r"(?:(?:base_model\.model|model|diffusion_model|transformer|unet|dit|module|_orig_mod)\.)*")
_FLAT_PREFIXES = [f"{first}_{second}" for first in ("lycoris", "lora") for second in ("", "unet_", "transformer_")]


def _spellings(modules: Sequence[str], suffixes: set[str]) -> Iterator[Format]:
    """Every way to read these names of modules that is not in the table of formats."""
    dotted = {_DOTTED_PREFIX.match(module)[0] for module in modules if "." in module}
    peft = any(suffix.startswith("lora_A") for suffix in suffixes)
    for prefix in [*sorted(dotted), *_FLAT_PREFIXES]:
        for naming in ("official", "diffusers", "ComfyUI"):
            if any((f.prefix, f.naming) == (prefix, naming) for f in FORMATS.values()):
                continue
            shown = f"'{prefix}'" if prefix else "no prefix"
            title = f"{'PEFT' if peft else 'LyCORIS' if prefix.startswith('lyco') else 'LoRA'}, {naming} names, {shown}"
            yield Format("", title, prefix, naming, flat=prefix.endswith("_"), peft=peft, alpha="alpha" in suffixes)


def detect_format(keys: Sequence[str]) -> Format | None:
    """The format that fits most of the keys, or None if no key belongs to a HunyuanVideo LoRA.

    Some formats differ only in whether they store alpha; there the presence of alpha in `keys` decides. Other spellings
    than those of the table get a format without a name, which is only read.
    """
    split = [pair for pair in map(split_key, keys) if pair is not None]
    has_alpha = any(suffix == "alpha" for _, suffix in split)
    spellings = _spellings([module for module, _ in split], {suffix for _, suffix in split})
    best, best_score = None, (0, False)
    for format_ in [*FORMATS.values(), *spellings]:
        fitting = sum(official_part(module, format_) is not None for module, _ in split)
        score = (fitting, format_.alpha == has_alpha)
        if fitting and score > best_score:
            best, best_score = format_, score
    return best
