"""Devices and dtypes by name, and errors that mean too little memory."""

import gc
import os

import torch

from utils.dtype_names import TORCH_NAMES
from utils.errors import UserError

DTYPES: dict[str, torch.dtype] = {name: getattr(torch, torch_name) for name, torch_name in TORCH_NAMES.items()}


def default_dtype(name: str | None, device: torch.device, on_gpu: str = "float16") -> torch.dtype:
    """The dtype called `name`; if None, float32 on a CPU and `on_gpu` on any other device."""
    return DTYPES[name or ("float32" if device.type == "cpu" else on_gpu)]


def resolve_device(name: str | None = None) -> torch.device:
    """The device called `name`; if None, CUDA if it is available, else the CPU.

    A GPU given by number also becomes torch's current device, because pinned memory and Triton kernels use it.

    Raises:
        UserError: torch does not know the name or cannot use the device.
    """
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name}: {str(error).splitlines()[0]}") from None
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)
    return device


def own_device(name: str | None) -> torch.device:
    """Like `resolve_device`, but None means the GPU with the local rank of this process if a launcher started it.

    Raises:
        UserError: torch does not know the name or cannot use the device.
    """
    local_rank = os.environ.get("LOCAL_RANK")
    if name is None and local_rank is not None and torch.cuda.is_available():
        name = f"cuda:{local_rank}"
    return resolve_device(name)


# Out of memory, CUDA, its libraries and torch's CPU allocator raise a plain RuntimeError with one of these texts.
_OUT_OF_MEMORY = (
    "CUDA out of memory",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "allocate memory",
    "not enough memory",  # on Windows
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the error means that a device or the host has no memory left."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, (RuntimeError, OSError)) and any(words in str(error) for words in _OUT_OF_MEMORY)


def dtype_word(dtype: torch.dtype) -> str:
    """`torch.bfloat16` -> "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def release_memory(device: torch.device) -> None:
    """Deletes unreachable objects and returns memory that torch's allocator caches to the device."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
