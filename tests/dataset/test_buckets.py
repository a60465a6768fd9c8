"""Clips, buckets, crops and resampling against the rules of docs/formats.md, section 3, computed by hand."""

import math

import pytest

from dataset.buckets import (
    FrameSpan,
    bucket_sizes,
    choose_bucket,
    kept_by_counting,
    nearest_in_time,
    resampled_count,
    resize_crop,
    spans_of_video,
)
from dataset.config_utils import DatasetSettings


def settings(**keys) -> DatasetSettings:
    return DatasetSettings(video_directory="videos", cache_directory="cache", **keys)


def pairs(frames: int, **keys) -> list[tuple[int, int]]:
    clips = spans_of_video(frames, settings(**keys))
    return [(clip.start, clip.length) for of_target in clips.values() for clip in of_target]


GOLDEN = {
    "head": ({"target_frames": [1, 13, 25]}, [(0, 1), (0, 13), (0, 25)]),
    "chunk": ({"target_frames": [13, 25]}, [(0, 13), (13, 13), (26, 13), (0, 25)]),
    "slide": (
        {"target_frames": [1, 13, 25], "frame_stride": 10},
        [(0, 1), (10, 1), (20, 1), (30, 1), (0, 13), (10, 13), (20, 13), (0, 25), (10, 25)],
    ),
    "uniform": (
        {"target_frames": [1, 13, 25], "frame_sample": 4},
        [(0, 1), (13, 1), (26, 1), (39, 1), (0, 13), (9, 13), (18, 13), (27, 13), (0, 25), (5, 25), (10, 25), (15, 25)],
    ),
    "full": ({"max_frames": 129}, [(0, 37)]),
}


@pytest.mark.parametrize("mode", GOLDEN)
def test_clips_of_forty_frames(mode: str) -> None:
    keys, expected = GOLDEN[mode]
    assert pairs(40, frame_extraction=mode, **keys) == expected


def test_chunk_of_one_frame_takes_every_frame() -> None:
    assert pairs(7, frame_extraction="chunk", target_frames=[1]) == [(start, 1) for start in range(7)]


def test_targets_are_rounded_sorted_and_distinct() -> None:
    assert settings(target_frames=[46, 25, 45, 1, 3]).target_frames == (1, 25, 45)


def test_targets_longer_than_the_video_yield_nothing_but_are_reported() -> None:
    clips = spans_of_video(20, settings(target_frames=[13, 25]))
    assert clips == {13: [FrameSpan(0, 13)], 25: []}


def test_uniform_one_sample_is_head_and_full_respects_max_frames() -> None:
    assert pairs(40, frame_extraction="uniform", frame_sample=1, target_frames=[13]) == [(0, 13)]
    assert pairs(40, frame_extraction="full", max_frames=18) == [(0, 17)]
    assert pairs(3, frame_extraction="full") == [(0, 1)]


def test_uniform_names_no_clip_twice() -> None:
    assert pairs(14, frame_extraction="uniform", frame_sample=9, target_frames=[13]) == [(0, 13), (1, 13)]


def reference_buckets(resolution: tuple[int, int]) -> list[tuple[int, int]]:
    """The rule in the words of docs/formats.md."""
    area = resolution[0] * resolution[1]
    side = math.floor(math.sqrt(area))
    found = set()
    width = 16 * math.floor(math.floor(side / 2) / 16)
    while width < side + 16:
        height = 16 * math.floor(math.floor(area / width) / 16)
        found |= {(width, height), (height, width)}
        width += 16
    return sorted(found)


SIZES = [
    *[(960, 544), (1920, 1080), (1080, 1920), (640, 480), (480, 640), (100, 100), (101, 99), (333, 777)],
    *[(2048, 858), (720, 576), (4000, 3000), (17, 400), (400, 17), (512, 512), (513, 511), (1, 1)],
    *[(1279, 719), (128, 72), (5000, 20), (256, 144)],
]


