"""Files are written completely or not at all; paths and texts are read as the user meant them."""

import contextlib
import functools
import json
import os
import re
import shutil
import tomllib
import zipfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import psutil

from utils.errors import UserError, one_line

TEMPORARY_SUFFIX = ".partial"
REPLACED = "old"  # stands where the process id stands in a temporary name: a folder that is being replaced
# At most 7 digits, as process ids have on Linux; names such as rclone's a.txt.12345678.partial differ.
_LEFTOVER = re.compile(rf"(?P<name>.*)\.(?P<owner>[1-9]\d{{0,6}}|{REPLACED}){re.escape(TEMPORARY_SUFFIX)}", re.DOTALL)
_CLOCK_SECONDS = 2.0  # how much the start time of a process and the time of a file may disagree
# Invisible characters that editors and file managers add: byte-order mark, zero-width space, bidirectional marks.
# The zero-width joiners U+200C and U+200D stay: Persian and Indic words and emoji need them.
INVISIBLE_CHARACTERS = dict.fromkeys([0xFEFF, 0x200B, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A)])


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike) -> Iterator[Path]:
    """Yields a temporary path beside `path`; on success it is flushed to disk and renamed, on failure removed.

    The temporary name ends in `.{process id}.partial`, so two processes never share one, and what a killed process
    left can be recognised. The first write to a folder removes what such processes left in it (`remove_leftovers`).
    A `path` that this function yielded is yielded again: whoever yielded it first renames it.

    Raises:
        UserError: `path` is a folder.
        OSError: writing failed, for example because the disk is full. The error names `path`.
    """
    path = Path(path)
    if path.name.endswith(f".{os.getpid()}{TEMPORARY_SUFFIX}"):
        yield path
        return
    if path.is_dir():
        raise UserError(f"{path}: is a folder, a file name is expected")
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers_once(path.parent.absolute())
    temporary = _temporary(path)
    try:
        yield temporary
        _rename_to(path, temporary)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        names_no_file = type(error) is OSError and error.errno is not None and error.filename is None
        if names_no_file or str(getattr(error, "filename", None)) == str(temporary):
            with contextlib.suppress(AttributeError):  # errors of PyAV cannot be changed
                error.filename = str(path)
        raise


@contextlib.contextmanager
def atomic_path_of_same_name(path: Path) -> Iterator[Path]:
    """Like `atomic_path`, but the temporary path has the name of `path`, in a temporary folder beside it.

    For code of other projects, which may choose the format by the end of the name.
    """
    with temporary_folder(path) as folder:
        yield folder / path.name
        _rename_to(path, folder / path.name)


def _temporary(path: Path) -> Path:
    # A file name has at most 255 bytes. A long one is cut, so that the temporary name does not exceed that.
    stem = path.name.encode()[:200].decode(errors="ignore")
    return path.with_name(f"{stem}.{os.getpid()}{TEMPORARY_SUFFIX}")


def _rename_to(path: Path, temporary: Path) -> None:
    with open(temporary, "rb+") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)


@contextlib.contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """Yields a temporary folder beside `folder`; on success it replaces `folder`, on failure it is removed.

    A folder cannot be replaced in one step: for a moment the old one is called `{name}.old.partial`. A process that is
    killed in that moment leaves it, and it can be renamed back.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers_once(folder.parent.absolute())
    temporary = folder.with_name(f"{folder.name}.{os.getpid()}{TEMPORARY_SUFFIX}")
    replaced = folder.with_name(f"{folder.name}.{REPLACED}{TEMPORARY_SUFFIX}")
    # An earlier attempt may have failed to remove them, for example because a viewer held a file open on Windows.
    for leftover in (temporary, replaced):
        shutil.rmtree(leftover, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        if folder.exists():
            os.replace(folder, replaced)
        os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(replaced, ignore_errors=True)


@contextlib.contextmanager
def temporary_folder(beside: Path) -> Iterator[Path]:
    """Yields an empty folder beside the path `beside`, named like it, and removes it at the end.

    What a killed process left is removed by the next process that writes there, see `atomic_path`.
    """
    beside.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers_once(beside.parent.absolute())
    folder = _temporary(beside)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def is_leftover(path: Path) -> bool:
    """Whether this is a temporary file or folder of a process that no longer runs.

    A process that started after the file was last changed has only inherited the id of the one that wrote it.
    """
    found = _LEFTOVER.fullmatch(path.name)
    if found is None or found["owner"] == REPLACED:
        return False
    try:
        return psutil.Process(int(found["owner"])).create_time() > path.stat().st_mtime + _CLOCK_SECONDS
    except psutil.NoSuchProcess:
        return True
    except (psutil.Error, OSError):
        return False


def remove_leftovers(folder: Path) -> None:
    """Removes what processes that no longer run left in a folder, and restores folders that they were replacing."""
    found = [(path, match) for path in folder.iterdir() if (match := _LEFTOVER.fullmatch(path.name))]
    kept = set()  # names that a running process is writing
    for path, match in found:
        if is_leftover(path):
            _remove(path)
        elif match["owner"] != REPLACED:
            kept.add(match["name"])
    for path, match in found:
        if match["owner"] == REPLACED and match["name"] not in kept:
            original = path.with_name(match["name"])
            _remove(path) if original.exists() else path.rename(original)


_remove_leftovers_once = functools.cache(remove_leftovers)


def _remove(path: Path) -> None:
    """Deletes a file or a folder; one that cannot be deleted stays."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()


