"""The frames of a video file. It is read once, from its first packet to its last; nothing is found by seeking."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import av
import numpy as np
from av.video.stream import VideoStream

from dataset.media.images import MediaError, Picture
from utils.video_io import decoded_frames, first_frame, opened_video, orientation_of, upright_rgb

# For files that state no frame rate.
ASSUMED_FPS = 24
# Files of these formats have decoding times only; the decoder alone knows in which order their frames are shown.
WITHOUT_SHOWN_TIMES = frozenset(["avi", "asf"])
# The codecs whose frames version 1 of this decoder found by the times of their packets.
FOUND_BY_PACKETS = frozenset(["h264", "hevc"])


class UnusableTimesError(Exception):
    """The times of the frames do not ascend in the order in which they are shown."""


@dataclass(frozen=True)
class VideoInfo:
    """What the packets and the first frame tell of a video.

    Attributes:
        size: (width, height), upright.
        frames: number of frames as the packets tell; the decoder may show another number.
        last_time: when the last frame is shown, in seconds after the first.
        decoder: the first version of this decoder that reads the same pixels as this one.
        notes: peculiarities in words.
    """

    size: tuple[int, int]
    frames: int
    last_time: float
    decoder: int
    notes: tuple[str, ...]


@dataclass
class _PacketCount:
    """Counts the frames of a stream from its packets, in the order of the file.

    Attributes:
        before_keys: frames before the first keyframe, which are counted apart: they cannot be decoded.
        leading: counted frames that are shown before the first keyframe that is shown itself.
        times_ascend: whether all packets have times, and the stream was not restarted.
    """

    frames: int = 0
    first: int | None = None
    last: int | None = None
    before_keys: int = 0
    leading: int = 0
    times_ascend: bool = True
    _first_key: int | None = None
    _first_shown_key: int | None = None
    _keys: int = 0
    _dts: int | None = None

    def add(self, packet: av.Packet, is_hidden: bool) -> None:
        if packet.is_keyframe:
            self._keys += 1
            self._first_key = packet.pts if self._first_key is None else self._first_key
        if packet.is_discard or is_hidden:
            return
        if not self._keys:
            self.before_keys += 1
            return
        if packet.pts is None or (None not in (packet.dts, self._dts) and packet.dts < self._dts):
            self.times_ascend = False
        self._dts = packet.dts
        if packet.pts is not None:
            # Frames that are shown before the first keyframe need frames that the file does not contain.
            if self._keys == 1 and self._first_key is not None and packet.pts < self._first_key:
                return
            if packet.is_keyframe and self._first_shown_key is None:
                self._first_shown_key = packet.pts
            self.leading += self._first_shown_key is None or packet.pts < self._first_shown_key
            self.first = packet.pts if self.first is None else min(self.first, packet.pts)
            self.last = packet.pts if self.last is None else max(self.last, packet.pts)
        self.frames += 1


def _is_hidden(packet: av.Packet, stream: VideoStream) -> bool:
    """Whether a packet's frame is only a reference for others. VP8 says so in a bit (RFC 6386, 9.1); others need not:
    their packets hold exactly one shown frame."""
    return stream.codec_context.codec.name in ("vp8", "libvpx") and not memoryview(packet)[0] >> 4 & 1


def read_video_info(path: Path) -> VideoInfo:
    """Reads all packets and decodes the first frame.

    Raises:
        ValueError: no frame can be decoded.
    """
    count = _PacketCount()
    with opened_video(path) as (container, stream):
        for packet in container.demux(stream):
            if packet.size:
                count.add(packet, _is_hidden(packet, stream))
        context, unit = stream.codec_context, float(stream.time_base)
        rate, aspect = float(stream.average_rate or ASSUMED_FPS), stream.sample_aspect_ratio
        is_unordered = container.format.name in WITHOUT_SHOWN_TIMES and bool(context.has_b_frames)
        was_wrong = context.codec.name in FOUND_BY_PACKETS and (is_unordered or count.leading > 0)
    frame, frames = first_frame(path), count.frames or count.before_keys
    if frame is None or not frames:
        raise ValueError("no frame can be decoded")
    orientation = orientation_of(frame)
    turned = (f"turned by {orientation.degrees} degrees",) if orientation.degrees else ()
    notes = ("mirrored",) if orientation.is_mirrored else turned
    notes += ("interlaced",) if frame.interlaced_frame else ()
    notes += (f"pixels of {aspect} are not stretched",) if aspect and aspect != 1 else ()
    times_known = count.times_ascend and count.first is not None
    last_time = (count.last - count.first) * unit if times_known else (frames - 1) / rate
    decoder = 2 if was_wrong or orientation.is_mirrored else 1
    return VideoInfo(orientation.size(frame), frames, last_time, decoder, notes)


class VideoFrames:
    """Iterates once over the frames of a file in the order in which they are shown: (seconds after the first, picture).

    A frame that is damaged keeps its place; its picture raises a MediaError.

    Args:
        use_times: take the times from the file; without, all frames last equally long.

    Raises:
        UnusableTimesError: with `use_times`, a frame has no time, or is not shown later than the one before.
    """

    def __init__(self, path: Path, use_times: bool) -> None:
        self.path, self.use_times = path, use_times
        self.count = 0
        self.last_time = 0.0
        self.at_end = False

    def __iter__(self) -> Iterator[tuple[float, Picture]]:
        with opened_video(self.path) as (container, stream):
            rate = float(stream.average_rate or ASSUMED_FPS)
            start = orientation = None
            for frame in decoded_frames(container, stream):
                time = self.count / rate
                if self.use_times and frame is None:
                    time = self.last_time + 1 / rate
                elif self.use_times:
                    if frame.pts is None:
                        raise UnusableTimesError
                    start = frame.pts if start is None else start
                    time = float((frame.pts - start) * frame.time_base)
                    if self.count and time <= self.last_time:
                        raise UnusableTimesError
                self.last_time, self.count = time, self.count + 1
                if frame is None:
                    yield time, partial(self._damaged, self.count - 1)
                else:
                    orientation = orientation or orientation_of(frame)
                    yield time, partial(upright_rgb, frame, orientation)
        self.at_end = True

    def _damaged(self, index: int) -> np.ndarray:
        raise MediaError(f"{self.path}: frame {index} is damaged")
