"""LoRAs made from LoRAs: lower rank, sums, averages over training; and from the difference of two models."""

import dataclasses

from networks.factors import Factors, LoraFactors
from networks.formats import Lora
from networks.split_fuse import dense_svd, truncated_svd


def reduce_rank(lora: Lora, rank: int | None, energy: float = 1.0) -> Lora:
    """Every module as a LoRA of at most `rank` that keeps `energy` of its squared norm, in the dtype that it had."""
    modules = {name: _reduced(factors, rank, energy) for name, factors in lora.modules.items()}
    ranks = {factors.rank for factors in modules.values()}
    metadata = lora.metadata | {
        "ss_network_dim": str(ranks.pop()) if len(ranks) == 1 else "Dynamic",
        "ss_network_alpha": str(next(iter(modules.values())).rank) if not ranks else "Dynamic",
    }
    return dataclasses.replace(lora, modules=modules, metadata=metadata)


def _reduced(factors: Factors, rank: int | None, energy: float) -> LoraFactors:
    dtype = next(iter(factors.tensors().values())).dtype
    if isinstance(factors, LoraFactors):
        reduced = truncated_svd(factors, rank, energy)
    else:
        update = factors.update()
        dense = dense_svd(update, rank or min(update.shape), factors.dora_scale)
        reduced = truncated_svd(dense, rank, energy)
    return reduced.map(lambda tensor: tensor.to(dtype))
