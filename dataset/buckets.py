"""The arithmetic of a dataset: bucket sizes, resize and crop, the clips of a video, resampling in time.

Pure functions of numbers. The rules are those of the reference tool; dataset_config.md shows them with drawings.
A size is (width, height) in pixels.
"""

import functools
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from dataset.config_utils import SIZE_STEP, DatasetSettings, valid_frames

Size = tuple[int, int]
Frame = TypeVar("Frame")


def _floor_to_step(pixels: int) -> int:
    return pixels // SIZE_STEP * SIZE_STEP


@functools.cache
def bucket_sizes(resolution: Size) -> tuple[Size, ...]:
    """All bucket sizes with about the area of `resolution`, sorted.

    Widths grow in steps of 16 from half the side of the square of that area up to its side. Each height is the largest
    multiple of 16 that does not exceed the area. Every size is also listed with width and height exchanged.
    """
    area = resolution[0] * resolution[1]
    side = math.isqrt(area)
    sizes = set()
    for width in range(max(SIZE_STEP, _floor_to_step(side // 2)), side + SIZE_STEP, SIZE_STEP):
        height = max(SIZE_STEP, _floor_to_step(area // width))
        sizes |= {(width, height), (height, width)}
    return tuple(sorted(sizes))


def choose_bucket(size: Size, settings: DatasetSettings) -> Size:
    """The bucket of an image or video of this size: the one with the nearest aspect ratio, unless the settings fix it.

    Raises:
        ValueError: with `bucket_no_upscale`, a side is shorter than 16 pixels.
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
class ResizeCrop:
    """How a picture is brought to the size of its bucket: resized to `resized`, then cropped at (left, top)."""

    scale: float
    resized: Size
    left: int
    top: int


def resize_crop(size: Size, bucket: Size) -> ResizeCrop:
    """The smallest scale at which a picture of `size` covers the bucket, and the centre crop."""
    scale = max(bucket[0] / size[0], bucket[1] / size[1])
    resized = (int(size[0] * scale + 0.5), int(size[1] * scale + 0.5))
    return ResizeCrop(scale, resized, (resized[0] - bucket[0]) // 2, (resized[1] - bucket[1]) // 2)


@dataclass(frozen=True, order=True)
class FrameSpan:
    """The frames of a clip: `length` consecutive frames of a video from `start` on, counted after resampling."""

    start: int
    length: int

    @property
    def stop(self) -> int:
        return self.start + self.length


def spans_of_length(length: int, frames: int, settings: DatasetSettings) -> list[FrameSpan]:
    """The spans of `length` frames that `settings.frame_extraction` takes from a video of `frames` frames."""
    if length > frames:
        return []
    last = frames - length
    match settings.frame_extraction:
        case "chunk":
            starts = range(0, last + 1, length)
        case "slide":
            starts = range(0, last + 1, settings.frame_stride)
        case "uniform":
            # Evenly spaced starts, truncated to whole frames; duplicates are dropped. np.linspace rounds the spacing as
            # the reference tool does, so caches of that tool get the same names.
            starts = np.unique(np.linspace(0, last, settings.frame_sample, dtype=int)).tolist()
        case _:
            starts = range(1)
    return [FrameSpan(start, length) for start in starts]


def spans_of_video(frames: int, settings: DatasetSettings) -> dict[int, list[FrameSpan]]:
    """All spans taken from a video of `frames` frames, by length; the list is empty where the video is too short."""
    if settings.frame_extraction == "full":
        length = valid_frames(min(frames, settings.max_frames))
        return {length: [FrameSpan(0, length)]}
    return {length: spans_of_length(length, frames, settings) for length in settings.target_frames}


def resampled_count(last_time: float, fps: float) -> int:
    """Number of frames at `fps` of a video whose last frame is shown `last_time` seconds after its first.

    A quarter of a frame of tolerance keeps the last frame where a container rounds its timestamps to milliseconds.
    """
    return int(last_time * fps + 0.25) + 1


def nearest_in_time(frames: Iterable[tuple[float, Frame]], fps: float) -> Iterator[Frame]:
    """For each k the frame nearest in time to k / fps; of two equally near ones, the earlier. Frames may repeat.

    Args:
        frames: (when it is shown in seconds, frame) of each; the times ascend from 0.
    """
    k, before = 0, None
    for time, frame in frames:
        # A tolerance of one microsecond, so that rounding errors of the times do not decide a tie.
        while before is not None and k / fps - before[0] <= time - k / fps + 1e-6:
            yield before[1]
            k += 1
        before = time, frame
    while before is not None and k < resampled_count(before[0], fps):
        yield before[1]
        k += 1


def kept_by_counting(frames: Iterable[Frame], source_fps: float, target_fps: float) -> Iterator[Frame]:
    """Drops frames as the reference tool does for a stated rate: by counting, without regard to times.

    A frame is kept if the sum of the steps target_fps / source_fps up to it reaches another whole number. The steps are
    added up in float64, rounding errors included. No frame is repeated, so a rate below `target_fps` changes nothing.
    """
    reached, position = -1, 0.0
    for frame in frames:
        if int(position) != reached:
            reached = int(position)
            yield frame
        position += target_fps / source_fps
