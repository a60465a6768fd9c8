"""Pixels of images, and how a picture is brought to the size of its bucket.

Every error of a decoder becomes a `MediaError`, so that the caller can report the file and continue with the next one.
"""

import contextlib
import importlib
import math
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import cv2
import numpy as np
from PIL import ExifTags, Image, ImageOps, PngImagePlugin

from dataset.buckets import ResizeCrop, Size, resize_crop
from dataset.items import MediaInfo
from utils.errors import one_line

# Optional packages that add image formats to Pillow.
IMAGE_PLUGINS = ("pillow_jxl", "pillow_avif", "pillow_heif")
# Pillow's own limits refuse valid pictures: large scans, and PNG files with long texts or profiles. These still stop
# a file that is made to exhaust the memory: 512 megapixels take 1.5 GB.
MOST_PIXELS = 512_000_000
Image.MAX_IMAGE_PIXELS = None
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY = 64 << 20
# A picture that would become larger than this (48 MB) is cropped before it is enlarged. A few values then differ by 1.
MOST_ENLARGED_PIXELS = 16_000_000
LANCZOS_REACH = 3

Picture = Callable[[], np.ndarray]  # gives (H, W, 3) uint8, or raises MediaError


class MediaError(Exception):
    """A media file that cannot be used, with the reason."""


@contextlib.contextmanager
def as_media_error(path: Path) -> Iterator[None]:
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


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    with as_media_error(path), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with Image.open(path) as image:
            if image.width * image.height > MOST_PIXELS:
                raise ValueError(f"{image.width}x{image.height} is more than {MOST_PIXELS // 10**6} megapixels")
            yield image


def _is_turned(image: Image.Image) -> bool:
    """Whether EXIF asks for a rotation or a mirror. A damaged EXIF asks for nothing."""
    try:
        return image.getexif().get(ExifTags.Base.Orientation) in range(2, 9)
    except Exception:  # Pillow raises errors of many types on damaged EXIF data
        return False


def _upright(image: Image.Image) -> Image.Image:
    return ImageOps.exif_transpose(image) if _is_turned(image) else image


def load_image(path: Path) -> np.ndarray:
    """An image with its EXIF rotation applied, (H, W, 3) uint8 RGB."""
    with _opened(path) as image:
        return to_rgb(_upright(image))


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
        if crop.scale > 1 and crop.resized[0] * crop.resized[1] > MOST_ENLARGED_PIXELS:
            return _enlarged_crop(pixels, crop, bucket)
        if crop.scale > 1:
            pixels = np.asarray(Image.fromarray(pixels).resize(crop.resized, Image.Resampling.LANCZOS))
        else:
            pixels = cv2.resize(pixels, crop.resized, interpolation=cv2.INTER_AREA)
        pixels = pixels[crop.top : crop.top + bucket[1], crop.left : crop.left + bucket[0]]
    # Arrays from Pillow are read-only, and torch warns about those.
    return np.require(pixels, requirements=("C", "W"))


def _enlarged_crop(pixels: np.ndarray, crop: ResizeCrop, bucket: Size) -> np.ndarray:
    """What enlarging and then cropping would give, without the enlarged picture: 6000x20 becomes 163200x544."""
    starts, stops, box = [], [], []
    for size, resized, first, length in zip(
        pixels.shape[1::-1], crop.resized, (crop.left, crop.top), bucket, strict=True
    ):
        start, stop = first * size / resized, (first + length) * size / resized
        # Pillow keeps a box in float32, which is exact enough only in a small picture. Lanczos reaches 3 pixels far.
        starts.append(max(int(start) - LANCZOS_REACH, 0))
        stops.append(min(math.ceil(stop) + LANCZOS_REACH, size))
        box.append((start - starts[-1], stop - starts[-1]))
    part = Image.fromarray(np.ascontiguousarray(pixels[starts[1] : stops[1], starts[0] : stops[0]]))
    (left, right), (top, bottom) = box
    return np.array(part.resize(bucket, Image.Resampling.LANCZOS, box=(left, top, right, bottom)))


def image_info(path: Path) -> MediaInfo:
    with _opened(path) as image:
        notes = ("turned by EXIF",) if _is_turned(image) else ()
        notes += (f"first of {image.n_frames} frames",) if getattr(image, "n_frames", 1) > 1 else ()
        # Depending on the format, Pillow reports the size before or after the rotation.
        width, height = _upright(image).size
    return MediaInfo(width, height, notes=notes)
