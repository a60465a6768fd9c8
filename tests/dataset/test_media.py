"""Decoding: frames are recognised by their content; the tests write a file for every codec and peculiarity."""

import math
import warnings
from pathlib import Path

import av
import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from dataset.buckets import FrameSpan
from dataset.config_utils import DatasetSettings
from dataset.items import Item, frames_after_resampling, plan_items
from dataset.media import MediaError, load_image, load_pixels, read_media_info, resize_to_bucket, to_rgb
from dataset.sources import Source
from tests.media_samples import number_of, numbered_frame, turn_video, write_image, write_video

CODECS = {
    "h264.mp4": {},
    "sound.mp4": {"audio": True},
    "transport.ts": {},
    "ten_bit.mp4": {"codec": "libx265", "pix_fmt": "yuv420p10le", "options": {"x265-params": "log-level=none"}},
    "hidden_frames.webm": {"codec": "libvpx", "options": {"auto-alt-ref": "1", "lag-in-frames": "16"}},
    "vp9.webm": {"codec": "libvpx-vp9", "options": {"cpu-used": "8"}},
    "b_frames.avi": {"codec": "mpeg4", "options": {"bf": "2"}},
    "program.mpg": {"codec": "mpeg2video"},
    "interlaced.mp4": {"options": {"x264-params": "interlaced=1"}},
    "four_two_two.mov": {"codec": "prores_ks", "pix_fmt": "yuv422p10le"},
    "old.wmv": {"codec": "wmv2"},
}


def settings(**keys) -> DatasetSettings:
    return DatasetSettings(**{"video_directory": "v", "cache_directory": "c", "resolution": [128, 64]} | keys)


def source(path: Path) -> Source:
    kind = "frames" if path.is_dir() else "video" if path.suffix not in (".png", ".jpg", ".tif", ".webp") else "image"
    return Source(path, path.stem, kind)


def clip(path: Path, start: int, length: int, bucket: tuple[int, int] = (128, 64), **keys) -> np.ndarray:
    item = Item(path.stem, path.stem, (128, 64), bucket, FrameSpan(start, length), path)
    return load_pixels(source(path), item, settings(**keys))


def numbers(frames: np.ndarray) -> list[int]:
    return [number_of(frame) for frame in frames]


@pytest.mark.parametrize("name", CODECS)
def test_each_frame_of_each_codec_is_the_one_asked_for(tmp_path: Path, name: str) -> None:
    path = write_video(tmp_path / name, frames=40, **CODECS[name])
    found = read_media_info(source(path))
    assert (found.frames, found.size) == (40, (128, 64))
    assert math.isclose(found.fps, 24, rel_tol=1e-3)
    assert numbers(clip(path, 5, 33)) == list(range(5, 38))
    assert numbers(clip(path, 39, 1)) == [39]


@pytest.mark.parametrize("mode", ["head", "chunk", "slide", "uniform", "full"])
def test_extraction_modes_on_a_real_file(tmp_path: Path, mode: str) -> None:
    path = write_video(tmp_path / "v.mp4", frames=40)
    keys = settings(target_frames=[13], frame_extraction=mode, frame_stride=10, frame_sample=4)
    items = plan_items(keys, "v", read_media_info(source(path))).items
    for item in items:
        expected = list(range(item.span.start, item.span.start + item.span.length))
        assert numbers(load_pixels(source(path), item, keys)) == expected
        assert item.name == f"v_{item.span.start:05d}-{item.span.length:03d}"


def test_a_late_clip_is_found_by_seeking(tmp_path: Path) -> None:
    path = write_video(tmp_path / "long.mp4", frames=900, size=(64, 32), options={"g": "60", "preset": "ultrafast"})
    assert numbers(clip(path, 700, 5)) == [number % 256 for number in range(700, 705)]


@pytest.mark.parametrize("fps", [12, 23.976, 25, 30, 60])
def test_auto_resamples_constant_rates(tmp_path: Path, fps: float) -> None:
    path = write_video(tmp_path / "v.mp4", frames=60, fps=fps)
    _check_times(path, [index / fps for index in range(60)], half=max(0.5 / fps, 1 / 48))


def test_auto_resamples_a_variable_rate(tmp_path: Path) -> None:
    steps = np.where(np.arange(60) % 7 < 3, 0.02, 0.045)
    times = [0.0, *np.cumsum(steps)[:-1].round(3)]
    path = write_video(tmp_path / "v.mkv", frames=60, times=times)
    _check_times(path, times, half=0.045 / 2 + 0.001)


