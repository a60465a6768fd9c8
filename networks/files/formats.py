"""Every LoRA file format: recognised, read into one representation, and written from it.

The representation is `LoraWeights`: official dotted module name -> factors. Separate q, k, v are stacked when a file is
read (`split_fuse`), so that a LoRA has the same representation whatever program wrote it.
"""

import contextlib
import dataclasses
import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from networks.factors import SUFFIXES, Factors, LohaFactors, LoraFactors, factors_from
from networks.files.format_table import FORMATS, Format
from networks.files.metadata import model_hashes
from networks.files.names import detect_format, official_part, part_names, split_key
from networks.files.split_fuse import fold_alpha, split_rows, stack_rows, swap_halves
from utils.errors import UserError, one_line
from utils.safetensors_utils import iterate_tensors, read_header, save_file

# Officially (shift, scale), in diffusers (scale, shift).
SWAPPED = "final_layer.adaLN_modulation.1"
# The DiT's ratio of the MLP's width to the hidden width, for a file that has q but no mlp of a single block.
MLP_RATIO = 4


@dataclass
class LoraWeights:
    """A LoRA (LoHa, LoKr, DoRA) in no particular format.

    Attributes:
        modules: official dotted module name -> factors.
        metadata: of the file it was read from.
        format: the format it was read from.
        leftover: keys of the file that belong to no module of the DiT, such as those of text encoders.
    """

    modules: dict[str, Factors]
    metadata: dict[str, str] = field(default_factory=dict)
    format: Format = FORMATS["default"]
    leftover: list[str] = field(default_factory=list)


def read_lora(path: str | os.PathLike, allow_partial: bool = False) -> LoraWeights:
    """Reads a LoRA file of any format.

    Args:
        path: a safetensors file.
        allow_partial: keep keys that belong to no module in `leftover` instead of raising.

    Raises:
        UserError: no LoRA for HunyuanVideo, keys left over, factors missing or of wrong shapes.
    """
    _, metadata = read_header(path)
    _refuse_other_models(path, metadata)
    return from_tensors(dict(iterate_tensors(path)), metadata, str(path), allow_partial)


def from_tensors(
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    source: str,
    allow_partial: bool = False,
    format_: Format | None = None,
) -> LoraWeights:
    """The same from tensors; `source` names them in errors, `format_` is recognised from the keys if unset."""
    format_ = format_ or detect_format(list(tensors))
    if format_ is None:
        raise UserError(f"{source}: no HunyuanVideo LoRA: no key is known, such as {_example(list(tensors))}")
    grouped, leftover = _group(tensors, format_)
    if leftover and not allow_partial:
        raise UserError(
            f"{source}: {len(leftover)} of {len(tensors)} keys belong to no module of HunyuanVideo's DiT, such as "
            f"{leftover[0]}; convert_lora.py with --allow_partial makes a file without them"
        )
    metadata = dict(metadata)
    alphas = _AdapterMetadata(metadata.pop("lora_adapter_metadata", None), source)
    read = {}
    for official, parts in grouped.items():
        with _about(source, official):
            read[official] = _read_parts(official, parts, format_, alphas)
    modules, mlp_rows = {}, _mlp_rows(read)
    for official, parts in read.items():
        with _about(source, official):
            modules[official] = _stacked(official, parts, format_, mlp_rows)
    _check_widths(modules, source)
    return LoraWeights(modules, metadata, format_, leftover)


@contextlib.contextmanager
def _about(source: str, official: str) -> Iterator[None]:
    """Factors that do not go together are the user's wrong file: the error names it and the module."""
    try:
        yield
    except ValueError as error:
        raise UserError(f"{source}: {official} {error}") from None


# Rows of the blocks' modules as multiples of the hidden width; all but fc2 and linear2 have hidden columns.
ROWS = {"_attn_qkv": 3, "_attn_proj": 1, ".fc2": 1, ".linear2": 1, "_mod.linear": 6, ".modulation.linear": 3}
COLUMNS = ("_attn_qkv", "_attn_proj", ".fc1", ".linear1", "_mod.linear", ".modulation.linear")


def _check_widths(modules: Mapping[str, Factors], source: str) -> None:
    """The modules must be of one DiT: the same hidden width everywhere."""
    widths = {}
    for name, factors in modules.items():
        for ending, multiple in ROWS.items():
            if "_blocks." in name and name.endswith(ending):
                widths[f"{name} has {factors.out_features} rows"] = factors.out_features / multiple
        if "_blocks." in name and name.endswith(COLUMNS):
            widths[f"{name} has {factors.in_features} columns"] = factors.in_features
    if len(set(widths.values())) > 1:
        hidden = Counter(widths.values()).most_common(1)[0][0]
        odd = next(what for what, width in widths.items() if width != hidden)
        raise UserError(f"{source}: {odd}, which does not go with the hidden width {hidden:g} of the other modules")


