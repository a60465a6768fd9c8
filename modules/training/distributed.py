"""What processes tell each other in a step. With one process nothing is sent."""

from collections.abc import Iterable, Sequence

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn

BUCKET_ELEMENTS = 16_000_000


def global_positions(accelerator: Accelerator, batches: Sequence[Sequence[str]]) -> tuple[list[list[int]], int]:
    """Where each of this rank's samples stands in the step's global batch, and how many samples that has.

    The global batch is ordered by the names of its items, so that it does not depend on how they are spread over
    batches and processes.

    Args:
        batches: item names of each micro step's batch of this rank; empty without a batch.
    """
    rank = accelerator.process_index
    own = [[(name, micro, rank, at) for at, name in enumerate(names)] for micro, names in enumerate(batches)]
    everyone = sorted(gather_object([key for keys in own for key in keys]))
    position = {key: place for place, key in enumerate(everyone)}
    return [[position[key] for key in keys] for keys in own], len(everyone)


def sum_over_processes(accelerator: Accelerator, values: Tensor) -> Tensor:
    """The sum of a tensor over all processes."""
    return accelerator.reduce(values, "sum") if accelerator.num_processes > 1 else values


def least_of_processes(number: int) -> int:
    """The smallest that any process has, so that all decide alike."""
    return min(gather_object([number]))


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