def _check_times(path: Path, times: list[float], half: float) -> None:
    keys = settings(source_fps="auto")
    count = frames_after_resampling(read_media_info(source(path)), keys)
    assert abs(count - (times[-1] * 24 + 1)) <= 1
    for k, number in enumerate(numbers(clip(path, 0, count, source_fps="auto"))):
        assert abs(times[number] - k / 24) <= half + 1e-3


def test_a_stated_rate_counts_frames_and_target_fps_changes_the_grid(tmp_path: Path) -> None:
    path = write_video(tmp_path / "v.mp4", frames=40, fps=24)
    assert numbers(clip(path, 0, 9, source_fps=48)) == [2 * k for k in range(9)]
    assert numbers(clip(path, 0, 9, source_fps=24, target_fps=12)) == [2 * k for k in range(9)]
    assert numbers(clip(path, 0, 9, source_fps=12)) == list(range(9)), "the reference tool repeats no frame"
    assert numbers(clip(path, 0, 8, source_fps=30)) == [0, 2, 3, 4, 5, 7, 8, 9], "seen in the reference tool"


def test_frames_are_taken_as_they_are_without_source_fps(tmp_path: Path) -> None:
    path = write_video(tmp_path / "v.mp4", frames=20, fps=60)
    assert numbers(clip(path, 0, 13)) == list(range(13))


def test_rotated_videos_come_out_upright(tmp_path: Path) -> None:
    for matrix, turns in (((0, 1, -1, 0), 1), ((-1, 0, 0, -1), 2), ((0, -1, 1, 0), 3)):
        path = write_video(tmp_path / f"{turns}.mp4", frames=13)
        turn_video(path, matrix)
        size = (64, 128) if turns % 2 else (128, 64)
        assert read_media_info(source(path)).size == size
        upright = clip(path, 0, 13, bucket=size)
        # Reading rotated the stored frames by the display matrix; rotate them back to read their numbers.
        assert numbers(np.stack([np.rot90(frame, turns) for frame in upright])) == list(range(13))


def test_a_folder_of_frames_is_a_video(tmp_path: Path) -> None:
    folder = tmp_path / "scene.01"
    folder.mkdir()
    for number in range(20):
        Image.fromarray(numbered_frame(number)).save(folder / f"{number:04d}.png")
    assert read_media_info(source(folder)).frames == 20
    assert numbers(clip(folder, 3, 13)) == list(range(3, 16))
    assert numbers(clip(folder, 0, 5, source_fps=48)) == [0, 2, 4, 6, 8]


def test_a_cover_picture_is_not_the_video(tmp_path: Path) -> None:
    path = tmp_path / "two.mkv"
    with av.open(str(path), "w") as container:
        streams = [container.add_stream("libx264", rate=24) for _ in range(2)]
        for stream, (width, height) in zip(streams, [(32, 32), (128, 64)], strict=True):
            stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for number in range(10):
            for stream in streams:
                picture = numbered_frame(number, stream.width, stream.height)
                container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        for stream in streams:
            container.mux(stream.encode())
    assert read_media_info(source(path)).size == (128, 64)
    assert numbers(clip(path, 2, 5)) == [2, 3, 4, 5, 6]


def test_a_truncated_video_is_used_up_to_its_end_or_reported(tmp_path: Path) -> None:
    path = write_video(tmp_path / "v.ts", frames=60)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    frames = read_media_info(source(path)).frames
    assert 0 < frames < 60
    with pytest.raises(MediaError, match=r"v\.ts"):
        clip(path, 40, 13)


def test_exif_rotation_is_applied(tmp_path: Path) -> None:
    upright = np.zeros((40, 60, 3), np.uint8)
    upright[:20, :30] = (250, 10, 10)
    stored = {1: upright, 3: np.rot90(upright, 2), 6: np.rot90(upright, 1), 8: np.rot90(upright, 3)}
    for orientation, pixels in stored.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        path = tmp_path / f"{orientation}.jpg"
        Image.fromarray(np.ascontiguousarray(pixels)).save(path, exif=exif, quality=95, subsampling=0)
        assert read_media_info(source(path)).size == (60, 40)
        loaded = load_image(path)
        assert loaded.shape == (40, 60, 3)
        assert np.abs(loaded.astype(int) - upright).mean() < 3


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.tif", "a.webp", "a.avif"])
def test_a_turned_image_is_measured_as_it_is_loaded(tmp_path: Path, name: str) -> None:
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        try:
            Image.new("RGB", (60, 40)).save(tmp_path / name, exif=exif)
        except (OSError, KeyError):
            pytest.skip("this Pillow does not write the format")
        assert read_media_info(source(tmp_path / name)).size == load_image(tmp_path / name).shape[1::-1], orientation


