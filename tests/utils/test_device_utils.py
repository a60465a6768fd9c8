"""Devices by name, and what counts as running out of memory."""

import pytest
import torch

from utils.device_utils import is_out_of_memory, resolve_device
from utils.errors import UserError


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        MemoryError(),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:114] DefaultCPUAllocator: can't allocate memory: you tried"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:116] data. DefaultCPUAllocator: not enough memory: you tried"),
    ],
)
def test_every_library_says_it_in_its_own_way(error):
    assert is_out_of_memory(error)


@pytest.mark.parametrize("error", [RuntimeError("CUDA error: device-side assert"), ValueError("allocate memory")])
def test_other_errors_are_not(error):
    assert not is_out_of_memory(error)


def test_what_the_cpu_allocator_raises_is_recognised():
    with pytest.raises(RuntimeError) as raised:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert is_out_of_memory(raised.value)


def test_a_gpu_with_a_number_becomes_the_current_one(monkeypatch):
    chosen = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(torch, "empty", lambda *_, device: None)
    for name in ("cpu", "cuda", "cuda:1"):
        assert resolve_device(name) == torch.device(name)
    assert chosen == [torch.device("cuda:1")]


def test_a_gpu_that_is_not_there_is_refused():
    with pytest.raises(UserError, match="--device cuda:99"):
        resolve_device("cuda:99")
