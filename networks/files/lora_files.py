"""LoRA files: read from any format, written in any format."""

import hashlib
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from hunyuan_model.checkpoints.tensors import TensorFile, open_file
from networks.factors import DifferenceFactors, LohaFactors, LokrFactors, LoraFactors
from networks.files.format_table import FORMATS, NATIVE, Format
from networks.files.formats import LoraWeights, alpha_tensor, from_tensors, to_tensors
from networks.files.names import block_template
from networks.files.peft_metadata import PEFT_KEY, peft_metadata
from utils.errors import UserError, printable
from utils.files import read_text
from utils.safetensors_utils import save_file


def read_lora(path: str | os.PathLike, allow_partial: bool = False) -> LoraWeights:
    """Reads a LoRA file of any format.

    Args:
        path: a .safetensors or .pt file; beside a file of PEFT, its adapter_config.json is read.
        allow_partial: put keys that belong to no module into `leftover` instead of raising.

    Raises:
        UserError: no LoRA for HunyuanVideo, keys left over, factors missing or of wrong shapes.
    """
    file = open_file(Path(path))
    _refuse_other_models(path, file.metadata)
    tensors = {name: file.read(name).clone() for name in file.infos}
    return from_tensors(tensors, file.metadata | _peft_config(Path(path), file), str(path), allow_partial)


def _peft_config(path: Path, file: TensorFile) -> dict[str, str]:
    """The content of PEFT's adapter_config.json beside a file that PEFT wrote, as metadata."""
    if PEFT_KEY in file.metadata or not any("base_model.model." in name for name in file.infos):
        return {}
    config = path.with_name("adapter_config.json")
    if config.is_file():
        return {PEFT_KEY: read_text(config, "PEFT configuration")}
    if not any(name.endswith(".alpha") for name in file.infos):
        print(
            printable(f"warning: {path}: no {config.name} beside it, which holds alpha; alpha is taken to be the rank"),
            file=sys.stderr,
        )
    return {}


def _refuse_other_models(path: str | os.PathLike, metadata: Mapping[str, str]) -> None:
    """Raises UserError if the metadata names another model.

    Keys cannot tell: Flux and HunyuanVideo 1.5 have almost the same module names, and Flux even the same shapes.
    """
    for name in ("ss_base_model_version", "modelspec.architecture"):
        model = metadata.get(name, "").lower().replace("-", "_").split("/")[0]
        if model and (not model.startswith("hunyuan") or "1_5" in model or "1.5" in model):
            raise UserError(f"{path}: made for another model: its metadata has {name} = {metadata[name]}")


NETWORK_MODULES = {LoraFactors: "networks.lora", LohaFactors: "networks.loha", LokrFactors: "networks.lokr"}


def network_facts(lora: LoraWeights) -> dict[str, str]:
    """What the metadata of a LoRA say about its kind, rank and alpha; Dynamic where modules differ."""
    factors = [own for own in lora.modules.values() if not isinstance(own, DifferenceFactors)]
    ranked = [own for own in factors if not isinstance(own, LokrFactors) or own.has_rank]
    ranks = {own.rank for own in ranked}
    alphas = {own.rank if own.alpha is None else own.alpha for own in ranked}
    facts = {"ss_network_dim": ranks, "ss_network_alpha": alphas}
    words = {key: f"{min(values)}" if len(values) == 1 else "Dynamic" for key, values in facts.items() if values}
    modules = {NETWORK_MODULES[type(own)] for own in factors}
    return words | ({"ss_network_module": modules.pop()} if len(modules) == 1 else {})


