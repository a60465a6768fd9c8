"""A small dataset of images and videos, and cache_latents.py run on it."""

import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from dataset.cache import text_cache_path, write_text_cache
from dataset.config_utils import load_dataset_config
from dataset.sources import list_sources
from tests.media_samples import write_caption, write_image, write_video

ROOT = Path(__file__).parents[1]
VIDEO_ITEMS = 14 + 2 + 9 + 1  # every frame of both videos, and the chunks of 5 frames that fit


@dataclass
class MediaWorld:
    """A config with one image and one video dataset, and the way to run the script on it."""

    folder: Path
    config: Path
    vae: Path
    run: Callable[..., str]

    @property
    def images(self) -> Path:
        return self.folder / "images"

    @property
    def videos(self) -> Path:
        return self.folder / "videos"

    def caches(self) -> dict[str, Path]:
        return {path.name: path for path in self.folder.glob("c*/*_hv.safetensors")}

    def stamps(self) -> dict[str, int]:
        return {name: path.stat().st_mtime_ns for name, path in self.caches().items()}

    def command(self, *more: object) -> list[str]:
        words = ["--dataset_config", self.config, "--vae", self.vae, "--device", "cpu", *more]
        return [sys.executable, str(ROOT / "cache_latents.py"), *map(str, words)]


def write_media(folder: Path) -> Path:
    """Three images and two videos with captions; returns their dataset config."""
    for name in ("images", "videos"):
        (folder / name).mkdir()
    for name, size in (("a.png", (100, 80)), ("b c.jpg", (64, 64)), ("猫#[1].png", (50, 90))):
        write_caption(write_image(folder / "images" / name, size))
    for name, frames in (("v.mp4", 14), ("w.webm", 9)):
        codec = "libvpx" if name.endswith("webm") else "libx264"
        write_caption(write_video(folder / "videos" / name, frames=frames, size=(64, 32), codec=codec))
    config = folder / "data.toml"
    root = folder.as_posix()
    config.write_text(
        f"[general]\nresolution = [32, 32]\nenable_bucket = true\n"
        f"[[datasets]]\nimage_directory = '{root}/images'\ncache_directory = '{root}/c1'\n"
        f"[[datasets]]\nvideo_directory = '{root}/videos'\ncache_directory = '{root}/c2'\n"
        f"target_frames = [1, 5]\nframe_extraction = 'chunk'\n",
        encoding="utf-8",
    )
    return config


def counts(output: str) -> list[list[int]]:
    """(new, changed, kept, skipped, orphaned) of each dataset in the closing table."""
    rows = re.findall(r"^  \[\[\w+\]\] \d +((?:\d+ +){5})\S", output.split("latent caches")[-1], re.M)
    return [[int(word) for word in row.split()] for row in rows]


def write_text_caches(media: MediaWorld) -> None:
    for settings in load_dataset_config(media.config).datasets:
        for source in (source for source in list_sources(settings) if source.problem is None):
            tensors = torch.zeros(256, 8), torch.ones(256), torch.zeros(4), torch.ones(77)
            write_text_cache(text_cache_path(settings.cache_directory, source.name), *tensors, source.caption, {})
