"""Latent caching without the model: which items must be encoded, decoding ahead, encoding, writing the caches.

Threads decode and resize while the VAE encodes. The decoded pixels that wait are limited in bytes, so the memory does
not grow with the dataset. The noise for sampling from the VAE's posterior is seeded by the item's name, so an
interrupted run writes the same tensors as an undisturbed one.
"""

import hashlib
from collections import defaultdict, deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import groupby
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
    remove_partial_files,
    write_latent_cache,
)
from dataset.items import Item, item_provenance
from dataset.manifest import FAILURES, Manifest, failure_manifests
from dataset.media import MediaError, load_items
from dataset.scan import ScannedDataset
from dataset.sources import Source
from utils.device_utils import is_out_of_memory
from utils.errors import UserError, one_line

Member = tuple[Source, Item]  # an item with the source that it is decoded from

# Limit for the decoded pixels that wait for the VAE: one clip of 129 frames at 960x544 (202 MB), or many small ones.
MAX_BYTES_AHEAD = 256 << 20
# Small clips are decoded together up to this size, so that a long video is not read from its start for each of them.
TASK_BYTES = 32 << 20


class Encoder(Protocol):
    """What this module uses of a VAE."""

    def encode(self, pixels: torch.Tensor) -> Any: ...


@dataclass(frozen=True)
class Task:
    """Items of one bucket that are decoded together. They are encoded `batch_size` at a time."""

    dataset: ScannedDataset
    members: tuple[Member, ...]
    batch_size: int

    @property
    def pixel_bytes(self) -> int:
        return sum(_pixel_bytes(item) for _, item in self.members)


def _pixel_bytes(item: Item) -> int:
    return item.frame_count * item.bucket[0] * item.bucket[1] * 3


@dataclass
class Outcome:
    """What a run did with one dataset.

    Attributes:
        statuses: the state of each cache file before the run, by item name.
        failures: why items could not be encoded, by item name.
        orphaned: cache files that belong to no item.
    """

    statuses: dict[str, CacheStatus] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    orphaned: list[Path] = field(default_factory=list)

    def count(self, state: str) -> int:
        return sum(status.state == state for name, status in self.statuses.items() if name not in self.failures)


def members_of_process(dataset: ScannedDataset, rank: int, world_size: int) -> list[Member]:
    """The items that one process encodes: every `world_size`-th of the whole list, so no two processes share a file."""
    return list(dataset.items)[rank::world_size]


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
    statuses = {}
    for source, item in members:
        expected = item_provenance(item, dataset.settings, source.stamp) | vae_provenance
        status = check_latents(item.path, item.latent_shape, expected, trust_names)
        if status.kept and not dataset.manifest.is_intact(item.path):
            status = CacheStatus("changed", "the cache file is damaged or not finite")
        statuses[item.name] = status
    return statuses


