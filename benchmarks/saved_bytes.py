"""Bytes that autograd saves for the backward pass of 1 double and 2 single blocks of the 13B model.

    python -m benchmarks.saved_bytes

510 image tokens, 64 of 256 text tokens valid, bfloat16, LoRA of rank 32 on all targets. Every storage that is alive
after the forward pass is counted once, at its full size; parameters are not counted.
"""

import argparse
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.comparison import Comparison, print_comparisons
from hunyuan_model.models import HunyuanVideoConfig, HYVideoDiffusionTransformer
from tests.small_dit import prepare
from utils.cli import print_table

LIMITS_MB = {"none": 185, "selective": 115, "full": 115}
REFERENCE_TOOL_MB = 303


def new_model(dtype: torch.dtype = torch.bfloat16) -> HYVideoDiffusionTransformer:
    """A DiT of one double and two single blocks of full width, with small embedders and random weights."""
    config = HunyuanVideoConfig(depth_double=1, depth_single=2, depth_refiner=0, text_dim=64, text_dim_2=64)
    with torch.device("meta"):
        model = HYVideoDiffusionTransformer(config).to(dtype).requires_grad_(False)
    model = model.to_empty(device="cpu")
    for parameter in model.parameters():
        parameter.normal_(std=0.02)
    return model


def inputs(grid: tuple[int, int, int], valid_text: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Latents of f x h x w and 256 text tokens, of which `valid_text` are valid."""
    return {
        "x": torch.randn(1, 16, *grid, dtype=dtype),
        "timestep": torch.tensor([500.0]),
        "text_states": torch.randn(1, 256, 64, dtype=dtype),
        "text_mask": (torch.arange(256) < valid_text).long()[None],
        "text_states_2": torch.randn(1, 64, dtype=dtype),
        "guidance": torch.tensor([6000.0]),
    }


class _Allocations(TorchDispatchMode):
    """Remembers every storage that an operation makes, to find out later which are still alive."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[int, tuple[StorageWeakRef, int, tuple]] = {}

    def __torch_dispatch__(self, op: Callable, types: object, args: tuple = (), kwargs: dict | None = None) -> object:
        results = op(*args, **(kwargs or {}))
        for result in results if isinstance(results, (tuple, list)) else [results]:
            if isinstance(result, Tensor):
                storage = result.untyped_storage()
                shape = (tuple(result.shape), str(result.dtype).removeprefix("torch."))
                self.seen.setdefault(storage._cdata, (StorageWeakRef(storage), storage.nbytes(), shape))
        return results


def kept_bytes(checkpointing: str) -> tuple[int, dict[tuple, int]]:
    """Bytes that are kept alive for the backward pass, in total and by shape and dtype.

    Saved-tensor hooks would not see what checkpointing keeps by itself, so storages are counted instead.
    """
    model = new_model()
    network = prepare(model, checkpointing, rank=32)
    given = inputs((1, 30, 68), 64, torch.bfloat16)
    excluded = {t.untyped_storage()._cdata for t in [*model.parameters(), *network.parameters(), *given.values()]}
    with _Allocations() as allocations:
        output = model(**given)
    excluded.add(output.untyped_storage()._cdata)
    by_shape: dict[tuple, int] = {}
    for key, (storage, size, shape) in allocations.seen.items():
        if key not in excluded and not storage.expired():
            by_shape[shape] = by_shape.get(shape, 0) + size
    return sum(by_shape.values()), by_shape


def main(argv: Sequence[str] | None = None) -> list[Comparison]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--details", action="store_true", help="list the kept tensors by shape")
    args = parser.parse_args(argv)
    comparisons = []
    for kind, limit in LIMITS_MB.items():
        total, by_shape = kept_bytes(kind)
        work = f"kept for backward, checkpointing {kind}"
        comparisons.append(Comparison(work, total / 1e6, limit, "MB", "limit"))
        comparisons.append(Comparison(work, total / 1e6, REFERENCE_TOOL_MB, "MB", "reference tool"))
        if args.details:
            largest = sorted(by_shape.items(), key=lambda item: -item[1])[:24]
            print_table(kind, [(shape, dtype, f"{size / 1e6:.1f}") for (shape, dtype), size in largest])
    print_comparisons("1 double and 2 single blocks", comparisons)
    return comparisons


if __name__ == "__main__":
    main()
