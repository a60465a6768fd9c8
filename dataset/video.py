"""Frames of a video file by their index in display order, told by timestamps where the file has them."""

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

from utils.video_decoding import opened_video, upright_rgb

# Codecs whose every packet is exactly one shown frame, so that packets can be counted instead of decoded frames.
ONE_FRAME_PER_PACKET = frozenset(["h264", "hevc", "av1", "vp9", "mjpeg", "png", "prores", "dnxhd", "ffv1", "rawvideo"])
# Shorter ways are decoded frame by frame, which needs no trust in a container's seeking.
SEEK_BEYOND_FRAMES = 500
# A file is read for each of its clips, of which an hour holds thousands; the timeline of an hour takes about 6 MB.
TIMELINES_KEPT = 16
# For files that state no rate.
ASSUMED_FPS = 24


@dataclass(frozen=True)
class Timeline:
    """All frames of a stream in display order.

    Attributes:
        pts: their timestamps in the stream's units; where the file has none, their numbers.
        seconds: when each is shown, the first at 0.
        keyframes: timestamps from which decoding can begin.
        exact: whether the timestamps come from the file.
    """

    pts: list[int]
    seconds: list[float]
    keyframes: list[int]
    exact: bool


@dataclass(frozen=True)
class FirstFrame:
    """What only a decoded frame tells: (width, height) as it is to be seen, and peculiarities in words."""

    size: tuple[int, int]
    notes: tuple[str, ...]


def _decoded(container: InputContainer, stream: VideoStream) -> Iterator[av.VideoFrame]:
    """All frames that can be decoded; packets that cannot are passed over and missed by the caller."""
    for packet in container.demux(stream):
        with contextlib.suppress(av.error.InvalidDataError):
            yield from (frame for frame in packet.decode() if not frame.is_corrupt)


def timeline(path: Path) -> Timeline:
    """The frames of a file, by reading packets without decoding them where the codec allows."""
    stat = path.stat()
    return _read_timeline(path, stat.st_size, stat.st_mtime_ns)


@functools.lru_cache(maxsize=TIMELINES_KEPT)
def _read_timeline(path: Path, size: int, mtime_ns: int) -> Timeline:
    """Size and modification time only tell apart what the file was and is."""
    with opened_video(path) as (container, stream):
        packets = [packet for packet in container.demux(stream) if packet.size and not packet.is_discard]
        keyframes = sorted(packet.pts for packet in packets if packet.is_keyframe and packet.pts is not None)
        countable = stream.codec_context.name in ONE_FRAME_PER_PACKET and None not in [p.pts for p in packets]
        # Frames shown before the first keyframe refer to others that were cut away.
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
    """Decodes one frame.

    Raises:
        ValueError: none can be decoded.
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


def _stretches(indices: Sequence[int]) -> Iterator[list[int]]:
    """The ascending indices, parted where it is worth to seek."""
    stretch: list[int] = []
    for index in indices:
        if index - (stretch[-1] if stretch else 0) > SEEK_BEYOND_FRAMES and stretch:
            yield stretch
            stretch = []
        stretch.append(index)
    yield stretch


def frames_at(path: Path, frames: Timeline, indices: Sequence[int]) -> Iterator[tuple[int, np.ndarray]]:
    """(index, pixels (H, W, 3) uint8 RGB, upright) of each of the ascending distinct indices that can be decoded."""
    for stretch in _stretches(indices) if frames.exact else [indices]:
        wanted = {frames.pts[index]: index for index in stretch}
        with opened_video(path) as (container, stream):
            if frames.exact and frames.keyframes and stretch[0] > SEEK_BEYOND_FRAMES:
                before = bisect.bisect_right(frames.keyframes, frames.pts[stretch[0]]) - 1
                container.seek(frames.keyframes[max(before, 0)], stream=stream, backward=True)
            for number, frame in enumerate(_decoded(container, stream)):
                index = wanted.pop(frame.pts if frames.exact else number, None)
                if index is not None:
                    yield index, upright_rgb(frame)
                if not wanted:
                    break
