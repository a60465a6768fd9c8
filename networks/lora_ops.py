"""LoRAs made from LoRAs: lower rank, weighted sum, moving average over checkpoints."""

import dataclasses
from collections.abc import Sequence

import torch

from networks.factors import DifferenceFactors, Factors, LoraFactors
from networks.files.formats import LoraWeights
from networks.files.lora_files import network_facts
from networks.files.rounding import rounded
from networks.files.split_fuse import low_rank_approximation, truncated_svd
from utils.errors import UserError


def reduce_rank(lora: LoraWeights, rank: int | None, energy: float = 1.0) -> LoraWeights:
    """Every module as a LoRA of at most `rank` that keeps `energy` of the squared norm; dtypes stay."""
    modules = {name: _reduced(factors, rank, energy) for name, factors in lora.modules.items()}
    return with_rank_metadata(dataclasses.replace(lora, modules=modules))


def _reduced(factors: Factors, rank: int | None, energy: float) -> LoraFactors:
    dtype = next(iter(factors.tensors().values())).dtype
    if not isinstance(factors, LoraFactors):
        delta_weight = factors.delta_weight()
        factors = low_rank_approximation(delta_weight, rank or min(delta_weight.shape), factors.dora_scale)
    return rounded(truncated_svd(factors, rank, energy), dtype)


def with_rank_metadata(lora: LoraWeights) -> LoraWeights:
    """The LoRA with metadata that name its kind, rank and alpha."""
    return dataclasses.replace(lora, metadata=lora.metadata | network_facts(lora))


def concatenate(loras: Sequence[LoraWeights], multipliers: Sequence[float]) -> LoraWeights:
    """The weighted sum of LoRAs, exactly: the factors are concatenated, so the ranks of a module add up.

    Raises:
        UserError: a module is no plain LoRA, or the LoRAs are for weights of different shapes.
    """
    modules: dict[str, LoraFactors] = {}
    vectors: dict[str, torch.Tensor] = {}
    for lora, multiplier in zip(loras, multipliers, strict=True):
        for name, factors in lora.modules.items():
            if not isinstance(factors, LoraFactors) or factors.dora_scale is not None:
                raise UserError(f"{name}: only plain LoRAs can be added exactly; resize LoHa and LoKr to a rank first")
            alpha = factors.scale * multiplier * factors.rank
            scaled = rounded(dataclasses.replace(factors, alpha=alpha), fold_alpha=True)
            modules[name] = _sum(name, modules[name], scaled) if name in modules else scaled
        for name, vector in lora.vectors.items():
            vectors[name] = vectors.get(name, 0) + vector.float() * multiplier
    return with_rank_metadata(dataclasses.replace(loras[0], modules=modules, vectors=vectors))


def _sum(name: str, first: LoraFactors, second: LoraFactors) -> LoraFactors:
    if first.down.shape[1:] != second.down.shape[1:] or len(first.up) != len(second.up):
        raise UserError(f"{name}: the LoRAs are for weights of different shapes")
    down = torch.cat([first.down, second.down.to(first.down.dtype)])
    return LoraFactors(down=down, up=torch.cat([first.up, second.up.to(first.up.dtype)], dim=1))


def ema_decays(count: int, beta: float, beta2: float | None, sigma_rel: float | None) -> list[float]:
    """The decays of a moving average over `count` files: the first file starts it, each other one has a decay.

    Args:
        count: number of files.
        beta: decay, or the first decay if `beta2` is given.
        beta2: the last decay; decays go linearly from `beta` to it.
        sigma_rel: relative width of a power-function average instead (arXiv:2312.02696, equations 2 and 126).
    """
    if sigma_rel is None:
        end = beta if beta2 is None else beta2
        return torch.linspace(beta, end, count - 1, dtype=torch.float64).tolist()
    gamma = gamma_from_sigma_rel(sigma_rel)
    return [(1 - 1 / step) ** (gamma + 1) for step in range(2, count + 1)]


def gamma_from_sigma_rel(sigma_rel: float) -> float:
    """The exponent gamma of the power function with this relative width: the largest root of a cubic (equation 126)."""
    inverse = sigma_rel**-2
    companion = torch.tensor(
        [[-7.0, inverse - 16, inverse - 12], [1.0, 0.0, 0.0], [0.0, 1.0, 0.0]], dtype=torch.float64
    )
    return torch.linalg.eigvals(companion).real.max().item()


def moving_average(loras: Sequence[LoraWeights], decays: Sequence[float]) -> LoraWeights:
    """The moving average of checkpoints of one training, factor by factor in float32, with the last one's metadata.

    Raises:
        UserError: the files differ in modules, kinds, shapes or alpha.
    """
    first, lengths = loras[0].modules, {name: len(vector) for name, vector in loras[0].vectors.items()}
    for lora in loras[1:]:
        if lora.modules.keys() != first.keys() or any(
            _signature(lora.modules[name]) != _signature(first[name]) for name in first
        ):
            raise UserError("the files are not checkpoints of one training: modules, shapes or alpha differ")
        if {name: len(vector) for name, vector in lora.vectors.items()} != lengths:
            raise UserError("the files are not checkpoints of one training: their changes of biases and norms differ")
    modules = {name: _averaged([lora.modules[name] for lora in loras], decays) for name in first}
    columns = {name: [DifferenceFactors(diff=lora.vectors[name][:, None]) for lora in loras] for name in lengths}
    vectors = {name: _averaged(own, decays).diff[:, 0] for name, own in columns.items()}
    return dataclasses.replace(loras[-1], modules=modules, vectors=vectors)


def _signature(factors: Factors) -> tuple:
    shapes = tuple((name, tuple(tensor.shape)) for name, tensor in factors.tensors().items())
    return type(factors), factors.alpha, shapes


def _averaged(checkpoints: Sequence[Factors], decays: Sequence[float]) -> Factors:
    averages = {name: tensor.float() for name, tensor in checkpoints[0].tensors().items()}
    for factors, decay in zip(checkpoints[1:], decays, strict=True):
        for name, tensor in factors.tensors().items():
            averages[name] = decay * averages[name] + (1 - decay) * tensor.float()
    dtypes = {name: tensor.dtype for name, tensor in checkpoints[0].tensors().items()}
    return dataclasses.replace(checkpoints[0], **{name: tensor.to(dtypes[name]) for name, tensor in averages.items()})
