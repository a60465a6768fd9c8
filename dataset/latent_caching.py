"""From planned items to latent caches: what is to do, decoding ahead, encoding, writing.

Decoding and resizing run in threads while the VAE encodes; how much they work ahead is bounded in bytes, so memory
does not depend on the size of the dataset. The noise of the posterior comes from a seed of the item's name, so an
interrupted run and an undisturbed one write the same tensors.
"""

import hashlib
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from tqdm import tqdm

from dataset.cache import (
    FAILURES,
    LATENT_SUFFIX,
    Manifest,
    Verdict,
    check_latents,
    failure_manifests,
    orphans,
    remove_leftovers,
    write_latent_cache,
)
from dataset.intake import TakenDataset
from dataset.items import Item, made_from
from dataset.media import MediaError, load_items
from dataset.sources import Source
from utils.device_utils import is_out_of_memory
from utils.errors import UserError, one_line

T = TypeVar("T")
R = TypeVar("R")
# Decoded pixels that may wait for the VAE: one clip of 129 frames at 960x544 (202 MB), or many small ones.
BYTES_AHEAD = 256 << 20
# Small clips are decoded together up to this size, so that a long video is not read from its start for each.
BYTES_TOGETHER = 32 << 20


class Encoder(Protocol):
    """What is needed of a VAE."""

    def encode(self, pixels: torch.Tensor) -> Any: ...


@dataclass(frozen=True)
class Task:
    """Items of one bucket that are decoded together, with the sources they come from."""

    dataset: TakenDataset
    members: tuple[tuple[Source, Item], ...]
    batch_size: int

    @property
    def pixel_bytes(self) -> int:
        return sum(_pixel_bytes(item) for _, item in self.members)


def _pixel_bytes(item: Item) -> int:
    return (item.clip.length if item.clip else 1) * item.bucket[0] * item.bucket[1] * 3


@dataclass
class Outcome:
    """What a run did with one dataset."""

    verdicts: dict[str, Verdict] = field(default_factory=dict)  # by item name
    failures: dict[str, str] = field(default_factory=dict)  # reason by item name
    orphaned: list[Path] = field(default_factory=list)

    def count(self, word: str) -> int:
        return sum(verdict.word == word for name, verdict in self.verdicts.items() if name not in self.failures)


def share_of(members: Sequence[T], rank: int, world_size: int) -> list[T]:
    """The part of one process: depends on the place in the list alone, so no two processes write one file."""
    return list(members[rank::world_size])


def judge(
    dataset: TakenDataset, mine: Sequence[tuple[Source, Item]], ingredients: dict[str, Any], trust_names: bool
) -> dict[str, Verdict]:
    """Whether each item's cache can be kept, by item name; `ingredients` are the VAE and the dtype.

    The manifest remembers what is trusted, other processes' share too, so that the trainer trusts the same.
    """
    dataset.manifest.trusted = {
        item.path.name: made_from(item, dataset.settings, source.stamp)
        for source, item in (dataset.items if trust_names else ())
    }
    verdicts = {}
    for source, item in mine:
        expected = made_from(item, dataset.settings, source.stamp) | ingredients
        verdict = check_latents(item.path, item.latent_shape, expected, trust_names)
        if verdict.kept and not dataset.manifest.is_sound(item.path):
            verdict = Verdict("changed", "the cache file is damaged or not finite")
        verdicts[item.name] = verdict
    return verdicts


