"""What the latents of a clip depend on, and how many frames a resampled video has."""

from pathlib import Path

import pytest

from dataset.config_utils import DatasetSettings
from dataset.items import MediaInfo, frames_after_resampling, item_provenance, plan_items


def settings(**keys) -> DatasetSettings:
    return DatasetSettings(video_directory="videos", cache_directory="cache", resolution=[64, 48], **keys)


def provenance(**keys) -> dict:
    given = settings(target_frames=[5], **keys)
    (item,) = plan_items(given, "cat", MediaInfo(128, 96, frames=40, last_time=1.3, fps=30.0)).items
    return item_provenance(item, given, [10, 20])


@pytest.mark.parametrize(
    ("keys", "fps"),
    [
        ({}, "as is"),
        ({"source_fps": 30.0}, "30 to 24 fps counted"),
        ({"source_fps": 30.0, "target_fps": 12.5}, "30 to 12.5 fps counted"),
        ({"source_fps": "auto"}, "auto to 24 fps"),
    ],
)
def test_the_frame_rates_are_part_of_the_fingerprint(keys: dict, fps: str) -> None:
    assert provenance(**keys) == {"source": [10, 20], "bucket": [64, 48], "clip": [0, 5], "fps": fps}


@pytest.mark.parametrize(
    ("keys", "frames"),
    # 40 frames at 30 a second last 1.3 s: 31.2 intervals at 24 a second.
    [({}, 40), ({"source_fps": 30.0}, 32), ({"source_fps": "auto"}, 32), ({"source_fps": 30.0, "target_fps": 15}, 20)],
)
def test_frames_after_resampling(keys: dict, frames: int) -> None:
    info = MediaInfo(128, 96, frames=40, last_time=1.3, fps=30.0)
    assert frames_after_resampling(info, settings(target_frames=[5], **keys)) == frames


def test_shape_and_names_of_an_item() -> None:
    info = MediaInfo(128, 96, frames=40)
    first, second = plan_items(settings(target_frames=[13], frame_extraction="chunk"), "cat", info).items[:2]
    assert (first.latent_shape, first.bucket_name) == ((4, 6, 8), "64x48x13")
    assert second.path == Path("cache/cat_00013-013_0128x0096_hv.safetensors")
