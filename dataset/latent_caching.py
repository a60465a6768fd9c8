"""Latent caching without the model: which items must be encoded, decoding ahead, encoding, writing the caches.

Each file is decoded once, for all its items in all datasets; batches are formed from the clips as they come. The noise
for sampling from the VAE's posterior is seeded by the item's name, so an interrupted run writes the same tensors as an
undisturbed one.
"""

import hashlib
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from tqdm import tqdm

from dataset.cache import (
    LATENT_SUFFIX,
    CacheStatus,
    check_latents,
    orphans,
    write_latent_cache,
)
from dataset.config_utils import DatasetSettings
from dataset.items import Item, item_provenance, resample_rule
from dataset.manifest import FAILURES, Manifest, failure_manifests
from dataset.media import MediaError, MiscountError
from dataset.media.ahead import Job, read_ahead
from dataset.scan import ScannedDataset
from dataset.sources import Source
from utils.device_utils import is_out_of_memory
from utils.errors import UserError, one_line

Member = tuple[Source, Item]  # an item with the source that it is decoded from
Pending = tuple[ScannedDataset, Source, Item]  # an item that must be encoded

# For decoded clips that wait until their batch is full; beyond, smaller batches are encoded.
MAX_UNBATCHED_BYTES = 256 << 20


class Encoder(Protocol):
    """What this module uses of a VAE."""

    def encode(self, pixels: torch.Tensor) -> Any: ...


@dataclass
class Outcome:
    """What a run did with one dataset.

    Attributes:
        statuses: the state of each cache file before the run, by item name.
        failures: why items could not be encoded, by item name.
        orphaned: cache files that belong to no item.
        recounted: videos whose decoder showed another number of frames than their packets promised.
    """

    statuses: dict[str, CacheStatus] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    orphaned: list[Path] = field(default_factory=list)
    recounted: list[str] = field(default_factory=list)

    def count(self, state: str) -> int:
        return sum(status.state == state for name, status in self.statuses.items() if name not in self.failures)


