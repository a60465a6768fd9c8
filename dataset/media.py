"""Pixels of images and videos: uint8 RGB, upright, resized and cropped to a bucket.

Arrays are (H, W, 3) for a frame and (F, H, W, 3) for a clip. Whatever a decoder says of a broken file becomes a
`MediaError`, so that the caller can list the file and go on.
"""

import bisect
import contextlib
import importlib
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path

import av
import cv2
import numpy as np
from av.filter import Graph
from av.stream import Disposition
from av.video.stream import VideoStream
from PIL import Image, ImageOps

from dataset.buckets import Size, fit_to_bucket, resampled_indices
from dataset.cache import file_identity
from dataset.config_utils import DatasetSettings
from dataset.items import Item, Probe
from dataset.sources import Source, frame_files
from utils.errors import one_line

# Codecs whose every packet is exactly one shown frame, so that packets can be counted instead of decoded frames.
ONE_FRAME_PER_PACKET = frozenset(["h264", "hevc", "av1", "vp9", "mjpeg", "png", "prores", "dnxhd", "ffv1", "rawvideo"])
# Shorter ways are decoded from the beginning, which needs no trust in a container's seeking.
SEEK_BEYOND_FRAMES = 500
# Packages that teach Pillow a format when they are installed.
IMAGE_PLUGINS = ("pillow_jxl", "pillow_avif", "pillow_heif")


class MediaError(Exception):
    """A media file that cannot be used, with the reason."""


@contextlib.contextmanager
def _as_media_error(path: Path) -> Iterator[None]:
    # Decoders fed with damaged bytes raise anything from SyntaxError (Pillow) to OverflowError.
    try:
        yield
    except MediaError:
        raise
    except Exception as error:
        raise MediaError(f"{path}: {one_line(error) or type(error).__name__}") from error


def _load_image_plugins() -> None:
    for name in IMAGE_PLUGINS:
        with contextlib.suppress(ImportError):
            plugin = importlib.import_module(name)
            if hasattr(plugin, "register_heif_opener"):
                plugin.register_heif_opener()


_load_image_plugins()