def write_text(path: str | os.PathLike, text: str) -> None:
    """Writes UTF-8 text atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")


def require_writable(folder: Path, option: str, create: bool = True) -> None:
    """Checks that files can be written to the folder; with `create` it exists afterwards.

    Raises:
        UserError: they cannot. The message begins with `option`, the option that gave the folder.
    """
    try:
        if create:
            folder.mkdir(parents=True, exist_ok=True)
        existing = next(each for each in (folder, *folder.absolute().parents) if each.exists())
        if not existing.is_dir():
            raise UserError(f"{option} {folder}: {existing} is a file, a folder is expected")
        trial = existing / f".{os.getpid()}{TEMPORARY_SUFFIX}"
        trial.touch()
        trial.unlink()
    except OSError as error:
        raise UserError(f"{option} {folder}: cannot be written to: {error.strerror}") from None


def require_output(option: str, output: Path, inputs: Iterable[Path]) -> None:
    """Checks that a file can be written, without changing anything.

    Args:
        option: the option that gave `output`, for the message.

    Raises:
        UserError: it is a folder, one of the inputs, in an input folder, or in a folder that cannot be written to.
    """
    if output.is_dir():
        raise UserError(f"{option} {output}: is a folder, a file name is expected")
    if output.exists() and any(output.samefile(path) or path.resolve() in output.resolve().parents for path in inputs):
        raise UserError(f"{option} {output}: is one of the inputs; give another name")
    require_writable(output.parent, option, create=False)


def require_suffix(option: str, path: Path, suffix: str) -> None:
    """Raises a UserError if the name of a file does not end in `suffix`; `option` gave the file."""
    if path.suffix != suffix:
        raise UserError(f"{option} {path}: a name that ends in {suffix} is expected")


def clean_path(text: str) -> str:
    """The path without invisible characters and surrounding white space."""
    return text.translate(INVISIBLE_CHARACTERS).strip()


def user_path(text: str) -> Path:
    """The path that a user wrote. `~/a.png` is in the home folder; `~a.png` is an ordinary name."""
    path = Path(clean_path(text))
    return path.expanduser() if path.parts[:1] == ("~",) else path


def read_text(path: str | os.PathLike, what: str) -> str:
    """Reads UTF-8 text, with or without a byte-order mark.

    Args:
        what: the kind of file, for the message.

    Raises:
        UserError: the file is missing, unreadable, not UTF-8, or holds NUL characters, as UTF-16 does.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"{path}: {what} not found") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: {what} is not UTF-8 (byte {error.start}); save it as UTF-8") from None
    except OSError as error:
        raise UserError(f"{path}: {what} cannot be read: {error.strerror}") from None
    if "\0" in text:
        raise UserError(f"{path}: {what} holds NUL characters, so it is probably UTF-16; save it as UTF-8")
    return text


def has_right_checksums(path: str | os.PathLike) -> bool:
    """Whether this is a zip file, and every file in it has the bytes that it was written with, by its CRC-32.

    torch.save writes zip files, and torch.load does not compare checksums. A checksum of 0 stands for none:
    torch can be told not to compute them.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            for entry in archive.infolist():
                with archive.open(entry) as file:
                    while entry.CRC and file.read(1 << 20):
                        pass
    except Exception:  # what zipfile raises depends on where the file is damaged
        return False
    return True


def parse_json(text: str | bytes) -> Any:
    """Parses JSON. Every JSON that comes from outside is read with it.

    Raises:
        ValueError: no JSON, a number of thousands of digits, or nested too deeply.
    """
    return _decoded(json.loads, text)


def _decoded(loads: Callable[[Any], Any], text: str | bytes) -> Any:
    try:
        return loads(text)
    except RecursionError:
        raise ValueError("brackets are nested too deeply") from None


def read_toml(path: str | os.PathLike, what: str) -> dict:
    """Parses a TOML file.

    Args:
        what: the kind of file, for the message.

    Raises:
        UserError: `read_text` fails, or the syntax is wrong.
    """
    text = read_text(path, what)
    try:
        return _decoded(tomllib.loads, text)
    except ValueError as error:
        hint = "; write Windows paths with / or in 'single quotes'" if "\\" in text else ""
        raise UserError(f"{path}: {what} is not valid TOML: {one_line(error)}{hint}") from None
