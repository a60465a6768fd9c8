"""The tensors of a LoRA file, in any format, to one representation (`LoraWeights`) and back.

The representation has the DiT's own modules under their official names. If a file stores q, k and v as separate
modules, they are fused when it is read and split when it is written (`split_fuse`). `lora_files` does the reading and
writing.
"""

import contextlib
import dataclasses
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from networks.factors import VECTOR_SUFFIXES, DifferenceFactors, Factors, LohaFactors, LoraFactors, factors_from
from networks.files.format_table import NATIVE, Format
from networks.files.names import detect_format, official_part, part_names, split_key
from networks.files.peft_metadata import PEFT_KEY, PeftAlphas
from networks.files.rounding import rounded
from networks.files.split_fuse import split_rows, stack_rows, swap_halves
from utils.errors import UserError

# The rows of this module are (shift, scale) in the official layout and (scale, shift) in diffusers.
SWAPPED = "final_layer.adaLN_modulation.1"
# The DiT's MLP width divided by its hidden width, for a file in which no single block has the MLP part.
MLP_RATIO = 4
# The rows of a block's module as a multiple of the hidden width.
ROWS = {"_attn_qkv": 3, "_attn_proj": 1, ".fc2": 1, ".linear2": 1, "_mod.linear": 6, ".modulation.linear": 3}
# The modules of a block that have as many columns as the hidden width.
COLUMNS = ("_attn_qkv", "_attn_proj", ".fc1", ".linear1", "_mod.linear", ".modulation.linear")

# The tensors of one official module: index of the part -> suffix of the key -> tensor.
PartTensors = dict[int, dict[str, Tensor]]


@dataclass
class LoraWeights:
    """A LoRA (or LoHa, LoKr, DoRA), whatever the format of its file.

    Attributes:
        modules: official dotted module name -> factors.
        vectors: official name of a bias or of the weight of a norm -> what is added to it (out,), float32.
        metadata: the file's metadata.
        format: the format of the file.
        leftover: keys of the file that belong to no module of the DiT, such as those of text encoders.
    """

    modules: dict[str, Factors]
    metadata: dict[str, str] = field(default_factory=dict)
    format: Format = NATIVE
    leftover: list[str] = field(default_factory=list)
    vectors: dict[str, Tensor] = field(default_factory=dict)

    def changes(self) -> dict[str, Factors | Tensor]:
        """What is applied to each tensor of the DiT, by its official name."""
        return {f"{name}.weight": factors for name, factors in self.modules.items()} | self.vectors


def from_tensors(
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    source: str,
    allow_partial: bool = False,
    format_: Format | None = None,
) -> LoraWeights:
    """The LoRA that the tensors of a file describe.

    Args:
        tensors: tensors by key.
        metadata: the file's metadata.
        source: the name of the file in errors.
        allow_partial: put keys that belong to no module into `leftover` instead of raising.
        format_: the format of the keys; None: recognise it.

    Raises:
        UserError: no LoRA for HunyuanVideo, keys left over, factors missing or of wrong shapes.
    """
    format_ = format_ or detect_format(list(tensors))
    if format_ is None:
        found = f"none of its keys is known; the first is '{next(iter(tensors))}'" if tensors else "it has no tensors"
        raise UserError(f"{source}: no HunyuanVideo LoRA: {found}")
    grouped, leftover = _group(tensors, format_, source)
    if leftover and not allow_partial:
        raise UserError(
            f"{source}: {len(leftover)} of {len(tensors)} keys belong to no module of HunyuanVideo's DiT, such as "
            f"{leftover[0]}; convert_lora.py with --allow_partial makes a file without them"
        )
    metadata = dict(metadata)
    alphas = PeftAlphas(metadata.pop(PEFT_KEY, None), source)
    parts_by_module: dict[str, list[Factors | None]] = {}
    vector_parts: dict[str, list[Factors | None]] = {}
    for official, part_tensors in grouped.items():
        with _naming_module(source, official):
            own = _take_vectors(part_tensors)
            parts = _read_parts(official, part_tensors, format_, alphas)
            if any(parts):
                parts_by_module[official] = parts
            vector_parts |= {f"{official}.{name}": found for name, found in _read_vectors(own, parts).items()}
    modules, mlp_rows = {}, _mlp_rows(parts_by_module)
    for official, parts in parts_by_module.items():
        with _naming_module(source, official):
            modules[official] = _fused(official, parts, format_, mlp_rows)
    vectors = {}
    for name, parts in vector_parts.items():
        official = name.rpartition(".")[0]
        with _naming_module(source, official):
            vector = _fused(official, parts, format_, mlp_rows, modules.get(official))
            vectors[name] = vector.diff[:, 0]
    _check_widths(modules, source)
    return LoraWeights(modules, metadata, format_, leftover, vectors)


