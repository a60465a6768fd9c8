"""What processes tell each other in a step. With one process nothing is sent."""

from collections.abc import Iterable, Sequence

import torch
from accelerate import Accelerator
from torch import Tensor, nn

BUCKET_ELEMENTS = 16_000_000


def first_positions(accelerator: Accelerator, sizes: Sequence[int]) -> tuple[list[int], int]:
    """Where each of this rank's batches begins in the step's global batch, and how many samples that has.

    The global batch is in the order (micro step, rank), so it does not depend on how many processes share it.

    Args:
        sizes: samples of each micro step's batch of this rank; 0 without a batch.
    """
    own = torch.tensor(sizes, device=accelerator.device)
    table = accelerator.gather(own[:, None].T.contiguous()).T  # (micro steps, ranks)
    flat = table.flatten()
    starts = (flat.cumsum(0) - flat).view_as(table)
    return starts[:, accelerator.process_index].tolist(), int(flat.sum())


def sum_over_processes(accelerator: Accelerator, values: Tensor) -> Tensor:
    """The sum of a tensor over all processes."""
    return accelerator.reduce(values, "sum") if accelerator.num_processes > 1 else values


@torch.no_grad()
def sum_gradients(accelerator: Accelerator, parameters: Iterable[nn.Parameter]) -> None:
    """Adds up the gradients of all processes, in flat buffers; a rank that had no batch joins with zeros."""
    if accelerator.num_processes == 1:
        return
    for bucket in _buckets(parameters):
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in bucket]
        flat = accelerator.reduce(torch.cat([gradient.flatten() for gradient in gradients]), "sum")
        pieces = flat.split([gradient.numel() for gradient in gradients])
        for parameter, piece in zip(bucket, pieces, strict=True):
            parameter.grad = piece.view_as(parameter)


def _buckets(parameters: Iterable[nn.Parameter]) -> Iterable[list[nn.Parameter]]:
    """Groups of parameters of one dtype whose gradients fit into one buffer."""
    bucket: list[nn.Parameter] = []
    for parameter in parameters:
        elements = sum(member.numel() for member in bucket) + parameter.numel()
        if bucket and (elements > BUCKET_ELEMENTS or parameter.dtype != bucket[0].dtype):
            yield bucket
            bucket = []
        bucket.append(parameter)
    if bucket:
        yield bucket
