"""Writes and reads videos and images. Metadata is stored inside each file.

Pixels are tensors (3, F, H, W), float32 in 0..1.
"""

import contextlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from itertools import islice
from pathlib import Path

import av
import numpy as np
import torch
from av.container import InputContainer
from av.filter import Graph
from av.sidedata.sidedata import Type
from av.stream import Disposition
from av.video.stream import VideoStream
from einops import rearrange
from PIL import Image, PngImagePlugin, UnidentifiedImageError
from torch import Tensor

from utils.errors import UserError, one_line
from utils.files import atomic_folder, atomic_path, parse_json

ENCODER_OPTIONS = {
    # Visually lossless for H.264; the default of 23 loses fine grain.
    "crf": "16",
    # The macroblock tree gives moving regions fewer bits. And its AVX2 code in the x264 of PyAV 18 reads uninitialised
    # memory: one time in fifty, the same frames made a different file.
    "mbtree": "0",
}
COLOR_MATRIX_BT709 = 1  # ITU-T H.273, also for primaries and transfer; what players assume for untagged video
RANGE_LIMITED = 1
METADATA_KEY = "comment"
# Enough for a video larger than 4K; with the usual one per processor, a frame of 4K takes half a gigabyte.
DECODER_THREADS = 4


def to_uint8(pixels: Tensor) -> Tensor:
    """(3, F, H, W) in 0..1 -> frames (F, H, W, 3) uint8 on the CPU."""
    return rearrange(pixels.detach().float().clamp(0, 1).mul(255).round().to(torch.uint8).cpu(), "C F H W -> F H W C")


def save_video(pixels: Tensor, path: str | Path, fps: float, metadata: Mapping[str, object] | None = None) -> None:
    """Like `write_frames`, for pixels (3, F, H, W) in 0..1."""
    write_frames((to_uint8(frame)[0].numpy() for frame in pixels.split(1, dim=1)), path, fps, metadata)


def write_frames(
    frames: Iterable[np.ndarray], path: str | Path, fps: float, metadata: Mapping[str, object] | None = None
) -> None:
    """Writes an H.264 mp4 that browsers can play (yuv420p, index at the start of the file).

    Args:
        frames: (H, W, 3) uint8 each, at least one; H and W are even.
        fps: frames per second, stored as the nearest fraction with a denominator of at most 1001.
        metadata: stored as JSON in the comment tag.
    """
    rate = Fraction(fps).limit_denominator(1001)
    with atomic_path(path) as temporary:
        container = av.open(str(temporary.absolute()), "w", format="mp4", options={"movflags": "+faststart"})
        with container:
            if metadata is not None:
                container.metadata[METADATA_KEY] = json_text(metadata)
            stream = None
            for index, array in enumerate(frames):
                stream = stream or _h264_stream(container, rate, array.shape[1], array.shape[0])
                frame = av.VideoFrame.from_ndarray(array, format="rgb24")
                frame = frame.reformat(format="yuv420p", dst_colorspace="ITU709", dst_color_range="MPEG")
                frame.pts, frame.time_base = index, 1 / rate
                container.mux(stream.encode(frame))
            container.mux(stream.encode())


def _h264_stream(container: av.container.OutputContainer, rate: Fraction, width: int, height: int):
    stream = container.add_stream("libx264", rate=rate, options=ENCODER_OPTIONS)
    stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
    context = stream.codec_context
    context.time_base = 1 / rate
    context.colorspace = context.color_primaries = context.color_trc = COLOR_MATRIX_BT709
    context.color_range = RANGE_LIMITED
    return stream


@contextlib.contextmanager
def opened_video(path: str | Path, threads: int = DECODER_THREADS) -> Iterator[tuple[InputContainer, VideoStream]]:
    """Opens a file; yields the container and its largest video stream, cover pictures aside.

    Args:
        threads: of the decoder; each holds a frame or more.

    Raises:
        ValueError: the file has no video stream, or FFmpeg does not know its codec.
    """
    with av.open(str(Path(path).absolute())) as container:  # FFmpeg takes the relative name 12:30.mp4 for a protocol
        streams = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
        streams = [s for s in streams if s.codec_context is not None]  # None: FFmpeg does not know the codec
        if not streams:
            raise ValueError("no video stream of a known codec")
        stream = max(streams, key=lambda s: s.codec_context.width * s.codec_context.height)
        stream.thread_type = "AUTO"
        stream.codec_context.thread_count = threads
        yield container, stream


