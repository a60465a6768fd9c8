"""Which batches belong to which optimizer step: a pure function of the step, so that a run can start at any step.

A step takes the next `accumulation x processes` batches of the epoch, fewer at the epoch's end; no step crosses an
epoch. Rank r takes batch `micro x processes + r` of the step for each micro step.
"""

import math
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch.utils.data import DataLoader, Dataset, Sampler

from utils.errors import UserError

BatchKey = tuple[int, int] | None


@dataclass(frozen=True)
class StepPlan:
    """The arithmetic of a run; steps and epochs count from 0."""

    batches_per_epoch: int
    accumulation: int
    processes: int
    total_steps: int

    @classmethod
    def create(
        cls, batches_per_epoch: int, accumulation: int, processes: int, max_steps: int, max_epochs: int | None
    ) -> "StepPlan":
        """`max_epochs`, if given, wins over `max_steps`."""
        plan = cls(batches_per_epoch, accumulation, processes, max_steps)
        if max_epochs is None:
            return plan
        return cls(batches_per_epoch, accumulation, processes, max_epochs * plan.steps_per_epoch)

    @property
    def batches_per_step(self) -> int:
        return self.accumulation * self.processes

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(self.batches_per_epoch / self.batches_per_step)

    @property
    def total_epochs(self) -> int:
        return math.ceil(self.total_steps / self.steps_per_epoch)

    def epoch_of(self, step: int) -> int:
        return step // self.steps_per_epoch

    def ends_epoch(self, step: int) -> bool:
        """Whether `step` is the last of its epoch."""
        return (step + 1) % self.steps_per_epoch == 0

    def batch_keys(self, step: int, rank: int) -> list[BatchKey]:
        """(epoch, batch of the epoch) for each micro step of a rank; None where the epoch has no batch left."""
        epoch, step_of_epoch = divmod(step, self.steps_per_epoch)
        first = step_of_epoch * self.batches_per_step + rank
        batches = range(first, first + self.batches_per_step, self.processes)
        return [(epoch, batch) if batch < self.batches_per_epoch else None for batch in batches]


class _KeySampler(Sampler[BatchKey]):
    """The batch keys of one rank from a step to the end of the run."""

    def __init__(self, plan: StepPlan, rank: int, first_step: int) -> None:
        self.plan, self.rank, self.first_step = plan, rank, first_step

    def __len__(self) -> int:
        return (self.plan.total_steps - self.first_step) * self.plan.accumulation

    def __iter__(self) -> Iterator[BatchKey]:
        for step in range(self.first_step, self.plan.total_steps):
            yield from self.plan.batch_keys(step, self.rank)


class _KeyedDataset(Dataset):
    """Batches by (epoch, batch): workers that live through all epochs learn the epoch with every request.

    A user's mistake is delivered as a batch: torch would fold the traceback of an exception into its message.
    """

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __getitem__(self, key: BatchKey) -> Any:
        try:
            return None if key is None else self.dataset.batch_of(*key)
        except UserError as error:
            return error


def as_it_is(batch: Any) -> Any:
    """The dataset makes whole batches; there is nothing to collate."""
    return batch


def ignore_stop_signals(_worker: int) -> None:
    """Ctrl+C reaches every process of a terminal, and a launcher, systemd or SLURM sends SIGTERM to all of a run.

    The main process decides when the workers end.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def delivered(loader: DataLoader) -> Iterator[Any]:
    """The batches of a `batch_loader`; its workers end with them, or when they are closed.

    Raises:
        UserError: the dataset raised it.
    """
    batches = iter(loader)
    try:
        for batch in batches:
            if isinstance(batch, UserError):
                raise batch
            yield batch
    finally:
        if loader.num_workers:
            # A traceback may hold the iterator until torch ends its workers by SIGTERM, which they ignore.
            batches._shutdown_workers()


def batch_loader(dataset: Any, plan: StepPlan, rank: int, first_step: int, workers: int) -> DataLoader:
    """One loader for the whole run of a rank, from `first_step` on: `plan.accumulation` items for each step; read it
    through `delivered`.

    Args:
        dataset: `batch_of(epoch, index)`; can be pickled.
        workers: loader processes; 0 loads in this process.
    """
    return DataLoader(
        _KeyedDataset(dataset),
        batch_size=None,
        sampler=_KeySampler(plan, rank, first_step),
        num_workers=workers,
        collate_fn=as_it_is,
        worker_init_fn=ignore_stop_signals,
    )