def test_every_kind_of_image_becomes_rgb(tmp_path: Path) -> None:
    grey16 = np.linspace(0, 65535, 64 * 48).reshape(48, 64).astype(np.uint16)
    rgb = np.stack([grey16 >> 8, grey16 >> 8, grey16 >> 8], axis=-1).astype(np.uint8)
    cases = {
        "grey16.png": Image.fromarray(grey16),
        "grey16.tif": Image.fromarray(grey16),
        "float.tif": Image.fromarray((grey16 / 65535).astype(np.float32)),
        "cmyk.jpg": Image.fromarray(rgb).convert("CMYK"),
        "palette.png": Image.fromarray(rgb).quantize(256),
        "grey.webp": Image.fromarray(rgb),
    }
    for name, image in cases.items():
        image.save(tmp_path / name, **({"lossless": True} if name.endswith("webp") else {}))
        loaded = load_image(tmp_path / name)
        assert loaded.dtype == np.uint8 and loaded.shape == (48, 64, 3)
        assert np.abs(loaded.astype(int) - rgb).max() <= 8, name


def test_alpha_is_laid_over_white() -> None:
    pixels = np.zeros((4, 4, 4), np.uint8)
    pixels[..., 0] = 200
    pixels[:2, :, 3] = 255
    pixels[3, :, 3] = 128
    rgb = to_rgb(Image.fromarray(pixels))
    assert rgb[0, 0].tolist() == [200, 0, 0]
    assert rgb[2, 0].tolist() == [255, 255, 255]
    assert np.abs(rgb[3, 0].astype(int) - [227, 127, 127]).max() <= 1


def test_avif_is_read_where_pillow_can(tmp_path: Path) -> None:
    path = tmp_path / "a.avif"
    try:
        Image.fromarray(numbered_frame(77)).save(path)
    except (OSError, KeyError):
        pytest.skip("this Pillow has no AVIF")
    assert number_of(load_image(path)) == 77


def test_shrinking_averages_areas() -> None:
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (128, 256, 3), dtype=np.uint8)
    expected = pixels.reshape(32, 4, 64, 4, 3).mean(axis=(1, 3))
    assert np.abs(resize_to_bucket(pixels, (64, 32)) - expected).max() <= 0.51


def test_enlarging_is_lanczos_and_crops_are_centred() -> None:
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (30, 50, 3), dtype=np.uint8)
    large = np.asarray(Image.fromarray(pixels).resize((107, 64), Image.Resampling.LANCZOS))
    assert np.array_equal(resize_to_bucket(pixels, (64, 64)), large[:, 21:85])
    assert resize_to_bucket(pixels, (50, 30)) is pixels


@pytest.mark.parametrize("bucket", [(48, 32), (96, 64), (24, 16)])
def test_torch_does_not_warn_about_an_image_that_needs_no_crop(tmp_path: Path, bucket: tuple[int, int]) -> None:
    pixels = resize_to_bucket(load_image(write_image(tmp_path / "a.png", (48, 32))), bucket)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.from_numpy(pixels)


def test_pixels_equal_the_reference_rule_for_many_sizes() -> None:
    rng = np.random.default_rng(1)
    sizes = [(w, h) for w in (33, 64, 100, 257) for h in (31, 64, 90, 129, 300)]
    for width, height in sizes:
        pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        for bucket in ((64, 64), (96, 48), (48, 96), (112, 80), (32, 32)):
            scale = max(bucket[0] / width, bucket[1] / height)
            scaled = (int(width * scale + 0.5), int(height * scale + 0.5))
            if scale > 1:
                whole = np.asarray(Image.fromarray(pixels).resize(scaled, Image.Resampling.LANCZOS))
            else:
                whole = cv2.resize(pixels, scaled, interpolation=cv2.INTER_AREA)
            left, top = (scaled[0] - bucket[0]) // 2, (scaled[1] - bucket[1]) // 2
            expected = whole[top : top + bucket[1], left : left + bucket[0]]
            assert np.array_equal(resize_to_bucket(pixels, bucket), expected)


