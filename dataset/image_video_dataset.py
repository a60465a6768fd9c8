"""Batches for training, read from cache files only.

The items of a dataset are those of its media folder or JSONL file; where that does not exist on this machine, those of
the manifest that cache_latents.py wrote into the cache directory. Other files in the cache directory are ignored.
"""

import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from dataset.cache import CacheStatus, check_latents, check_text, read_latent_cache, read_text_cache, text_cache_path
from dataset.config_utils import DatasetConfig, DatasetSettings
from dataset.items import Item, MediaInfo, item_provenance, plan_items
from dataset.manifest import Manifest, failed_items
from dataset.sources import list_sources
from utils.errors import UserError


@dataclass
class Batch:
    """Items of one bucket. Latents are unscaled."""

    latents: torch.Tensor  # (B, 16, f, h, w) float32
    text_states: torch.Tensor  # (B, 256, D) float32
    text_mask: torch.Tensor  # (B, 256) int64
    text_states_2: torch.Tensor  # (B, D2) float32
    names: list[str]
    bucket: str  # width x height x frames, pixels


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
    """What a look at the caches of a dataset found.

    Attributes:
        items: those whose caches can be used.
        problems: why training cannot start, one line for each caching script that must run.
        notes: what the user should know, such as files that are left out.
    """

    items: list[TrainingItem] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _Bucket:
    dataset: int
    name: str
    batch_size: int
    items: tuple[TrainingItem, ...]  # each item num_repeats times


