"""Recomputing activations in the backward pass instead of keeping them (arXiv 1604.06174), applied from outside."""

import functools
from collections.abc import Iterable

import torch.utils.checkpoint
from torch import nn


def checkpoint_activations(blocks: Iterable[nn.Module]) -> None:
    """Makes every block keep its inputs only and run again when gradients are needed.

    Sets `is_checkpointed` on the blocks: what wraps them further (block swap) need not keep anything for backward.
    """
    for block in blocks:
        block.is_checkpointed = True
        block.forward = functools.partial(torch.utils.checkpoint.checkpoint, block.forward, use_reentrant=False)
