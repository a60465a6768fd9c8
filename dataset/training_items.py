"""Which items of a dataset can be trained on: checks the cache files, before training starts.

The media folder or JSONL file decides which items a dataset has. If it does not exist on this machine, the manifest
that cache_latents.py wrote into the cache directory decides. Other files in the cache directory are ignored.
"""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from dataset.cache import CacheStatus, check_latents, check_text, text_cache_path
from dataset.config_utils import DatasetSettings
from dataset.items import Item, MediaInfo, item_provenance, plan_items
from dataset.manifest import Manifest, failed_items
from dataset.sources import Source, list_sources


@dataclass(frozen=True)
class TrainingItem:
    """The cache files of one item."""

    name: str
    source: str
    latents: Path
    text: Path
    bucket: str
    positions: int  # f * h * w of the latents, to find the largest batch


@dataclass
class CachedItems:
    """The result of checking the caches of a dataset.

    Attributes:
        items: those whose caches can be used.
        problems: why training cannot start, one line for each caching script that must run.
        notes: what the user should know, such as files that are left out.
    """

    items: list[TrainingItem] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


class _CacheProblems:
    """Collects why caches cannot be used, for one line that names the script to run."""

    def __init__(self, script: str) -> None:
        self.script = script
        self.names: dict[str, list[str]] = defaultdict(list)  # by reason

    def add(self, reason: str, name: str) -> None:
        self.names[reason].append(name)

    def lines(self, directory: Path) -> list[str]:
        parts = [
            f"{why}: {names[0]}" + (f" and {len(names) - 1} more" if len(names) > 1 else "")
            for why, names in self.names.items()
        ]
        return [f"{directory}: caches cannot be used ({'; '.join(parts)}); run {self.script}"] if parts else []


def cached_items(settings: DatasetSettings, show_progress: bool = False) -> CachedItems:
    """Finds the items of a dataset and checks the header of each of their cache files."""
    directory = settings.cache_directory
    manifest = Manifest.load(directory, "latents")
    if not manifest.sources:
        problem = (
            f"{directory}: hv_latents.manifest.json is missing, so no caches are known here; "
            "run cache_latents.py, which also accepts existing caches of musubi-tuner"
        )
        return CachedItems(problems=[problem])
    listed = {source.name: source for source in list_sources(settings)}
    check = _CacheCheck(settings, manifest)
    for name in tqdm(
        listed or manifest.sources,
        desc=f"{directory}: checking caches",
        unit="file",
        leave=False,
        delay=2,
        disable=not show_progress,
    ):
        check.add(name, listed.get(name))
    return check.result()


class _CacheCheck:
    """Checks the caches of one dataset, source by source."""

    def __init__(self, settings: DatasetSettings, manifest: Manifest) -> None:
        self.settings, self.manifest, self.directory = settings, manifest, settings.cache_directory
        self.failed = failed_items(self.directory)
        self.trusted_texts = Manifest.load(self.directory, "text").trusted
        self.items: list[TrainingItem] = []
        self.latent_problems = _CacheProblems("cache_latents.py")
        self.text_problems = _CacheProblems("cache_text_encoder_outputs.py")
        self.left_out: list[str] = []  # why sources are not used
        self.not_cached: list[str] = []  # items that the caching run could not encode
        self.by_musubi = 0

    def add(self, name: str, source: Source | None) -> None:
        """Checks the caches of the source `name`; `source` is None where the media are not on this machine."""
        entry = self.manifest.sources.get(name)
        cached_elsewhere = source is not None and source.absent and entry is not None and "probe" in entry
        if source and source.problem and not cached_elsewhere:
            self.left_out.append(source.problem)
        elif entry is None:
            self.latent_problems.add("not cached", name)
        elif not (source is None or source.absent or source.is_described_by(entry)):
            self.latent_problems.add("the media file changed", name)
        elif "probe" not in entry:
            self.left_out.append(entry["problem"])
        else:
            self._add_items(name, entry, self._checked_text(name, source.caption if source else None))

    def _checked_text(self, name: str, caption: str | None) -> Path:
        path = text_cache_path(self.directory, name)
        is_trusted = self.trusted_texts.get(path.name) == {"caption": caption}
        status = check_text(path, caption, {}, trust_name=is_trusted)
        if not status.kept:
            self.text_problems.add(status.reason, name)
        return path

    def _add_items(self, name: str, entry: dict[str, Any], text: Path) -> None:
        for item, status in self._checked_latents(name, entry):
            self.by_musubi += status.by_musubi
            if status.kept:
                f, h, w = item.latent_shape
                self.items.append(TrainingItem(item.name, item.source, item.path, text, item.bucket_name, f * h * w))
            elif self.failed.get(item.name) == entry["stamp"]:
                self.not_cached.append(item.name)
            else:
                self.latent_problems.add(status.reason, item.name)

    def _checked_latents(self, name: str, entry: dict[str, Any]) -> Iterator[tuple[Item, CacheStatus]]:
        try:
            plan = plan_items(self.settings, name, MediaInfo.from_json(entry["probe"]))
        except ValueError as error:
            self.latent_problems.add(str(error), name)
            return
        for item in plan.items:
            expected = item_provenance(item, self.settings, entry["stamp"])
            is_trusted = self.manifest.trusted.get(item.path.name) == expected
            yield item, check_latents(item.path, item.latent_shape, expected, trust_name=is_trusted)

    def result(self) -> CachedItems:
        notes = []
        if self.left_out:
            count, first = len(self.left_out), self.left_out[0]
            notes.append(f"{self.directory}: {count} listed files cannot be used and are left out; the first: {first}")
        if self.not_cached:
            count, first = len(self.not_cached), self.not_cached[0]
            notes.append(
                f"{self.directory}: {count} items could not be cached and are left out; the first: {first}; "
                "cache_latents.py says why"
            )
        if self.by_musubi:
            notes.append(f"{self.directory}: {self.by_musubi} latent caches were made by musubi-tuner and are used")
        problems = self.latent_problems.lines(self.directory) + self.text_problems.lines(self.directory)
        return CachedItems(self.items, problems, notes)
