"""What a caching script remembers of a dataset between runs: `hv_*.manifest.json` in the cache directory.

With several processes, each writes its own files: a list of the cache files that it found intact
(`hv_latents-sound-0.manifest.json`) and a list of the items that failed (`hv_failures-0.manifest.json`).
"""

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dataset.cache import CACHE_VERSION, require_usable
from utils.errors import UserError
from utils.files import parse_json, write_text
from utils.safetensors_utils import load_file

# Kind of the manifests in which each process of a caching script lists the items that failed.
FAILURES = "failures-"
# Key in a manifest, and part of the name of a process's own manifest, of the intact cache files.
INTACT_KEY = "sound"


@dataclass
class Manifest:
    """What the last run of a caching script knew of one dataset.

    Attributes:
        kind: "latents" or "text", or the kind of a process's own list.
        sources: by the name of the source, what the script remembers of it.
        intact: by the name of the cache file, its size and modification time when it was last known to be readable
            and finite.
        trusted: by the name of the cache file, the provenance that --skip_existing took for granted.
        recounted: sources of which this process found another number of frames than was known.
    """

    directory: Path
    kind: str
    sources: dict[str, dict[str, Any]] = field(default_factory=dict)
    intact: dict[str, list[int]] = field(default_factory=dict)
    trusted: dict[str, dict[str, Any]] = field(default_factory=dict)
    recounted: set[str] = field(default_factory=set)

    @property
    def path(self) -> Path:
        return self.directory / f"hv_{self.kind}.manifest.json"

    @classmethod
    def load(cls, directory: Path, kind: str) -> "Manifest":
        """The manifest of a directory, with what all processes found; empty if it is missing or damaged."""
        manifest = cls.read(directory, kind)
        for share in manifest._shares().values():
            manifest.intact |= share.intact
            for name, entry in share.sources.items():
                if manifest.sources.get(name, {}).get("stamp") == entry.get("stamp"):
                    manifest.sources[name] = entry
        return manifest

    @classmethod
    def read(cls, directory: Path, kind: str) -> "Manifest":
        """One manifest file alone; empty if it is missing or damaged."""
        manifest = cls(directory, kind)
        try:
            values = parse_json(manifest.path.read_text(encoding="utf-8"))
            if values["version"] == CACHE_VERSION:
                manifest.sources, manifest.intact = dict(values["sources"]), dict(values[INTACT_KEY])
                manifest.trusted = dict(values.get("trusted", {}))
        except (OSError, ValueError, KeyError, TypeError):
            pass
        return manifest

    def save(self) -> None:
        """Writes the manifest atomically."""
        values = {"version": CACHE_VERSION, "sources": self.sources, INTACT_KEY: self.intact, "trusted": self.trusted}
        write_text(self.path, json.dumps(values, ensure_ascii=False, indent=1) + "\n")

    def share(self, rank: int) -> "Manifest":
        """A new, empty list of the intact files of one process."""
        return Manifest(self.directory, f"{self.kind}-{INTACT_KEY}-{rank}")

    def save_share(self, rank: int, own_files: Iterable[Path]) -> None:
        """Saves what one process found: which of its cache files are intact, and which sources it counted again."""
        share = self.share(rank)
        share.intact = {path.name: self.intact[path.name] for path in own_files if path.name in self.intact}
        share.sources = {name: self.sources[name] for name in sorted(self.recounted)}
        if share.intact or share.sources:
            share.save()
        else:
            share.path.unlink(missing_ok=True)

    def recount(self, source: str, probe: dict[str, Any]) -> None:
        """Replaces what was known of a source's media."""
        self.sources[source] = self.sources[source] | {"probe": probe}
        self.recounted.add(source)

    def save_all(self, world_size: int) -> None:
        """Saves the manifest at the end of process 0, which has read the lists of all processes.

        Deletes the lists that no process of this run rewrites: that of process 0, and those of ranks that do not exist.
        """
        self.save()
        for rank, share in self._shares().items():
            if rank == 0 or rank >= world_size:
                share.path.unlink(missing_ok=True)

    def _shares(self) -> dict[int, "Manifest"]:
        return _manifests_by_rank(self.directory, f"{self.kind}-{INTACT_KEY}-")

    def is_intact(self, path: Path) -> bool:
        """Whether a cache file is readable and all its values can be used.

        A file is read only if its size or modification time differs from the last time that it was found intact.
        """
        stat = path.stat()
        stamp = [stat.st_size, stat.st_mtime_ns]
        if self.intact.get(path.name) == stamp:
            return True
        try:
            require_usable(load_file(path))
        except (UserError, ValueError):
            return False
        self.intact[path.name] = stamp
        return True

    def mark_intact(self, path: Path) -> None:
        """Records a file that was just written; the writers refuse values that are not finite."""
        stat = path.stat()
        self.intact[path.name] = [stat.st_size, stat.st_mtime_ns]


def failed_items(directory: Path) -> dict[str, list[int]]:
    """The names of the items that failed in the last caching run, each with the stamp of its source at that time."""
    manifests = failure_manifests(directory).values()
    return {name: entry["stamp"] for manifest in manifests for name, entry in manifest.sources.items()}


def failure_manifests(directory: Path) -> dict[int, Manifest]:
    """The lists of failed items, by the rank of the process that wrote them."""
    return _manifests_by_rank(directory, FAILURES)


def _manifests_by_rank(directory: Path, kind: str) -> dict[int, Manifest]:
    found = [re.fullmatch(rf"hv_({kind}(\d+))\.manifest\.json", path.name) for path in directory.glob("hv_*.json")]
    return {int(match[2]): Manifest.read(directory, match[1]) for match in found if match}


@contextmanager
def save_shares_on_error(shares: Sequence[tuple[Manifest, Sequence[Path]]], rank: int) -> Iterator[None]:
    """Saves this process's lists of intact files if the run is interrupted or fails, so that the next run need not
    read those files again.

    Args:
        shares: manifests, each with the cache files of this process; the caller may append to the list meanwhile.
    """
    try:
        yield
    except BaseException:
        for manifest, own_files in shares:
            with suppress(OSError):  # a full disk here must not replace the error that ended the run
                manifest.save_share(rank, own_files)
        raise
