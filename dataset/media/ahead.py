"""Threads that decode and resize while the VAE encodes. All bytes that they hold are counted."""

import contextlib
import ctypes
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from queue import SimpleQueue

import numpy as np

from dataset.config_utils import DatasetSettings
from dataset.items import Item, MediaInfo
from dataset.media.clips import Clip, MiscountError, read_clips
from dataset.sources import Source
from utils.video_io import DECODER_THREADS

# For the decoded clips that wait: one of 129 frames at 960x544 (202 MB), or many small ones.
MAX_WAITING_BYTES = 256 << 20
# For the decoders themselves and the frames of their unfinished clips: two files of 4K, or many small ones.
MAX_DECODER_BYTES = 512 << 20
# Frames that a decoder keeps besides one per thread: up to 16 references, of which streams use about 5.
REFERENCE_FRAMES = 8
M_MMAP_THRESHOLD = -3  # malloc.h of glibc


@dataclass(frozen=True)
class Job:
    """One file to read, and its items in all datasets.

    Attributes:
        expected: what the items were planned with; None: the number of frames is not checked.
    """

    source: Source
    items: tuple[Item, ...]
    settings: DatasetSettings
    info: MediaInfo
    expected: MediaInfo | None

    @property
    def working_bytes(self) -> int:
        """What reading the file takes: the decoder's frames at 12 bits per pixel, RGB at full size, and one clip."""
        frame = self.info.width * self.info.height
        decoder = (DECODER_THREADS + REFERENCE_FRAMES) * frame * 3 // 2 if self.source.kind == "video" else 0
        return decoder + 6 * frame + max(map(pixel_bytes, self.items))


def pixel_bytes(item: Item) -> int:
    """Bytes of the pixels of an item, (F, H, W, 3) uint8."""
    return item.frame_count * item.bucket[0] * item.bucket[1] * 3


def _return_freed_blocks() -> None:
    """Makes glibc return blocks above 1 MiB to the system as soon as they are freed.

    Without this, each thread keeps the frames that it has freed; with eight files of 4K that was half a gigabyte.
    """
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL("libc.so.6").mallopt(M_MMAP_THRESHOLD, 1 << 20)


class _StoppedError(Exception):
    """The reader of the results is gone."""


class _ByteBudget:
    """A limit for the bytes that all threads hold together. What exceeds it alone may be held alone."""

    def __init__(self, limit: int) -> None:
        self.limit, self.held, self.is_closed = limit, 0, False
        self.changed = threading.Condition()

    def take(self, count: int) -> None:
        """Waits until `count` more bytes may be held."""
        with self.changed:
            self.changed.wait_for(lambda: self.is_closed or not self.held or self.held + count <= self.limit)
            if self.is_closed:
                raise _StoppedError
            self.held += count

    def give_back(self, count: int) -> None:
        with self.changed:
            self.held -= count
            self.changed.notify_all()

    def close(self) -> None:
        """All who wait, now or later, stop."""
        with self.changed:
            self.is_closed = True
            self.changed.notify_all()


class _Readers:
    """The state that the threads share."""

    def __init__(self, jobs: Sequence[Job]) -> None:
        self.jobs = deque(jobs)
        self.decoders, self.waiting = _ByteBudget(MAX_DECODER_BYTES), _ByteBudget(MAX_WAITING_BYTES)
        self.results: SimpleQueue[tuple[Job, Item | None, Clip | BaseException] | None] = SimpleQueue()

    def work(self) -> None:
        """Reads one job after the other, until there are no more; None ends the results of each thread."""
        try:
            while self.jobs:
                try:
                    job = self.jobs.popleft()
                except IndexError:  # another thread was faster
                    break
                self._read(job)
        except _StoppedError:
            pass
        finally:
            self.results.put(None)

    def _read(self, job: Job) -> None:
        self.decoders.take(job.working_bytes)
        try:
            for item, clip in read_clips(job.source, job.items, job.settings, job.expected):
                if isinstance(clip, np.ndarray):
                    self.waiting.take(clip.nbytes)
                self.results.put((job, item, clip))
                del clip
        except _StoppedError:
            raise
        except BaseException as error:
            self.results.put((job, None, error))
        finally:
            self.decoders.give_back(job.working_bytes)

    def close(self) -> None:
        self.jobs.clear()
        self.decoders.close()
        self.waiting.close()


def read_ahead(jobs: Sequence[Job], workers: int) -> Iterator[tuple[Job, Item | None, Clip | MiscountError]]:
    """The clips of all jobs, as they become complete; a MiscountError, without an item, ends the clips of its job.

    Args:
        workers: threads, each of which reads a file.
    """
    _return_freed_blocks()
    readers = _Readers(jobs)
    pool = ThreadPoolExecutor(workers)
    try:
        running = min(workers, len(jobs))
        for _ in range(running):
            pool.submit(readers.work)
        while running:
            result = readers.results.get()
            if result is None:
                running -= 1
                continue
            if isinstance(result[2], np.ndarray):
                readers.waiting.give_back(result[2].nbytes)
            elif result[1] is None and not isinstance(result[2], MiscountError):
                raise result[2]
            yield result
            del result
    finally:
        readers.close()
        pool.shutdown()