def tasks_of(dataset: TakenDataset, members: Sequence[tuple[Source, Item]], batch_size: int) -> list[Task]:
    """Tasks of one bucket each: a batch, or so many that one way through a file serves several small clips."""
    per_bucket: dict[str, list[tuple[Source, Item]]] = defaultdict(list)
    for source, item in members:
        per_bucket[item.bucket_name].append((source, item))
    tasks = []
    for _, same in sorted(per_bucket.items()):
        size = batch_size * max(1, BYTES_TOGETHER // (batch_size * _pixel_bytes(same[0][1])))
        tasks += [Task(dataset, tuple(same[start : start + size]), batch_size) for start in range(0, len(same), size)]
    return tasks


def prefetch(
    tasks: Sequence[T], load: Callable[[T], R], nbytes: Callable[[T], int], workers: int
) -> Iterator[tuple[T, Future[R]]]:
    """Yields each task in order with the future of `load(task)`, while threads work ahead.

    Results that wait hold at most BYTES_AHEAD by the measure of `nbytes`, or one task that is larger.
    """
    upcoming, waiting = deque(tasks), deque()
    pool = ThreadPoolExecutor(workers)

    def work_ahead() -> None:
        held = sum(nbytes(task) for task, _ in waiting)
        while upcoming and (not waiting or (len(waiting) < workers and held + nbytes(upcoming[0]) <= BYTES_AHEAD)):
            task = upcoming.popleft()
            held += nbytes(task)
            waiting.append((task, pool.submit(load, task)))

    try:
        work_ahead()
        while waiting:
            task, future = waiting.popleft()
            work_ahead()
            yield task, future
    finally:
        pool.shutdown(cancel_futures=True)


@dataclass
class Loaded:
    """The decoded members of a task, and those that could not be decoded with the reason."""

    members: list[tuple[Source, Item]] = field(default_factory=list)
    pixels: list[np.ndarray] = field(default_factory=list)  # (F, H, W, 3) of each member
    failures: list[tuple[Item, str]] = field(default_factory=list)


def load_members(task: Task) -> Loaded:
    """Decodes the members of a task, each file once."""
    loaded = Loaded()
    for source, of_source in groupby(task.members, key=lambda member: member[0]):
        items = [item for _, item in of_source]
        for item, pixels in zip(items, load_items(source, items, task.dataset.settings), strict=True):
            if isinstance(pixels, MediaError):
                loaded.failures.append((item, str(pixels)))
            else:
                loaded.members.append((source, item))
                loaded.pixels.append(pixels)
    return loaded


def noise_for(name: str, shape: Sequence[int]) -> torch.Tensor:
    """Standard normal float32 noise on the CPU that depends on the item's name alone."""
    seed = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=7).digest(), "little")
    return torch.randn(tuple(shape), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def encode(
    vae: Encoder, pixels: list[np.ndarray], names: Sequence[str], device: torch.device, dtype: torch.dtype
) -> torch.Tensor:
    """Samples latents (B, 16, f, h, w), float32 and unscaled, of clips (F, H, W, 3); empties the list `pixels`."""
    batch = torch.from_numpy(np.stack(pixels) if len(pixels) > 1 else pixels[0][None])
    # A long clip is 200 MB as bytes and 800 MB as floats: keep no second copy of the bytes meanwhile.
    pixels.clear()
    batch = batch.to(device).permute(0, 4, 1, 2, 3)  # B F H W 3 -> B 3 F H W
    batch = batch.to(torch.float32, memory_format=torch.contiguous_format).div_(127.5).sub_(1).to(dtype)
    posterior = vae.encode(batch)
    mean, deviation = posterior.mean.float(), (0.5 * posterior.logvar.float()).exp()
    noise = torch.stack([noise_for(name, mean.shape[1:]) for name in names])
    return (mean + deviation * noise.to(mean)).cpu()


@dataclass(frozen=True)
class LatentWriter:
    """Encodes tasks with one VAE and writes their caches.

    Attributes:
        dtype: of the VAE's computation.
        cache_dtype: of the stored latents.
        ingredients: the part of `made_from` that is the same for all items.
        strict: stop at the first item that fails.
    """

    vae: Encoder
    device: torch.device
    dtype: torch.dtype
    cache_dtype: torch.dtype
    ingredients: dict[str, Any]
    strict: bool

    def run(self, tasks: Sequence[Task], outcomes: dict[str, Outcome], workers: int, show_progress: bool) -> None:
        """Works through the tasks; failures go into the outcome of their dataset (by heading).

        Raises:
            UserError: out of memory, the disk is full, or a failure when strict.
        """
        total = sum(len(task.members) for task in tasks)
        with tqdm(total=total, desc="encoding", unit="item", disable=not show_progress) as bar:
            for task, future in prefetch(tasks, load_members, lambda task: task.pixel_bytes, workers):
                loaded = future.result()
                failures = outcomes[task.dataset.heading].failures
                for item, reason in [*loaded.failures, *self._encode_and_write(task, loaded, bar)]:
                    if self.strict:
                        raise UserError(f"{reason} (--strict)")
                    failures[item.name] = reason
                bar.update(len(loaded.failures))

    def _encode_and_write(self, task: Task, loaded: Loaded, bar: tqdm) -> Iterator[tuple[Item, str]]:
        """Yields the items that failed with the reason."""
        while loaded.members:
            members, loaded.members = loaded.members[: task.batch_size], loaded.members[task.batch_size :]
            pixels, loaded.pixels = loaded.pixels[: task.batch_size], loaded.pixels[task.batch_size :]
            latents = self._encode(members, pixels)
            for (source, item), of_item in zip(members, latents, strict=True):
                try:
                    self._write(task.dataset, source, item, of_item)
                except OSError as error:
                    raise UserError(
                        f"{item.path}: cannot be written: {one_line(error)}; what is cached stays"
                    ) from None
                except ValueError as error:
                    yield item, f"{source.path}: {item.name}: {error}; try --vae_dtype float32 or bfloat16"
            bar.update(len(members))

    def _encode(self, members: Sequence[tuple[Source, Item]], pixels: list[np.ndarray]) -> torch.Tensor:
        names = [item.name for _, item in members]
        try:
            return encode(self.vae, pixels, names, self.device, self.dtype)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise UserError(
                f"out of memory while encoding {names[0]} ({members[0][1].bucket_name}); lower --batch_size or "
                "set --vae_spatial_tile_sample_min_size 128; what is cached stays"
            ) from None

    def _write(self, dataset: TakenDataset, source: Source, item: Item, latents: torch.Tensor) -> None:
        ingredients = made_from(item, dataset.settings, source.stamp) | self.ingredients
        frame_count = item.clip.length if item.clip else None
        write_latent_cache(item.path, latents.to(self.cache_dtype), item.size, frame_count, ingredients)
        dataset.manifest.mark_sound(item.path)


def begin(dataset: TakenDataset, rank: int, world_size: int) -> list[tuple[Source, Item]]:
    """The items of this process; writes the manifest (process 0) and removes what killed runs left.

    Raises:
        UserError: the cache directory cannot be written.
    """
    mine = share_of(list(dataset.items), rank, world_size)
    directory = dataset.settings.cache_directory
    try:
        directory.mkdir(parents=True, exist_ok=True)
        remove_leftovers(directory, [*(item.path for _, item in mine), dataset.manifest.share(rank).path])
        if rank == 0:
            remove_leftovers(directory, [dataset.manifest.path])
            dataset.manifest.save()
    except OSError as error:
        raise UserError(f"{directory}: the cache directory cannot be written: {error.strerror}") from None
    return mine


def finish(dataset: TakenDataset, outcome: Outcome, rank: int, world_size: int, prune: bool) -> None:
    """Saves what was learned of the cache files and the failures; deletes orphans only when asked."""
    directory = dataset.settings.cache_directory
    _save_failures(dataset, outcome, rank)
    if rank > 0:
        dataset.manifest.save_share(rank, [item.path for _, item in share_of(list(dataset.items), rank, world_size)])
        return
    for other_rank, failures in failure_manifests(directory).items():
        if other_rank >= world_size:  # of an earlier run with more processes
            failures.path.unlink(missing_ok=True)
    wanted = [item.path for _, item in dataset.items]
    outcome.orphaned = orphans(directory, LATENT_SUFFIX, wanted)
    for path in outcome.orphaned if prune else []:
        path.unlink(missing_ok=True)
    names = {path.name for path in wanted}
    dataset.manifest.sound = {name: stamp for name, stamp in dataset.manifest.sound.items() if name in names}
    dataset.manifest.save_all(world_size)


def _save_failures(dataset: TakenDataset, outcome: Outcome, rank: int) -> None:
    """Each process keeps its own list, so that none writes another's file; the trainer reads them all."""
    stamps = {item.name: source.stamp for source, item in dataset.items}
    failures = Manifest(dataset.settings.cache_directory, f"{FAILURES}{rank}")
    failures.sources = {name: {"stamp": stamps[name], "problem": why} for name, why in outcome.failures.items()}
    if failures.sources:
        failures.save()
    else:
        failures.path.unlink(missing_ok=True)
