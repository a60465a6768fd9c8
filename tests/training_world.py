"""What tests of the trainer train on: caches without media, as on a machine that holds only the caches."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from dataset.cache import Manifest, text_cache_path, write_latent_cache, write_text_cache
from dataset.config_utils import load_dataset_config
from dataset.items import Probe, made_from, plan_items
from utils.tiny_models import DitSize

STAMP = [1000, 0]


@dataclass(frozen=True)
class World:
    """A dataset config and its cache folder."""

    config: Path
    cache: Path

    def latent_files(self) -> list[Path]:
        return sorted(path for path in self.cache.glob("*_hv.safetensors"))


def write_world(
    folder: Path, items: int = 5, batch_size: int = 1, sizes: Sequence[tuple[int, int]] = ((64, 48),), seed: int = 0
) -> World:
    """Writes `items` cached images whose sizes take turns; sizes are (width, height)."""
    cache = folder / "cache"
    cache.mkdir(parents=True)
    config = folder / "dataset.toml"
    config.write_text(
        f"[general]\nresolution = [64, 48]\nbatch_size = {batch_size}\nenable_bucket = true\n"
        f"bucket_no_upscale = true\n[[datasets]]\nimage_directory = '{(folder / 'absent').as_posix()}'\n"
        f"cache_directory = '{cache.as_posix()}'\n",
        encoding="utf-8",
    )
    settings = load_dataset_config(config).datasets[0]
    manifest = Manifest(cache, "latents")
    size = DitSize()
    for index in range(items):
        name = f"item{index}"
        generator = torch.Generator().manual_seed(seed * 1000 + index)
        probe = Probe(*sizes[index % len(sizes)])
        manifest.sources[name] = {"stamp": STAMP, "probe": probe.to_json()}
        for item in plan_items(settings, name, probe).items:
            latents = 2.1 * torch.randn(16, *item.latent_shape, generator=generator)
            write_latent_cache(item.path, latents, item.size, None, made_from(item, settings, STAMP))
        mask = (torch.arange(256) < 5 + 3 * index).long()
        write_text_cache(
            text_cache_path(cache, name),
            torch.randn(256, size.text_dim, generator=generator),
            mask,
            torch.randn(size.text_dim_2, generator=generator),
            torch.ones(77),
            f"caption {index}",
            {},
        )
    manifest.save()
    return World(config, cache)
