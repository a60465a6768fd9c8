"""The report on a dataset before caching, and --debug_mode."""

import enum
import re
import shutil
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from dataset.media import load_image, resize_to_bucket
from tests.media_samples import number_of, write_caption, write_image, write_video
from tests.media_world import VIDEO_ITEMS, MediaWorld
from utils.errors import UserError


def test_the_report_warns_of_probable_mistakes(media: MediaWorld) -> None:
    shutil.copy(media.images / "a.png", media.images / "twin.png")
    write_caption(media.images / "twin.png", "")
    write_image(media.images / "small.png", (20, 20))
    write_caption(media.images / "small.png")
    write_caption(write_video(media.videos / "fast.mp4", frames=10, fps=60, size=(64, 32)))
    media.config.write_text(media.config.read_text().replace("enable", "batch_size = 2\nenable"))
    output = media.run("--debug_mode", "html", "--debug_output", media.folder / "page.html")
    for words in (
        "empty captions (1): twin.png",
        "same content (1): a.png = twin.png",
        "smaller than their bucket, so enlarged (1): small.png (20x20)",
        "not 24 fps",
        "fast.mp4 (60.00)",
        "buckets with fewer items than batch_size 2",
        "steps per epoch:",
    ):
        assert words in output, words


def test_the_page_shows_the_exact_pixels(media: MediaWorld) -> None:
    import base64
    import io

    from PIL import Image

    page = media.folder / "page.html"
    write_caption(media.images / "a.png", "<script>alert(1)</script> & more")
    media.run("--debug_mode", "html", "--debug_output", page)
    assert not media.caches()
    text = page.read_text(encoding="utf-8")
    assert "&lt;script&gt;" in text and "<script" not in text and "http" not in text
    assert text.count("<figure>") == 3 + VIDEO_ITEMS
    encoded = re.search(r"<b>a\.png.*?base64,([^\"]+)", text, re.S)[1]
    shown = np.asarray(Image.open(io.BytesIO(base64.b64decode(encoded))).convert("RGB")).astype(int)
    expected = resize_to_bucket(load_image(media.images / "a.png"), (32, 32)).astype(int)
    assert shown.shape == expected.shape and np.abs(shown - expected).mean() < 6
    frames = re.findall(r"base64,([^\"]+)", text.split("<b>v.mp4")[1].split("<b>w.webm")[0])[:14]
    numbers = [number_of(np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))) for data in frames]
    assert numbers == list(range(14))


@pytest.mark.slow
@pytest.mark.skipif(not (shutil.which("chromium") or shutil.which("chrome")), reason="needs Chromium")
def test_the_page_opens_in_a_browser(media: MediaWorld) -> None:
    page = media.folder / "page.html"
    media.run("--debug_mode", "html", "--debug_output", page)
    shot = media.folder / "shot.png"
    browser = shutil.which("chromium") or shutil.which("chrome")
    words = ["--headless", "--no-sandbox", "--disable-gpu", "--window-size=1200,1600", f"--screenshot={shot}"]
    subprocess.run([browser, *words, page.as_uri()], check=True, capture_output=True, timeout=60)
    pixels = load_image(shot).astype(int)
    # The bars of the chart have the accent colour of the style sheet; the images are red.
    bars = (np.abs(pixels - [0x3B, 0x7D, 0xD8]).sum(axis=2) < 12).sum()
    reds = ((pixels[..., 0] > 150) & (pixels[..., 1] < 90)).sum()
    assert bars > 2000 and reds > 1000


def test_a_missing_display_or_package_is_one_line(media: MediaWorld, monkeypatch) -> None:
    for name in ("DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    if sys.platform == "linux":
        with pytest.raises(UserError, match="no display; use --debug_mode html"):
            media.run("--debug_mode", "image")
    monkeypatch.setitem(sys.modules, "ascii_magic", None)
    with pytest.raises(UserError, match="pip install ascii-magic"):
        media.run("--debug_mode", "console")


def test_windows_show_every_item_and_play_clips(media: MediaWorld, monkeypatch) -> None:
    import cv2

    shown: list[np.ndarray] = []
    monkeypatch.setenv("DISPLAY", ":0")
    monkeypatch.setattr(cv2, "imshow", lambda title, pixels: shown.append(pixels))
    monkeypatch.setattr(cv2, "waitKey", lambda delay: -1)
    monkeypatch.setattr(cv2, "destroyAllWindows", lambda: None)
    media.run("--debug_mode", "image")
    assert len(shown) == 3 + VIDEO_ITEMS
    red = resize_to_bucket(load_image(media.images / "a.png"), (32, 32))
    assert np.array_equal(shown[0][..., ::-1], red)

    shown.clear()
    media.config.write_text(media.config.read_text().replace("[1, 5]", "[5]"))
    media.run("--debug_mode", "video", "--console_num_images", 1)
    assert [number_of(frame) for frame in shown[1:]] == [0, 1, 2, 3, 4]

    shown.clear()
    monkeypatch.setattr(cv2, "waitKey", lambda delay: 27)
    media.run("--debug_mode", "video")
    assert len(shown) == 1


def test_characters_are_drawn_with_ascii_magic(media: MediaWorld, monkeypatch) -> None:
    drawn = []

    class Back(enum.Enum):
        BLUE = 1

    class AsciiArt:
        @classmethod
        def from_pillow_image(cls, image):
            drawn.append(image.size)
            return cls()

        def to_terminal(self, columns, back):
            drawn.append((columns, back))

    monkeypatch.setitem(sys.modules, "ascii_magic", SimpleNamespace(AsciiArt=AsciiArt, Back=Back))
    words = ["--debug_mode", "console", "--console_num_images", 1, "--console_width", 40]
    assert "a caption" in media.run(*words, "--console_back", "blue")
    assert drawn == [(32, 32), (40, Back.BLUE)] * 2
    with pytest.raises(UserError, match="--console_back pink: allowed: BLUE"):
        media.run(*words, "--console_back", "pink")
