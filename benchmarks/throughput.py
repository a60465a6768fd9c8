"""Times, operation counts and rates for benchmarks of speed."""

import time
from collections.abc import Callable

import torch

from hunyuan_model.models import HunyuanVideoConfig


def now(device: torch.device) -> float:
    """The time in seconds, after the device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def timed(run: Callable[[], object], device: torch.device) -> float:
    """Seconds until the device has finished this work."""
    start = now(device)
    run()
    return now(device) - start


def matrix_product_rate(device: torch.device, dtype: torch.dtype, tokens: int) -> float:
    """Floating-point operations per second, measured with a matrix product of the size of a block's MLP."""
    config = HunyuanVideoConfig()
    a = torch.randn(tokens, config.hidden_size, device=device, dtype=dtype)
    b = torch.randn(config.hidden_size, config.mlp_hidden, device=device, dtype=dtype)
    seconds = min(timed(lambda: a @ b, device) for _ in range(10))
    return 2 * a.numel() * config.mlp_hidden / seconds


def copy_bandwidth(device: torch.device) -> float:
    """Bytes per second of copies from pinned main memory to the device."""
    host = torch.empty(1 << 30, dtype=torch.uint8, pin_memory=device.type == "cuda")
    target = torch.empty_like(host, device=device, pin_memory=False)
    return host.numel() / min(timed(lambda: target.copy_(host, non_blocking=True), device) for _ in range(5))


def forward_operations(config: HunyuanVideoConfig, tokens: int) -> tuple[int, int]:
    """Floating-point operations of all blocks in a forward pass: of the linear layers, and of attention.

    In both kinds of blocks, every image or text token is multiplied by 4 D^2 weights around attention and 2 D M weights
    of the MLP. Modulation is not counted, because it is computed for one vector only. With frozen weights, a backward
    pass has the same number of operations in the linear layers and twice the number in attention.
    """
    blocks, D = config.depth_double + config.depth_single, config.hidden_size
    weights = 4 * D**2 + 2 * D * config.mlp_hidden
    return blocks * 2 * tokens * weights, blocks * 4 * tokens**2 * D
