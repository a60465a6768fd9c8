"""--compare: one labelled page of many videos, as an mp4 in which all of them play and a PNG of their middle frames."""

import contextlib
import dataclasses
import functools
import math
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from modules.generation.jobs import drawn_seed, time_stamp
from modules.generation.options import GenerationOptions
from modules.generation.outputs import Job
from modules.generation.requests import Request
from modules.generation.settings import page_settings, video_settings
from modules.generation.variants import request_for_dit
from utils.files import temporary_folder
from utils.video_io import to_uint8, write_frames, write_image

LARGEST_PAGE = 3840  # pixels on the longer side; hardware decoders in browsers take at most 4096
LABEL_HEIGHT, MARGIN = 28, 8
# Fonts with East Asian characters (Linux, Windows, macOS), then fonts with European ones.
SYSTEM_FONTS = (
    *("NotoSansCJK-Regular.ttc", "YuGothM.ttc", "msyh.ttc", "malgun.ttf"),
    *("ヒラギノ角ゴシック W3.ttc", "Hiragino Sans GB.ttc", "AppleSDGothicNeo.ttc"),
    *("DejaVuSans.ttf", "arial.ttf", "Arial.ttf"),
)
PAPER, INK, MISSING = (255, 255, 255), (20, 20, 20), (200, 200, 200)


@dataclass(frozen=True)
class Comparison:
    """Every LoRA file at every multiplier for every prompt, and every prompt without LoRA, all with the same seed.

    A file or a multiplier that is given twice stands on the page once.

    Attributes:
        requests: the prompts, each with its seed.
        stem: the first part of the names of all its files.
        seed: the seed of prompts that give none.
        loras, multipliers: those to be compared, each once.
        plain: the job of each prompt without LoRA.
        cells: the job of every (prompt, LoRA file, multiplier), given by their positions in the lists above.
    """

    options: GenerationOptions
    requests: Sequence[Request]
    stem: str
    seed: int
    loras: Sequence[Path]
    multipliers: Sequence[float]
    plain: Sequence[Job]
    cells: Mapping[tuple[int, int, int], Job]

    @classmethod
    def create(cls, options: GenerationOptions, requests: Sequence[Request]) -> "Comparison":
        """Draws the seed if none is given, and names the files.

        Raises:
            UserError: a request does not fit the DiT.
        """
        seed = drawn_seed() if options.prompt.seed is None else options.prompt.seed
        requests = [dataclasses.replace(each, seed=seed if each.seed is None else each.seed) for each in requests]
        requests = [request_for_dit(request, options.dit) for request in requests]
        loras = list({path.resolve(): path for path in reversed(options.lora.lora_weight)}.values())[::-1]
        multipliers = list(dict.fromkeys(options.lora.lora_multiplier or [1.0]))
        stem = f"{time_stamp()}_{seed}_compare"
        jobs = (f"{stem}_{number:03d}" for number in range(10**9))
        plain = [_job(options, request, next(jobs), []) for request in requests]
        cells = {
            (index, row, column): _job(options, request, next(jobs), [(path, multiplier)])
            for index, request in enumerate(requests)
            for row, path in enumerate(loras)
            for column, multiplier in enumerate(multipliers)
        }
        return cls(options, requests, stem, seed, loras, multipliers, plain, cells)

    @property
    def jobs(self) -> list[Job]:
        return [*self.plain, *self.cells.values()]

    def page(self, frames: Mapping[str, np.ndarray]) -> "Page":
        """The page.

        Args:
            frames: (F, H, W, 3) uint8 of the videos that did not fail, by the stems of their jobs.
        """
        columns = ["without LoRA", *(f"multiplier {str(each).removesuffix('.0')}" for each in self.multipliers)]
        rows = []
        for index, request in enumerate(self.requests):
            for row, name in enumerate(_names(self.loras)):
                jobs = [self.plain[index], *(self.cells[index, row, column] for column in range(len(columns) - 1))]
                rows.append(Row(f"{name}: {request.prompt}", [frames.get(job.stem) for job in jobs]))
        return Page(columns, rows)

    def save(self, frames: Mapping[str, np.ndarray]) -> list[Path]:
        """Writes the page as mp4 and PNG and returns their paths; `frames` as for `page`."""
        output = self.options.output
        metadata = None if output.no_metadata else page_settings(self.options, self.seed)
        return self.page(frames).save(output.save_path / self.stem, self.requests[0].fps, metadata)

    @contextlib.contextmanager
    def kept_frames(self) -> Iterator["KeptFrames"]:
        """An empty place for the frames of the videos, which is removed at the end."""
        with temporary_folder(self.options.output.save_path / self.stem) as folder:
            yield KeptFrames(folder)


