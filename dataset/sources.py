"""What a dataset consists of: media files with captions, from a folder or a JSONL file.

Listing reads captions and file sizes, never media. The list is the truth: caches are looked up by the names given
here, and what lies in the cache directory besides is an orphan.
"""

import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePath, PurePosixPath
from typing import Any

from dataset.cache import file_identity
from dataset.config_utils import DatasetSettings
from utils.errors import UserError
from utils.files import clean_path, read_text, user_path

IMAGE_EXTENSIONS = frozenset(
    [".png", ".jpg", ".jpeg", ".webp", ".bmp", ".avif", ".jxl", ".heic", ".heif", ".tif", ".tiff"]
)
VIDEO_EXTENSIONS = frozenset(
    [".mp4", ".webm", ".avi", ".mkv", ".mov", ".flv", ".wmv", ".m4v", ".mpg", ".mpeg", ".ts", ".m2ts"]
)
# File systems take names of 255 bytes, of which a clip's cache adds 36 (`_00000-129_0960x0544_hv.safetensors`).
LONGEST_NAME = 210
# Halves of characters, which stand for bytes that are not UTF-8: they can neither be written nor printed.
NOT_UTF8 = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class Source:
    """One image, video file or folder of frames.

    `name` begins the names of its caches and is unique in its dataset; it follows from `listed` alone, the path as the
    folder or the JSONL file has it, so it is the same on every machine. `problem` says why the source cannot be used;
    a file that is `absent` may still have caches, made on another machine.
    """

    path: Path
    name: str
    kind: str  # "image", "video" or "frames"
    listed: str = ""
    caption: str = ""
    size: int = 0
    mtime_ns: int = 0
    problem: str | None = None
    absent: bool = False

    @property
    def stamp(self) -> list[int]:
        """Size and modification time, by which a changed file is known without reading it."""
        return [self.size, self.mtime_ns]

    @property
    def identity(self) -> str:
        """Hash of the content; of a video, which may be large and is always compressed, of its ends."""
        return file_identity(self.path, whole=self.kind != "video")

    def is_described_by(self, entry: dict[str, Any]) -> bool:
        """Whether this is the file of a manifest's entry; one with another modification time is told by its content."""
        if self.stamp in (entry["stamp"], entry.get("seen")):
            return True
        return self.size == entry["stamp"][0] and ("probe" not in entry or entry["probe"]["digest"] == self.identity)


def _encoded(text: str) -> bytes:
    """UTF-8; names that are none, which are never used, still need to be told apart."""
    return text.encode(errors="surrogatepass")


def _short_hash(text: str) -> str:
    return hashlib.blake2b(_encoded(text), digest_size=4).hexdigest()


def _shortened(name: str) -> str:
    if len(_encoded(name)) <= LONGEST_NAME:
        return name
    return f"{_encoded(name)[: LONGEST_NAME - 9].decode(errors='ignore')}-{_short_hash(name)}"


def cache_names(paths: Sequence[PurePath]) -> list[str]:
    """Names for the caches of these media: the file's stem, and where two share it, more of the path.

    a.png and a.jpg become a-png and a-jpg; two a.png from different folders get a hash of their folder. Case does not
    distinguish, because it does not on Windows. A name depends on the listed files alone, not on their order.
    """
    forms: tuple[Callable[[PurePath], str], ...] = (
        lambda path: path.stem,
        lambda path: f"{path.stem}-{path.suffix[1:]}" if path.suffix else path.stem,
        lambda path: f"{path.stem}-{path.suffix[1:]}-{_short_hash(path.as_posix())}",
    )
    names: dict[PurePath, str] = {}
    remaining = list(dict.fromkeys(paths))
    for form in forms:
        proposed = {path: _shortened(form(path)) for path in remaining}
        taken = {name.casefold() for name in names.values()}
        count = Counter(name.casefold() for name in proposed.values())
        names |= {
            path: name
            for path, name in proposed.items()
            if count[name.casefold()] == 1 and name.casefold() not in taken
        }
        remaining = [path for path in remaining if path not in names]
    return [names[path] for path in paths]


def _stamp(path: Path) -> tuple[int, int]:
    """Size and modification time of a file, or of all frames of a folder together."""
    if path.is_dir():
        stats = [frame.stat() for frame in frame_files(path)]
        return sum(stat.st_size for stat in stats), max((stat.st_mtime_ns for stat in stats), default=0)
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns


def frame_files(folder: Path) -> list[Path]:
    """The images of a folder that stands for a video, in the order of their names."""
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in IMAGE_EXTENSIONS)


def _with_caption_file(source: Source, extension: str) -> Source:
    path = source.path.with_suffix(extension) if source.path.is_file() else Path(f"{source.path}{extension}")
    try:
        return replace(source, caption=read_text(path, "caption").strip())
    except UserError as error:
        return replace(source, problem=source.problem or str(error))


def _kind(path: Path, is_video: bool) -> str:
    if not is_video:
        return "image"
    return "frames" if path.is_dir() else "video"


