"""Frames of a video file by their index in display order; timestamps identify them where the file has any."""

import bisect
import contextlib
import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np
from av.container import InputContainer
from av.video.stream import VideoStream

from utils.video_io import opened_video, upright_rgb

# Codecs with exactly one shown frame in each packet: their frames can be counted without decoding.
ONE_FRAME_PER_PACKET = frozenset(["h264", "hevc", "av1", "vp9", "mjpeg", "png", "prores", "dnxhd", "ffv1", "rawvideo"])
# Gaps up to this length are decoded frame by frame; seeking in a container is less reliable.
SEEK_BEYOND_FRAMES = 500
# Timelines in memory: a long video has thousands of clips, and each needs it. An hour of video takes about 6 MB.
TIMELINES_KEPT = 16
# For files that state no frame rate.
ASSUMED_FPS = 24


@dataclass(frozen=True)
class Timeline:
    """All frames of a stream in display order.

    Attributes:
        pts: presentation timestamps of the frames in the stream's time base; 0, 1, 2, ... where the file has none.
        seconds: when each frame is shown; the first at 0.
        keyframes: timestamps of the keyframes, where decoding can start.
        exact: whether the timestamps come from the file.
    """

    pts: list[int]
    seconds: list[float]
    keyframes: list[int]
    exact: bool


@dataclass(frozen=True)
class FirstFrame:
    """What only decoding tells: (width, height) after the file's rotation, and peculiarities in words."""

    size: tuple[int, int]
    notes: tuple[str, ...]


def _decoded(container: InputContainer, stream: VideoStream) -> Iterator[av.VideoFrame]:
    """All frames that can be decoded, in display order; damaged packets and frames are skipped."""
    for packet in container.demux(stream):
        with contextlib.suppress(av.error.InvalidDataError):
            yield from (frame for frame in packet.decode() if not frame.is_corrupt)


def timeline(path: Path) -> Timeline:
    """Reads the timeline of a file from its packets; decodes the frames only where the packets do not tell."""
    stat = path.stat()
    return _read_timeline(path, stat.st_size, stat.st_mtime_ns)


@functools.lru_cache(maxsize=TIMELINES_KEPT)
def _read_timeline(path: Path, size: int, mtime_ns: int) -> Timeline:
    """Cached by path; size and modification time are part of the key, so that a changed file is read again."""
    with opened_video(path) as (container, stream):
        packets = [packet for packet in container.demux(stream) if packet.size and not packet.is_discard]
        keyframes = sorted(packet.pts for packet in packets if packet.is_keyframe and packet.pts is not None)
        countable = stream.codec_context.name in ONE_FRAME_PER_PACKET and None not in [p.pts for p in packets]
        # Frames shown before the first keyframe depend on frames that the file does not contain.
        pts = sorted(p.pts for p in packets if p.pts is not None and p.pts >= (keyframes or [0])[0])
        unit, rate = float(stream.time_base), float(stream.average_rate or ASSUMED_FPS)
    if not countable or len(set(pts)) < len(pts):
        with opened_video(path) as (container, stream):
            pts = [frame.pts for frame in _decoded(container, stream)]
        keyframes = []
    if None in pts or pts != sorted(set(pts)):
        return Timeline(list(range(len(pts))), [number / rate for number in range(len(pts))], [], exact=False)
    return Timeline(pts, [(time - pts[0]) * unit for time in pts], keyframes, exact=True)


def first_frame(path: Path) -> FirstFrame:
    """Decodes the first frame.

    Raises:
        ValueError: no frame can be decoded.
    """
    with opened_video(path) as (container, stream):
        frame = next(_decoded(container, stream), None)
        aspect = stream.sample_aspect_ratio
    if frame is None:
        raise ValueError("no frame can be decoded")
    notes = (f"turned by {abs(frame.rotation)} degrees",) if frame.rotation else ()
    notes += ("interlaced",) if frame.interlaced_frame else ()
    notes += (f"pixels of {aspect} are not stretched",) if aspect and aspect != 1 else ()
    return FirstFrame((frame.height, frame.width) if frame.rotation % 180 else (frame.width, frame.height), notes)


def _split_at_gaps(indices: Sequence[int]) -> Iterator[list[int]]:
    """The ascending indices in runs; between two runs lies a gap that is long enough to seek across."""
    run: list[int] = []
    for index in indices:
        if index - (run[-1] if run else 0) > SEEK_BEYOND_FRAMES and run:
            yield run
            run = []
        run.append(index)
    yield run


def frames_at(path: Path, frames: Timeline, indices: Sequence[int]) -> Iterator[tuple[int, np.ndarray]]:
    """Yields (index, pixels) for each frame that can be decoded; pixels are (H, W, 3) uint8 RGB, upright.

    Args:
        frames: the timeline of the file.
        indices: of the frames in display order; ascending and distinct.
    """
    for run in _split_at_gaps(indices) if frames.exact else [indices]:
        wanted = {frames.pts[index]: index for index in run}
        with opened_video(path) as (container, stream):
            if frames.exact and frames.keyframes and run[0] > SEEK_BEYOND_FRAMES:
                before = bisect.bisect_right(frames.keyframes, frames.pts[run[0]]) - 1
                container.seek(frames.keyframes[max(before, 0)], stream=stream, backward=True)
            for number, frame in enumerate(_decoded(container, stream)):
                index = wanted.pop(frame.pts if frames.exact else number, None)
                if index is not None:
                    yield index, upright_rgb(frame)
                if not wanted:
                    break
