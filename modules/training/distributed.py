"""Communication between the processes of a run. With one process nothing is sent."""

from collections.abc import Iterable, Sequence

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn

BUCKET_ELEMENTS = 16_000_000


def global_positions(accelerator: Accelerator, batches: Sequence[Sequence[str]]) -> tuple[list[list[int]], int]:
    """The position of each sample of this process in the step's global batch, and the size of the global batch.

    The global batch is sorted by the names of its items, so it does not depend on their distribution over batches and
    processes.

    Args:
        batches: for each micro step, the names of the items in the batch of this process; empty without a batch.
    """
    rank = accelerator.process_index
    own = [[(name, micro, rank, at) for at, name in enumerate(names)] for micro, names in enumerate(batches)]
    everyone = sorted(gather_object([key for keys in own for key in keys]))
    position = {key: place for place, key in enumerate(everyone)}
    return [[position[key] for key in keys] for keys in own], len(everyone)


def sum_over_processes(accelerator: Accelerator, values: Sequence[float]) -> list[float]:
    """The sum of each number over all processes, in double precision."""
    own = torch.tensor(values, dtype=torch.float64, device=accelerator.device)
    return (accelerator.reduce(own, "sum") if accelerator.num_processes > 1 else own).tolist()


def min_over_processes(number: int) -> int:
    """The smallest number of any process, so that all processes decide alike."""
    return min(gather_object([number]))


@torch.no_grad()
def sum_gradients(accelerator: Accelerator, parameters: Iterable[nn.Parameter]) -> None:
    """Adds up the gradients of all processes in flat buffers; a process without a gradient takes part with zeros.

    A parameter that has a gradient on no process keeps none, as with one process: optimizers skip it, while AdamW would
    move it even if its gradient were zero.
    """
    if accelerator.num_processes == 1:
        return
    parameters = list(parameters)
    own = torch.tensor([p.grad is not None for p in parameters], dtype=torch.float32, device=accelerator.device)
    trained = [p for p, count in zip(parameters, accelerator.reduce(own, "sum").tolist(), strict=True) if count]
    for bucket in _buckets(trained):
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in bucket]
        flat = accelerator.reduce(torch.cat([gradient.flatten() for gradient in gradients]), "sum")
        pieces = flat.split([gradient.numel() for gradient in gradients])
        for parameter, piece in zip(bucket, pieces, strict=True):
            parameter.grad = piece.view_as(parameter)


def _buckets(parameters: Iterable[nn.Parameter]) -> Iterable[list[nn.Parameter]]:
    """Groups parameters of one dtype whose gradients fit into one buffer."""
    bucket: list[nn.Parameter] = []
    for parameter in parameters:
        elements = sum(member.numel() for member in bucket) + parameter.numel()
        if bucket and (elements > BUCKET_ELEMENTS or parameter.dtype != bucket[0].dtype):
            yield bucket
            bucket = []
        bucket.append(parameter)
    if bucket:
        yield bucket
