"""Videos and images on disk: written whole, with the settings that made them inside; read back exactly.

Pixels are tensors (3, F, H, W), float32 in 0..1.
"""

import json
from collections.abc import Iterable, Mapping
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from einops import rearrange
from torch import Tensor

from utils.errors import UserError, one_line
from utils.files import atomic_folder, atomic_path

if TYPE_CHECKING:
    import av
    import numpy as np

ENCODER_OPTIONS = {
    # Visually lossless for H.264; the default of 23 loses the fine grain that people judge a model by.
    "crf": "16",
    # The macroblock tree takes bits from what moves. And its AVX2 code in the x264 of PyAV 18 reads memory that nobody
    # wrote: one time in fifty the same frames became another file.
    "mbtree": "0",
}
COLOR_MATRIX_BT709 = 1  # ITU-T H.273, also for primaries and transfer; what players assume for untagged video
RANGE_LIMITED = 1
METADATA_KEY = "comment"


def to_uint8(pixels: Tensor) -> Tensor:
    """(3, F, H, W) in 0..1 -> frames (F, H, W, 3) uint8 on the CPU."""
    return rearrange(pixels.detach().float().clamp(0, 1).mul(255).round().to(torch.uint8).cpu(), "C F H W -> F H W C")


def save_video(pixels: Tensor, path: str | Path, fps: float, metadata: Mapping[str, object] | None = None) -> None:
    """Writes pixels (3, F, H, W) in 0..1 as `write_frames` does."""
    write_frames((to_uint8(frame)[0].numpy() for frame in pixels.split(1, dim=1)), path, fps, metadata)


def write_frames(
    frames: Iterable["np.ndarray"], path: str | Path, fps: float, metadata: Mapping[str, object] | None = None
) -> None:
    """Writes H.264 in an mp4 that browsers play (yuv420p, index in front).

    Args:
        frames: (H, W, 3) uint8 each, at least one; H and W are even.
        fps: frames per second, exact for whole and decimal numbers.
        metadata: stored as JSON in the comment tag.
    """
    import av

    rate = Fraction(fps).limit_denominator(1001)
    with atomic_path(path) as temporary:
        container = av.open(str(temporary), "w", format="mp4", options={"movflags": "+faststart"})
        with container:
            if metadata is not None:
                container.metadata[METADATA_KEY] = json.dumps(dict(metadata), ensure_ascii=False)
            stream = None
            for index, array in enumerate(frames):
                stream = stream or _h264_stream(container, rate, array.shape[1], array.shape[0])
                frame = av.VideoFrame.from_ndarray(array, format="rgb24")
                frame = frame.reformat(format="yuv420p", dst_colorspace="ITU709", dst_color_range="MPEG")
                frame.pts, frame.time_base = index, 1 / rate
                container.mux(stream.encode(frame))
            container.mux(stream.encode())


def _h264_stream(container: "av.container.OutputContainer", rate: Fraction, width: int, height: int):
    stream = container.add_stream("libx264", rate=rate, options=ENCODER_OPTIONS)
    stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
    context = stream.codec_context
    context.time_base = 1 / rate
    context.colorspace = context.color_primaries = context.color_trc = COLOR_MATRIX_BT709
    context.color_range = RANGE_LIMITED
    return stream


def read_video(path: str | Path, frames: int | None = None) -> tuple[Tensor, float]:
    """As `read_frames`, but pixels (3, F, H, W) in 0..1."""
    pixels, rate = read_frames(path, frames)
    return rearrange(pixels, "F H W C -> C F H W").float() / 255, rate


def read_frames(path: str | Path, frames: int | None = None) -> tuple[Tensor, float]:
    """The first `frames` frames (all if None) upright, (F, H, W, 3) uint8, and the frames per second.

    Raises:
        UserError: the file cannot be decoded or has no frames.
    """
    import av
    import numpy as np

    from utils.video_decoding import opened_video, upright_rgb

    arrays = []
    try:
        with opened_video(path) as (container, stream):
            rate = float(stream.average_rate or stream.guessed_rate or 0)
            for frame in container.decode(stream):
                arrays.append(torch.from_numpy(np.ascontiguousarray(upright_rgb(frame))))
                if len(arrays) == frames:
                    break
    except (av.FFmpegError, OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as a video: {one_line(error)}") from None
    if not arrays:
        raise UserError(f"{path}: this video has no frames")
    return torch.stack(arrays), rate


def save_image(pixels: Tensor, path: str | Path, metadata: Mapping[str, object] | None = None) -> None:
    """Writes one frame (3, 1, H, W) in 0..1 as `write_image` does."""
    write_image(to_uint8(pixels)[0].numpy(), path, metadata)


def write_image(array: "np.ndarray", path: str | Path, metadata: Mapping[str, object] | None = None) -> None:
    """Writes (H, W, 3) uint8 as PNG; the metadata is JSON in the text chunk `comment`."""
    from PIL import Image, PngImagePlugin

    text = PngImagePlugin.PngInfo()
    if metadata is not None:
        text.add_itxt(METADATA_KEY, json.dumps(dict(metadata), ensure_ascii=False))
    with atomic_path(path) as temporary:
        Image.fromarray(array).save(temporary, format="PNG", pnginfo=text)


def save_images(pixels: Tensor, folder: str | Path, metadata: Mapping[str, object] | None = None) -> None:
    """Writes every frame of (3, F, H, W) as `folder`/00000.png and so on; the folder appears when it is complete."""
    with atomic_folder(Path(folder)) as temporary:
        for index, frame in enumerate(pixels.split(1, dim=1)):
            save_image(frame, temporary / f"{index:05d}.png", metadata)


def read_metadata(path: str | Path) -> dict[str, object]:
    """The settings inside a file of ours: mp4, PNG or safetensors.

    Raises:
        UserError: the file carries none.
    """
    path = Path(path)
    try:
        text = _METADATA_READERS[path.suffix.lower()](path)
        settings = json.loads(text)
    except (KeyError, json.JSONDecodeError):
        settings = None
    if not isinstance(settings, dict):
        raise UserError(f"{path}: carries no settings of hv_generate_video.py (was it made with --no_metadata?)")
    return settings


def _video_metadata(path: Path) -> str:
    import av

    try:
        with av.open(str(path)) as container:
            return container.metadata[METADATA_KEY]
    except (av.FFmpegError, OSError) as error:
        raise UserError(f"{path}: cannot be read as a video: {one_line(error)}") from None


def _image_metadata(path: Path) -> str:
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            return image.info[METADATA_KEY]
    except (UnidentifiedImageError, OSError) as error:
        raise UserError(f"{path}: cannot be read as an image: {one_line(error)}") from None


def _latent_metadata(path: Path) -> str:
    from utils.safetensors_utils import read_header

    return read_header(path)[1]["settings"]


_METADATA_READERS = {".mp4": _video_metadata, ".png": _image_metadata, ".safetensors": _latent_metadata}