def decoded_frames(container: InputContainer, stream: VideoStream) -> Iterator[av.VideoFrame | None]:
    """All frames of a stream in the order in which they are shown; None in the place of a damaged one.

    Left out are frames before the first one that is whole: they depend on frames that the file does not contain.
    """
    has_begun = False
    for packet in container.demux(stream):
        try:
            frames = packet.decode()
        except av.error.InvalidDataError:
            frames = [None]
        for frame in frames:
            whole = None if frame is None or frame.is_corrupt else frame
            has_begun = has_begun or whole is not None
            if has_begun:
                yield whole


def first_frame(path: str | Path) -> av.VideoFrame | None:
    """The first frame that is shown; None if there is none."""
    with opened_video(path, threads=1) as (container, stream):
        return next(decoded_frames(container, stream), None)


@dataclass(frozen=True)
class Orientation:
    """How a stored picture is shown: first transposed, then its columns and rows reversed.

    Attributes:
        is_mirrored: no rotation gives the same.
        degrees: of the rotation, where it is none with a mirror.
    """

    is_transposed: bool
    reverses_columns: bool
    reverses_rows: bool

    @property
    def is_mirrored(self) -> bool:
        return self.is_transposed ^ self.reverses_columns ^ self.reverses_rows

    @property
    def degrees(self) -> int:
        return 90 if self.is_transposed else 180 if self.reverses_columns else 0

    def size(self, frame: av.VideoFrame) -> tuple[int, int]:
        """(width, height) of the frame as it is shown."""
        return (frame.height, frame.width) if self.is_transposed else (frame.width, frame.height)


def orientation_of(frame: av.VideoFrame) -> Orientation:
    """Reads the display matrix, which shows the stored pixel (x, y) at (a x + c y, b x + d y); all frames share it."""
    # In PyAV a frame and its side data refer to each other, so they stay in memory until the garbage is collected.
    # A frame of 4K is too large for that.
    small = frame.reformat(width=16, height=16, format="gray", threads=1)
    matrix = small.side_data.get(Type.DISPLAYMATRIX)
    if matrix is None:
        return Orientation(False, False, False)
    a, b, _, c, d, *_ = np.frombuffer(bytes(matrix), np.int32).tolist()
    if abs(b) + abs(c) > abs(a) + abs(d):
        return Orientation(True, c < 0, b < 0)
    return Orientation(False, a < 0, d < 0)


def upright_rgb(frame: av.VideoFrame, orientation: Orientation) -> np.ndarray:
    """The frame as (H, W, 3) uint8 RGB: deinterlaced, and rotated or mirrored as the file asks for."""
    shown = _progressive(frame) if frame.interlaced_frame else frame
    pixels = shown.to_ndarray(format="rgb24", threads=1)  # by default, each call starts one thread per processor
    if orientation.is_transposed:
        pixels = pixels.swapaxes(0, 1)
    return pixels[:: -1 if orientation.reverses_rows else 1, :: -1 if orientation.reverses_columns else 1]


def _progressive(frame: av.VideoFrame) -> av.VideoFrame:
    """Deinterlaces one frame by itself: the lines of its second field are interpolated from the first."""
    graph = Graph()
    buffer = graph.add_buffer(
        width=frame.width, height=frame.height, format=frame.format, time_base=frame.time_base or Fraction(1, 24)
    )
    graph.link_nodes(buffer, graph.add("estdif", "mode=frame"), graph.add("buffersink")).configure()
    graph.push(frame)
    graph.push(None)
    return graph.pull()


def read_video(path: str | Path, frames: int | None = None) -> tuple[Tensor, float]:
    """Like `read_frames`, but returns pixels (3, F, H, W) in 0..1."""
    pixels, rate = read_frames(path, frames)
    return rearrange(pixels, "F H W C -> C F H W").float() / 255, rate


