"""Hashes of the contents of files, so that a file is known wherever it lies and whatever its time says."""

import hashlib
import json
from pathlib import Path

from utils.files import parse_json, write_text

LARGE = 64 << 20  # bytes; a smaller file is hashed in less than a tenth of a second


class ContentHashes:
    """SHA-256 of files.

    The hash of a large file is kept in a file, and used again while path, size and times of the large file are the
    same.

    Args:
        memory: the file that keeps them, JSON. It need not exist, and is only written for large files.
    """

    def __init__(self, memory: Path) -> None:
        self._memory = memory
        self._known = _read(memory)

    def of(self, path: Path) -> str:
        """The hash of a file, 64 hexadecimal digits.

        Raises:
            OSError: it cannot be read.
        """
        stat = path.stat()
        stamp = f"{path.resolve()} {stat.st_size} {stat.st_mtime_ns} {stat.st_ctime_ns}"
        if stamp in self._known:
            return self._known[stamp]
        if stat.st_size >= LARGE:
            print(f"reading {path} ({stat.st_size / 1e9:.1f} GB) to know whether it is still the same file")
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        self._known[stamp] = digest
        if stat.st_size >= LARGE:
            write_text(self._memory, json.dumps(_read(self._memory) | {stamp: digest}, indent=0))
        return digest


def _read(memory: Path) -> dict[str, str]:
    """What the file keeps; nothing if it is missing or damaged, for then the files are only read again."""
    try:
        known = parse_json(memory.read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}
