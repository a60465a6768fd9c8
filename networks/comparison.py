"""How far two LoRAs are from each other in what they do to the weights: the proof of a conversion."""

import torch
from torch import Tensor

from networks.factors import Factors, LoraFactors
from networks.files.formats import LoraWeights
from utils.errors import UserError


def relative_difference(first: Factors, second: Factors) -> float:
    """|dW1 - dW2| / |dW1| in the Frobenius norm, DoRA's lengths included; 0 where both are zero."""
    if _same(first, second):
        return 0.0
    if isinstance(first, LoraFactors) and isinstance(second, LoraFactors):
        squares = _lowrank_squares(first, second)
    else:
        dense = first.delta_weight()
        squares = dense.square().sum().double(), (dense - second.delta_weight()).square().sum().double()
    return max(_ratio(*squares), _lengths_difference(first.dora_scale, second.dora_scale))


def _same(first: Factors, second: Factors) -> bool:
    ours, theirs = first.tensors(), second.tensors()
    same_matrices = ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    return same_matrices and first.scale == second.scale


def _lowrank_squares(first: LoraFactors, second: LoraFactors) -> tuple[Tensor, Tensor]:
    """|dW1|^2 and |dW1 - dW2|^2 from Gram matrices of the factors; in float64, for the terms nearly cancel."""
    up1, up2 = (factors.up.flatten(1).double() * factors.scale for factors in (first, second))
    down1, down2 = (factors.down.flatten(1).double() for factors in (first, second))
    up, down = torch.cat([up1, -up2], dim=1), torch.cat([down1, down2])
    rank = first.rank
    gram = (up.T @ up) * (down @ down.T)
    return gram[:rank, :rank].sum(), gram.sum()


def _ratio(norm: Tensor, difference: Tensor) -> float:
    difference = difference.clamp_min(0).sqrt().item()
    return difference / norm.sqrt().item() if norm > 0 else float(difference > 0)


def _lengths_difference(first: Tensor | None, second: Tensor | None) -> float:
    if first is None or second is None:
        return 0.0 if first is second else 1.0
    return ((first.double() - second.double()).norm() / first.double().norm()).item()


def worst_difference(first: LoraWeights, second: LoraWeights, source: str) -> tuple[float, str]:
    """The largest relative difference over all modules and the module where it is.

    Raises:
        UserError: the two have not the same modules.
    """
    lost = first.modules.keys() ^ second.modules.keys()
    # Modules that change nothing may be left out.
    lost = {name for name in lost if (first.modules | second.modules)[name].delta_weight().any()}
    if lost:
        raise UserError(f"{source}: differs in {len(lost)} modules from what was to be written, such as {min(lost)}")
    both = first.modules.keys() & second.modules.keys()
    return max((relative_difference(first.modules[name], second.modules[name]), name) for name in both)
