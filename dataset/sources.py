"""The sources of a dataset: media files with captions, from a folder or a JSONL file.

Listing them reads captions and file sizes, but no media. The list decides what belongs to the dataset: a cache file
that matches no listed source is an orphan.
"""

import hashlib
import json
import os
import posixpath
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePath, PurePosixPath
from typing import Any

from dataset.config_utils import DatasetSettings
from utils.errors import UserError, one_line
from utils.files import clean_path, parse_json, read_text, user_path

IMAGE_EXTENSIONS = frozenset(
    [".png", ".jpg", ".jpeg", ".webp", ".bmp", ".avif", ".jxl", ".heic", ".heif", ".tif", ".tiff"]
)
VIDEO_EXTENSIONS = frozenset(
    [".mp4", ".webm", ".avi", ".mkv", ".mov", ".flv", ".wmv", ".m4v", ".mpg", ".mpeg", ".ts", ".m2ts"]
)
# File systems allow names of 255 bytes; a clip's cache appends 36 of them (`_00000-129_0960x0544_hv.safetensors`).
LONGEST_NAME = 210
# Surrogates: Python decodes bytes of file names that are not UTF-8 to these; they can be neither encoded nor printed.
NOT_UTF8 = re.compile("[\ud800-\udfff]")
END_BYTES = 1 << 20  # of each end of a file that `file_identity` reads


@dataclass(frozen=True)
class Source:
    """One image, video file or folder of frames, with its caption.

    Attributes:
        name: the beginning of the names of its caches, unique in its dataset. It is derived from `listed` alone, so
            that it is the same on every machine.
        kind: "image", "video" or "frames" (a folder of images that is one video).
        listed: the path as the folder or the JSONL file lists it.
        size: bytes of the file, or of all frames together.
        mtime_ns: modification time; of a folder, a number that changes with the name, size or time of any frame.
        problem: why the source cannot be used.
        absent: the file does not exist here; it may still have caches that were made on another machine.
    """

    path: Path
    name: str
    kind: str
    listed: str = ""
    caption: str = ""
    size: int = 0
    mtime_ns: int = 0
    problem: str | None = None
    absent: bool = False

    @property
    def stamp(self) -> list[int]:
        """Size and modification time, which tell without reading the file that it changed."""
        return [self.size, self.mtime_ns]

    @property
    def identity(self) -> str:
        """Hash of the content; for a video, which may be large, of both its ends."""
        return file_identity(self.path, whole=self.kind != "video")

    def is_described_by(self, entry: dict[str, Any]) -> bool:
        """Whether a manifest's entry is about this very file.

        If only the modification time differs (the file was copied, for example), the hash of the content decides.
        """
        if self.stamp in (entry["stamp"], entry.get("seen")):
            return True
        return self.size == entry["stamp"][0] and ("probe" not in entry or entry["probe"]["digest"] == self.identity)


def file_identity(path: Path, whole: bool = False) -> str:
    """Hash of a file, or of all frames of a folder: sizes and the first and last MiB of each, or all bytes if `whole`.

    Neither path nor modification time count, so media may be moved or copied.
    """
    digest, total = hashlib.blake2b(digest_size=16), 0
    for file in sorted(frame_files(path)) if path.is_dir() else [path]:
        size = file.stat().st_size
        total += size
        with open(file, "rb") as stream:
            name = os.fsencode(file.name if path.is_dir() else "")
            digest.update(name + f":{size}:".encode() + stream.read(-1 if whole else END_BYTES))
            stream.seek(max(size - END_BYTES, 0))
            digest.update(stream.read(END_BYTES))
    return f"{total}-{digest.hexdigest()}"


def _encoded(text: str) -> bytes:
    """UTF-8. Surrogates pass: a name with surrogates is never used, but must stay different from others."""
    return text.encode(errors="surrogatepass")


def _short_hash(text: str) -> str:
    return hashlib.blake2b(_encoded(text), digest_size=4).hexdigest()


def _shortened(name: str) -> str:
    if len(_encoded(name)) <= LONGEST_NAME:
        return name
    return f"{_encoded(name)[: LONGEST_NAME - 9].decode(errors='ignore')}-{_short_hash(name)}"


