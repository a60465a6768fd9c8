"""The arithmetic of a dataset: sizes of buckets, resize and crop, clips of a video, resampling in time.

Pure functions of numbers; the rules are those of the reference tool (dataset_config.md shows them with pictures).
Sizes are (width, height) in pixels.
"""

import bisect
import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dataset.config_utils import SIZE_STEP, DatasetSettings, valid_frames

Size = tuple[int, int]


def _floor_to_step(pixels: int) -> int:
    return pixels // SIZE_STEP * SIZE_STEP


@functools.cache
def bucket_sizes(resolution: Size) -> tuple[Size, ...]:
    """All sizes of about the area of `resolution`, sorted: widths in steps of 16, heights fill the area, and turned."""
    area = resolution[0] * resolution[1]
    side = math.isqrt(area)
    sizes = set()
    for width in range(max(SIZE_STEP, _floor_to_step(side // 2)), side + SIZE_STEP, SIZE_STEP):
        height = max(SIZE_STEP, _floor_to_step(area // width))
        sizes |= {(width, height), (height, width)}
    return tuple(sorted(sizes))


def choose_bucket(size: Size, settings: DatasetSettings) -> Size:
    """The bucket of an item: the one of nearest aspect ratio, or what the settings prescribe.

    Raises:
        ValueError: `bucket_no_upscale` leaves less than one step of the item.
    """
    width, height = size
    if not settings.enable_bucket:
        return settings.resolution
    if settings.bucket_no_upscale and width * height <= settings.resolution[0] * settings.resolution[1]:
        if min(size) < SIZE_STEP:
            raise ValueError(f"{width}x{height} is smaller than {SIZE_STEP} pixels, and bucket_no_upscale is on")
        return _floor_to_step(width), _floor_to_step(height)
    return min(bucket_sizes(settings.resolution), key=lambda bucket: abs(bucket[0] / bucket[1] - width / height))


@dataclass(frozen=True)
class Fit:
    """How pixels of one size fill a bucket: scaled to `scaled`, then cropped from (left, top)."""

    scale: float
    scaled: Size
    left: int
    top: int


def fit_to_bucket(size: Size, bucket: Size) -> Fit:
    """Scale so that the bucket is covered, then a centre crop."""
    scale = max(bucket[0] / size[0], bucket[1] / size[1])
    scaled = (int(size[0] * scale + 0.5), int(size[1] * scale + 0.5))
    return Fit(scale, scaled, (scaled[0] - bucket[0]) // 2, (scaled[1] - bucket[1]) // 2)


@dataclass(frozen=True, order=True)
class Clip:
    """Frames start .. start + length - 1 of a video (after any resampling)."""

    start: int
    length: int


def clips_of_target(target: int, frames: int, settings: DatasetSettings) -> list[Clip]:
    """The clips of `target` frames that `settings.frame_extraction` takes from a video of `frames` frames."""
    if target > frames:
        return []
    last = frames - target
    match settings.frame_extraction:
        case "chunk":
            starts = range(0, last + 1, target)
        case "slide":
            starts = range(0, last + 1, settings.frame_stride)
        case "uniform":
            # Truncated positions of an even spacing; equal ones would be the same clip twice. numpy rounds the spacing
            # as the reference tool does, so that caches of that tool are found.
            starts = np.unique(np.linspace(0, last, settings.frame_sample, dtype=int)).tolist()
        case _:
            starts = range(1)
    return [Clip(start, target) for start in starts]


def clips_of_video(frames: int, settings: DatasetSettings) -> dict[int, list[Clip]]:
    """Clips per target of a video of `frames` frames; an empty list says that the video is too short for a target."""
    if settings.frame_extraction == "full":
        target = valid_frames(min(frames, settings.max_frames))
        return {target: [Clip(0, target)]}
    return {target: clips_of_target(target, frames, settings) for target in settings.target_frames}


def resampled_count(last_time: float, fps: float) -> int:
    """Frames at `fps` of a video whose last frame is shown `last_time` seconds after its first.

    A quarter of a frame of tolerance keeps the last one where a container rounds its times to milliseconds.
    """
    return int(last_time * fps + 0.25) + 1


def resampled_indices(times: Sequence[float], fps: float) -> list[int]:
    """For each k the frame that is nearest to k / fps, the earlier of two; `times` ascend from 0, in seconds."""
    indices = []
    for k in range(resampled_count(times[-1], fps)):
        after = min(bisect.bisect_left(times, k / fps), len(times) - 1)
        before = max(after - 1, 0)
        # A microsecond decides ties alike, whatever the rounding of the times.
        indices.append(before if k / fps - times[before] <= times[after] - k / fps + 1e-6 else after)
    return indices