def read_frames(path: str | Path, frames: int | None = None) -> tuple[Tensor, float]:
    """The first `frames` frames (all if None), (F, H, W, 3) uint8, and the frames per second. See `iterate_frames`."""
    rates, arrays = [], []
    for array, rate in islice(iterate_frames(path), frames):
        rates.append(rate)
        arrays.append(torch.from_numpy(np.ascontiguousarray(array)))
    return torch.stack(arrays), rates[0]


def iterate_frames(path: str | Path) -> Iterator[tuple[np.ndarray, float]]:
    """Each frame as (H, W, 3) uint8 in the order in which they are shown, with the frames per second of the file.

    Frames are upright, see `upright_rgb`.

    Raises:
        UserError: the file cannot be decoded or has no frames.
    """
    index = -1
    try:
        with opened_video(path) as (container, stream):
            rate = float(stream.average_rate or stream.guessed_rate or 0)
            orientation = None
            for index, frame in enumerate(decoded_frames(container, stream)):
                if frame is None:
                    raise ValueError(f"frame {index} is damaged")
                orientation = orientation or orientation_of(frame)
                yield upright_rgb(frame, orientation), rate
    except (av.FFmpegError, OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as a video: {one_line(error)}") from None
    if index < 0:
        raise UserError(f"{path}: this video has no frames")


def json_text(values: Mapping[str, object]) -> str:
    """The values as JSON that is valid UTF-8.

    Half a surrogate pair, which stands for a byte of a file name that is not UTF-8, is written as its escape sequence.
    Readers of JSON restore it.
    """
    text = json.dumps(dict(values), ensure_ascii=False)
    return re.sub(r"[\ud800-\udfff]", lambda half: f"\\u{ord(half[0]):04x}", text)


def save_image(pixels: Tensor, path: str | Path, metadata: Mapping[str, object] | None = None) -> None:
    """Like `write_image`, for one frame (3, 1, H, W) in 0..1."""
    write_image(to_uint8(pixels)[0].numpy(), path, metadata)


def write_image(array: np.ndarray, path: str | Path, metadata: Mapping[str, object] | None = None) -> None:
    """Writes (H, W, 3) uint8 as a PNG; the metadata is stored as JSON in the text chunk `comment`."""
    text = PngImagePlugin.PngInfo()
    if metadata is not None:
        text.add_itxt(METADATA_KEY, json_text(metadata))
    with atomic_path(path) as temporary:
        Image.fromarray(array).save(temporary, format="PNG", pnginfo=text)


def save_images(pixels: Tensor, folder: str | Path, metadata: Mapping[str, object] | None = None) -> None:
    """Writes every frame of (3, F, H, W) as `folder`/00000.png, 00001.png, ...; the folder appears when complete."""
    with atomic_folder(Path(folder)) as temporary:
        for index, frame in enumerate(pixels.split(1, dim=1)):
            save_image(frame, temporary / f"{index:05d}.png", metadata)


def read_metadata(path: str | Path) -> dict[str, object] | None:
    """The metadata that this module stored in an mp4 or PNG; None if there is none.

    Raises:
        UserError: the file cannot be read.
    """
    path = Path(path)
    text = _image_comment(path) if path.suffix.lower() == ".png" else _video_comment(path)
    try:
        metadata = parse_json(text)
    except ValueError:
        return None
    return metadata if isinstance(metadata, dict) else None


def _video_comment(path: Path) -> str:
    try:
        with av.open(str(Path(path).absolute())) as container:
            return container.metadata.get(METADATA_KEY, "")
    except (av.FFmpegError, OSError) as error:
        raise UserError(f"{path}: cannot be read as a video: {one_line(error)}") from None


def _image_comment(path: Path) -> str:
    try:
        with Image.open(path) as image:
            return image.info.get(METADATA_KEY, "")
    except (UnidentifiedImageError, OSError) as error:
        raise UserError(f"{path}: cannot be read as an image: {one_line(error)}") from None
