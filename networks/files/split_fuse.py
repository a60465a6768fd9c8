"""Splits the factors of a fused module (q, k, v, mlp) into parts and fuses them again, exactly; lowers ranks by SVD.

Fused to split: all parts get the same `down`, and each part gets its rows of `up`. Split to fused: if all parts have
the same `down`, the rows of `up` are stacked; otherwise ranks add up: `down` is stacked and `up` is block-diagonal.
Splitting drops ranks that are zero in a part, so that split -> fused -> split returns identical matrices.
"""

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from networks.factors import DifferenceFactors, Factors, LoraFactors
from networks.files.rounding import rounded


def split_rows(factors: Factors, rows: Sequence[int]) -> list[Factors | None]:
    """Factors for each group of rows.

    Args:
        factors: the factors of the fused module.
        rows: the number of rows of each group.

    Returns:
        None for a group in which the update is zero, if it is not zero in every group.

    Raises:
        ValueError: `rows` do not add up, or the factors are a LoKr or a DoRA by columns.
    """
    if sum(rows) != factors.out_features:
        raise ValueError(f"has {factors.out_features} rows, {' + '.join(map(str, rows))} are expected")
    if not factors.has_separable_rows:
        raise ValueError("is a LoKr, or a DoRA of columns, which cannot be split by rows")
    starts = [sum(rows[:index]) for index in range(len(rows))]
    whole = [factors.rows(start, start + count) for start, count in zip(starts, rows)]
    if isinstance(factors, DifferenceFactors):
        return whole
    parts = [_without_zero_ranks(part) for part in whole]
    if factors.dora_scale is not None or not any(parts):
        # These parts would share one `down` tensor; cloned, because a safetensors file cannot hold shared tensors.
        return [part or kept.map(torch.clone) for part, kept in zip(parts, whole)]
    return parts


def _without_zero_ranks(factors: Factors) -> Factors | None:
    """`factors` without the ranks that add nothing (zero columns in every factor with rows); None if none adds."""
    pairs = factors.PAIRS
    used = torch.stack([getattr(factors, side).flatten(1).ne(0).any(0) for side, _ in pairs]).any(0)
    if not used.any():
        return None
    changed = {side: getattr(factors, side)[:, used] for side, _ in pairs}
    changed |= {columns: getattr(factors, columns)[used] for _, columns in pairs}
    kept = int(used.sum())
    alpha = None if factors.alpha is None else factors.alpha * kept / factors.rank
    return dataclasses.replace(factors, alpha=alpha, **changed)


def stack_rows(parts: Sequence[Factors | None], rows: Sequence[int]) -> Factors:
    """The factors of the fused module; the update is zero in the rows of a part that is None.

    Args:
        parts: factors of each part.
        rows: the number of rows of each part.

    Raises:
        ValueError: the parts are of different kinds or do not fit `rows`, or only some parts are DoRA.
    """
    given = [part for part in parts if part is not None]
    difference = isinstance(given[0], DifferenceFactors)
    if len({type(part) for part in given}) > 1 or not (given[0].PAIRS or difference):
        raise ValueError("has parts that are LoKr, or of different kinds")
    for part, count in zip(parts, rows, strict=True):
        if part is not None and part.out_features != count:
            raise ValueError(f"has a part of {part.out_features} rows, {count} are expected")
    if difference:
        like = given[0].diff
        blocks = [like.new_zeros(n, *like.shape[1:]) if p is None else p.diff for p, n in zip(parts, rows)]
        return DifferenceFactors(diff=torch.cat(blocks))
    stack = _stack_shared if _share_columns(given) else _stack_block_diagonal
    return dataclasses.replace(stack(parts, rows), dora_scale=_stack_dora(parts))


def _stack_dora(parts: Sequence[Factors | None]) -> Tensor | None:
    lengths = [None if part is None else part.dora_scale for part in parts]
    if all(length is None for length in lengths):
        return None
    if any(length is None or length.shape[1] != 1 for length in lengths):
        raise ValueError("is DoRA in some of its parts only, or DoRA of columns")
    return torch.cat(lengths)


def _share_columns(given: Sequence[Factors]) -> bool:
    """Whether all parts have the same alpha and the same factors with columns (`down`)."""
    first = given[0]
    same_columns = (
        torch.equal(getattr(part, columns), getattr(first, columns)) for part in given[1:] for _, columns in first.PAIRS
    )
    return all(part.alpha == first.alpha for part in given) and all(same_columns)


