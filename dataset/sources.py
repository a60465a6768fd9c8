"""What a dataset consists of: media files with captions, from a folder or a JSONL file.

Listing reads captions and file sizes, never media. The list is the truth: caches are looked up by the names given
here, and what lies in the cache directory besides is an orphan.
"""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from dataset.config_utils import DatasetSettings
from utils.errors import UserError
from utils.files import clean_path, read_text

IMAGE_EXTENSIONS = frozenset(
    [".png", ".jpg", ".jpeg", ".webp", ".bmp", ".avif", ".jxl", ".heic", ".heif", ".tif", ".tiff"]
)
VIDEO_EXTENSIONS = frozenset(
    [".mp4", ".webm", ".avi", ".mkv", ".mov", ".flv", ".wmv", ".m4v", ".mpg", ".mpeg", ".ts", ".m2ts"]
)
# File systems take names of 255 bytes, of which a clip's cache adds 36 (`_00000-129_0960x0544_hv.safetensors`).
LONGEST_NAME = 210


@dataclass(frozen=True)
class Source:
    """One image, video file or folder of frames.

    `name` begins the names of its caches and is unique in its dataset. `problem` says why it cannot be used; a file
    that is `absent` may still have caches, made on another machine.
    """

    path: Path
    name: str
    kind: str  # "image", "video" or "frames"
    caption: str = ""
    size: int = 0
    mtime_ns: int = 0
    problem: str | None = None
    absent: bool = False

    @property
    def stamp(self) -> list[int]:
        """Size and modification time, by which a changed file is known without reading it."""
        return [self.size, self.mtime_ns]


def _short_hash(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=4).hexdigest()


def _shortened(name: str) -> str:
    if len(name.encode()) <= LONGEST_NAME:
        return name
    return f"{name.encode()[: LONGEST_NAME - 9].decode(errors='ignore')}-{_short_hash(name)}"


def cache_names(paths: Sequence[Path]) -> list[str]:
    """Names for the caches of these media: the file's stem, and where two share it, more of the path.

    a.png and a.jpg become a-png and a-jpg; two a.png from different folders get a hash of their folder. Case does not
    distinguish, because it does not on Windows. A name depends on the listed files alone, not on their order.
    """
    forms: tuple[Callable[[Path], str], ...] = (
        lambda path: path.stem,
        lambda path: f"{path.stem}-{path.suffix[1:]}" if path.suffix else path.stem,
        lambda path: f"{path.stem}-{path.suffix[1:]}-{_short_hash(path.as_posix())}",
    )
    names: dict[Path, str] = {}
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


def _checked(path: Path, is_video: bool, caption: str = "", problem: str | None = None) -> Source:
    """The source at a path, without a name yet."""
    size = mtime_ns = 0
    absent = False
    try:
        size, mtime_ns = _stamp(path)
        problem = problem or (f"{path}: the file is empty" if size == 0 else None)
    except OSError as error:
        absent = isinstance(error, FileNotFoundError)
        problem = problem or f"{path}: cannot be read: {error.strerror}"
    return Source(path, "", _kind(path, is_video), caption, size, mtime_ns, problem, absent)


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
    sources = [_checked(path, settings.is_video) for path in paths]
    return [_with_caption_file(source, settings.caption_extension) for source in sources]


def _from_jsonl(settings: DatasetSettings) -> Iterator[Source]:
    file = settings.location
    key = "video_path" if settings.is_video else "image_path"
    # Only line feeds end a line: str.splitlines would also cut captions at U+2028 and its like.
    for number, line in enumerate(read_text(file, "JSONL file").split("\n"), 1):
        if not line.strip():
            continue
        place = f"{file}, line {number}"
        try:
            entry = json.loads(line)
        except json.JSONDecodeError as error:
            yield Source(Path(place), "", key[:5], problem=f"{place}: not valid JSON: {error.msg}")
            continue
        missing = [
            word for word in (key, "caption") if not isinstance(entry, dict) or not isinstance(entry.get(word), str)
        ]
        if missing:
            yield Source(Path(place), "", key[:5], problem=f'{place}: "{missing[0]}" is missing or no text')
            continue
        path = Path(clean_path(entry[key])).expanduser()
        beside = file.parent / path
        yield _checked(
            beside if not path.exists() and beside.exists() else path, settings.is_video, entry["caption"].strip()
        )


def _once(found: Sequence[Source]) -> Iterator[Source]:
    """The sources, where one path stands several times only its first mention as usable."""
    seen: set[Path] = set()
    for number, source in enumerate(found):
        if source.path in seen:
            yield replace(source, path=Path(f"{source.path}#{number + 1}"), problem=f"{source.path}: listed twice")
        else:
            seen.add(source.path)
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
    names = cache_names([source.path for source in found])
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
