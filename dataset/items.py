"""From a source and the settings to the items of training: which clips, in which bucket, in which cache file.

The caching scripts and the trainer plan with the same functions, so both speak of the same files.
"""

from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from dataset.buckets import Clip, Size, choose_bucket, clips_of_video, resampled_count
from dataset.cache import latent_cache_path
from dataset.config_utils import DatasetSettings


@dataclass(frozen=True)
class Probe:
    """What is known of a media file without decoding it; kept in the manifest.

    `last_time` is when the last frame is shown, in seconds after the first; `fps` is measured. Both are 0 where the
    media have no clock (images, folders of frames). `digest` is the hash of the file's bytes.
    """

    width: int
    height: int
    frames: int = 1
    last_time: float = 0.0
    fps: float = 0.0
    digest: str = ""
    notes: tuple[str, ...] = ()

    @property
    def size(self) -> Size:
        return self.width, self.height

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"notes": list(self.notes)}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Probe":
        """Raises KeyError or TypeError when a manifest was not written by this version."""
        return cls(**{field.name: values[field.name] for field in fields(cls)} | {"notes": tuple(values["notes"])})


@dataclass(frozen=True)
class Item:
    """One latent cache: an image, or a clip of a video."""

    name: str
    source: str  # name of the source
    size: Size  # of the original media
    bucket: Size
    clip: Clip | None  # None: an image
    path: Path

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(f, h, w)"""
        frames = self.clip.length if self.clip else 1
        return (frames - 1) // 4 + 1, self.bucket[1] // 8, self.bucket[0] // 8

    @property
    def bucket_name(self) -> str:
        """Width x height x frames, the key by which batches are formed."""
        return f"{self.bucket[0]}x{self.bucket[1]}x{self.clip.length if self.clip else 1}"


@dataclass(frozen=True)
class Plan:
    """The items of one source, and the targets it is too short for."""

    items: tuple[Item, ...] = ()
    dropped_targets: tuple[int, ...] = ()


def resample_rule(settings: DatasetSettings) -> str:
    """How frames are chosen in time, as text for fingerprints: `as is`, `auto to 24 fps`, `30 to 24 fps`."""
    if settings.source_fps is None:
        return "as is"
    source = settings.source_fps if settings.source_fps == "auto" else f"{settings.source_fps:g}"
    return f"{source} to {settings.target_fps:g} fps"


def frames_after_resampling(probe: Probe, settings: DatasetSettings) -> int:
    """How many frames the clips are taken from."""
    if settings.source_fps is None or (settings.source_fps == "auto" and probe.fps == 0):
        return probe.frames
    last_time = probe.last_time if settings.source_fps == "auto" else (probe.frames - 1) / settings.source_fps
    return resampled_count(last_time, settings.target_fps)


def plan_items(settings: DatasetSettings, source: str, probe: Probe) -> Plan:
    """The items that the settings make of a source.

    Raises:
        ValueError: the media are too small for a bucket.
    """
    bucket = choose_bucket(probe.size, settings)

    def item(clip: Clip | None) -> Item:
        name = f"{source}_{clip.start:05d}-{clip.length:03d}" if clip else source
        path = latent_cache_path(settings.cache_directory, name, probe.size)
        return Item(name, source, probe.size, bucket, clip, path)

    if not settings.is_video:
        return Plan((item(None),))
    clips = clips_of_video(frames_after_resampling(probe, settings), settings)
    # Two targets never give the same clip, because targets are distinct.
    items = tuple(item(clip) for of_target in clips.values() for clip in of_target)
    return Plan(items, tuple(target for target, of_target in clips.items() if not of_target))


def made_from(item: Item, settings: DatasetSettings, stamp: list[int]) -> dict[str, Any]:
    """What an item's latents depend on, besides the VAE; `stamp` is size and modification time of the source."""
    return {
        "source": stamp,
        "bucket": list(item.bucket),
        "clip": [item.clip.start, item.clip.length] if item.clip else None,
        "fps": resample_rule(settings) if item.clip else None,
    }