class KeptFrames(dict[str, np.ndarray]):
    """The frames (F, H, W, 3) uint8 of many videos by the stems of their jobs, in files instead of main memory."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def keep(self, job: Job, pixels: Tensor) -> None:
        """Adds (3, F, H, W) in 0..1."""
        _, frames, height, width = pixels.shape
        path = self.folder / f"{job.stem}.npy"
        array = np.lib.format.open_memmap(path, mode="w+", dtype=np.uint8, shape=(frames, height, width, 3))
        for index, frame in enumerate(pixels.split(1, dim=1)):
            array[index] = to_uint8(frame)[0].numpy()
        array.flush()
        self[job.stem] = np.load(path, mmap_mode="r")


def _job(options: GenerationOptions, request: Request, stem: str, loras: Sequence[tuple[Path, float]]) -> Job:
    """The job of one video of the page. Its latents carry the settings that make this video alone."""
    files, multipliers = [path for path, _ in loras], [multiplier for _, multiplier in loras]
    own = dataclasses.replace(options.lora, lora_weight=files, lora_multiplier=multipliers, compare=False)
    settings = video_settings(dataclasses.replace(options, lora=own), request)
    return Job(request, stem, None if options.output.no_metadata else settings, loras=loras)


def _names(paths: Sequence[Path]) -> list[str]:
    """A name for each file: its own without suffix, or its path where two files have the same name."""
    count = Counter(path.stem for path in paths)
    return [path.stem if count[path.stem] == 1 else str(path.with_suffix("")) for path in paths]


@dataclass(frozen=True)
class Row:
    """One row of the page: a title, and below it a video for each column, None where the video failed."""

    title: str
    videos: Sequence[np.ndarray | Tensor | None]  # F H W C uint8


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

    @functools.cached_property
    def font(self) -> ImageFont.FreeTypeFont:
        return _font("".join((*self.columns, *(row.title for row in self.rows))))

    @functools.cached_property
    def column_width(self) -> int:
        """The width of a cell, or of the longest column label if that is wider and the page has room for it."""
        widest = max(math.ceil(self.font.getlength(label)) for label in self.columns)
        return max(self.cell_size()[1], min(widest, LARGEST_PAGE // len(self.columns) - MARGIN))

    def place(self, row: int, column: int) -> tuple[int, int]:
        """Left and top pixel of a cell."""
        height, _ = self.cell_size()
        left = MARGIN + column * (self.column_width + MARGIN)
        return left, LABEL_HEIGHT + row * (LABEL_HEIGHT + height + MARGIN) + LABEL_HEIGHT

    def background(self) -> Image.Image:
        """The page with labels but without videos. Height and width are even, which H.264 requires."""
        height, width = self.cell_size()[0], self.column_width
        left, top = self.place(len(self.rows) - 1, len(self.columns) - 1)
        right, bottom = left + width + MARGIN, top + height + MARGIN
        page = Image.new("RGB", (right + right % 2, bottom + bottom % 2), PAPER)
        draw, font = ImageDraw.Draw(page), self.font
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
                    picture = Image.fromarray(np.asarray(video[min(index, len(video) - 1)]))
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
