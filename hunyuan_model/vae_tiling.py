"""Overlapping tiles: where they lie, and how their outputs are blended.

Tiles are laid out on latents (frames, rows, columns). `pixel_spans` converts their spans to pixels.
"""

import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

TIME_COMPRESSION = 4
SPACE_COMPRESSION = 8

# (start, stop) of every tile along one axis.
Spans = list[tuple[int, int]]


def overlapping_spans(length: int, tile: int, overlap: int) -> Spans:
    """Tiles that cover `length`, each overlapping the next. The last may be shorter, but is longer than the overlap."""
    if length <= tile:
        return [(0, length)]
    return [(start, min(start + tile, length)) for start in range(0, length - overlap, tile - overlap)]


def pixel_spans(spans: Sequence[Spans]) -> list[Spans]:
    """Spans of latents -> spans of pixels. The first latent frame of a tile is one frame, every other is four."""
    frames, *sides = spans
    return [
        [(TIME_COMPRESSION * start, TIME_COMPRESSION * (stop - 1) + 1) for start, stop in frames],
        *([(SPACE_COMPRESSION * start, SPACE_COMPRESSION * stop) for start, stop in side] for side in sides),
    ]


def pixel_size(size: Sequence[int]) -> list[int]:
    """(f, h, w) of latents -> (F, H, W) of pixels."""
    return [span[1] for (span,) in pixel_spans([[(0, length)] for length in size])]


def blend_weights(spans: Spans, index: int) -> Tensor:
    """Weight of each element of tile `index`. Weights change linearly over an overlap and add up to 1 over all tiles.

    A rising ramp starts at 0. In time this drops the first frame of a later tile, which the causal network has computed
    as if it were the first frame of the clip.
    """
    start, stop = spans[index]
    weights = torch.ones(stop - start)
    if index > 0:
        overlap = spans[index - 1][1] - start
        weights[:overlap] = torch.arange(overlap) / overlap
    if index + 1 < len(spans):
        overlap = stop - spans[index + 1][0]
        weights[-overlap:] = 1 - torch.arange(overlap) / overlap
    return weights


def run_tiles(
    network: Callable[[Tensor], Tensor], x: Tensor, x_spans: list[Spans], out: Tensor, out_spans: list[Spans]
) -> None:
    """Adds the weighted network(tile) to `out` for every sample and tile, with one tile in memory at a time.

    Args:
        x, out: B C F H W, in pixels or latents; `out` starts as zeros and has the network's dtype and device.
        x_spans, out_spans: the tiles' spans per axis, in the units of `x` and of `out`.
    """
    tiles = list(itertools.product(*(range(len(axis)) for axis in x_spans)))
    for sample, tile in itertools.product(range(len(x)), tiles):
        source = [slice(*axis[index]) for axis, index in zip(x_spans, tile)]
        target = [slice(*axis[index]) for axis, index in zip(out_spans, tile)]
        y = network(x[sample : sample + 1, :, *source].to(out))  # 1 C f h w
        for dim, (axis, index) in enumerate(zip(out_spans, tile), start=2):
            y.movedim(dim, -1).mul_(blend_weights(axis, index).to(y))
        out[sample, :, *target] += y[0]
        del y  # or it would stay in memory while the next tile is computed