def to_rgb(image: Image.Image) -> np.ndarray:
    """Any Pillow image as (H, W, 3) uint8: alpha laid over white, 16 bits per channel scaled to 8."""
    if image.mode.startswith("I") or image.mode == "F":
        values = np.asarray(image, dtype=np.float64)
        # Pillow opens 16-bit grey as I or I;16; floating-point images are 0..1 by convention.
        values = values * 255 if image.mode == "F" else values / 257 if values.max() > 255 else values
        grey = np.clip(values + 0.5, 0, 255).astype(np.uint8)
        return np.repeat(grey[..., None], 3, axis=2)
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        return np.asarray(Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB"))
    return np.asarray(image.convert("RGB"))


def load_image(path: Path) -> np.ndarray:
    """An image as it is meant to be seen, (H, W, 3) uint8."""
    with _as_media_error(path), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with Image.open(path) as image:
            return to_rgb(ImageOps.exif_transpose(image))


def resize_to_bucket(pixels: np.ndarray, bucket: Size) -> np.ndarray:
    """(H, W, 3) -> (bucket height, bucket width, 3): scaled to cover, area average down, Lanczos up, centre crop."""
    size = (pixels.shape[1], pixels.shape[0])
    if size == bucket:
        return pixels
    fit = fit_to_bucket(size, bucket)
    if fit.scale > 1:
        pixels = np.asarray(Image.fromarray(pixels).resize(fit.scaled, Image.Resampling.LANCZOS))
    else:
        pixels = cv2.resize(pixels, fit.scaled, interpolation=cv2.INTER_AREA)
    return np.ascontiguousarray(pixels[fit.top : fit.top + bucket[1], fit.left : fit.left + bucket[0]])


def _probe_image(path: Path) -> Probe:
    with _as_media_error(path), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with Image.open(path) as image:
            width, height = image.size
            orientation = image.getexif().get(0x0112, 1)
            notes = ("turned by EXIF",) if orientation in range(2, 9) else ()
            notes += (f"first of {image.n_frames} frames",) if getattr(image, "n_frames", 1) > 1 else ()
    width, height = (height, width) if orientation in range(5, 9) else (width, height)
    return Probe(width, height, notes=notes)


def _probe_frame_folder(path: Path) -> Probe:
    frames = frame_files(path)
    if not frames:
        raise MediaError(f"{path}: no images in this folder")
    first = _probe_image(frames[0])
    return Probe(first.width, first.height, frames=len(frames))


@dataclass(frozen=True)
class _Timeline:
    """Presentation times of a stream's frames in display order, in units of the stream's time base."""

    pts: list[int]
    keyframes: list[int]
    exact: bool  # False: the times are only counted, frames must be found by counting too


def _video_stream(container: av.container.InputContainer, path: Path) -> VideoStream:
    """The largest video stream that is no cover picture."""
    streams = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
    if not streams:
        raise MediaError(f"{path}: no video stream")
    stream = max(streams, key=lambda s: s.codec_context.width * s.codec_context.height)
    stream.thread_type = "AUTO"
    return stream


def _timeline(path: Path) -> _Timeline:
    """The times of all frames, by reading packets without decoding them where the codec allows."""
    with av.open(str(path)) as container:
        stream = _video_stream(container, path)
        packets = [packet for packet in container.demux(stream) if packet.size and not packet.is_discard]
        keyframes = sorted(packet.pts for packet in packets if packet.is_keyframe and packet.pts is not None)
        # Frames shown before the first keyframe refer to others that were cut away.
        pts = [packet.pts for packet in packets if packet.pts is not None and packet.pts >= (keyframes or [0])[0]]
        countable = stream.codec_context.name in ONE_FRAME_PER_PACKET and None not in [p.pts for p in packets]
    if countable and len(set(pts)) == len(pts):
        return _Timeline(sorted(pts), keyframes, exact=True)
    with av.open(str(path)) as container:
        stream = _video_stream(container, path)
        decoded = [frame.pts for frame in _decoded(container, stream)]
    exact = None not in decoded and decoded == sorted(set(decoded))
    return _Timeline(decoded if exact else list(range(len(decoded))), [], exact)


def _decoded(container: av.container.InputContainer, stream: VideoStream) -> Iterator[av.VideoFrame]:
    """All frames that can be decoded; packets that cannot are passed over and missed by the caller."""
    for packet in container.demux(stream):
        with contextlib.suppress(av.error.InvalidDataError):
            yield from (frame for frame in packet.decode() if not frame.is_corrupt)


def _probe_video(path: Path) -> Probe:
    with _as_media_error(path):
        timeline = _timeline(path)
        with av.open(str(path)) as container:
            stream = _video_stream(container, path)
            first = next(_decoded(container, stream), None)
            if first is None or not timeline.pts:
                raise MediaError(f"{path}: no frame can be decoded")
            time_base = float(stream.time_base) if timeline.exact else 1 / float(stream.average_rate or 24)
            aspect = stream.sample_aspect_ratio
            notes = (f"turned by {abs(first.rotation)} degrees",) if first.rotation else ()
            notes += ("interlaced",) if first.interlaced_frame else ()
            notes += (f"pixels of {aspect} are not stretched",) if aspect and aspect != 1 else ()
    count = len(timeline.pts)
    last_time = (timeline.pts[-1] - timeline.pts[0]) * time_base
    width, height = (first.height, first.width) if first.rotation % 180 else (first.width, first.height)
    fps = (count - 1) / last_time if last_time > 0 else 0.0
    return Probe(width, height, count, last_time, fps, notes=notes)


def probe(source: Source) -> Probe:
    """Size, frames and times of a source, without decoding more than a first frame where that is possible.

    Raises:
        MediaError: the file cannot be opened or holds nothing usable.
    """
    probers = {"image": _probe_image, "frames": _probe_frame_folder, "video": _probe_video}
    found = probers[source.kind](source.path)
    with _as_media_error(source.path):
        return replace(found, digest=file_identity(source.path))


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


def _upright_rgb(frame: av.VideoFrame) -> np.ndarray:
    pixels = (_progressive(frame) if frame.interlaced_frame else frame).to_ndarray(format="rgb24")
    return np.rot90(pixels, frame.rotation // 90) if frame.rotation else pixels


def _frames_at(path: Path, indices: Sequence[int], timeline: _Timeline) -> Iterator[tuple[int, av.VideoFrame]]:
    """(index, frame) for each of the ascending distinct indices, decoding no further than the last."""
    wanted = {timeline.pts[index]: index for index in indices}
    with av.open(str(path)) as container:
        stream = _video_stream(container, path)
        if timeline.exact and indices[0] > SEEK_BEYOND_FRAMES and timeline.keyframes:
            before = bisect.bisect_right(timeline.keyframes, timeline.pts[indices[0]]) - 1
            container.seek(timeline.keyframes[max(before, 0)], stream=stream, backward=True)
        for count, frame in enumerate(_decoded(container, stream)):
            index = wanted.pop(frame.pts if timeline.exact else count, None)
            if index is not None:
                yield index, frame
            if not wanted:
                return
    raise MediaError(f"{path}: frame {min(wanted.values())} of {len(timeline.pts)} cannot be decoded")


def _chosen_frames(source: Source, item: Item, settings: DatasetSettings, times: Sequence[float]) -> list[int]:
    """Indices into the file's frames, one for each frame of the clip."""
    window = range(item.clip.start, item.clip.start + item.clip.length)
    if settings.source_fps is None or (settings.source_fps == "auto" and times[-1] == 0):
        return list(window)
    if settings.source_fps != "auto":
        times = [index / settings.source_fps for index in range(len(times))]
    resampled = resampled_indices(times, settings.target_fps)
    return [resampled[k] for k in window]


def _clip_of_video(source: Source, item: Item, settings: DatasetSettings) -> np.ndarray:
    timeline = _timeline(source.path)
    with av.open(str(source.path)) as container:
        time_base = float(_video_stream(container, source.path).time_base)
    times = [(pts - timeline.pts[0]) * time_base for pts in timeline.pts] if timeline.exact else [0.0]
    chosen = _chosen_frames(source, item, settings, times)
    if chosen[-1] >= len(timeline.pts):
        raise MediaError(f"{source.path}: {len(timeline.pts)} frames, but frame {chosen[-1]} is needed")
    clip = np.empty((item.clip.length, item.bucket[1], item.bucket[0], 3), dtype=np.uint8)
    for index, frame in _frames_at(source.path, sorted(set(chosen)), timeline):
        pixels = resize_to_bucket(_upright_rgb(frame), item.bucket)
        clip[[position for position, wanted in enumerate(chosen) if wanted == index]] = pixels
    return clip


def _clip_of_folder(source: Source, item: Item, settings: DatasetSettings) -> np.ndarray:
    frames = frame_files(source.path)
    chosen = _chosen_frames(source, item, settings, [0.0] * len(frames))
    return np.stack([resize_to_bucket(load_image(frames[index]), item.bucket) for index in chosen])


def load_pixels(source: Source, item: Item, settings: DatasetSettings) -> np.ndarray:
    """The exact pixels that are encoded for an item, (F, H, W, 3) uint8.

    Raises:
        MediaError: a frame that is needed cannot be decoded.
    """
    with _as_media_error(source.path):
        if source.kind == "image":
            return resize_to_bucket(load_image(source.path), item.bucket)[None]
        return (_clip_of_folder if source.kind == "frames" else _clip_of_video)(source, item, settings)