def _name_forms(path: PurePath) -> tuple[str, str, str]:
    """Possible names for the caches of a path, the shortest first."""
    with_suffix = f"{path.stem}-{path.suffix[1:]}"
    return path.stem, with_suffix if path.suffix else path.stem, f"{with_suffix}-{_short_hash(path.as_posix())}"


def cache_names(paths: Sequence[PurePath]) -> list[str]:
    """Names for the caches of these media, without repeats: the stem of the file, or more if several share it.

    a.png and a.jpg become a-png and a-jpg; two a.png in different folders also get a hash of their paths. Names that
    differ only in case count as the same, as they do on Windows. A name depends on the set of listed files, not on
    their order.
    """
    names: dict[PurePath, str] = {}
    remaining = list(dict.fromkeys(paths))
    for level in range(3):
        proposed = {path: _shortened(_name_forms(path)[level]) for path in remaining}
        taken = {name.casefold() for name in names.values()}
        count = Counter(name.casefold() for name in proposed.values())
        names |= {
            path: name
            for path, name in proposed.items()
            if count[name.casefold()] == 1 and name.casefold() not in taken
        }
        remaining = [path for path in remaining if path not in names]
    return [names[path] for path in dict.fromkeys(paths)]


def _stamp(path: Path) -> tuple[int, int]:
    """Size and modification time of a file; of a folder, the total size and a number that stands for all frames.

    The newest time would not do: it stays the same when two frames are exchanged.
    """
    if path.is_dir():
        stats = [(frame.name, frame.stat()) for frame in frame_files(path)]
        text = repr([(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats])
        return sum(stat.st_size for _, stat in stats), int(_short_hash(text), 16)
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns


def frame_files(folder: Path) -> list[Path]:
    """The frames of a folder that is one video: its images, in natural order; hidden files are no frames.

    Hidden are the `._0001.png` that macOS writes beside each file on foreign drives.
    """
    images = (path for path in folder.iterdir() if path.suffix.lower() in IMAGE_EXTENSIONS)
    return sorted((path for path in images if not path.name.startswith(".")), key=lambda path: natural_key(path.name))


def natural_key(name: str) -> tuple[list[str | int], str]:
    """Sorts names as people count: 2 before 10, whether or not the numbers are padded with zeros."""
    words = re.split("([0-9]+)", name)  # words and numbers alternate, so that keys can be compared
    return [int(word) if number % 2 else word for number, word in enumerate(words)], name


def existing_spelling(path: Path) -> Path:
    """The path, with its name spelled as it exists: accents may be composed (Linux, Windows) or not (old macOS)."""
    spellings = [path.with_name(unicodedata.normalize(form, path.name)) for form in ("NFC", "NFD")]
    return next((spelling for spelling in (path, *spellings) if os.path.lexists(spelling)), path)


def _with_caption_file(source: Source, extension: str) -> Source:
    named = source.path.with_suffix(extension) if source.path.is_file() else Path(f"{source.path}{extension}")
    path = existing_spelling(named)
    if path.exists() and not path.is_file():  # a pipe would be waited for without end
        return replace(source, problem=source.problem or f"{path}: a file with the caption is expected")
    try:
        return replace(source, caption=read_text(path, "caption").strip())
    except UserError as error:
        return replace(source, problem=source.problem or str(error))


def _source_at(path: Path, listed: str, is_video: bool, caption: str = "") -> Source:
    """The source at a path, with a problem where it cannot be used; its name is still empty."""
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
        problem = f"{printable}: the name is not UTF-8; rename the file"
    kind = "image" if not is_video else "frames" if path.is_dir() else "video"
    return Source(path, "", kind, listed, caption, size, mtime_ns, problem, absent)


def _is_folder(entry: os.DirEntry) -> bool:
    """False for links that lead nowhere or in circles: they are listed, with the reason why they cannot be used."""
    try:
        return entry.is_dir()
    except OSError:
        return False


def _is_frame_folder(entry: os.DirEntry, caption_extension: str) -> bool:
    """Whether a folder is one video: it holds images, and a caption file lies beside it."""
    return (
        _is_folder(entry)
        and existing_spelling(Path(f"{entry.path}{caption_extension}")).is_file()
        and bool(frame_files(Path(entry.path)))
    )


def _from_directory(settings: DatasetSettings) -> list[Source]:
    extensions = VIDEO_EXTENSIONS if settings.is_video else IMAGE_EXTENSIONS
    with os.scandir(settings.location) as entries:
        paths = sorted(
            Path(entry.path)
            for entry in entries
            if (Path(entry.name).suffix.lower() in extensions and not _is_folder(entry))
            or (settings.is_video and _is_frame_folder(entry, settings.caption_extension))
        )
    sources = [_source_at(path, path.name, settings.is_video) for path in paths]
    return [_with_caption_file(source, settings.caption_extension) for source in sources]


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and not NOT_UTF8.search(value)


def _from_jsonl(settings: DatasetSettings) -> Iterator[Source]:
    file = settings.location
    key = "video_path" if settings.is_video else "image_path"
    # Lines end at line feeds only; str.splitlines would also split captions at U+2028 and similar characters.
    for number, line in enumerate(read_text(file, "JSONL file").split("\n"), 1):
        if not line.strip():
            continue
        place = f"{file}, line {number}"
        unusable = Source(Path(place), "", key[:5], Path(place).name)
        try:
            entry = parse_json(line)
        except json.JSONDecodeError as error:
            hint = "; write Windows paths with / or \\\\" if "\\" in line else ""
            yield replace(unusable, problem=f"{place}: not valid JSON: {error.msg}{hint}")
            continue
        except ValueError as error:
            yield replace(unusable, problem=f"{place}: not valid JSON: {one_line(error)}")
            continue
        missing = [word for word in (key, "caption") if not isinstance(entry, dict) or not _is_text(entry.get(word))]
        if missing:
            yield replace(unusable, problem=f'{place}: "{missing[0]}" is missing or not a text')
            continue
        path = existing_spelling(user_path(entry[key]))
        beside = existing_spelling(file.parent / path)
        # A list that was written on Windows must give the same cache names on every system.
        listed = clean_path(entry[key]).replace("\\", "/")
        yield _source_at(
            beside if not path.exists() and beside.exists() else path,
            listed,
            settings.is_video,
            entry["caption"].strip(),
        )


def _with_repeats_marked(found: Sequence[Source]) -> list[Source]:
    """The same sources with their names; where a file is listed several times, all but the first get a problem.

    The names depend on what is listed alone, so a path that is written twice must not count twice there. Two spellings
    of one file that only this machine's folders show to be the same, both keep a name.
    """
    listed = [PurePosixPath(posixpath.normpath(source.listed)) for source in found]
    names = dict(zip(dict.fromkeys(listed), cache_names(listed), strict=True))
    paths: set[str] = set()
    named: list[Source] = []
    for number, (source, path) in enumerate(zip(found, listed, strict=True), 1):
        name, place = names.get(path, ""), os.path.normpath(source.path.absolute())
        if place in paths or path not in names:
            source = replace(source, problem=f"{source.path}: listed twice")
        # `pop`: what is written a second time cannot have the same name; it is not used.
        names.pop(path, None)
        paths.add(place)
        named.append(replace(source, name=name or f"{path.name}#{number}"))
    return named


def list_sources(settings: DatasetSettings) -> list[Source]:
    """All sources of a dataset, also those with a `problem`; an empty list if the folder or JSONL file does not exist.

    Raises:
        UserError: the location cannot be read, or is a file instead of a folder or the other way round.
    """
    location = settings.location
    is_directory = location in (settings.image_directory, settings.video_directory)
    if not location.exists():
        return []
    if not os.access(location, os.R_OK):
        raise UserError(f"{location}: cannot be read; check its permissions")
    if location.is_dir() != is_directory:
        expected = "a folder is expected" if is_directory else "a JSONL file is expected"
        raise UserError(f"{location}: {expected}")
    return _with_repeats_marked(_from_directory(settings) if is_directory else list(_from_jsonl(settings)))


def explain_empty(settings: DatasetSettings) -> str:
    """Why a dataset has no media: what was expected at its location and what is there instead."""
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
    advice = f"; it has {folders} folders, which are not searched" if folders else ""
    if images if settings.is_video else videos:
        advice = f"; write {other}"
    return f"{location}: {images} images and {videos} videos, but the config says {given}{advice}"