@contextlib.contextmanager
def _naming_module(source: str, official: str) -> Iterator[None]:
    """Turns a ValueError about factors into a UserError that names the file and the module."""
    try:
        yield
    except ValueError as error:
        raise UserError(f"{source}: {official} {error}") from None


def _group(tensors: Mapping[str, Tensor], format_: Format, source: str) -> tuple[dict[str, PartTensors], list[str]]:
    """The tensors by official module, and the keys that belong to no module."""
    grouped: dict[str, PartTensors] = {}
    leftover = []
    for key, tensor in tensors.items():
        pair = split_key(key)
        found = official_part(pair[0], format_) if pair else None
        if found is None:
            leftover.append(key)
            continue
        official, part = found
        own = grouped.setdefault(official, {}).setdefault(part, {})
        if pair[1] in own:
            raise UserError(f"{source}: has two {pair[1]} for {official}; give a file with one adapter")
        own[pair[1]] = tensor
    return grouped, leftover


def _take_vectors(tensors: PartTensors) -> PartTensors:
    """Takes what is added to biases and to weights of norms out of a module's tensors."""
    taken: PartTensors = {}
    for part, own in tensors.items():
        names = [suffix for suffix in own if suffix in VECTOR_SUFFIXES or (suffix == "diff" and own[suffix].dim() == 1)]
        taken[part] = {suffix: own.pop(suffix) for suffix in names}
        if names and own.keys() == {"alpha"}:
            own.clear()
    return taken


def _read_vectors(taken: PartTensors, parts: Sequence[Factors | None]) -> dict[str, list[Factors | None]]:
    """For the bias and the weight of a module what is added to them: a column for each part, None for a missing part.

    Raises:
        ValueError: a tensor is no vector of finite numbers.
    """
    found: dict[str, list[Factors | None]] = {}
    for part, own in taken.items():
        for suffix, tensor in own.items():
            factors = factors_from({"diff": tensor.float().reshape(-1, 1)})
            if suffix.startswith("lora_") and parts[part] is not None:  # PEFT scales the bias of lora_B with lora_B
                factors = dataclasses.replace(factors, diff=factors.diff * parts[part].scale)
            name = VECTOR_SUFFIXES.get(suffix, "weight")
            found.setdefault(name, [None] * len(parts))[part] = factors
    return found


def _read_parts(official: str, tensors: PartTensors, format_: Format, alphas: PeftAlphas) -> list[Factors | None]:
    """The factors of each part of a module; None for a part that the file does not have."""
    parts: list[Factors | None] = []
    for index, name in enumerate(part_names(official, format_)):
        factors = factors_from(tensors[index]) if tensors.get(index) else None
        if factors is not None and factors.alpha is None and alphas:
            factors = alphas.applied(factors, name.removeprefix(format_.prefix))
        parts.append(factors)
    return parts


def _fused(
    official: str,
    parts: Sequence[Factors | None],
    format_: Format,
    mlp_rows: int | None,
    module: Factors | None = None,
) -> Factors:
    """The factors of the official module from those of its parts in the file; `module`: those of its weight, if known.

    A vector is a column here.
    """
    if len(parts) > 1:
        hidden = None if module is None else module.in_features
        return stack_rows(parts, _rows(parts, mlp_rows, hidden))
    return swap_halves(parts[0]) if format_.splits and official == SWAPPED else parts[0]


def _rows(parts: Sequence[Factors | None], mlp_rows: int | None, hidden: int | None) -> list[int]:
    """The number of rows of every part, including missing parts: q, k and v all have the hidden width."""
    given = [part for part in parts if part is not None]
    widths = given[0].in_features if given[0].in_features > 1 else given[0].out_features // MLP_RATIO
    hidden = hidden or next((part.out_features for part in parts[:3] if part is not None), widths)
    mlp = parts[3].out_features if len(parts) == 4 and parts[3] is not None else mlp_rows or MLP_RATIO * hidden
    return [hidden, hidden, hidden, mlp][: len(parts)]


def _mlp_rows(parts_by_module: Mapping[str, Sequence[Factors | None]]) -> int | None:
    """The MLP width of the single blocks, from any block of the file that has the MLP part."""
    four_parts = (parts for parts in parts_by_module.values() if len(parts) == 4)
    return next((parts[3].out_features for parts in four_parts if parts[3] is not None), None)


