"""Reads and writes safetensors files. All other modules use these functions."""

import contextlib
import json
import math
import os
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch

from utils.errors import UserError, one_line
from utils.files import atomic_path, parse_json

# Names of the format's dtypes (https://github.com/huggingface/safetensors, "Format"). The reference implementation
# sorts tensors by dtype in this order. We do the same, because some programs identify a file by a hash of its bytes.
TORCH_DTYPES = {
    "I64": torch.int64,
    "F64": torch.float64,
    "F32": torch.float32,
    "I32": torch.int32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "I16": torch.int16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
BLOCK_SCALE = "F8_E8M0"  # dtype of the scales of mxfp8, each of which belongs to a few values of a weight
# The reference implementation refuses longer headers.
MAX_HEADER_BYTES = 100_000_000


@dataclass(frozen=True)
class TensorInfo:
    """What the header says about one tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int  # of the tensor's first byte in the file

    @property
    def count(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.count * self.dtype.itemsize


def read_header(path: str | os.PathLike) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """Tensor infos by name, and the metadata. Reads only the header.

    Raises:
        UserError: the file is missing, empty, truncated, or not a safetensors file.
    """
    path = Path(path)
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            prefix = file.read(8)
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
            if not 2 <= length <= min(MAX_HEADER_BYTES, size - 8):
                found = "the file is empty" if size == 0 else f"{size:,} bytes, header of {length:,} bytes claimed"
                raise UserError(f"{path}: not a safetensors file, or cut off ({found}); download or make it again")
            header = parse_json(file.read(length))
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except ValueError:
        raise UserError(f"{path}: not a safetensors file (its header is not JSON)") from None
    infos = header.values() if isinstance(header, dict) else []
    if any(isinstance(info, dict) and info.get("dtype") == BLOCK_SCALE for info in infos):
        raise UserError(f"{path}: is mxfp8, which is not supported; use the bf16, fp16 or fp8 file of this model")
    try:
        metadata = {key: str(value) for key, value in (header.pop("__metadata__", None) or {}).items()}
        infos = {
            name: TensorInfo(TORCH_DTYPES[i["dtype"]], tuple(map(int, i["shape"])), 8 + length + i["data_offsets"][0])
            for name, i in header.items()
        }
        spans = {name: info["data_offsets"] for name, info in header.items()}
        end = max((span[1] for span in spans.values()), default=0)
        sizes = {name: stop - start if start >= 0 else -1 for name, (start, stop) in spans.items()}
        broken = [name for name, info in infos.items() if min((0, *info.shape)) < 0 or info.nbytes != sizes[name]]
    except (AttributeError, KeyError, TypeError, ValueError, IndexError) as error:
        raise UserError(f"{path}: not a safetensors file this version reads: {one_line(repr(error))}") from None
    if broken:
        raise UserError(f"{path}: broken safetensors file: the bytes of {broken[0]} do not fit its shape")
    if size < 8 + length + end:
        raise UserError(f"{path}: cut off: {size:,} bytes of {8 + length + end:,}; download or make it again")
    return infos, metadata


def iterate_tensors(path: str | os.PathLike, device: torch.device | str = "cpu") -> Iterator[tuple[str, torch.Tensor]]:
    """Yields (name, tensor) one by one. Only the tensors that the caller keeps stay in memory."""
    infos, _ = read_header(path)
    with open(path, "rb") as file:
        for name, info in infos.items():
            yield name, read_tensor(file, info).to(device)


def read_tensor(file: BinaryIO, info: TensorInfo) -> torch.Tensor:
    """Reads one tensor into newly allocated memory. Unlike with a memory map, no page of the file stays resident.

    Raises:
        UserError: the file ends early.
    """
    tensor = torch.empty(info.shape, dtype=info.dtype)
    file.seek(info.offset)
    if file.readinto(memoryview(tensor.view(-1).view(torch.uint8).numpy())) != info.nbytes:
        raise UserError(f"{file.name}: cut off while it was read; download or make it again")
    return tensor


def load_file(path: str | os.PathLike, device: torch.device | str = "cpu") -> dict[str, torch.Tensor]:
    """All tensors of a file by name."""
    return dict(iterate_tensors(path, device))


def save_file(
    tensors: Mapping[str, torch.Tensor], path: str | os.PathLike, metadata: Mapping[str, str] | None = None
) -> None:
    """Writes the file completely or not at all (`utils.files.atomic_path`).

    Raises:
        OSError: writing failed, for example because the disk is full. An older file of this name is unchanged.
    """
    with streamed_file(path, {name: (t.dtype, t.shape) for name, t in tensors.items()}, metadata) as write:
        for name, tensor in tensors.items():
            write(name, tensor)


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether no value is NaN or infinite."""
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    # Minimum and maximum are NaN if any value is, and are faster to compute than isfinite of every value.
    wide = tensor.detach() if tensor.dtype.itemsize > 1 else tensor.detach().float()
    return bool(torch.stack(torch.aminmax(wide)).isfinite().all())


@contextlib.contextmanager
def streamed_file(
    path: str | os.PathLike,
    layout: Mapping[str, tuple[torch.dtype, Sequence[int]]],
    metadata: Mapping[str, str] | None = None,
) -> Iterator[Callable[[str, torch.Tensor], None]]:
    """Writes a file tensor by tensor, so that it is never in memory as a whole. Yields `write(name, tensor)`.

    No file ever holds a value that is not finite. The file gets its name when all tensors are written. Its bytes are
    those that the reference implementation writes. That one is not used: if it is killed, it leaves a temporary file
    whose name cannot be recognised.

    Args:
        path: the file.
        layout: dtype and shape of every tensor. Each tensor must be written once, in any order.
        metadata: texts for the header.

    Raises:
        UserError: a tensor has a value that is not finite. An older file of this name is unchanged.
    """
    names, order = {dtype: name for name, dtype in TORCH_DTYPES.items()}, list(TORCH_DTYPES.values())
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    offsets, end = {}, 0
    for name, (dtype, shape) in sorted(layout.items(), key=lambda item: (order.index(item[1][0]), item[0])):
        offsets[name], end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": names[dtype], "shape": list(shape), "data_offsets": [offsets[name], end]}
    # Metadata may hold file names that are not UTF-8. What cannot be encoded becomes a JSON escape sequence.
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode(errors="backslashreplace")
    text += b" " * (-len(text) % 8)
    missing = set(layout)
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)

        def write(name: str, tensor: torch.Tensor) -> None:
            dtype, shape = layout[name]
            if tensor.dtype != dtype or tuple(tensor.shape) != tuple(shape):
                raise ValueError(f"{name}: {tensor.dtype} {tuple(tensor.shape)} does not fit {dtype} {tuple(shape)}")
            if not is_finite(tensor):
                raise UserError(f"{path}: not written: {name} would have values that are not finite")
            file.seek(8 + len(text) + offsets[name])
            file.write(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
            missing.discard(name)

        yield write
        if missing:
            raise ValueError(f"{len(missing)} tensors were never written, such as {min(missing)}")
        file.truncate(8 + len(text) + end)
