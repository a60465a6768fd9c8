"""What every reader of video files must agree on: which stream is the video, and how its frames are to be seen."""

import contextlib
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.container import InputContainer
from av.filter import Graph
from av.stream import Disposition
from av.video.stream import VideoStream


@contextlib.contextmanager
def opened_video(path: str | Path) -> Iterator[tuple[InputContainer, VideoStream]]:
    """The container and its largest video stream that is no cover picture.

    Raises:
        ValueError: there is none.
    """
    with av.open(str(path)) as container:
        streams = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
        if not streams:
            raise ValueError("no video stream")
        stream = max(streams, key=lambda s: s.codec_context.width * s.codec_context.height)
        stream.thread_type = "AUTO"
        yield container, stream


def upright_rgb(frame: av.VideoFrame) -> np.ndarray:
    """(H, W, 3) uint8, without the combs of interlacing and turned as the file asks for."""
    pixels = (_progressive(frame) if frame.interlaced_frame else frame).to_ndarray(format="rgb24")
    return np.rot90(pixels, frame.rotation // 90) if frame.rotation else pixels


def _progressive(frame: av.VideoFrame) -> av.VideoFrame:
    """The frame with the lines of its second field drawn anew from the first; looks at no other frame."""
    graph = Graph()
    buffer = graph.add_buffer(
        width=frame.width, height=frame.height, format=frame.format, time_base=frame.time_base or Fraction(1, 24)
    )
    graph.link_nodes(buffer, graph.add("estdif", "mode=frame"), graph.add("buffersink")).configure()
    graph.push(frame)
    graph.push(None)
    return graph.pull()
