"""Pixels of images and videos: uint8 RGB, upright, resized and cropped to a bucket.

Arrays are (H, W, 3) for a frame and (F, H, W, 3) for a clip. Whatever a decoder says of a broken file becomes a
`MediaError`, so that the caller can list the file and go on.
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
from dataset.buckets import Size, fit_to_bucket, resampled_indices
from dataset.config_utils import DatasetSettings
from dataset.items import Item, Probe
from dataset.sources import Source, frame_files
from utils.errors import one_line

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
    if size != bucket:
        fit = fit_to_bucket(size, bucket)
        if fit.scale > 1:
            pixels = np.asarray(Image.fromarray(pixels).resize(fit.scaled, Image.Resampling.LANCZOS))
        else:
            pixels = cv2.resize(pixels, fit.scaled, interpolation=cv2.INTER_AREA)
        pixels = pixels[fit.top : fit.top + bucket[1], fit.left : fit.left + bucket[0]]
    # What Pillow hands out is read-only, of which torch complains.
    return np.require(pixels, requirements=("C", "W"))


def _probe_image(path: Path) -> Probe:
    with _as_media_error(path), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with Image.open(path) as image:
            is_turned = image.getexif().get(ExifTags.Base.Orientation) in range(2, 9)
            notes = ("turned by EXIF",) if is_turned else ()
            notes += (f"first of {image.n_frames} frames",) if getattr(image, "n_frames", 1) > 1 else ()
            # Some of Pillow's readers state the size before turning, some the size after it.
            width, height = (ImageOps.exif_transpose(image) if is_turned else image).size
    return Probe(width, height, notes=notes)


def _probe_frame_folder(path: Path) -> Probe:
    frames = frame_files(path)
    if not frames:
        raise MediaError(f"{path}: no images in this folder")
    first = _probe_image(frames[0])
    return Probe(first.width, first.height, frames=len(frames))


def _probe_video(path: Path) -> Probe:
    with _as_media_error(path):
        frames, first = video.timeline(path), video.first_frame(path)
        if not frames.pts:
            raise ValueError("no frame can be decoded")
    count, last_time = len(frames.pts), frames.seconds[-1]
    fps = (count - 1) / last_time if last_time > 0 else 0.0
    return Probe(*first.size, count, last_time, fps, notes=first.notes)


def probe(source: Source) -> Probe:
    """Size, frames and times of a source, without decoding more than a first frame where that is possible.

    Raises:
        MediaError: the file cannot be opened or holds nothing usable.
    """
    probers = {"image": _probe_image, "frames": _probe_frame_folder, "video": _probe_video}
    found = probers[source.kind](source.path)
    with _as_media_error(source.path):
        return replace(found, digest=source.identity)


def _chosen_frames(item: Item, settings: DatasetSettings, seconds: Sequence[float]) -> list[int]:
    """Indices into the file's frames, one for each frame of the clip; `seconds` says when each is shown."""
    window = range(item.clip.start, item.clip.start + item.clip.length)
    if settings.source_fps is None or (settings.source_fps == "auto" and seconds[-1] == 0):
        return list(window)
    if settings.source_fps != "auto":
        seconds = [index / settings.source_fps for index in range(len(seconds))]
    resampled = resampled_indices(seconds, settings.target_fps)
    return [resampled[k] for k in window]


def _clips_of_video(source: Source, items: Sequence[Item], settings: DatasetSettings) -> list[np.ndarray | MediaError]:
    """Each frame is decoded once, however many clips hold it."""
    frames = video.timeline(source.path)
    chosen = [_chosen_frames(item, settings, frames.seconds) for item in items]
    places = defaultdict(list)  # by index of the frame: (number of the item, position in its clip)
    for number, indices in enumerate(chosen):
        for position, index in enumerate(indices):
            places[index].append((number, position))
    clips = [np.empty((item.clip.length, item.bucket[1], item.bucket[0], 3), np.uint8) for item in items]
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
    """The exact pixels that are encoded for items of one source, each (F, H, W, 3) uint8, or why there are none."""
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
    """The exact pixels that are encoded for one item, (F, H, W, 3) uint8.

    Raises:
        MediaError: a frame that is needed cannot be decoded.
    """
    (pixels,) = load_items(source, [item], settings)
    if isinstance(pixels, MediaError):
        raise pixels
    return pixels
