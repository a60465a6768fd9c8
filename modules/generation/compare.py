"""One labelled page of many videos: a PNG of their middle frames and an mp4 in which they all play."""

import contextlib
import functools
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from modules.generation.outputs import Job, OutputFolder
from utils.video_io import to_uint8, write_frames, write_image

LARGEST_PAGE = 3840  # pixels on the longer side; hardware decoders of browsers end at 4096
LABEL_HEIGHT, MARGIN = 28, 8
# With the characters of East Asia: on Linux, on Windows, on macOS; then with those of Europe.
SYSTEM_FONTS = (
    *("NotoSansCJK-Regular.ttc", "YuGothM.ttc", "msyh.ttc", "malgun.ttf"),
    *("ヒラギノ角ゴシック W3.ttc", "Hiragino Sans GB.ttc", "AppleSDGothicNeo.ttc"),
    *("DejaVuSans.ttf", "arial.ttf", "Arial.ttf"),
)
PAPER, INK, MISSING = (255, 255, 255), (20, 20, 20), (200, 200, 200)


@dataclass(frozen=True)
class ComparisonOutput(OutputFolder):
    """Keeps the pixels of every job for the page instead of writing a file each, and latents until that is saved."""

    pixels: dict[str, Tensor] = field(default_factory=dict)  # by stem: F H W C uint8

    def save_pixels(self, job: Job, pixels: Tensor) -> None:
        self.pixels[job.stem] = to_uint8(pixels)

    def remove_latents(self, jobs: Iterable[Job]) -> None:
        """After the page is saved: latents that were not asked for and are on it have done their duty."""
        for job in jobs:
            if not self.keeps_latents and job.stem in self.pixels:
                self.latent_path(job).unlink(missing_ok=True)


@dataclass(frozen=True)
class Row:
    """One row of the page: a title line above, and a video, or None where it failed, under each column's label."""

    title: str
    videos: Sequence[Tensor | None]  # F H W C uint8


@dataclass(frozen=True)
class Page:
    """Rows of videos under common column labels."""

    columns: Sequence[str]
    rows: Sequence[Row]

    @property
    def frames(self) -> int:
        return max(len(video) for row in self.rows for video in row.videos if video is not None)

    def cell_size(self) -> tuple[int, int]:
        """Height and width that every video is shown in: the largest of them, smaller if the page gets too large."""
        videos = [video for row in self.rows for video in row.videos if video is not None]
        height, width = max(video.shape[1] for video in videos), max(video.shape[2] for video in videos)
        scale = min(
            1.0,
            (LARGEST_PAGE / len(self.columns) - MARGIN) / width,
            (LARGEST_PAGE / len(self.rows) - LABEL_HEIGHT - MARGIN) / height,
        )
        return max(16, int(height * scale)), max(16, int(width * scale))

    def place(self, row: int, column: int) -> tuple[int, int]:
        """Left and top of a cell."""
        height, width = self.cell_size()
        left = MARGIN + column * (width + MARGIN)
        return left, LABEL_HEIGHT + row * (LABEL_HEIGHT + height + MARGIN) + LABEL_HEIGHT

    def background(self) -> Image.Image:
        """The page with its labels and without videos; its sides are even, as H.264 wants them."""
        height, width = self.cell_size()
        left, top = self.place(len(self.rows) - 1, len(self.columns) - 1)
        right, bottom = left + width + MARGIN, top + height + MARGIN
        page = Image.new("RGB", (right + right % 2, bottom + bottom % 2), PAPER)
        draw, font = ImageDraw.Draw(page), _font("".join((*self.columns, *(row.title for row in self.rows))))
        for column, label in enumerate(self.columns):
            left, _ = self.place(0, column)
            draw.text((left, MARGIN), _shortened(draw, label, width, font), fill=INK, font=font)
        for index, row in enumerate(self.rows):
            left, top = self.place(index, 0)
            title = _shortened(draw, row.title, right - 2 * MARGIN, font)
            draw.text((left, top - LABEL_HEIGHT + MARGIN), title, fill=INK, font=font)
        return page

    def frame(self, background: Image.Image, index: int) -> np.ndarray:
        """The page at one moment, (H, W, 3) uint8; shorter videos hold their last frame."""
        height, width = self.cell_size()
        page = background.copy()
        for row_index, row in enumerate(self.rows):
            for column, video in enumerate(row.videos):
                cell = Image.new("RGB", (width, height), MISSING)
                if video is not None:
                    picture = Image.fromarray(video[min(index, len(video) - 1)].numpy())
                    picture.thumbnail((width, height), Image.Resampling.LANCZOS)
                    cell.paste(picture, ((width - picture.width) // 2, (height - picture.height) // 2))
                page.paste(cell, self.place(row_index, column))
        return np.asarray(page)

    def save(self, path: Path, fps: float, metadata: Mapping[str, object] | None) -> list[Path]:
        """Writes `path`.mp4 and, with the middle frame of every video, `path`.png."""
        video, sheet = (path.with_name(path.name + suffix) for suffix in (".mp4", ".png"))
        self.save_video(video, fps, metadata)
        self.save_frame(sheet, self.frames // 2, metadata)
        return [video, sheet]

    def save_video(self, path: Path, fps: float, metadata: Mapping[str, object] | None = None) -> None:
        """Writes an mp4 in which all videos play."""
        background = self.background()
        write_frames((self.frame(background, index) for index in range(self.frames)), path, fps, metadata)

    def save_frame(self, path: Path, index: int, metadata: Mapping[str, object] | None = None) -> None:
        """Writes the page at one moment as a PNG."""
        write_image(self.frame(self.background(), index), path, metadata)


@functools.cache
def _font(text: str) -> ImageFont.FreeTypeFont:
    """The font that lacks the fewest characters of the text: Pillow's own, else one that the system has."""
    size = LABEL_HEIGHT - 2 * MARGIN + 2
    font = ImageFont.load_default(size)
    for name in SYSTEM_FONTS if _lacking(font, text) else ():
        with contextlib.suppress(OSError):
            font = min(font, ImageFont.truetype(name, size), key=lambda font: len(_lacking(font, text)))
    if lacking := _lacking(font, text):
        print(f"warning: no font was found for these characters of the labels: {lacking}", file=sys.stderr)
    return font


def _lacking(font: ImageFont.FreeTypeFont, text: str) -> str:
    """The characters that the font draws as it draws one that no font has."""
    box = bytes(font.getmask("\U0010ffff"))
    return "".join(sorted(each for each in {*"".join(text.split())} if bytes(font.getmask(each)) == box))


def _shortened(draw: ImageDraw.ImageDraw, text: str, width: int, font: ImageFont.FreeTypeFont) -> str:
    """The text as far as it fits, with an ellipsis where it was cut."""
    text = " ".join(text.split())
    if draw.textlength(text, font=font) <= width:
        return text
    while text and draw.textlength(text + "...", font=font) > width:
        text = text[:-1]
    return text + "..."