def write_lora(
    lora: LoraWeights, path: str | os.PathLike, format_: Format, dtype: torch.dtype | None = None
) -> dict[str, Tensor]:
    """Writes a LoRA in a format, with its metadata and the hashes of the new file; returns the file's tensors.

    Raises:
        UserError: see `to_tensors`; or a value does not fit into float16.
    """
    tensors = to_tensors(lora, format_, dtype)
    if any(tensor.dtype == torch.float16 and tensor.isinf().any() for tensor in tensors.values()):
        raise UserError(f"{path}: some values are too large for float16; use bfloat16 or float32")
    metadata = lora.metadata | (network_facts(lora) if "ss_network_dim" in lora.metadata else {})
    if format_.adapter_metadata:
        metadata[PEFT_KEY] = peft_metadata(tensors, format_.prefix)
    _save(tensors, path, metadata)
    return tensors


def _save(tensors: Mapping[str, Tensor], path: str | os.PathLike, metadata: Mapping[str, str]) -> None:
    save_file(tensors, path, {**metadata, **model_hashes(tensors, metadata)})


def model_hashes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> dict[str, str]:
    """The two hashes under which web interfaces find the metadata of a LoRA, computed as kohya's tools do.

    Both are hashes of the file with the `ss_*` metadata only, because users may edit the other metadata.
    `sshs_model_hash` is the SHA-256 of everything after the header; `sshs_legacy_hash` is the first 8 digits of the
    SHA-256 of the 64 KiB at 1 MiB.
    """
    training = {key: value for key, value in (metadata or {}).items() if key.startswith("ss_")}
    data = save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, training or None)
    start = 8 + int.from_bytes(data[:8], "little")
    return {
        "sshs_model_hash": hashlib.sha256(memoryview(data)[start:]).hexdigest(),
        "sshs_legacy_hash": hashlib.sha256(data[0x100000:0x110000]).hexdigest()[:8],
    }


def save_native(
    tensors: Mapping[str, Tensor],
    path: str | os.PathLike,
    dtype: torch.dtype | None = None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes tensors with native keys; `dtype` None keeps each tensor's own dtype."""
    cast = {name: tensor.detach().to("cpu", dtype or tensor.dtype) for name, tensor in tensors.items()}
    for name in (name for name in cast if name.endswith(".alpha")):
        cast[name] = alpha_tensor(tensors[name].item(), cast[name].dtype)
    _save(cast, path, metadata or {})


def load_native(path: str | os.PathLike) -> dict[str, Tensor]:
    """The tensors of a LoRA file of any format, under native keys."""
    return to_tensors(read_lora(path), NATIVE)


def native_tensors(tensors: Mapping[str, Tensor], source: str = "weights") -> dict[str, Tensor]:
    """Renames tensors from the keys of any format to native keys; fuses split modules."""
    return to_tensors(from_tensors(tensors, {}, source), NATIVE)


def require_formats(shapes: Mapping[str, Sequence[int]], formats: Sequence[str]) -> None:
    """Checks, on one module of each kind, that a network can be written in these formats.

    Args:
        shapes: shapes of the network's tensors, by native key.
        formats: names of formats.

    Raises:
        UserError: a format cannot hold the network.
    """
    modules = {block_template(key.split(".")[0]): key.split(".")[0] for key in reversed(shapes)}.values()
    tensors = {key: torch.ones(tuple(shape)) for key, shape in shapes.items() if key.split(".")[0] in modules}
    tensors |= {f"{module}.alpha": torch.ones(()) for module in modules}
    lora = from_tensors(tensors, {}, "--network_module")
    for name in formats:
        try:
            to_tensors(lora, FORMATS[name])
        except UserError as error:
            raise UserError(f"--save_format {name}: {error}") from None


def write_formats(path: Path, formats: Sequence[str]) -> list[Path]:
    """Writes a native file in other formats beside it, as {stem}.{format}.safetensors; returns the new paths."""
    others = [name for name in formats if FORMATS[name] is not NATIVE]
    written = [path.with_name(f"{path.stem}.{name}.safetensors") for name in others]
    lora = read_lora(path) if others else None
    for name, other in zip(others, written, strict=True):
        write_lora(lora, other, FORMATS[name])
    return written