def _example(keys: list[str]) -> str:
    return f"'{keys[0]}'" if keys else "none (the file has no tensors)"


def _refuse_other_models(path: str | os.PathLike, metadata: Mapping[str, str]) -> None:
    """Flux and HunyuanVideo 1.5 have almost the same names, Flux even the same shapes: the metadata decide."""
    for name in ("ss_base_model_version", "modelspec.architecture"):
        model = metadata.get(name, "").lower().replace("-", "_").split("/")[0]
        if model and (not model.startswith("hunyuan") or "1_5" in model or "1.5" in model):
            raise UserError(f"{path}: made for another model: its metadata say {name} = {metadata[name]}")


Parts = dict[int, dict[str, Tensor]]


def _group(tensors: Mapping[str, Tensor], format_: Format) -> tuple[dict[str, Parts], list[str]]:
    """Official module -> part -> suffix -> tensor, and the keys that belong nowhere."""
    grouped: dict[str, Parts] = {}
    leftover = []
    for key, tensor in tensors.items():
        pair = split_key(key)
        found = official_part(pair[0], format_) if pair else None
        if found is None:
            leftover.append(key)
            continue
        official, part = found
        grouped.setdefault(official, {}).setdefault(part, {})[pair[1]] = tensor
    return grouped, leftover


class _AdapterMetadata:
    """PEFT's configuration as newer diffusers stores it: alpha per module, `transformer.` before every name."""

    def __init__(self, text: str | None, source: str):
        try:
            values = json.loads(text) if text else {}
            self.patterns = {re.compile(rf"(.*\.)?({pattern})"): float(alpha) for pattern, alpha in _alphas(values)}
        except (ValueError, TypeError, AttributeError, re.error) as error:
            raise UserError(f"{source}: lora_adapter_metadata cannot be read: {one_line(error)}") from None
        self.values = {name.removeprefix("transformer."): value for name, value in values.items()}

    def alpha(self, name: str, rank: int) -> float | None:
        alpha = self.values.get("lora_alpha")
        alpha = next((value for pattern, value in self.patterns.items() if pattern.fullmatch(name)), alpha)
        # Rank-stabilised LoRA scales by alpha / sqrt(rank).
        return alpha if alpha is None else float(alpha) * (rank**0.5 if self.values.get("use_rslora") else 1)


def _alphas(values: dict) -> Iterable[tuple[str, float]]:
    return (values.get("transformer.alpha_pattern") or values.get("alpha_pattern") or {}).items()


def _read_parts(official: str, parts: Parts, format_: Format, alphas: _AdapterMetadata) -> list[Factors | None]:
    """The factors of each part of a module, None where the file has none."""
    read: list[Factors | None] = []
    for index, name in enumerate(part_names(official, format_)):
        factors = factors_from(parts[index]) if index in parts else None
        if factors is not None and factors.alpha is None and alphas.values:
            alpha = alphas.alpha(name.removeprefix(format_.prefix), factors.rank)
            factors = factors if alpha == factors.rank else dataclasses.replace(factors, alpha=alpha)
        read.append(factors)
    return read


def _stacked(official: str, parts: Sequence[Factors | None], format_: Format, mlp_rows: int | None) -> Factors:
    """One adapter of the official module from the parts of the file's."""
    if len(parts) > 1:
        return stack_rows(parts, _rows(parts, mlp_rows))
    return swap_halves(parts[0]) if format_.splits and official == SWAPPED else parts[0]


def _rows(parts: Sequence[Factors | None], mlp_rows: int | None) -> list[int]:
    """The rows of every part, also of those that the file lacks: q, k, v are as wide as each other."""
    given = [part for part in parts if part is not None]
    hidden = next((part.out_features for part in parts[:3] if part is not None), given[0].in_features)
    mlp = parts[3].out_features if len(parts) == 4 and parts[3] is not None else mlp_rows or MLP_RATIO * hidden
    return [hidden, hidden, hidden, mlp][: len(parts)]


def _mlp_rows(read: Mapping[str, Sequence[Factors | None]]) -> int | None:
    """The width of the single blocks' MLP, from any block of the file that has it."""
    return next((parts[3].out_features for parts in read.values() if len(parts) == 4 and parts[3] is not None), None)