@pytest.mark.parametrize("resolution", [(960, 544), (512, 512), (256, 256), (1280, 720), (300, 200)])
def test_buckets_and_crops_follow_the_reference_rule(resolution: tuple[int, int]) -> None:
    buckets = reference_buckets(resolution)
    assert list(bucket_sizes(resolution)) == buckets
    chosen = settings(resolution=list(resolution), enable_bucket=True)
    for width, height in SIZES:
        errors = [abs(w / h - width / height) for w, h in buckets]
        expected = buckets[errors.index(min(errors))]
        assert choose_bucket((width, height), chosen) == expected

        crop = resize_crop((width, height), expected)
        scale = max(expected[0] / width, expected[1] / height)
        assert crop.resized == (math.floor(width * scale + 0.5), math.floor(height * scale + 0.5))
        assert crop.left == (crop.resized[0] - expected[0]) // 2 >= 0
        assert crop.top == (crop.resized[1] - expected[1]) // 2 >= 0


def test_the_buckets_of_64_by_64_pixels() -> None:
    """Area 4096: 4096 / 32 = 128, 4096 / 48 = 85 and 4096 / 64 = 64, rounded down to multiples of 16."""
    assert bucket_sizes((64, 64)) == ((32, 128), (48, 80), (64, 64), (80, 48), (128, 32))


@pytest.mark.parametrize(
    ("size", "bucket"),
    [
        # 2.6 is 0.93 from 80/48 and 1.4 from 128/32; by the logarithm it would be nearer to 128/32.
        ((260, 100), (80, 48)),
        # 0.4 is 0.2 from 48/80 and 0.15 from 32/128; by the logarithm it would be nearer to 48/80.
        ((100, 250), (32, 128)),
        ((500, 500), (64, 64)),
        ((1000, 100), (128, 32)),
    ],
)
def test_the_bucket_is_the_one_with_the_nearest_ratio(size: tuple[int, int], bucket: tuple[int, int]) -> None:
    assert choose_bucket(size, settings(resolution=[64, 64], enable_bucket=True)) == bucket


@pytest.mark.parametrize(
    ("size", "resized", "corner"),
    # Into 80 x 48: twice the size and 20 of 100 columns cut off; half the size and 33 of 81 rows, 16 of them above.
    [((50, 24), (100, 48), (10, 0)), ((160, 162), (80, 81), (0, 16)), ((40, 24), (80, 48), (0, 0))],
)
def test_crops_by_hand(size: tuple[int, int], resized: tuple[int, int], corner: tuple[int, int]) -> None:
    crop = resize_crop(size, (80, 48))
    assert (crop.resized, (crop.left, crop.top)) == (resized, corner)


def test_no_upscale_keeps_small_items_at_their_own_size() -> None:
    chosen = settings(resolution=[512, 512], enable_bucket=True, bucket_no_upscale=True)
    assert choose_bucket((300, 200), chosen) == (288, 192)
    assert choose_bucket((512, 512), chosen) == (512, 512)
    assert choose_bucket((2000, 2000), chosen) == (512, 512)
    with pytest.raises(ValueError, match="300x15"):
        choose_bucket((300, 15), chosen)


def test_without_buckets_every_item_gets_the_resolution() -> None:
    assert choose_bucket((33, 1000), settings(resolution=[960, 544])) == (960, 544)


@pytest.mark.parametrize("fps", [12, 23.976, 25, 30, 50, 60])
def test_resampled_frames_are_the_nearest_in_time(fps: float) -> None:
    times = [index / fps for index in range(100)]
    indices = list(nearest_in_time(zip(times, range(len(times)), strict=True), 24))
    assert len(indices) == resampled_count(times[-1], 24)
    for k, index in enumerate(indices):
        assert abs(times[index] - k / 24) <= 0.5 / fps + 1e-9
        assert abs(times[index] - k / 24) <= min(abs(time - k / 24) for time in times) + 1e-6


def test_resampling_survives_times_rounded_to_milliseconds() -> None:
    times = [round(index / 24, 3) for index in range(24)]  # as in Matroska; the last is 0.958 instead of 0.9583
    assert list(nearest_in_time(zip(times, range(len(times)), strict=True), 24)) == list(range(24))


def test_a_stated_rate_drops_frames_as_the_reference_tool_does() -> None:
    assert list(kept_by_counting(range(17), 30, 24)) == [0, 2, 3, 4, 5, 7, 8, 9, 11, 12, 13, 14, 15]
    assert list(kept_by_counting(range(9), 60, 24)) == [0, 3, 5, 8]
    assert list(kept_by_counting(range(9), 12, 24)) == list(range(9))
    assert list(kept_by_counting(range(9), 24, 24)) == list(range(9))