def _generator(*parts: object) -> torch.Generator:
    digest = hashlib.blake2b("\n".join(map(str, parts)).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def _shuffled(things: Sequence[Any], generator: torch.Generator) -> list[Any]:
    return [things[index] for index in torch.randperm(len(things), generator=generator).tolist()]


class TrainingDataset(torch.utils.data.Dataset):
    """Map-style dataset whose element i is the i-th batch of the epoch; use it with `DataLoader(batch_size=None)`.

    The order of the batches depends on seed and epoch only, so it is the same for any number of workers, and a run can
    start in the middle of an epoch. A batch never mixes buckets or datasets. Incomplete batches are kept.

    Args:
        config: the dataset config.
        seed: for the order.
        subset: "train" or "validation".
        validation_split: fraction of the sources (not clips) of each dataset that belongs to "validation".
        items_of: used instead of `cached_items`. A function that remembers its results saves reading the caches once
            for each subset.

    Raises:
        UserError: an item has no cache or its cache is out of date; says how many, why, and which script to run.
    """

    def __init__(
        self,
        config: DatasetConfig,
        seed: int,
        *,
        subset: str = "train",
        validation_split: float = 0.0,
        items_of: Callable[[DatasetSettings], CachedItems] | None = None,
    ) -> None:
        self.seed = seed
        self.subset = subset
        # In shared memory, so that workers that persist over several epochs see the change.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()
        self._order: tuple[int, list[tuple[int, list[TrainingItem]]]] | None = None
        self.notes: list[str] = []
        self._settings: list[DatasetSettings] = []
        self._buckets: list[_Bucket] = []

        problems: list[str] = []
        for settings in config.every_dataset:
            held_out = settings in config.validation
            if held_out and subset == "train":
                continue
            cached = (items_of or cached_items)(settings)
            problems += cached.problems
            self.notes += cached.notes
            self._add(settings, cached.items if held_out else _subset(cached.items, subset, validation_split))
        if problems:
            raise UserError("; ".join(problems))
        if not self._buckets and subset == "train":
            raise UserError(f"{config.path}: no items are left to train on")

    def _add(self, settings: DatasetSettings, items: list[TrainingItem]) -> None:
        per_bucket: dict[str, list[TrainingItem]] = defaultdict(list)
        for item in items:
            per_bucket[item.bucket] += [item] * (settings.num_repeats if self.subset == "train" else 1)
        number = len(self._settings)
        self._settings.append(settings)
        self._buckets += [
            _Bucket(number, name, settings.batch_size, tuple(members)) for name, members in sorted(per_bucket.items())
        ]

    @property
    def num_items(self) -> int:
        """Items per epoch, repeats included."""
        return sum(len(bucket.items) for bucket in self._buckets)

    def __len__(self) -> int:
        """Batches per epoch."""
        return sum(-(-len(bucket.items) // bucket.batch_size) for bucket in self._buckets)

    def set_epoch(self, epoch: int) -> None:
        """Sets the epoch, which decides the order; running workers use it from their next iteration on."""
        self._epoch.fill_(epoch)

    def _batches(self, epoch: int) -> list[tuple[int, list[TrainingItem]]]:
        """(number of the bucket, items) of each batch of an epoch, in order."""
        if self._order is None or self._order[0] != epoch:
            batches = []
            for number, bucket in enumerate(self._buckets):
                generator = _generator(self.seed, epoch, bucket.dataset, bucket.name)
                items = _shuffled(bucket.items, generator)
                size = bucket.batch_size
                batches += [(number, items[start : start + size]) for start in range(0, len(items), size)]
            self._order = (epoch, _shuffled(batches, _generator(self.seed, epoch)))
        return self._order[1]

    def __getitem__(self, index: int) -> Batch:
        return self.batch_of(int(self._epoch), index)

    def batch_of(self, epoch: int, index: int) -> Batch:
        """A batch of any epoch, regardless of `set_epoch`: for loaders that read ahead into the next epoch."""
        number, items = self._batches(epoch)[index]
        return _load(items, self._buckets[number].name)

    def names_of(self, index: int) -> list[str]:
        """Names of the items of a batch, without reading their caches."""
        return [item.name for item in self._batches(int(self._epoch))[index][1]]

    def largest_batch(self) -> Batch:
        """The batch that needs the most memory: with the most latents, and with captions of the maximum length."""
        bucket = max(self._buckets, key=lambda b: b.items[0].positions * min(b.batch_size, len(b.items)))
        batch = _load(bucket.items[: bucket.batch_size], bucket.name)
        batch.text_mask.fill_(1)
        batch.text_mask[1:, -1] = 0  # captions of unequal length need an attention mask, which takes more memory
        return batch

    def description(self) -> dict[str, Any]:
        """Settings and buckets of each dataset, for the metadata of a LoRA."""
        datasets = []
        for number, settings in enumerate(self._settings):
            buckets = {b.name: len(b.items) for b in self._buckets if b.dataset == number}
            datasets.append(settings.effective() | {"num_items": sum(buckets.values()), "buckets": buckets})
        return {"datasets": datasets}


def _load(items: Sequence[TrainingItem], bucket: str) -> Batch:
    texts = [read_text_cache(item.text) for item in items]
    return Batch(
        latents=torch.stack([read_latent_cache(item.latents) for item in items]),
        text_states=torch.stack([states for states, _, _ in texts]),
        text_mask=torch.stack([mask for _, mask, _ in texts]),
        text_states_2=torch.stack([pooled for _, _, pooled in texts]),
        names=[item.name for item in items],
        bucket=bucket,
    )


def _subset(items: list[TrainingItem], subset: str, validation_split: float) -> list[TrainingItem]:
    """The items of one side of the split. Whole sources are held out; hashes of their names decide which."""
    sources = sorted({item.source for item in items}, key=lambda name: hashlib.blake2b(name.encode()).digest())
    count = min(round(len(sources) * validation_split) or 1, len(sources) - 1) if validation_split > 0 else 0
    held_out = set(sources[: max(count, 0)])
    return [item for item in items if (item.source in held_out) == (subset == "validation")]


class _CacheProblems:
    """Collects why caches of a dataset cannot be used, for one line that names the script to run."""

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
    directory, cached = settings.cache_directory, CachedItems()
    manifest = Manifest.load(directory, "latents")
    if not manifest.sources:
        cached.problems.append(
            f"{directory}: hv_latents.manifest.json is missing, so no caches are known here; "
            "run cache_latents.py, which also accepts existing caches of musubi-tuner"
        )
        return cached
    listed = {source.name: source for source in list_sources(settings)}
    failed, trusted_texts = failed_items(directory), Manifest.load(directory, "text").trusted
    latent_problems = _CacheProblems("cache_latents.py")
    text_problems = _CacheProblems("cache_text_encoder_outputs.py")
    by_musubi, left_out = 0, []
    progress = tqdm(
        listed or manifest.sources,
        desc=f"{directory}: checking caches",
        unit="file",
        leave=False,
        delay=2,
        disable=not show_progress,
    )
    for name in progress:
        source, entry = listed.get(name), manifest.sources.get(name)
        cached_elsewhere = source is not None and source.absent and entry is not None and "probe" in entry
        if source and source.problem and not cached_elsewhere:
            left_out.append(source.problem)
            continue
        if entry is None or not (source is None or source.absent or source.is_described_by(entry)):
            latent_problems.add("not cached" if entry is None else "the media file changed", name)
            continue
        if "probe" not in entry:
            left_out.append(entry["problem"])
            continue
        text = text_cache_path(directory, name)
        caption = source.caption if source else None
        status = check_text(text, caption, {}, trust_name=trusted_texts.get(text.name) == {"caption": caption})
        if not status.kept:
            text_problems.add(status.reason, name)
        for item, item_status in _checked_items(settings, name, manifest, latent_problems):
            by_musubi += item_status.by_musubi
            if item_status.kept:
                cached.items.append(_training_item(item, text))
            elif failed.get(item.name) != entry["stamp"]:
                latent_problems.add(item_status.reason, item.name)
    cached.problems += latent_problems.lines(directory) + text_problems.lines(directory)
    if left_out:
        cached.notes.append(
            f"{directory}: {len(left_out)} listed files cannot be used and are left out; the first: {left_out[0]}"
        )
    if by_musubi:
        cached.notes.append(f"{directory}: {by_musubi} latent caches were made by musubi-tuner and are used")
    return cached


def _checked_items(
    settings: DatasetSettings, name: str, manifest: Manifest, problems: _CacheProblems
) -> Iterator[tuple[Item, CacheStatus]]:
    entry = manifest.sources[name]
    try:
        plan = plan_items(settings, name, MediaInfo.from_json(entry["probe"]))
    except ValueError as error:
        problems.add(str(error), name)
        return
    for item in plan.items:
        expected = item_provenance(item, settings, entry["stamp"])
        is_trusted = manifest.trusted.get(item.path.name) == expected
        yield item, check_latents(item.path, item.latent_shape, expected, trust_name=is_trusted)


def _training_item(item: Item, text: Path) -> TrainingItem:
    f, h, w = item.latent_shape
    return TrainingItem(item.name, item.source, item.path, text, item.bucket_name, f * h * w)