def _check_widths(modules: Mapping[str, Factors], source: str) -> None:
    """Raises UserError if the modules do not all have the same hidden width."""
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
        raise UserError(f"{source}: {odd}, which does not fit the hidden width {hidden:g} of the other modules")


def to_tensors(lora: LoraWeights, format_: Format, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """The tensors of a LoRA file in a format; `dtype` None keeps each tensor's own dtype.

    Raises:
        UserError: the programs that read this format know no LoHa, LoKr or DoRA, or a module cannot be split.
    """
    tensors = {}
    for official, factors in lora.modules.items():
        names = part_names(official, format_)
        if isinstance(factors, LoraFactors):  # before it is split, so that the parts keep the same `down`
            factors = rounded(factors, dtype, fold_alpha=not format_.alpha)
        try:
            parts = _split(official, factors, format_, len(names))
        except ValueError as error:
            raise UserError(f"{official} {error}") from None
        for name, part in zip(names, parts):
            if part is not None:
                tensors |= {f"{name}.{suffix}": tensor for suffix, tensor in _by_suffix(part, format_, dtype).items()}
    return tensors | (_vector_tensors(lora, format_, dtype) if format_.differences else {})


def _vector_tensors(lora: LoraWeights, format_: Format, dtype: torch.dtype | None) -> dict[str, Tensor]:
    """The tensors of a file that are added to biases and to weights of norms."""
    tensors = {}
    for name, vector in lora.vectors.items():
        official, _, kind = name.rpartition(".")
        names, column = part_names(official, format_), DifferenceFactors(diff=vector[:, None])
        module = lora.modules.get(official)
        hidden = len(vector) // (3 if len(names) == 3 else 3 + MLP_RATIO) if module is None else module.in_features
        for part_name, part in zip(names, _split(official, column, format_, len(names), hidden)):
            if part is not None:
                suffix = "diff_b" if kind == "bias" else "diff"
                tensors[f"{part_name}.{suffix}"] = part.diff[:, 0].to(dtype or vector.dtype).contiguous()
    return tensors


def _split(
    official: str, factors: Factors, format_: Format, count: int, hidden: int | None = None
) -> list[Factors | None]:
    """The factors of the `count` modules that this module is in the format; `hidden`: the width of q, if known."""
    if factors.dora_scale is not None and format_.dora is None:
        raise ValueError(
            f"is DoRA, which readers of '{format_.name}' do not know. DoRA depends on the weights of the DiT: "
            "merge_lora.py merges it, then lora_tool.py extract makes a LoRA of the difference"
        )
    if factors.kind not in format_.kinds:
        raise ValueError(f"is a {factors.kind}, which readers of '{format_.name}' do not know; --rank converts it")
    if count == 1:
        return [swap_halves(factors) if format_.splits and official == SWAPPED else factors]
    hidden = hidden or (factors.out_features // 3 if count == 3 else factors.in_features)
    return split_rows(factors, [hidden] * 3 + [factors.out_features - 3 * hidden] * (count - 3))


def _by_suffix(factors: Factors, format_: Format, dtype: torch.dtype | None) -> dict[str, Tensor]:
    """The tensors of one module of the file, by the suffix of their keys."""
    is_lora = isinstance(factors, LoraFactors)
    if is_lora:
        down, up = ("lora_A", "lora_B") if format_.peft else ("lora_down", "lora_up")
        suffixes = {"down": f"{down}.weight", "up": f"{up}.weight"}
    elif isinstance(factors, DifferenceFactors):
        suffixes = {"diff": "diff"}
    else:
        kind = "hada" if isinstance(factors, LohaFactors) else "lokr"
        suffixes = {name: f"{kind}_{name}" for name in factors.tensors()}
    found = {}
    for name, tensor in factors.tensors().items():
        if name == "dora_scale":
            is_vector = format_.dora.startswith("lora_magnitude_vector")
            found[format_.dora] = (tensor.flatten() if is_vector else tensor).to(dtype or tensor.dtype)
        else:
            found[suffixes[name]] = tensor.to(dtype or tensor.dtype)
    if (format_.alpha or not is_lora) and not isinstance(factors, DifferenceFactors):
        file_dtype = found[next(iter(suffixes.values()))].dtype
        found["alpha"] = alpha_tensor(factors.rank if factors.alpha is None else factors.alpha, file_dtype)
    return found


def alpha_tensor(alpha: float, dtype: torch.dtype) -> Tensor:
    """alpha in the dtype of the file if that represents it exactly, else in float32."""
    tensor = torch.tensor(float(alpha))
    return tensor.to(dtype) if tensor.to(dtype).float() == tensor else tensor
