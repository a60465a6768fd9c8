"""Overlapping tiles: where they lie, and how their results are blended into one.

Tiles are laid out over latents (frames, rows, columns); what is there a span of latents is a longer span of pixels.
"""

import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

TIME_COMPRESSION = 4
SPACE_COMPRESSION = 8

# Where the tiles along one axis start and stop.
Spans = list[tuple[int, int]]


def overlapping(length: int, tile: int, overlap: int) -> Spans:
    """Tiles that cover `length`, each overlapping the next; the last may be shorter but is longer than the overlap."""
    if length <= tile:
        return [(0, length)]
    return [(start, min(start + tile, length)) for start in range(0, length - overlap, tile - overlap)]


def pixel_spans(spans: Sequence[Spans]) -> list[Spans]:
    """The same tiles in pixels; the first latent frame of a tile is one frame, every further one four."""
    frames, *sides = spans
    return [
        [(TIME_COMPRESSION * start, TIME_COMPRESSION * (stop - 1) + 1) for start, stop in frames],
        *([(SPACE_COMPRESSION * start, SPACE_COMPRESSION * stop) for start, stop in side] for side in sides),
    ]


def pixel_size(size: Sequence[int]) -> list[int]:
    """(frames, rows, columns) of latents -> of pixels."""
    return [span[1] for (span,) in pixel_spans([[(0, length)] for length in size])]


def blend_weights(spans: Spans, index: int) -> Tensor:
    """Weight of each element of tile `index`: linear ramps over the overlaps, which add up to 1 over all tiles.

    A rising ramp starts at 0. In time that drops a later tile's first frame, which was taken for the start of a clip.
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
    """Adds network(tile), weighted, to `out` for every sample and tile, so that one tile at a time is in memory.

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
        del y  # or it would be there while the next tile is computed
