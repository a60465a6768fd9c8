"""Tensors by name from one safetensors file, one .pt file, or a folder of shards.

Opening a checkpoint reads only headers. Tensors are read one by one, when they are asked for.
"""

import hashlib
import pickle
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from utils.errors import UserError, one_line
from utils.files import has_right_checksums, parse_json, read_text
from utils.safetensors_utils import TensorInfo, read_header, read_tensor

# Keys under which a .pt file may hold its state dict: the official DiT has `module` (DeepSpeed), the VAE `state_dict`.
WRAPPERS = ("module", "state_dict", "model", "ema", "model_state_dict")
# The pages of a mapped file that were read stay in memory until the file is unmapped. So a .pt file is mapped again
# after this many bytes, or fewer times for large files: at most MOST_REMAPS times.
REMAP_BYTES = 128 << 20
MOST_REMAPS = 32
# The bytes of each tensor that `Checkpoint.fingerprint` reads.
HEAD_BYTES = 256
_ZIP = b"PK\x03\x04"  # only these four bytes: a header of safetensors may have a length of "PK" bytes


class TensorFile(Protocol):
    """One file: its header, and how to read one of its tensors."""

    path: Path
    infos: dict[str, TensorInfo]
    metadata: dict[str, str]
    wrapper: str  # the outermost key under which a .pt file holds its tensors, or an empty string

    def head(self, name: str) -> bytes:
        """The first bytes of a tensor, at most HEAD_BYTES."""
        ...

    def read(self, name: str) -> Tensor:
        """The tensor on the CPU. A tensor of a .pt file is a view that keeps pages of the file in memory."""
        ...


class SafetensorsFile:
    def __init__(self, path: Path) -> None:
        self.path = path
        self.infos, self.metadata = read_header(path)
        self.wrapper = ""

    def head(self, name: str) -> bytes:
        with open(self.path, "rb") as file:
            file.seek(self.infos[name].offset)
            return file.read(min(HEAD_BYTES, self.infos[name].nbytes))

    def read(self, name: str) -> Tensor:
        with open(self.path, "rb") as file:
            return read_tensor(file, self.infos[name])


