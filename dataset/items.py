"""From a source and the dataset's settings to its items: which clips, in which bucket, in which cache file.

The caching scripts and the trainer plan items with the same functions, so they agree on the cache files.
"""

from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from dataset.buckets import FrameSpan, Size, choose_bucket, kept_by_counting, resampled_count, spans_of_video
from dataset.cache import latent_cache_path
from dataset.config_utils import DatasetSettings

# Written beside a MediaInfo in the manifest; raised when files must be looked at again.
PROBE_KEY = "probe_version"
PROBE_VERSION = 2


@dataclass(frozen=True)
class MediaInfo:
    """What is known of a media file without decoding all of it; the manifest keeps it.

    Attributes:
        frames: number of frames, 1 for an image.
        last_time: when the last frame is shown, in seconds after the first; 0 for images and folders of frames.
        fps: the measured frame rate; 0 for images and folders of frames.
        digest: hash of the file's content.
        decoder: the first version of our decoder that reads the same pixels as today's. It is part of the provenance
            where it is not 1, so that only caches whose pixels changed are made again.
        notes: peculiarities of the file in words.
    """

    width: int
    height: int
    frames: int = 1
    last_time: float = 0.0
    fps: float = 0.0
    digest: str = ""
    decoder: int = 1
    notes: tuple[str, ...] = ()

    @property
    def size(self) -> Size:
        return self.width, self.height

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"notes": list(self.notes), PROBE_KEY: PROBE_VERSION}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "MediaInfo":
        """Raises KeyError or TypeError where the values were written by a version that knew less."""
        values = {"decoder": 1, **values}
        return cls(**{field.name: values[field.name] for field in fields(cls)} | {"notes": tuple(values["notes"])})


@dataclass(frozen=True)
class Item:
    """One training sample with its own latent cache: an image, or a clip of a video."""

    name: str
    source: str  # name of the source
    size: Size  # of the original media
    bucket: Size
    span: FrameSpan | None  # frames of the clip; None: an image
    path: Path  # of the latent cache
    decoder: int = 1  # see MediaInfo

    @property
    def frame_count(self) -> int:
        """Frames of the clip, 1 for an image."""
        return self.span.length if self.span else 1

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(f, h, w)"""
        return (self.frame_count - 1) // 4 + 1, self.bucket[1] // 8, self.bucket[0] // 8

    @property
    def bucket_name(self) -> str:
        """Width x height x frames; items with the same bucket name may share a batch."""
        return f"{self.bucket[0]}x{self.bucket[1]}x{self.frame_count}"


@dataclass(frozen=True)
class ItemPlan:
    """The items of one source, and the entries of target_frames that it is too short for."""

    items: tuple[Item, ...] = ()
    dropped_targets: tuple[int, ...] = ()


def resample_rule(settings: DatasetSettings) -> str:
    """How frames are resampled in time, as text for the provenance: `as is`, `auto to 24 fps`, `30 to 24 fps counted`.

    `30 to 24 fps`, without `counted`, was another rule, which chose by time. With equal rates both choose all frames.
    """
    if settings.source_fps is None:
        return "as is"
    if settings.source_fps == "auto":
        return f"auto to {settings.target_fps:g} fps"
    rule = "" if settings.source_fps == settings.target_fps else " counted"
    return f"{settings.source_fps:g} to {settings.target_fps:g} fps{rule}"


def frames_after_resampling(info: MediaInfo, settings: DatasetSettings) -> int:
    """Number of frames of a video after resampling; its clips are cut from these."""
    if settings.source_fps is None or (settings.source_fps == "auto" and info.fps == 0):
        return info.frames
    if settings.source_fps == "auto":
        return resampled_count(info.last_time, settings.target_fps)
    return sum(1 for _ in kept_by_counting(range(info.frames), settings.source_fps, settings.target_fps))


def plan_items(settings: DatasetSettings, source: str, info: MediaInfo) -> ItemPlan:
    """The items that the settings make of a source; `source` is its name.

    Raises:
        ValueError: the media are too small for a bucket.
    """
    bucket = choose_bucket(info.size, settings)

    def item(span: FrameSpan | None) -> Item:
        name = f"{source}_{span.start:05d}-{span.length:03d}" if span else source
        path = latent_cache_path(settings.cache_directory, name, info.size)
        return Item(name, source, info.size, bucket, span, path, info.decoder)

    if not settings.is_video:
        return ItemPlan((item(None),))
    spans = spans_of_video(frames_after_resampling(info, settings), settings)
    # The lengths in target_frames are distinct, so no span appears twice.
    items = tuple(item(span) for of_length in spans.values() for span in of_length)
    return ItemPlan(items, tuple(length for length, of_length in spans.items() if not of_length))


def item_provenance(item: Item, settings: DatasetSettings, stamp: list[int]) -> dict[str, Any]:
    """Everything that an item's latents depend on, except the VAE.

    Args:
        stamp: size and modification time of the source.
    """
    return {
        "source": stamp,
        "bucket": list(item.bucket),
        "clip": [item.span.start, item.span.length] if item.span else None,
        "fps": resample_rule(settings) if item.span else None,
        **({} if item.decoder == 1 else {"decoder": item.decoder}),
    }