def test_broken_images_are_media_errors(tmp_path: Path) -> None:
    good = write_image(tmp_path / "good.png").read_bytes()
    for name, data in {"cut.png": good[:200], "text.png": b"hello", "head.png": good[:8]}.items():
        path = tmp_path / name
        path.write_bytes(data)
        with pytest.raises(MediaError, match=name):
            load_image(path)


def test_extreme_pictures_are_cropped_before_they_are_enlarged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """6000x20 for a bucket of 320x272: enlarged as a whole it has 81,600 columns."""
    pixels = np.random.default_rng(0).integers(0, 256, (20, 6000, 3), dtype=np.uint8)
    expected = np.asarray(Image.fromarray(pixels).resize((81_600, 272), Image.Resampling.LANCZOS))[:, 40_640:40_960]
    sizes, real = [], Image.Image.resize

    def resize(image: Image.Image, size: tuple[int, int], *arguments, **keys) -> Image.Image:
        sizes.append(size)
        return real(image, size, *arguments, **keys)

    monkeypatch.setattr(Image.Image, "resize", resize)
    found = resize_to_bucket(pixels, (320, 272))
    assert sizes == [(320, 272)] and found.flags.writeable
    assert np.abs(found.astype(int) - expected).max() <= 1


def test_valid_pictures_that_pillow_refuses_by_default_are_read(tmp_path: Path) -> None:
    from PIL import PngImagePlugin

    text = PngImagePlugin.PngInfo()
    text.add_text("workflow", "x" * 3_000_000, zip=True)
    Image.fromarray(numbered_frame(77)).save(tmp_path / "text.png", pnginfo=text, icc_profile=b"\0" * 3_000_000)
    Image.fromarray(numbered_frame(77)).save(tmp_path / "exif.png", exif=b"MM\0*\0\0\0\x08\0\xffdamaged")
    for name in ("text.png", "exif.png"):
        assert read_media_info(source(tmp_path / name)).size == (128, 64)
        assert number_of(load_image(tmp_path / name)) == 77


def test_a_large_scan_is_measured_and_a_bomb_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "scan.png"
    Image.new("1", (20_000, 10_000)).save(path)
    assert read_media_info(source(path)).size == (20_000, 10_000)
    monkeypatch.setattr("dataset.media.images.MOST_PIXELS", 100_000_000)
    for look in (lambda path: read_media_info(source(path)), load_image):
        with pytest.raises(MediaError, match="20000x10000 is more than 100 megapixels"):
            look(path)


def test_a_frame_of_another_size_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "scene"
    folder.mkdir()
    for number in range(5):
        write_image(folder / f"{number}.png", (32, 32) if number != 3 else (32, 40))
    with pytest.raises(MediaError, match=r"3\.png: this frame is 32x40, but 0\.png is 32x32"):
        read_media_info(source(folder))


def test_only_folders_that_were_sorted_as_text_are_read_by_another_decoder(tmp_path: Path) -> None:
    for name, padding, decoder in (("padded", 2, 1), ("unpadded", 0, 2)):
        folder = tmp_path / name
        folder.mkdir()
        for number in range(12):
            Image.fromarray(numbered_frame(number)).save(folder / f"{number:0{padding}d}.png")
        info = read_media_info(source(folder))
        assert (info.frames, info.decoder) == (12, decoder)
        assert numbers(clip(folder, 0, 12)) == list(range(12))


def test_a_relative_name_with_a_colon_is_no_protocol(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_video(tmp_path / "a.mp4", 5).rename(tmp_path / "12:30.mp4")
    monkeypatch.chdir(tmp_path)
    assert read_media_info(source(Path("12:30.mp4"))).frames == 5


def test_interlaced_frames_are_deinterlaced(tmp_path: Path) -> None:
    """Even lines are light and odd ones dark, as in a fast motion: one of the two fields fills the whole frame."""
    path = tmp_path / "a.mp4"
    combed = np.full((64, 128, 3), 60, np.uint8)
    combed[::2] = 180
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=24, options={"x264-params": "interlaced=1:qp=4"})
        stream.width, stream.height, stream.pix_fmt = 128, 64, "yuv420p"
        for _ in range(5):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(combed, format="rgb24")))
        container.mux(stream.encode())
    assert "interlaced" in read_media_info(source(path)).notes
    luma = clip(path, 0, 5).mean(axis=-1)
    assert np.abs(np.diff(luma, axis=1)).max() < 12
    assert np.ptp(luma) < 12