def plan_tasks(dataset: ScannedDataset, members: Sequence[Member], batch_size: int) -> list[Task]:
    """Divides the items into tasks of one bucket each: one batch, or several batches of small clips."""
    per_bucket: dict[str, list[Member]] = defaultdict(list)
    for source, item in members:
        per_bucket[item.bucket_name].append((source, item))
    tasks = []
    for _, same in sorted(per_bucket.items()):
        size = batch_size * max(1, TASK_BYTES // (batch_size * _pixel_bytes(same[0][1])))
        tasks += [Task(dataset, tuple(same[start : start + size]), batch_size) for start in range(0, len(same), size)]
    return tasks


@dataclass
class DecodedTask:
    """The decoded items of a task, and those that could not be decoded, each with the reason."""

    members: list[Member] = field(default_factory=list)
    pixels: list[np.ndarray] = field(default_factory=list)  # (F, H, W, 3) uint8 of each member
    failures: list[tuple[Item, str]] = field(default_factory=list)


def decode_task(task: Task) -> DecodedTask:
    """Decodes the items of a task. Each file is opened once."""
    decoded = DecodedTask()
    for source, of_source in groupby(task.members, key=lambda member: member[0]):
        items = [item for _, item in of_source]
        for item, pixels in zip(items, load_items(source, items, task.dataset.settings), strict=True):
            if isinstance(pixels, MediaError):
                decoded.failures.append((item, str(pixels)))
            else:
                decoded.members.append((source, item))
                decoded.pixels.append(pixels)
    return decoded


def decode_ahead(tasks: Sequence[Task], workers: int) -> Iterator[tuple[Task, Future[DecodedTask]]]:
    """Yields each task in order with the future of its decoded items, while threads decode the next tasks.

    The tasks that wait hold at most MAX_BYTES_AHEAD of pixels, or are one task that is larger.
    """
    upcoming, waiting = deque(tasks), deque()
    pool = ThreadPoolExecutor(workers)

    def submit() -> None:
        held = sum(task.pixel_bytes for task, _ in waiting)
        while upcoming and (
            not waiting or (len(waiting) < workers and held + upcoming[0].pixel_bytes <= MAX_BYTES_AHEAD)
        ):
            task = upcoming.popleft()
            held += task.pixel_bytes
            waiting.append((task, pool.submit(decode_task, task)))

    try:
        submit()
        while waiting:
            task, future = waiting.popleft()
            submit()
            yield task, future
    finally:
        pool.shutdown(cancel_futures=True)


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
        strict: stop at the first item that fails.
    """

    vae: Encoder
    device: torch.device
    dtype: torch.dtype
    cache_dtype: torch.dtype
    vae_provenance: Mapping[str, Any]
    strict: bool

    def run(self, tasks: Sequence[Task], outcomes: dict[str, Outcome], workers: int, show_progress: bool) -> None:
        """Encodes all tasks. Failures are added to the outcomes, which are keyed by the heading of the dataset.

        Raises:
            UserError: out of memory, the disk is full, or an item failed and `strict` is set.
        """
        total = sum(len(task.members) for task in tasks)
        with tqdm(total=total, desc="encoding", unit="item", disable=not show_progress) as bar:
            for task, future in decode_ahead(tasks, workers):
                decoded = future.result()
                failures = outcomes[task.dataset.heading].failures
                for item, reason in [*decoded.failures, *self._encode_and_write(task, decoded, bar)]:
                    if self.strict:
                        raise UserError(f"{reason} (--strict)")
                    failures[item.name] = reason
                bar.update(len(decoded.failures))

    def _encode_and_write(self, task: Task, decoded: DecodedTask, bar: tqdm) -> Iterator[tuple[Item, str]]:
        """Yields the items that failed, each with the reason."""
        while decoded.members:
            members, decoded.members = decoded.members[: task.batch_size], decoded.members[task.batch_size :]
            pixels, decoded.pixels = decoded.pixels[: task.batch_size], decoded.pixels[task.batch_size :]
            latents = self._encode(members, pixels)
            for (source, item), of_item in zip(members, latents, strict=True):
                try:
                    self._write(task.dataset, source, item, of_item)
                except OSError as error:
                    raise UserError(
                        f"{item.path}: cannot be written: {one_line(error)}; caches written so far are kept"
                    ) from None
                except ValueError as error:
                    yield item, f"{source.path}: {item.name}: {error}; try --vae_dtype float32 or bfloat16"
            bar.update(len(members))

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


def prepare_cache_directory(dataset: ScannedDataset, members: Sequence[Member], rank: int) -> None:
    """Creates the directory, removes this process's temporary files of killed runs; process 0 writes the manifest.

    Args:
        members: the items of this process.

    Raises:
        UserError: the cache directory cannot be written.
    """
    directory = dataset.settings.cache_directory
    try:
        directory.mkdir(parents=True, exist_ok=True)
        remove_partial_files(directory, [*(item.path for _, item in members), dataset.manifest.share(rank).path])
        if rank == 0:
            remove_partial_files(directory, [dataset.manifest.path])
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
        members = members_of_process(dataset, rank, world_size)
        dataset.manifest.save_share(rank, [item.path for _, item in members])
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
