"""Devices and dtypes by the names that users type."""

import torch

from utils.dtype_names import TORCH_NAMES
from utils.errors import UserError

DTYPES: dict[str, torch.dtype] = {name: getattr(torch, torch_name) for name, torch_name in TORCH_NAMES.items()}


def default_dtype(word: str | None, device: torch.device, on_gpu: str = "float16") -> torch.dtype:
    """A dtype by its word; unset it is float32 on a CPU and `on_gpu` elsewhere."""
    return DTYPES[word or ("float32" if device.type == "cpu" else on_gpu)]


def resolve_device(name: str | None = None) -> torch.device:
    """The device called `name`, or CUDA if available, else the CPU.

    A GPU with a number becomes the current one: what names none, as pinning and Triton's kernels do, shall use it too.

    Raises:
        UserError: torch does not know the name or cannot reach the device.
    """
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name}: {str(error).splitlines()[0]}") from None
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)
    return device


# What CUDA and its libraries say in a plain RuntimeError where they get no memory, and torch's allocator of the CPU.
_OUT_OF_MEMORY = (
    "CUDA out of memory",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "allocate memory",
    "not enough memory",  # on Windows
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device or the host has no memory left, however a library says so."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, (RuntimeError, OSError)) and any(words in str(error) for words in _OUT_OF_MEMORY)


def dtype_word(dtype: torch.dtype) -> str:
    """`torch.bfloat16` -> `bfloat16`, the word used in file names and cache keys."""
    return str(dtype).removeprefix("torch.")


def release_memory(device: torch.device) -> None:
    """Hands cached blocks of an accelerator back after a model was deleted."""
    import gc

    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