def _stack_shared(parts: Sequence[Factors | None], rows: Sequence[int]) -> Factors:
    first = next(part for part in parts if part is not None)
    sides = {}
    for side, _ in first.PAIRS:
        like = getattr(first, side)
        empty = [like.new_zeros(count, *like.shape[1:]) for count in rows]
        sides[side] = torch.cat([none if part is None else getattr(part, side) for part, none in zip(parts, empty)])
    return dataclasses.replace(first, **sides)


def _stack_block_diagonal(parts: Sequence[Factors | None], rows: Sequence[int]) -> Factors:
    given = [part for part in parts if part is not None]
    rank = sum(part.rank for part in given)
    one_scale = len({part.scale for part in given}) == 1
    if not one_scale:
        parts = [part and _without_alpha(part) for part in parts]
        given = [part for part in parts if part is not None]
    alpha = given[0].alpha if given[0].alpha is None else given[0].alpha * rank / given[0].rank
    changed = {}
    for side, columns in given[0].PAIRS:
        like = getattr(given[0], side)
        blocks = like.new_zeros(sum(rows), rank, *like.shape[2:])
        row = column = 0
        for part, count in zip(parts, rows):
            if part is not None:
                blocks[row : row + count, column : column + part.rank] = getattr(part, side)
                column += part.rank
            row += count
        changed |= {side: blocks, columns: torch.cat([getattr(part, columns) for part in given])}
    return dataclasses.replace(given[0], alpha=alpha, **changed)


def _without_alpha(factors: Factors) -> Factors:
    if isinstance(factors, LoraFactors):
        return rounded(factors, fold_alpha=True)
    side = factors.PAIRS[0][0]
    return dataclasses.replace(factors, alpha=None, **{side: getattr(factors, side) * factors.scale})


def swap_halves(factors: Factors) -> Factors:
    """Swaps the two halves of the rows: (shift, scale) <-> (scale, shift)."""
    if not factors.has_separable_rows:
        raise ValueError("is a LoKr, or a DoRA of columns, whose halves cannot be swapped")
    sides = ["diff"] if isinstance(factors, DifferenceFactors) else [side for side, _ in factors.PAIRS]
    names = sides + ["dora_scale"] * (factors.dora_scale is not None)
    return dataclasses.replace(factors, **{n: torch.cat(getattr(factors, n).chunk(2)[::-1]) for n in names})


def truncated_svd(factors: LoraFactors, rank: int | None = None, energy: float = 1.0) -> LoraFactors:
    """The nearest LoRA of lower rank, by an SVD of up @ down that needs no matrix of the weight's size.

    Args:
        factors: the LoRA.
        rank: the largest rank of the result; None: no limit.
        energy: share of the squared Frobenius norm that must be kept (1: all).

    Returns:
        float32 factors with alpha = rank; both contain the square roots of the singular values.
    """
    up, down = factors.up.flatten(1).double() * factors.scale, factors.down.flatten(1).double()
    q_up, r_up = torch.linalg.qr(up)
    q_down, r_down = torch.linalg.qr(down.T)
    left, values, right = torch.linalg.svd(r_up @ r_down.T)
    kept = ranks_for_energy(values, energy)
    kept = max(1, min(kept, rank or kept))
    root = values[:kept].sqrt()
    new_up = (q_up @ left[:, :kept]) * root
    new_down = root[:, None] * (right[:kept] @ q_down.T)
    return LoraFactors(
        up=new_up.float().view(-1, kept, *factors.up.shape[2:]),
        down=new_down.float().view(kept, *factors.down.shape[1:]),
        dora_scale=factors.dora_scale,
    )


def ranks_for_energy(values: Tensor, energy: float) -> int:
    """How many of the descending singular values are needed for the share `energy` of the sum of their squares.

    Zeros are not counted, nor values below float32's resolution relative to the largest.
    """
    floor = values.max() * torch.finfo(torch.float32).eps if len(values) else 0.0
    nonzero = int((values > floor).sum())
    if energy >= 1:
        return nonzero
    share = values.square().cumsum(0) / values.square().sum()
    return min(nonzero, int((share < energy).sum()) + 1)


def low_rank_approximation(update: Tensor, rank: int, dora_scale: Tensor | None = None) -> LoraFactors:
    """The nearest LoRA of rank `rank` to a matrix (out, in), by randomised SVD with power iterations."""
    kept = min(rank, *update.shape)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        left, values, right = torch.svd_lowrank(update.float(), q=min(kept + 16, *update.shape), niter=6)
    root = values[:kept].sqrt()
    return LoraFactors(up=left[:, :kept] * root, down=(right[:, :kept] * root).T, dora_scale=dora_scale)
