"""Text caching without the models: which captions must be encoded, their batches, writing the caches."""

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dataset.cache import (
    TEXT_SUFFIX,
    CacheStatus,
    check_text,
    orphans,
    text_cache_path,
    write_text_cache,
)
from dataset.config_utils import DatasetSettings
from dataset.manifest import Manifest
from dataset.sources import Source, explain_empty, list_sources
from utils.errors import UserError

# Key in a cache file's provenance: the end of the caption that the LLM does not see, because it takes 256 tokens.
CUT_KEY = "cut"


@dataclass
class CaptionEntry:
    """One caption with its cache file; `status` is the state of that file before the run."""

    source: Source
    path: Path
    status: CacheStatus
    manifest: Manifest
    written: bool = False


@dataclass
class CaptionDataset:
    """The captions of one dataset, and which of them one process encodes.

    Attributes:
        entries: the usable captions, in the same order in all processes.
        skipped: sources that cannot be used.
        orphaned: text caches that belong to no caption.
    """

    settings: DatasetSettings
    manifest: Manifest
    entries: list[CaptionEntry]
    skipped: list[Source]
    orphaned: list[Path]
    rank: int
    world_size: int

    @property
    def entries_of_process(self) -> list[CaptionEntry]:
        """Every `world_size`-th entry, cached or not, since which files exist changes while other processes run."""
        return self.entries[self.rank :: self.world_size]

    def batches(self, batch_size: int) -> Iterator[list[CaptionEntry]]:
        """The captions that this process must encode, at most `batch_size` at a time."""
        pending = [entry for entry in self.entries_of_process if not entry.status.kept]
        for start in range(0, len(pending), batch_size):
            yield pending[start : start + batch_size]

    def finish(self, prune: bool) -> None:
        """Process 0 saves which cache files are intact, and deletes the orphans if `prune`."""
        self.manifest.save_all(self.world_size)
        for path in self.orphaned if prune else []:
            path.unlink()


@dataclass(frozen=True)
class TextCacheChecker:
    """Compares text caches with the ones that would be written now.

    Attributes:
        accepted: provenances that a cache file may have; the first is that of new files.
        trust_names: keep every complete file; --skip_existing.
        read_whole: read each kept file once, to find damage and values that are not finite.
        workers: threads.
    """

    accepted: Sequence[Mapping[str, Any]]
    trust_names: bool
    read_whole: bool
    workers: int
    rank: int
    world_size: int

    def scan(self, settings: DatasetSettings, shares: list[tuple[Manifest, list[Path]]]) -> CaptionDataset:
        """Lists the captions of a dataset and checks their cache files.

        Args:
            shares: the manifest and this process's cache files are appended before any of these files is read.

        Raises:
            UserError: the dataset has no usable caption.
        """
        sources = list_sources(settings)
        usable = [source for source in sources if source.problem is None]
        if not usable:
            raise UserError(sources[0].problem if sources else explain_empty(settings))
        paths = {source.name: text_cache_path(settings.cache_directory, source.name) for source in sources}
        manifest = Manifest.load(settings.cache_directory, "text")
        trusted = usable if self.trust_names else ()
        manifest.trusted = {paths[source.name].name: {"caption": source.caption} for source in trusted}
        own_paths = [paths[source.name] for source in usable[self.rank :: self.world_size]]
        shares.append((manifest, own_paths))
        # Process 0 reads the files of all processes, because it counts them all in its table.
        to_read = set((paths.values() if self.rank == 0 else own_paths) if self.read_whole else ())

        def entry(source: Source) -> CaptionEntry:
            path = paths[source.name]
            status = self._status(path, source.caption)
            if status.kept and path in to_read and not manifest.is_intact(path):
                status = CacheStatus("changed", "the cache file is damaged")
            return CaptionEntry(source, path, status, manifest)

        with ThreadPoolExecutor(self.workers) as pool:
            entries = list(pool.map(entry, usable))
        skipped = [source for source in sources if source.problem is not None]
        orphaned = orphans(settings.cache_directory, TEXT_SUFFIX, paths.values())
        return CaptionDataset(settings, manifest, entries, skipped, orphaned, self.rank, self.world_size)

    def _status(self, path: Path, caption: str) -> CacheStatus:
        statuses = [check_text(path, caption, provenance, self.trust_names) for provenance in self.accepted]
        return next((status for status in statuses if status.kept), statuses[0])


def write_entry(
    entry: CaptionEntry,
    llm: tuple[torch.Tensor, torch.Tensor],
    clip: tuple[torch.Tensor, torch.Tensor],
    dtype: torch.dtype,
    provenance: Mapping[str, Any],
) -> None:
    """Writes the embeddings of one caption.

    Args:
        llm: hidden states (256, D) and mask (256,).
        clip: pooled output (D2,) and mask (77,).
        dtype: of the stored embeddings.

    Raises:
        UserError: values are not finite in this dtype.
    """
    (states, mask), (pooled, pooled_mask) = llm, clip
    caption = entry.source.caption
    try:
        write_text_cache(entry.path, states.to(dtype), mask, pooled.to(dtype), pooled_mask, caption, provenance)
    except ValueError as error:
        raise UserError(
            f"{entry.source.path}: {error} in {provenance['dtype']}; use --text_encoder_dtype bfloat16 or float32"
        ) from None
    entry.written = True
    entry.manifest.mark_intact(entry.path)
