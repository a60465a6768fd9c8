"""Batches for training, read from cache files only."""

import hashlib
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from dataset.cache import read_latent_cache, read_text_cache
from dataset.config_utils import DatasetConfig, DatasetSettings
from dataset.training_items import CachedItems, TrainingItem, cached_items
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
