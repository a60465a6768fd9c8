"""Taking in a dataset: list its sources, learn their sizes, plan their items, and look for what will go wrong.

Runs before any model is loaded. Media that a manifest already knows, unchanged, are not opened again.
"""

import os
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

from tqdm import tqdm

from dataset.cache import Manifest
from dataset.config_utils import DatasetConfig, DatasetSettings
from dataset.items import Item, Plan, Probe, plan_items
from dataset.media import MediaError, probe
from dataset.sources import Source, explain_empty, list_sources
from utils.errors import UserError


@dataclass(frozen=True)
class TakenSource:
    """A source with what is known of it; `problem` says why it gives no items."""

    source: Source
    probe: Probe | None = None
    plan: Plan = field(default_factory=Plan)
    problem: str | None = None


@dataclass(frozen=True)
class TakenDataset:
    """One dataset of the config, ready to be cached."""

    heading: str
    settings: DatasetSettings
    sources: tuple[TakenSource, ...]
    manifest: Manifest

    @property
    def items(self) -> Iterator[tuple[Source, Item]]:
        """Every item with its source, in the order of the sources' names."""
        return ((taken.source, item) for taken in self.sources for item in taken.plan.items)

    @property
    def problems(self) -> list[str]:
        return [taken.problem for taken in self.sources if taken.problem]

    def duplicates(self) -> list[list[str]]:
        """File names of sources with the same content."""
        same: dict[str, list[str]] = defaultdict(list)
        for taken in self.sources:
            if taken.probe:
                same[taken.probe.digest].append(taken.source.path.name)
        return [names for names in same.values() if len(names) > 1]

    def buckets(self) -> Counter[str]:
        """Number of items per bucket."""
        return Counter(item.bucket_name for _, item in self.items)


def _known(source: Source, manifest: Manifest) -> tuple[Source, Probe] | None:
    """The source with the stamp that its caches carry, and its probe, if the manifest describes this very file."""
    entry = manifest.sources.get(source.name)
    try:
        if entry and source.is_described_by(entry):
            return replace(source, mtime_ns=entry["stamp"][1]), Probe.from_json(entry["probe"])
    except (KeyError, TypeError, OSError):
        pass
    return None


def _take_source(source: Source, settings: DatasetSettings, manifest: Manifest) -> TakenSource:
    if source.problem:
        return TakenSource(source, problem=source.problem)
    try:
        source, found = _known(source, manifest) or (source, probe(source))
        plan = plan_items(settings, source.name, found)
    except MediaError as error:
        return TakenSource(source, problem=str(error))
    except ValueError as error:
        return TakenSource(source, problem=f"{source.path}: {error}")
    if not plan.items:
        shortest = min(plan.dropped_targets)
        problem = f"{source.path}: {found.frames} frames, too short for the smallest of target_frames, {shortest}"
        return TakenSource(source, found, plan, problem)
    return TakenSource(source, found, plan)


def _remembered(taken: TakenSource, listed: Source) -> dict[str, Any]:
    """What the manifest keeps of a source, so that later runs and the trainer need not open it."""
    what = {"probe": taken.probe.to_json()} if taken.probe else {"problem": taken.problem}
    return {"stamp": taken.source.stamp, "seen": listed.stamp, **what}


def _take_dataset(heading: str, settings: DatasetSettings, workers: int, show_progress: bool) -> TakenDataset:
    sources = list_sources(settings)
    if not sources:
        raise UserError(explain_empty(settings))
    manifest = Manifest.load(settings.cache_directory, "latents")
    with (
        ThreadPoolExecutor(workers) as pool,
        tqdm(
            pool.map(lambda source: _take_source(source, settings, manifest), sources),
            desc=f"{heading}: looking at the media",
            total=len(sources),
            unit="file",
            leave=False,
            disable=not show_progress,
        ) as progress,
    ):
        taken = tuple(progress)
    # A caption that is missing today may be there tomorrow; only media that cannot be opened stay what they are.
    manifest.sources = {
        listed.name: _remembered(one, listed)
        for one, listed in zip(taken, sources, strict=True)
        if listed.problem is None
    }
    return TakenDataset(heading, settings, taken, manifest)


def take_in(config: DatasetConfig, workers: int | None = None, show_progress: bool = True) -> list[TakenDataset]:
    """Takes in all datasets of a config.

    Args:
        workers: threads that open media; one less than the processors by default.

    Raises:
        UserError: a dataset has no usable item; says why in one line.
    """
    workers = workers or max((os.cpu_count() or 2) - 1, 1)
    taken = []
    for section, members in (("datasets", config.datasets), ("validation", config.validation)):
        for number, settings in enumerate(members, 1):
            dataset = _take_dataset(f"[[{section}]] {number}", settings, workers, show_progress)
            if len(dataset.problems) == len(dataset.sources):
                raise nothing_usable(dataset, dataset.problems)
            taken.append(dataset)
    return taken


def nothing_usable(dataset: TakenDataset, problems: Sequence[str]) -> UserError:
    """The error of a dataset of which nothing is left, with the first reason and how many more there are."""
    others = f", and {len(problems) - 1} more" if len(problems) > 1 else ""
    return UserError(f"{dataset.settings.location}: no usable item: {problems[0]}{others}")
