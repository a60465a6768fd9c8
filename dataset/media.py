"""Pixels of images and videos: uint8 RGB, upright, resized and cropped to a bucket.

A frame is an array (H, W, 3), a clip (F, H, W, 3). Every error of a decoder becomes a `MediaError`, so that the caller
can report the file and continue with the next one.
"""

import contextlib
import importlib
import warnings
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
from PIL import ExifTags, Image, ImageOps

from dataset import video
from dataset.buckets import Size, resampled_indices, resize_crop
from dataset.config_utils import DatasetSettings
from dataset.items import Item, MediaInfo
from dataset.sources import Source, frame_files
from utils.errors import one_line

# Optional packages that add image formats to Pillow.
IMAGE_PLUGINS = ("pillow_jxl", "pillow_avif", "pillow_heif")


class MediaError(Exception):
    """A media file that cannot be used, with the reason."""


@contextlib.contextmanager
def _as_media_error(path: Path) -> Iterator[None]:
    # On damaged files decoders raise errors of many types, such as SyntaxError (Pillow) or OverflowError.
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
    """Any Pillow image as (H, W, 3) uint8: transparency is blended with white, 16-bit values are scaled to 8 bits."""
    if image.mode.startswith("I") or image.mode == "F":
        values = np.asarray(image, dtype=np.float64)
        # Pillow opens 16-bit greyscale images in mode I or I;16; floating-point images hold 0..1 by convention.
        values = values * 255 if image.mode == "F" else values / 257 if values.max() > 255 else values
        grey = np.clip(values + 0.5, 0, 255).astype(np.uint8)
        return np.repeat(grey[..., None], 3, axis=2)
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        return np.asarray(Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB"))
    return np.asarray(image.convert("RGB"))


def load_image(path: Path) -> np.ndarray:
    """An image with its EXIF rotation applied, (H, W, 3) uint8 RGB."""
    with _as_media_error(path), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with Image.open(path) as image:
            return to_rgb(ImageOps.exif_transpose(image))


def resize_to_bucket(pixels: np.ndarray, bucket: Size) -> np.ndarray:
    """Resizes a frame until it covers the bucket, then crops the centre.

    Shrinking averages areas, enlarging uses a Lanczos filter.

    Args:
        pixels: (H, W, 3) uint8.
        bucket: (width, height).

    Returns:
        (bucket height, bucket width, 3) uint8.
    """
    size = (pixels.shape[1], pixels.shape[0])
    if size != bucket:
        crop = resize_crop(size, bucket)
        if crop.scale > 1:
            pixels = np.asarray(Image.fromarray(pixels).resize(crop.resized, Image.Resampling.LANCZOS))
        else:
            pixels = cv2.resize(pixels, crop.resized, interpolation=cv2.INTER_AREA)
        pixels = pixels[crop.top : crop.top + bucket[1], crop.left : crop.left + bucket[0]]
    # Arrays from Pillow are read-only, and torch warns about those.
    return np.require(pixels, requirements=("C", "W"))


def _image_info(path: Path) -> MediaInfo:
    with _as_media_error(path), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with Image.open(path) as image:
            is_turned = image.getexif().get(ExifTags.Base.Orientation) in range(2, 9)
            notes = ("turned by EXIF",) if is_turned else ()
            notes += (f"first of {image.n_frames} frames",) if getattr(image, "n_frames", 1) > 1 else ()
            # Depending on the format, Pillow reports the size before or after the rotation.
            width, height = (ImageOps.exif_transpose(image) if is_turned else image).size
    return MediaInfo(width, height, notes=notes)


def _frame_folder_info(path: Path) -> MediaInfo:
    frames = frame_files(path)
    if not frames:
        raise MediaError(f"{path}: no images in this folder")
    first = _image_info(frames[0])
    return MediaInfo(first.width, first.height, frames=len(frames))


def _video_info(path: Path) -> MediaInfo:
    with _as_media_error(path):
        frames, first = video.timeline(path), video.first_frame(path)
        if not frames.pts:
            raise ValueError("no frame can be decoded")
    count, last_time = len(frames.pts), frames.seconds[-1]
    fps = (count - 1) / last_time if last_time > 0 else 0.0
    return MediaInfo(*first.size, count, last_time, fps, notes=first.notes)


def read_media_info(source: Source) -> MediaInfo:
    """Size, number of frames and times of a source. Decodes no more than the first frame where the format allows.

    Raises:
        MediaError: the file cannot be opened or holds no picture.
    """
    readers = {"image": _image_info, "frames": _frame_folder_info, "video": _video_info}
    info = readers[source.kind](source.path)
    with _as_media_error(source.path):
        return replace(info, digest=source.identity)


def _chosen_frames(item: Item, settings: DatasetSettings, seconds: Sequence[float]) -> list[int]:
    """For each frame of the clip the index of the file's frame; `seconds` says when each of the latter is shown."""
    positions = range(item.span.start, item.span.start + item.span.length)
    if settings.source_fps is None or (settings.source_fps == "auto" and seconds[-1] == 0):
        return list(positions)
    if settings.source_fps != "auto":
        seconds = [index / settings.source_fps for index in range(len(seconds))]
    resampled = resampled_indices(seconds, settings.target_fps)
    return [resampled[k] for k in positions]


def _clips_of_video(source: Source, items: Sequence[Item], settings: DatasetSettings) -> list[np.ndarray | MediaError]:
    """The clips of a video file. Each frame is decoded once, also where several clips share it."""
    frames = video.timeline(source.path)
    chosen = [_chosen_frames(item, settings, frames.seconds) for item in items]
    places = defaultdict(list)  # by index of the frame: (number of the item, position in its clip)
    for number, indices in enumerate(chosen):
        for position, index in enumerate(indices):
            places[index].append((number, position))
    clips = [np.empty((item.span.length, item.bucket[1], item.bucket[0], 3), np.uint8) for item in items]
    for index, pixels in video.frames_at(source.path, frames, sorted(i for i in places if i < len(frames.pts))):
        for number, position in places.pop(index):
            clips[number][position] = resize_to_bucket(pixels, items[number].bucket)
    missing = [next((index for index in indices if index in places), None) for indices in chosen]
    return [
        clip if index is None else MediaError(f"{source.path}: frame {index} of {len(frames.pts)} cannot be decoded")
        for clip, index in zip(clips, missing, strict=True)
    ]


def _clip_of_folder(source: Source, item: Item, settings: DatasetSettings) -> np.ndarray:
    frames = frame_files(source.path)
    chosen = _chosen_frames(item, settings, [0.0] * len(frames))
    return np.stack([resize_to_bucket(load_image(frames[index]), item.bucket) for index in chosen])


def load_items(source: Source, items: Sequence[Item], settings: DatasetSettings) -> list[np.ndarray | MediaError]:
    """The pixels that the VAE encodes for items of one source: (F, H, W, 3) uint8 each, or the error of that item."""
    try:
        with _as_media_error(source.path):
            if source.kind == "image":
                return [resize_to_bucket(load_image(source.path), item.bucket)[None] for item in items]
            if source.kind == "frames":
                return [_clip_of_folder(source, item, settings) for item in items]
            return _clips_of_video(source, items, settings)
    except MediaError as error:
        return [error] * len(items)


def load_pixels(source: Source, item: Item, settings: DatasetSettings) -> np.ndarray:
    """The pixels that the VAE encodes for one item, (F, H, W, 3) uint8.

    Raises:
        MediaError: a frame of the item cannot be decoded.
    """
    (pixels,) = load_items(source, [item], settings)
    if isinstance(pixels, MediaError):
        raise pixels
    return pixels