class PtFile:
    """A file of `torch.save`, mapped into memory. Code that it may contain is not run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.metadata: dict[str, str] = {}
        self.wrapper, self._tensors = self._map()
        self._bytes_read = 0
        self.infos = {name: TensorInfo(tensor.dtype, tuple(tensor.shape), 0) for name, tensor in self._tensors.items()}

    def _map(self) -> tuple[str, dict[str, Tensor]]:
        wrapper, content = "", load_pickle(self.path)
        while isinstance(content, Mapping):
            inner = [key for key in WRAPPERS if isinstance(content.get(key), Mapping)]
            if not inner:
                tensors = {str(name): tensor for name, tensor in content.items() if isinstance(tensor, Tensor)}
                return wrapper, tensors
            wrapper, content = wrapper or inner[0], content[inner[0]]
        raise UserError(f"{self.path}: holds a {type(content).__name__}, not a dictionary of tensors")

    def head(self, name: str) -> bytes:
        flat = self._tensors[name].detach().flatten()[: HEAD_BYTES // self.infos[name].dtype.itemsize]
        return flat.contiguous().view(torch.uint8).numpy().tobytes()

    def read(self, name: str) -> Tensor:
        size = self.infos[name].nbytes
        if self._bytes_read and self._bytes_read + size > max(REMAP_BYTES, self.path.stat().st_size // MOST_REMAPS):
            self._tensors = {}
            _, self._tensors = self._map()
            self._bytes_read = 0
        self._bytes_read += size
        return self._tensors[name].detach()


def load_pickle(path: Path) -> Any:
    """The content of a `torch.save` file, mapped into memory.

    Raises:
        UserError: cut off, not written by torch.save, older than torch 1.6, or with objects other than tensors.
    """
    try:
        if not zipfile.is_zipfile(path):
            raise UserError(f"{path}: not a file of torch.save, or cut off, or older than torch 1.6; download it again")
        return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except UserError:
        raise
    except pickle.UnpicklingError as error:
        found = re.search(r"(?:GLOBAL|global) (\S+)", str(error))
        what = f"it would run {found[1].rstrip('.')}" if found else one_line(error).split(".")[0]
        raise UserError(
            f"{path}: holds more than tensors ({what}) and was not loaded; use a .safetensors file"
        ) from None
    except Exception as error:  # a damaged pickle can raise anything
        raise UserError(f"{path}: cannot be read, cut off or broken: {one_line(error)[:200]}") from None


def require_checksums(path: Path) -> None:
    """Compares the bytes of a .pt file with its checksums; safetensors files have none.

    Raises:
        UserError: bytes have changed since the file was written.
    """
    if _is_zip(path) and not has_right_checksums(path):
        raise UserError(f"{path}: is damaged, its bytes do not match its checksums; download it again")


def _is_zip(path: Path) -> bool:
    with open(path, "rb") as file:
        return file.read(len(_ZIP)) == _ZIP


@dataclass(frozen=True)
class Checkpoint:
    """All tensors of a file or of a folder's shards."""

    path: Path
    files: tuple[TensorFile, ...]
    config: dict[str, Any] = field(default_factory=dict)  # from the metadata key `config`, or config.json beside it

    @property
    def paths(self) -> list[Path]:
        return [file.path for file in self.files]

    @property
    def container(self) -> str:
        """ "safetensors" or ".pt"."""
        return ".pt" if isinstance(self.files[0], PtFile) else "safetensors"

    @property
    def wrapper(self) -> str:
        """The top key of a .pt file, or an empty string."""
        return self.files[0].wrapper

    @cached_property
    def infos(self) -> dict[str, TensorInfo]:
        return {name: info for file in self.files for name, info in file.infos.items()}

    @cached_property
    def fingerprint(self) -> str:
        """A hash of all names, dtypes, shapes and the first bytes of every tensor. It does not depend on paths."""
        digest = hashlib.sha256()
        for name, info in sorted(self.infos.items()):
            digest.update(f"{name} {info.dtype} {info.shape}".encode() + self._holder(name).head(name))
        return digest.hexdigest()[:16]

    def _holder(self, name: str) -> TensorFile:
        return next(file for file in self.files if name in file.infos)

    def read(self, name: str) -> Tensor:
        """One tensor on the CPU. A tensor of a .pt file is a view that keeps pages of the file in memory."""
        return self._holder(name).read(name)


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Reads the headers of a model file, or of the model files of a folder.

    Raises:
        UserError: missing, empty, cut off, not a model file, or a folder without a model or with several.
    """
    path = Path(path)
    paths = _model_files(path) if path.is_dir() else [path]
    files = tuple(open_file(each) for each in paths)
    if not any(file.infos for file in files):
        raise UserError(f"{path}: holds no tensors")
    return Checkpoint(path, files, _config(paths[0], files[0].metadata))


# Files that are not models, by their first bytes.
_NOT_MODELS = {
    b"GGUF": "a GGUF file, which this program does not read; use the .safetensors or .pt file of the same model",
    b"version https://git-lfs": "a Git LFS pointer, not the model itself; fetch it with 'git lfs pull' or hf download",
    b"<!DOCTYPE": "a web page, not a model; download the file itself",
    b"<html": "a web page, not a model; download the file itself",
}


def open_file(path: Path) -> TensorFile:
    """Reads the header of a .safetensors or .pt file.

    Raises:
        UserError: missing, cut off, or a file of another kind, which the message names.
    """
    try:
        with open(path, "rb") as file:
            start = file.read(32)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    for magic, message in _NOT_MODELS.items():
        if start.startswith(magic):
            raise UserError(f"{path}: {message}")
    looks_like_safetensors = start[8:9] == b"{" or path.suffix == ".safetensors"
    return SafetensorsFile(path) if looks_like_safetensors and not start.startswith(_ZIP) else PtFile(path)


def _model_files(folder: Path) -> list[Path]:
    """The files of the model in a folder: the shards that an index lists, or the only model file.

    Raises:
        UserError: no model file, several without an index, or a missing shard.
    """
    for suffix in (".safetensors", ".bin"):
        indices = sorted(folder.glob(f"*{suffix}.index.json"), key=lambda index: len(index.name))
        if indices:
            return _shards(indices[0])
        files = [file for file in sorted(folder.glob(f"*{suffix}")) if not file.name.startswith(("._", "optimizer"))]
        preferred = [file for file in files if file.stem in ("diffusion_pytorch_model", "model", "pytorch_model")]
        if preferred or len(files) == 1:
            return (preferred or files)[:1]
        if files:
            names = ", ".join(file.name for file in files[:4])
            raise UserError(f"{folder}: {len(files)} model files ({names} ...) and no index; give one of them")
    files = sorted(file for file in folder.glob("*.pt") if not file.stem.endswith("_map"))
    if len(files) == 1:
        return files
    found = f"{len(files)} .pt files; give one of them" if files else "no .safetensors, .bin or .pt file in this folder"
    below = sorted(each.name for each in folder.iterdir() if each.is_dir() and not each.name.startswith("."))
    hint = f"; give one of the folders in it: {', '.join(below[:6])}" if below and not files else ""
    raise UserError(f"{folder}: {found}{hint}")


def _shards(index: Path) -> list[Path]:
    try:
        names = sorted(set(parse_json(read_text(index, "index of shards"))["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError):
        raise UserError(f"{index}: not an index of shards") from None
    if not names:
        raise UserError(f"{index}: lists no shards")
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing:
        raise UserError(f"{index}: {len(missing)} of {len(names)} shards are missing, the first is {missing[0]}")
    return [index.parent / name for name in names]


def _config(path: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    """What shapes cannot tell: the JSON under the metadata key `config`, or else config.json beside the file."""
    beside = path.with_name("config.json")
    text = metadata.get("config") or (read_text(beside, "model config") if beside.is_file() else "{}")
    try:
        config = parse_json(text)
    except ValueError as error:
        raise UserError(f"{beside if beside.is_file() else path}: its config is not JSON: {one_line(error)}") from None
    return config if isinstance(config, dict) else {}