def members_of_process(dataset: ScannedDataset, rank: int, world_size: int) -> list[Member]:
    """The items that one process encodes: its part of the whole list, so that few files are read by two processes."""
    items = list(dataset.items)
    return items[len(items) * rank // world_size : len(items) * (rank + 1) // world_size]


def check_caches(
    dataset: ScannedDataset, members: Sequence[Member], vae_provenance: Mapping[str, Any], trust_names: bool
) -> dict[str, CacheStatus]:
    """Whether the cache file of each item can be kept, by item name.

    With `trust_names` the manifest records which provenance was taken for granted, so that the trainer accepts it too.
    It does so for the items of all processes.

    Args:
        vae_provenance: the part of the provenance that all items share: the VAE and the dtype.
    """
    dataset.manifest.trusted = {
        item.path.name: item_provenance(item, dataset.settings, source.stamp)
        for source, item in (dataset.items if trust_names else ())
    }
    return {item.name: _check_cache(dataset, source, item, vae_provenance, trust_names) for source, item in members}


def _check_cache(
    dataset: ScannedDataset, source: Source, item: Item, vae_provenance: Mapping[str, Any], trust_names: bool
) -> CacheStatus:
    expected = item_provenance(item, dataset.settings, source.stamp) | vae_provenance
    status = check_latents(item.path, item.latent_shape, expected, trust_names)
    if status.kept and not dataset.manifest.is_intact(item.path):
        return CacheStatus("changed", "the cache file is damaged or not finite")
    return status


def plan_jobs(pending: Sequence[Pending], check_counts: bool) -> list[Job]:
    """One job for each file, or more where datasets resample it differently.

    Args:
        check_counts: whether the jobs report files with more or fewer frames than expected.
    """
    groups: dict[tuple[Path, str, str], list[Pending]] = defaultdict(list)
    for dataset, source, item in pending:
        groups[source.path, source.kind, resample_rule(dataset.settings)].append((dataset, source, item))
    jobs = []
    for (_, kind, _), group in groups.items():
        # With `head`, a file need not be read to its end; where another dataset takes more, it must.
        dataset, source, _ = max(group, key=lambda member: member[0].settings.frame_extraction != "head")
        info = dataset.info_of(source)
        expected = info if check_counts and kind == "video" else None
        jobs.append(Job(source, tuple(item for _, _, item in group), dataset.settings, info, expected))
    return jobs


def posterior_noise(name: str, shape: Sequence[int]) -> torch.Tensor:
    """Standard normal noise, float32 on the CPU; the item's name is the seed."""
    seed = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=7).digest(), "little")
    return torch.randn(tuple(shape), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def encode_clips(
    vae: Encoder, pixels: list[np.ndarray], names: Sequence[str], device: torch.device, dtype: torch.dtype
) -> torch.Tensor:
    """Encodes clips of one size and samples from the VAE's posterior.

    Args:
        pixels: (F, H, W, 3) uint8 of each clip. The list is emptied to free memory.
        names: of the items, the seeds of the noise.
        dtype: in which the VAE computes.

    Returns:
        Unscaled latents (B, 16, f, h, w), float32 on the CPU.
    """
    batch = torch.from_numpy(np.stack(pixels) if len(pixels) > 1 else pixels[0][None])
    # A long clip takes 200 MB as bytes and 800 MB as float32: free the bytes before the conversion.
    pixels.clear()
    batch = batch.to(device).permute(0, 4, 1, 2, 3)  # B F H W 3 -> B 3 F H W
    batch = batch.to(torch.float32, memory_format=torch.contiguous_format).div_(127.5).sub_(1).to(dtype)
    posterior = vae.encode(batch)
    mean, deviation = posterior.mean.float(), (0.5 * posterior.logvar.float()).exp()
    noise = torch.stack([posterior_noise(name, mean.shape[1:]) for name in names])
    return (mean + deviation * noise.to(mean)).cpu()


@dataclass(frozen=True)
class LatentWriter:
    """Encodes tasks with one VAE and writes the cache files.

    Attributes:
        dtype: in which the VAE computes.
        cache_dtype: of the stored latents.
        vae_provenance: the part of the provenance that all items share.
        max_batch_size: upper limit for the batch size of each dataset; None: no other limit.
        strict: stop at the first item that fails.
    """

    vae: Encoder
    device: torch.device
    dtype: torch.dtype
    cache_dtype: torch.dtype
    vae_provenance: Mapping[str, Any]
    max_batch_size: int | None
    strict: bool

    def batch_size(self, settings: DatasetSettings) -> int:
        """Clips that are encoded together."""
        return min(settings.batch_size, self.max_batch_size or settings.batch_size)

    def run(self, pending: Sequence[Pending], outcomes: dict[str, Outcome], workers: int, show_progress: bool) -> None:
        """Encodes all items. Failures are added to the outcomes, which are keyed by the heading of the dataset.

        Where a video turns out to have another number of frames, its items are planned and the file is read again.

        Raises:
            UserError: out of memory, the disk is full, or an item failed and `strict` is set.
        """
        with tqdm(total=len(pending), desc="encoding", unit="item", disable=not show_progress) as bar:
            encoding = _Encoding(self, outcomes, bar)
            again = encoding.run(plan_jobs(pending, check_counts=True), pending, workers)
            encoding.run(plan_jobs(again, check_counts=False), again, workers)
            encoding.remove_superseded()

    def encode_batch(self, batch: Sequence[Pending], pixels: list[np.ndarray]) -> Iterator[tuple[Pending, str]]:
        """Encodes clips of one size and writes their caches; yields the items that failed, each with the reason.

        Args:
            pixels: (F, H, W, 3) uint8 of each clip. The list is emptied to free memory.
        """
        latents = self._encode([(source, item) for _, source, item in batch], pixels)
        for (dataset, source, item), of_item in zip(batch, latents, strict=True):
            try:
                self._write(dataset, source, item, of_item)
            except OSError as error:
                raise UserError(
                    f"{item.path}: cannot be written: {one_line(error)}; caches written so far are kept"
                ) from None
            except ValueError as error:
                yield (
                    (dataset, source, item),
                    f"{source.path}: {item.name}: {error}; try --vae_dtype float32 or bfloat16",
                )

    def _encode(self, members: Sequence[Member], pixels: list[np.ndarray]) -> torch.Tensor:
        names = [item.name for _, item in members]
        try:
            return encode_clips(self.vae, pixels, names, self.device, self.dtype)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise UserError(
                f"out of memory while encoding {names[0]} ({members[0][1].bucket_name}); lower --batch_size or "
                "set --vae_spatial_tile_sample_min_size 128; caches written so far are kept"
            ) from None

    def _write(self, dataset: ScannedDataset, source: Source, item: Item, latents: torch.Tensor) -> None:
        provenance = item_provenance(item, dataset.settings, source.stamp) | self.vae_provenance
        frame_count = item.frame_count if item.span else None
        write_latent_cache(item.path, latents.to(self.cache_dtype), item.size, frame_count, provenance)
        dataset.manifest.mark_intact(item.path)


class _Encoding:
    """One run of a LatentWriter: collects clips into batches and keeps the outcomes up to date."""

    def __init__(self, writer: LatentWriter, outcomes: dict[str, Outcome], bar: tqdm) -> None:
        self.writer, self.outcomes, self.bar = writer, outcomes, bar
        self.unbatched: dict[tuple[str, str], list[tuple[Pending, np.ndarray]]] = defaultdict(list)
        self.handed_out: set[Item] = set()
        self.superseded: list[Item] = []

    def run(self, jobs: Sequence[Job], pending: Sequence[Pending], workers: int) -> list[Pending]:
        """Encodes all items; returns those of videos that were planned again and must be read again."""
        members = {item: (dataset, source, item) for dataset, source, item in pending}
        again: list[Pending] = []
        for job, item, clip in read_ahead(jobs, workers):
            if item is None:
                again += self._plan_again([members[item] for item in job.items], clip)
                continue
            self.handed_out.add(item)
            if isinstance(clip, MediaError):
                self._fail(members[item], str(clip))
                self.bar.update()
            else:
                self._collect(members[item], clip)
            del clip
        for key in list(self.unbatched):
            self._encode(key)
        return again

    def _collect(self, member: Pending, clip: np.ndarray) -> None:
        dataset, _, item = member
        key = dataset.heading, item.bucket_name
        self.unbatched[key].append((member, clip))
        if len(self.unbatched[key]) >= self.writer.batch_size(dataset.settings):
            self._encode(key)
        elif sum(clip.nbytes for batch in self.unbatched.values() for _, clip in batch) > MAX_UNBATCHED_BYTES:
            self._encode(max(self.unbatched, key=lambda key: sum(clip.nbytes for _, clip in self.unbatched[key])))

    def _encode(self, key: tuple[str, str]) -> None:
        members, pixels = map(list, zip(*self.unbatched.pop(key), strict=True))
        for member, reason in self.writer.encode_batch(members, pixels):
            self._fail(member, reason)
        self.bar.update(len(members))

    def _fail(self, member: Pending, reason: str) -> None:
        if self.writer.strict:
            raise UserError(f"{reason} (--strict)")
        self.outcomes[member[0].heading].failures[member[2].name] = reason

    def _plan_again(self, members: Sequence[Pending], error: MiscountError) -> list[Pending]:
        """Plans the items of a file with its true number of frames; returns those that must still be read."""
        again = []
        of_datasets = {dataset.heading: (dataset, source) for dataset, source, _ in members}
        for dataset, source in of_datasets.values():
            outcome = self.outcomes[dataset.heading]
            outcome.recounted.append(str(error))
            before = {item for other, item in dataset.items if other.name == source.name}
            after = dataset.plan_again(source, error.info).items
            self.superseded += before - set(after)
            for item in before - set(after):
                outcome.statuses.pop(item.name, None)
                outcome.failures.pop(item.name, None)
            new = [item for item in after if item not in before]
            for item in new:
                outcome.statuses[item.name] = _check_cache(
                    dataset, source, item, self.writer.vae_provenance, trust_names=False
                )
            unread = {item for _, _, item in members} - self.handed_out
            wanted = [
                item for item in after if item in unread or (item in new and not outcome.statuses[item.name].kept)
            ]
            again += [(dataset, source, item) for item in wanted]
        self.bar.total += len(again) - len({item for _, _, item in members} - self.handed_out)
        return again

    def remove_superseded(self) -> None:
        """Deletes what this run wrote for clips that are not in the plan with the true number of frames."""
        for item in self.superseded:
            if item in self.handed_out:
                item.path.unlink(missing_ok=True)


def prepare_cache_directory(dataset: ScannedDataset, rank: int) -> None:
    """Creates the directory; process 0 writes the manifest.

    Raises:
        UserError: the cache directory cannot be written.
    """
    directory = dataset.settings.cache_directory
    try:
        directory.mkdir(parents=True, exist_ok=True)
        if rank == 0:
            dataset.manifest.save()
    except OSError as error:
        raise UserError(f"{directory}: the cache directory cannot be written: {error.strerror}") from None


def finish(dataset: ScannedDataset, outcome: Outcome, rank: int, world_size: int, prune: bool) -> None:
    """Saves the failures and which cache files are intact; process 0 also looks for orphans.

    Args:
        prune: delete the orphans.
    """
    directory = dataset.settings.cache_directory
    _save_failures(dataset, outcome, rank)
    if rank > 0:
        dataset.manifest.save_share(rank, [item.path for _, item in dataset.items if item.name in outcome.statuses])
        return
    for other_rank, failures in failure_manifests(directory).items():
        if other_rank >= world_size:  # left by an earlier run with more processes
            failures.path.unlink(missing_ok=True)
    wanted = [item.path for _, item in dataset.items]
    outcome.orphaned = orphans(directory, LATENT_SUFFIX, wanted)
    for path in outcome.orphaned if prune else []:
        path.unlink(missing_ok=True)
    names = {path.name for path in wanted}
    dataset.manifest.intact = {name: stamp for name, stamp in dataset.manifest.intact.items() if name in names}
    dataset.manifest.save_all(world_size)


def _save_failures(dataset: ScannedDataset, outcome: Outcome, rank: int) -> None:
    """Each process writes its own list of failures; the trainer reads them all."""
    stamps = {item.name: source.stamp for source, item in dataset.items}
    failures = Manifest(dataset.settings.cache_directory, f"{FAILURES}{rank}")
    failures.sources = {name: {"stamp": stamps[name], "problem": why} for name, why in outcome.failures.items()}
    if failures.sources:
        failures.save()
    else:
        failures.path.unlink(missing_ok=True)
