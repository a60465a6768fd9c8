"""Which batches and which random numbers belong to a step.

Both depend only on the seed, the step and the position in the global batch, so a run can start at any step.

A step takes the next `accumulation x processes` batches of the epoch; the last step of an epoch takes those that are
left. In micro step m, rank r takes batch `m x processes + r` of the step.
"""

import math
import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from utils.errors import UserError

BatchKey = tuple[int, int] | None
"""(epoch, batch of the epoch); None where the epoch has no batch left."""

# The first number of every key of a random generator: what its numbers are used for.
NOISE, DROPOUT, VALIDATION = range(3)


@dataclass(frozen=True)
class StepPlan:
    """How the batches of a run are divided into steps and epochs; both count from 0."""

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
        """The batch of a rank for each micro step."""
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
    """A dataset whose keys hold the epoch, because the workers of the DataLoader live through all epochs.

    A UserError is returned as if it were a batch: torch would put the traceback of a raised one into its message.
    """

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __getitem__(self, key: BatchKey) -> Any:
        try:
            return None if key is None else self.dataset.batch_of(*key)
        except UserError as error:
            return error


def whole_batch(batch: Any) -> Any:
    """The collate_fn for a dataset whose items are whole batches already."""
    return batch


def ignore_stop_signals(_worker: int) -> None:
    """Leaves it to the main process to end the workers.

    Ctrl+C reaches every process of a terminal; launchers, systemd and SLURM send SIGTERM to every process of a run.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def read_batches(loader: DataLoader) -> Iterator[Any]:
    """The batches of a `batch_loader`. Its workers end after the last batch, or when this iterator is closed.

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
            # A traceback may keep the iterator alive; torch would then end the workers with SIGTERM, which they ignore.
            batches._shutdown_workers()


def batch_loader(dataset: Any, plan: StepPlan, rank: int, first_step: int, workers: int) -> DataLoader:
    """The batches of a rank from `first_step` to the end of the run, `plan.accumulation` of them for each step.

    Read it through `read_batches`.

    Args:
        dataset: has `batch_of(epoch, index)`, and can be pickled.
        workers: processes that load; 0: load in this process.
    """
    return DataLoader(
        _KeyedDataset(dataset),
        batch_size=None,
        sampler=_KeySampler(plan, rank, first_step),
        num_workers=workers,
        collate_fn=whole_batch,
        worker_init_fn=ignore_stop_signals,
    )


def generator_for(*key: int) -> torch.Generator:
    """A CPU generator, seeded by the key."""
    return torch.Generator("cpu").manual_seed(seed_for(*key))


def seed_for(*key: int) -> int:
    """A seed of 63 bits from a key of integers; similar keys give unrelated seeds (numpy's SeedSequence)."""
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1)


def step_generators(seed: int, step: int, positions: Sequence[int]) -> list[torch.Generator]:
    """One generator for each sample of a batch; `positions` are those in the global batch."""
    return [generator_for(NOISE, seed, step, position) for position in positions]


def draw_noise(latents: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
    """Standard normal noise of the shape of latents (B, C, f, h, w), drawn on the CPU, a generator for each sample."""
    noise = torch.stack([torch.randn(latents.shape[1:], generator=generator) for generator in generators])
    return noise.to(latents.device, non_blocking=True)


def seed_dropout(seed: int, step: int, position: int) -> None:
    """Seeds torch's global generators, which dropout uses, for the batch at this position of the global batch."""
    torch.manual_seed(seed_for(DROPOUT, seed, step, position))