def _checked(path: Path, listed: str, is_video: bool, caption: str = "") -> Source:
    """The source at a path, without a name yet."""
    size = mtime_ns = 0
    problem, absent = None, False
    try:
        size, mtime_ns = _stamp(path)
        problem = f"{path}: the file is empty" if size == 0 else None
    except OSError as error:
        absent = isinstance(error, FileNotFoundError)
        problem = f"{path}: cannot be read: {error.strerror}"
    except ValueError as error:
        problem = f"{path}: cannot be read: {error}"
    if NOT_UTF8.search(listed):
        printable = str(path).encode(errors="backslashreplace").decode()
        problem = f"{printable}: rename it: its name is not UTF-8"
    return Source(path, "", _kind(path, is_video), listed, caption, size, mtime_ns, problem, absent)


def _is_frame_folder(entry: os.DirEntry, caption_extension: str) -> bool:
    """A folder stands for a video when a caption lies beside it and images lie in it."""
    return entry.is_dir() and Path(f"{entry.path}{caption_extension}").is_file() and bool(frame_files(Path(entry.path)))


def _from_directory(settings: DatasetSettings) -> list[Source]:
    extensions = VIDEO_EXTENSIONS if settings.is_video else IMAGE_EXTENSIONS
    with os.scandir(settings.location) as entries:
        paths = sorted(
            Path(entry.path)
            for entry in entries
            if (Path(entry.name).suffix.lower() in extensions and entry.is_file())
            or (settings.is_video and _is_frame_folder(entry, settings.caption_extension))
        )
    sources = [_checked(path, path.name, settings.is_video) for path in paths]
    return [_with_caption_file(source, settings.caption_extension) for source in sources]


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and not NOT_UTF8.search(value)


def _from_jsonl(settings: DatasetSettings) -> Iterator[Source]:
    file = settings.location
    key = "video_path" if settings.is_video else "image_path"
    # Only line feeds end a line: str.splitlines would also cut captions at U+2028 and its like.
    for number, line in enumerate(read_text(file, "JSONL file").split("\n"), 1):
        if not line.strip():
            continue
        place = f"{file}, line {number}"
        unusable = Source(Path(place), "", key[:5], Path(place).name)
        try:
            entry = json.loads(line)
        except json.JSONDecodeError as error:
            yield replace(unusable, problem=f"{place}: not valid JSON: {error.msg}")
            continue
        missing = [word for word in (key, "caption") if not isinstance(entry, dict) or not _is_text(entry.get(word))]
        if missing:
            yield replace(unusable, problem=f'{place}: "{missing[0]}" is missing or no text')
            continue
        path = user_path(entry[key])
        beside = file.parent / path
        # Lists that were written on Windows name the same caches everywhere.
        listed = clean_path(entry[key]).replace("\\", "/")
        yield _checked(
            beside if not path.exists() and beside.exists() else path,
            listed,
            settings.is_video,
            entry["caption"].strip(),
        )


def _once(found: Sequence[Source]) -> Iterator[Source]:
    """The sources, where one path stands several times only its first mention as usable."""
    paths: set[Path] = set()
    listed: set[PurePath] = set()
    for number, source in enumerate(found, 1):
        if source.path in paths or PurePosixPath(source.listed) in listed:
            source = replace(source, problem=f"{source.path}: listed twice")
        if PurePosixPath(source.listed) in listed:
            source = replace(source, listed=f"{source.listed}#{number}")
        paths.add(source.path)
        listed.add(PurePosixPath(source.listed))
        yield source


def list_sources(settings: DatasetSettings) -> list[Source]:
    """All media of a dataset with captions, unusable ones with their `problem`; empty where the location is absent.

    Raises:
        UserError: a folder where a JSONL file is expected, or the other way round.
    """
    location, is_directory = (
        settings.location,
        settings.location in (settings.image_directory, settings.video_directory),
    )
    if not location.exists():
        return []
    if not os.access(location, os.R_OK):
        raise UserError(f"{location}: cannot be read; check its permissions")
    if location.is_dir() != is_directory:
        expected = "a folder is expected" if is_directory else "a JSONL file is expected"
        raise UserError(f"{location}: {expected}")
    found = list(_once(_from_directory(settings) if is_directory else list(_from_jsonl(settings))))
    names = cache_names([PurePosixPath(source.listed) for source in found])
    return [replace(source, name=name) for source, name in zip(found, names, strict=True)]


def explain_empty(settings: DatasetSettings) -> str:
    """Why a dataset has no media: what was looked for and what lies there instead."""
    location = settings.location
    if not location.exists():
        return f"{location}: no such file or folder"
    if location.is_file():
        return f"{location}: lists no media"
    suffixes = Counter(path.suffix.lower() for path in location.iterdir() if path.is_file())
    images = sum(count for suffix, count in suffixes.items() if suffix in IMAGE_EXTENSIONS)
    videos = sum(count for suffix, count in suffixes.items() if suffix in VIDEO_EXTENSIONS)
    folders = sum(path.is_dir() for path in location.iterdir())
    given, other = (
        ("video_directory", "image_directory") if settings.is_video else ("image_directory", "video_directory")
    )
    count_of_other = images if settings.is_video else videos
    advice = (
        f"; write {other}"
        if count_of_other
        else (f"; it has {folders} folders, which are not searched" if folders else "")
    )
    return f"{location}: {images} images and {videos} videos, but the config says {given}{advice}"
