"""LoRAs made from LoRAs: lower rank, sums, averages over training; and from the difference of two models."""

import dataclasses
from collections.abc import Iterator, Sequence
from collections.abc import Set as AbstractSet

import torch
from torch import Tensor

from networks.factors import Factors, LoraFactors
from networks.files.formats import LoraWeights
from networks.files.split_fuse import low_rank_approximation, truncated_svd
from utils.errors import UserError


def reduce_rank(lora: LoraWeights, rank: int | None, energy: float = 1.0) -> LoraWeights:
    """Every module as a LoRA of at most `rank` that keeps `energy` of its squared norm, in the dtype that it had."""
    modules = {name: reduced(factors, rank, energy) for name, factors in lora.modules.items()}
    return with_rank_metadata(dataclasses.replace(lora, modules=modules))


def reduced(factors: Factors, rank: int | None, energy: float = 1.0) -> LoraFactors:
    """One module as a LoRA of at most `rank`; see `truncated_svd`."""
    dtype = next(iter(factors.tensors().values())).dtype
    if not isinstance(factors, LoraFactors):
        update = factors.delta_weight()
        factors = low_rank_approximation(update, rank or min(update.shape), factors.dora_scale)
    return truncated_svd(factors, rank, energy).map(lambda tensor: tensor.to(dtype))


def with_rank_metadata(lora: LoraWeights) -> LoraWeights:
    """The metadata say the rank of the LoRA as it is now; alpha is the rank."""
    ranks = {factors.rank for factors in lora.modules.values()}
    word = str(ranks.pop()) if len(ranks) == 1 else "Dynamic"
    return dataclasses.replace(lora, metadata=lora.metadata | {"ss_network_dim": word, "ss_network_alpha": word})


def concatenate(loras: Sequence[LoraWeights], multipliers: Sequence[float]) -> LoraWeights:
    """The weighted sum of LoRAs, exactly: the ranks of each module add up.

    Raises:
        UserError: a module is no plain LoRA, or the LoRAs are for weights of different shapes.
    """
    modules: dict[str, LoraFactors] = {}
    for lora, multiplier in zip(loras, multipliers, strict=True):
        for name, factors in lora.modules.items():
            if not isinstance(factors, LoraFactors) or factors.dora_scale is not None:
                raise UserError(f"{name}: only plain LoRAs can be added exactly; resize LoHa and LoKr to a rank first")
            scaled = dataclasses.replace(factors, up=factors.up * (factors.scale * multiplier), alpha=None)
            modules[name] = _sum(name, modules[name], scaled) if name in modules else scaled
    return with_rank_metadata(dataclasses.replace(loras[0], modules=modules))


def _sum(name: str, first: LoraFactors, second: LoraFactors) -> LoraFactors:
    if first.down.shape[1:] != second.down.shape[1:] or len(first.up) != len(second.up):
        raise UserError(f"{name}: the LoRAs are for weights of different shapes")
    down = torch.cat([first.down, second.down.to(first.down.dtype)])
    return LoraFactors(down=down, up=torch.cat([first.up, second.up.to(first.up.dtype)], dim=1))


def ema_decays(count: int, beta: float, beta2: float | None, sigma_rel: float | None) -> list[float]:
    """How much of the average so far is kept when each file but the first is added.

    Args:
        count: number of files.
        beta, beta2: the decay, going evenly from the first to the second.
        sigma_rel: relative width of a power-function average instead (arXiv:2312.02696, equations 2 and 126).
    """
    if sigma_rel is None:
        end = beta if beta2 is None else beta2
        return torch.linspace(beta, end, count - 1, dtype=torch.float64).tolist()
    gamma = gamma_from_sigma_rel(sigma_rel)
    return [(1 - 1 / step) ** (gamma + 1) for step in range(2, count + 1)]


def gamma_from_sigma_rel(sigma_rel: float) -> float:
    """The exponent whose power-function profile has this relative width: the largest root of a cubic."""
    inverse = sigma_rel**-2
    companion = torch.tensor(
        [[-7.0, inverse - 16, inverse - 12], [1.0, 0.0, 0.0], [0.0, 1.0, 0.0]], dtype=torch.float64
    )
    return torch.linalg.eigvals(companion).real.max().item()


def average(loras: Sequence[LoraWeights], keep: Sequence[float]) -> LoraWeights:
    """The moving average of one training's checkpoints, matrix by matrix, in float32; metadata are the last one's.

    Raises:
        UserError: the files differ in modules, kinds, shapes or alpha.
    """
    first = loras[0].modules
    for lora in loras[1:]:
        if lora.modules.keys() != first.keys() or any(
            _signature(lora.modules[name]) != _signature(first[name]) for name in first
        ):
            raise UserError("the files are not checkpoints of one training: modules, shapes or alpha differ")
    modules = {name: _averaged([lora.modules[name] for lora in loras], keep) for name in first}
    return dataclasses.replace(loras[-1], modules=modules)


def _signature(factors: Factors) -> tuple:
    shapes = tuple((name, tuple(tensor.shape)) for name, tensor in factors.tensors().items())
    return type(factors), factors.alpha, shapes


def _averaged(factors: Sequence[Factors], keep: Sequence[float]) -> Factors:
    averages = {name: tensor.float() for name, tensor in factors[0].tensors().items()}
    for each, beta in zip(factors[1:], keep, strict=True):
        for name, tensor in each.tensors().items():
            averages[name] = beta * averages[name] + (1 - beta) * tensor.float()
    dtypes = {name: tensor.dtype for name, tensor in factors[0].tensors().items()}
    return dataclasses.replace(factors[0], **{name: tensor.to(dtypes[name]) for name, tensor in averages.items()})


def extract(
    pairs: Iterator[tuple[str, Tensor, Tensor]], names: AbstractSet[str], rank: int, energy: float = 1.0
) -> tuple[dict[str, LoraFactors], list[str]]:
    """The LoRA that is nearest to the difference of two models.

    Args:
        pairs: (tensor name, tensor of the base, tensor of the tuned model), float32.
        names: modules that may be adapted.
        rank: the largest rank.
        energy: share of the squared norm of the extracted difference that must stay.

    Returns:
        Factors of the modules that differ, and the names of tensors that differ but cannot be in a LoRA.
    """
    modules, left = {}, []
    for name, base, tuned in pairs:
        difference = tuned - base
        if not difference.any():
            continue
        module = name.removesuffix(".weight")
        if module in names and difference.dim() == 2 and module != name:
            modules[module] = truncated_svd(low_rank_approximation(difference, rank), rank, energy)
        else:
            left.append(name)
    return modules, left
