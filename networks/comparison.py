"""How much two LoRAs differ in what they add to the weights; shows that a conversion is right."""

import torch
from torch import Tensor

from networks.factors import Factors, LoraFactors
from networks.files.formats import LoraWeights
from utils.errors import UserError

FLOAT16_LOSS = 1e-3  # of the norm of dW; more is reported


def relative_difference(first: Factors, second: Factors) -> float:
    """|dW1 - dW2| / |dW1| in the Frobenius norm, or the same of the DoRA lengths if that is larger; 0 if equal."""
    if _identical(first, second):
        return 0.0
    if isinstance(first, LoraFactors) and isinstance(second, LoraFactors):
        squares = _lowrank_squares(first, second)
    else:
        dense = first.delta_weight()
        squares = dense.square().sum().double(), (dense - second.delta_weight()).square().sum().double()
    return max(_ratio(*squares), _lengths_difference(first.dora_scale, second.dora_scale))


def _identical(first: Factors, second: Factors) -> bool:
    ours, theirs = first.tensors(), second.tensors()
    same_tensors = ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    return same_tensors and first.scale == second.scale


def _lowrank_squares(first: LoraFactors, second: LoraFactors) -> tuple[Tensor, Tensor]:
    """|dW1|^2 and |dW1 - dW2|^2 from Gram matrices of the factors; in float64 because the terms nearly cancel."""
    up1, up2 = (factors.up.flatten(1).double() * factors.scale for factors in (first, second))
    down1, down2 = (factors.down.flatten(1).double() for factors in (first, second))
    up, down = torch.cat([up1, -up2], dim=1), torch.cat([down1, down2])
    rank = first.rank
    gram = (up.T @ up) * (down @ down.T)
    return gram[:rank, :rank].sum(), gram.sum()


def _ratio(norm_square: Tensor, difference_square: Tensor) -> float:
    difference = difference_square.clamp_min(0).sqrt().item()
    return difference / norm_square.sqrt().item() if norm_square > 0 else float(difference > 0)


def _lengths_difference(first: Tensor | None, second: Tensor | None) -> float:
    if first is None or second is None:
        return 0.0 if first is second else 1.0
    return ((first.double() - second.double()).norm() / first.double().norm()).item()


def worst_difference(first: LoraWeights, second: LoraWeights, source: str) -> tuple[float, str]:
    """The largest relative difference over all modules, and the module that has it.

    Raises:
        UserError: the LoRAs have different modules; `source` names the file in the error.
    """
    unmatched = first.modules.keys() ^ second.modules.keys()
    # A format may leave out modules whose dW is zero.
    unmatched = {name for name in unmatched if (first.modules | second.modules)[name].delta_weight().any()}
    if unmatched:
        raise UserError(
            f"{source}: {len(unmatched)} modules are missing in it or in the original, such as {min(unmatched)}"
        )
    found = {change: name for name, change in differences(first, second).items()}
    return max(found.items(), default=(0.0, "no module"))


def differences(first: LoraWeights, second: LoraWeights) -> dict[str, float]:
    """The relative difference of every module that both have."""
    both = sorted(first.modules.keys() & second.modules.keys())
    return {name: relative_difference(first.modules[name], second.modules[name]) for name in both}


def float16_loss(first: LoraWeights, written: LoraWeights) -> str | None:
    """A sentence about the modules that float16 cannot hold; None if there are none.

    Args:
        first: what was to be written; only its modules are compared.
        written: what a float16 file holds.
    """
    changes = differences(first, written)
    coarse = {name: change for name, change in changes.items() if change > FLOAT16_LOSS}
    if not coarse:
        return None
    worst = max(coarse, key=coarse.get)
    text = f"float16 changes dW of {len(coarse)} of {len(changes)} modules by more than {FLOAT16_LOSS:g} of its norm"
    return f"{text}, at most {coarse[worst]:.1e} ({worst})"
