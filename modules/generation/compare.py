"""--compare: one labelled page of many videos, as an mp4 in which all of them play and a PNG of their middle frames."""

import contextlib
import dataclasses
import functools
import itertools
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from modules.generation.jobs import drawn_seed, time_stamp
from modules.generation.options import GenerationOptions
from modules.generation.outputs import Job
from modules.generation.requests import Request
from modules.generation.settings import page_settings
from modules.generation.variants import request_for_dit
from utils.video_io import write_frames, write_image

LARGEST_PAGE = 3840  # pixels on the longer side; hardware decoders in browsers take at most 4096
LABEL_HEIGHT, MARGIN = 28, 8
# Fonts with East Asian characters (Linux, Windows, macOS), then fonts with European ones.
SYSTEM_FONTS = (
    *("NotoSansCJK-Regular.ttc", "YuGothM.ttc", "msyh.ttc", "malgun.ttf"),
    *("ヒラギノ角ゴシック W3.ttc", "Hiragino Sans GB.ttc", "AppleSDGothicNeo.ttc"),
    *("DejaVuSans.ttf", "arial.ttf", "Arial.ttf"),
)
PAPER, INK, MISSING = (255, 255, 255), (20, 20, 20), (200, 200, 200)


Cell = tuple[int, Path | None, float]
"""Index of the prompt, LoRA file, multiplier. Without LoRA: (index, None, 0.0)."""


@dataclass(frozen=True)
class Comparison:
    """Every LoRA file at every multiplier for every prompt, and every prompt without LoRA, all with the same seed.

    Attributes:
        stem: the first part of the names of all its files.
        seed: the seed of prompts that give none.
        cells: the job of each video on the page.
    """

    options: GenerationOptions
    requests: Sequence[Request]
    stem: str
    seed: int
    cells: Mapping[Cell, Job]

    @classmethod
    def create(cls, options: GenerationOptions, requests: Sequence[Request]) -> "Comparison":
        """Draws the seed if none is given, and names the files.

        Raises:
            UserError: a request does not fit the DiT.
        """
        seed = drawn_seed() if options.prompt.seed is None else options.prompt.seed
        requests = [dataclasses.replace(each, seed=seed if each.seed is None else each.seed) for each in requests]
        stem = f"{time_stamp()}_{seed}_compare"
        cells: dict[Cell, Job] = {}
        for index, request in enumerate(requests):
            for path, multiplier in [(None, 0.0), *itertools.product(options.lora.lora_weight, _multipliers(options))]:
                name = f"{stem}_{len(cells):03d}"
                loras = [] if path is None else [(path, multiplier)]
                cells[index, path, multiplier] = Job(request_for_dit(request, options.dit), name, loras=loras)
        return cls(options, requests, stem, seed, cells)

    @property
    def jobs(self) -> list[Job]:
        return list(self.cells.values())

    def save(self, frames: Mapping[str, Tensor]) -> list[Path]:
        """Writes the page as mp4 and PNG and returns their paths.

        Args:
            frames: (F, H, W, 3) uint8 of the videos that did not fail, by the stems of their jobs.
        """
        multipliers, output = _multipliers(self.options), self.options.output
        columns = ["without LoRA", *(f"multiplier {multiplier:g}" for multiplier in multipliers)]
        rows = []
        for index, request in enumerate(self.requests):
            for path in self.options.lora.lora_weight:
                cells = [(index, None, 0.0), *((index, path, multiplier) for multiplier in multipliers)]
                videos = [frames.get(self.cells[cell].stem) for cell in cells]
                rows.append(Row(f"{path.stem}: {request.prompt}", videos))
        metadata = None if output.no_metadata else page_settings(self.options, self.seed)
        return Page(columns, rows).save(output.save_path / self.stem, self.requests[0].fps, metadata)


def _multipliers(options: GenerationOptions) -> list[float]:
    return options.lora.lora_multiplier or [1.0]


@dataclass(frozen=True)
class Row:
    """One row of the page: a title, and below it a video for each column, None where the video failed."""

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
        """Height and width of a cell: those of the largest video, or less if the page would get too large."""
        videos = [video for row in self.rows for video in row.videos if video is not None]
        height, width = max(video.shape[1] for video in videos), max(video.shape[2] for video in videos)
        scale = min(
            1.0,
            (LARGEST_PAGE / len(self.columns) - MARGIN) / width,
            (LARGEST_PAGE / len(self.rows) - LABEL_HEIGHT - MARGIN) / height,
        )
        return max(16, int(height * scale)), max(16, int(width * scale))

    def place(self, row: int, column: int) -> tuple[int, int]:
        """Left and top pixel of a cell."""
        height, width = self.cell_size()
        left = MARGIN + column * (width + MARGIN)
        return left, LABEL_HEIGHT + row * (LABEL_HEIGHT + height + MARGIN) + LABEL_HEIGHT

    def background(self) -> Image.Image:
        """The page with labels but without videos. Height and width are even, which H.264 requires."""
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
        """Frame `index` of the page, (H, W, 3) uint8. A video that is shorter shows its last frame."""
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
        """Writes `path`.mp4 and the middle frame of the page as `path`.png; returns both paths."""
        video, sheet = (path.with_name(path.name + suffix) for suffix in (".mp4", ".png"))
        self.save_video(video, fps, metadata)
        self.save_frame(sheet, self.frames // 2, metadata)
        return [video, sheet]

    def save_video(self, path: Path, fps: float, metadata: Mapping[str, object] | None = None) -> None:
        """Writes the mp4."""
        background = self.background()
        write_frames((self.frame(background, index) for index in range(self.frames)), path, fps, metadata)

    def save_frame(self, path: Path, index: int, metadata: Mapping[str, object] | None = None) -> None:
        """Writes frame `index` of the page as a PNG."""
        write_image(self.frame(self.background(), index), path, metadata)


@functools.cache
def _font(text: str) -> ImageFont.FreeTypeFont:
    """Pillow's own font, or the system's font that lacks fewer characters of the text."""
    size = LABEL_HEIGHT - 2 * MARGIN + 2
    font = ImageFont.load_default(size)
    for name in SYSTEM_FONTS if _lacking(font, text) else ():
        with contextlib.suppress(OSError):
            font = min(font, ImageFont.truetype(name, size), key=lambda font: len(_lacking(font, text)))
    if lacking := _lacking(font, text):
        print(f"warning: no font was found for these characters of the labels: {lacking}", file=sys.stderr)
    return font


def _lacking(font: ImageFont.FreeTypeFont, text: str) -> str:
    """The characters of the text that the font does not have. It draws them like U+10FFFF, which no font has."""
    box = bytes(font.getmask("\U0010ffff"))
    return "".join(sorted(each for each in {*"".join(text.split())} if bytes(font.getmask(each)) == box))


def _shortened(draw: ImageDraw.ImageDraw, text: str, width: int, font: ImageFont.FreeTypeFont) -> str:
    """The text, cut with an ellipsis if it is wider than `width`."""
    text = " ".join(text.split())
    if draw.textlength(text, font=font) <= width:
        return text
    while text and draw.textlength(text + "...", font=font) > width:
        text = text[:-1]
    return text + "..."
