"""Scanning a dataset: lists its sources, reads their sizes and lengths, plans their items and collects problems.

Runs before any model is loaded. Media that the manifest knows and that have not changed are not opened again.
"""

import os
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

from tqdm import tqdm

from dataset.config_utils import DatasetConfig, DatasetSettings
from dataset.items import Item, ItemPlan, MediaInfo, plan_items
from dataset.manifest import Manifest
from dataset.media import MediaError, read_media_info
from dataset.sources import Source, explain_empty, list_sources
from utils.errors import UserError


@dataclass(frozen=True)
class ScannedSource:
    """A source with its media info and its items; `problem` says why it has no items."""

    source: Source
    info: MediaInfo | None = None
    plan: ItemPlan = field(default_factory=ItemPlan)
    problem: str | None = None


@dataclass(frozen=True)
class ScannedDataset:
    """One dataset of the config, ready to be cached. `heading` names it in tables, for example `[[datasets]] 1`."""

    heading: str
    settings: DatasetSettings
    sources: tuple[ScannedSource, ...]
    manifest: Manifest

    @property
    def items(self) -> Iterator[tuple[Source, Item]]:
        """Every item with its source, in the order of the sources."""
        return ((scanned.source, item) for scanned in self.sources for item in scanned.plan.items)

    @property
    def problems(self) -> list[str]:
        """Why sources cannot be used, one line each."""
        return [scanned.problem for scanned in self.sources if scanned.problem]

    def duplicates(self) -> list[list[str]]:
        """Groups of file names whose content is the same."""
        same: dict[str, list[str]] = defaultdict(list)
        for scanned in self.sources:
            if scanned.info:
                same[scanned.info.digest].append(scanned.source.path.name)
        return [names for names in same.values() if len(names) > 1]

    def buckets(self) -> Counter[str]:
        """Number of items in each bucket, by bucket name."""
        return Counter(item.bucket_name for _, item in self.items)


def decoding_threads(requested: int | None) -> int:
    """The number of threads that open and decode media: as requested, else the number of processors minus one."""
    return requested or max((os.cpu_count() or 2) - 1, 1)


def scan_datasets(
    config: DatasetConfig, workers: int | None = None, show_progress: bool = True
) -> list[ScannedDataset]:
    """Scans all datasets of a config, those for validation too.

    Args:
        workers: threads that open media, see `decoding_threads`.

    Raises:
        UserError: a dataset has no usable item; the message says why.
    """
    found = []
    for section, members in (("datasets", config.datasets), ("validation", config.validation)):
        for number, settings in enumerate(members, 1):
            heading = f"[[{section}]] {number}"
            dataset = _scan_dataset(heading, settings, decoding_threads(workers), show_progress)
            if len(dataset.problems) == len(dataset.sources):
                raise no_usable_item(dataset, dataset.problems)
            found.append(dataset)
    return found


def no_usable_item(dataset: ScannedDataset, problems: Sequence[str]) -> UserError:
    """The error for a dataset without any usable item: the first problem, and how many more there are."""
    others = f", and {len(problems) - 1} more" if len(problems) > 1 else ""
    return UserError(f"{dataset.settings.location}: no usable item: {problems[0]}{others}")


def _scan_dataset(heading: str, settings: DatasetSettings, workers: int, show_progress: bool) -> ScannedDataset:
    sources = list_sources(settings)
    if not sources:
        raise UserError(explain_empty(settings))
    manifest = Manifest.load(settings.cache_directory, "latents")
    with (
        ThreadPoolExecutor(workers) as pool,
        tqdm(
            pool.map(lambda source: _scan_source(source, settings, manifest), sources),
            desc=f"{heading}: scanning media",
            total=len(sources),
            unit="file",
            leave=False,
            disable=not show_progress,
        ) as progress,
    ):
        found = tuple(progress)
    # A source with a problem in the listing (a missing caption, say) is not recorded: it may be usable next time.
    manifest.sources = {
        listed.name: _manifest_entry(scanned, listed)
        for scanned, listed in zip(found, sources, strict=True)
        if listed.problem is None
    }
    return ScannedDataset(heading, settings, found, manifest)


def _scan_source(source: Source, settings: DatasetSettings, manifest: Manifest) -> ScannedSource:
    if source.problem:
        return ScannedSource(source, problem=source.problem)
    try:
        source, info = _known(source, manifest) or (source, read_media_info(source))
        plan = plan_items(settings, source.name, info)
    except MediaError as error:
        return ScannedSource(source, problem=str(error))
    except ValueError as error:
        return ScannedSource(source, problem=f"{source.path}: {error}")
    if not plan.items:
        shortest = min(plan.dropped_targets)
        problem = f"{source.path}: {info.frames} frames, too short for the smallest of target_frames, {shortest}"
        return ScannedSource(source, info, plan, problem)
    return ScannedSource(source, info, plan)


def _known(source: Source, manifest: Manifest) -> tuple[Source, MediaInfo] | None:
    """The source and its media info from the manifest; None if the manifest lacks the file or the file has changed.

    The returned source has the modification time that its caches record.
    """
    entry = manifest.sources.get(source.name)
    try:
        if entry and source.is_described_by(entry):
            return replace(source, mtime_ns=entry["stamp"][1]), MediaInfo.from_json(entry["probe"])
    except (KeyError, TypeError, OSError):
        pass
    return None


def _manifest_entry(scanned: ScannedSource, listed: Source) -> dict[str, Any]:
    """What the manifest keeps of a source, so that later runs and the trainer need not open it."""
    content = {"probe": scanned.info.to_json()} if scanned.info else {"problem": scanned.problem}
    return {"stamp": scanned.source.stamp, "seen": listed.stamp, **content}