def to_tensors(lora: LoraWeights, format_: Format, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """The tensors of a file in a format; `dtype` None keeps each tensor's own.

    Raises:
        UserError: the format's readers know no LoHa, LoKr or DoRA, or a module cannot be split.
    """
    tensors = {}
    for official, factors in lora.modules.items():
        names = part_names(official, format_)
        try:
            parts = _parts(official, factors, format_, len(names))
        except ValueError as error:
            raise UserError(f"{official} {error}") from None
        for name, part in zip(names, parts):
            if part is not None:
                tensors |= {f"{name}.{suffix}": tensor for suffix, tensor in _named(part, format_, dtype).items()}
    return tensors


def _parts(official: str, factors: Factors, format_: Format, count: int) -> list[Factors | None]:
    if factors.dora_scale is not None and format_.dora is None:
        raise ValueError(f"is DoRA, which readers of '{format_.name}' do not know")
    if not isinstance(factors, LoraFactors) and not format_.other_kinds:
        raise ValueError(f"is no plain LoRA, all that readers of '{format_.name}' know; --rank makes it one")
    if count == 1:
        return [swap_halves(factors) if format_.splits and official == SWAPPED else factors]
    hidden = factors.out_features // 3 if count == 3 else factors.in_features
    return split_rows(factors, [hidden] * 3 + [factors.out_features - 3 * hidden] * (count - 3))


def _named(factors: Factors, format_: Format, dtype: torch.dtype | None) -> dict[str, Tensor]:
    """The tensors of one module of the file by suffix."""
    plain = isinstance(factors, LoraFactors)
    if plain:
        stems = {"down": "lora_A.weight", "up": "lora_B.weight"}
        stems = stems if format_.peft else {"down": "lora_down.weight", "up": "lora_up.weight"}
        factors = factors if format_.alpha else fold_alpha(factors)
    else:
        stem = "hada" if isinstance(factors, LohaFactors) else "lokr"
        stems = {name: f"{stem}_{name}" for name in factors.tensors()}
    named = {}
    for name, tensor in factors.tensors().items():
        if name == "dora_scale":
            flat = format_.dora == "lora_magnitude_vector"
            named[format_.dora] = (tensor.flatten() if flat else tensor).to(dtype or tensor.dtype)
        else:
            named[stems[name]] = tensor.to(dtype or tensor.dtype)
    if format_.alpha or not plain:
        like = named[next(iter(stems.values()))]
        named["alpha"] = _alpha_tensor(factors.rank if factors.alpha is None else factors.alpha, like.dtype)
    return named


def _alpha_tensor(alpha: float, dtype: torch.dtype) -> Tensor:
    """alpha in the dtype of the file if that holds it exactly, else in float32."""
    tensor = torch.tensor(float(alpha))
    return tensor.to(dtype) if tensor.to(dtype).float() == tensor else tensor


def adapter_metadata(tensors: Mapping[str, Tensor], prefix: str) -> str:
    """PEFT's configuration of a file whose alpha is its rank everywhere, as diffusers stores it."""
    ranks = {}
    for key, tensor in tensors.items():
        module, suffix = split_key(key)
        if SUFFIXES[suffix] == "down":
            ranks[module.removeprefix(prefix)] = tensor.shape[0]
    rank = Counter(ranks.values()).most_common(1)[0][0]
    # `^` keeps `proj_out` from meaning every block's proj_out.
    pattern = {f"^{name}": other for name, other in ranks.items() if other != rank}
    values = {
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": pattern,
        "alpha_pattern": pattern,
        "target_modules": sorted(ranks),
        "use_dora": any(key.endswith("lora_magnitude_vector") for key in tensors),
    }
    return json.dumps({f"{prefix}{name}": value for name, value in values.items()})


def write_lora(
    lora: LoraWeights,
    path: str | os.PathLike,
    format_: Format,
    dtype: torch.dtype | None = None,
) -> dict[str, Tensor]:
    """Writes a LoRA in a format, with its metadata and the hashes of the new file; returns the file's tensors.

    Raises:
        UserError: see `to_tensors`.
    """
    tensors = to_tensors(lora, format_, dtype)
    if dtype == torch.float16 and any(tensor.isinf().any() for tensor in tensors.values()):
        raise UserError(f"{path}: some values are too large for float16; use bfloat16 or float32")
    metadata = dict(lora.metadata)
    if format_.adapter_metadata:
        metadata["lora_adapter_metadata"] = adapter_metadata(tensors, format_.prefix)
    save_lora_file(tensors, path, metadata)
    return tensors


def save_lora_file(tensors: Mapping[str, Tensor], path: str | os.PathLike, metadata: Mapping[str, str]) -> None:
    """Writes a LoRA file; the hashes by which other tools know it are those of these very tensors."""
    save_file(tensors, path, {**metadata, **model_hashes(tensors, metadata)})
