"""The log of a run: `train_log.jsonl`, the trackers of accelerate, and a progress bar.

Nothing in the file depends on the clock, so two runs can be compared line by line.
"""

import json
import statistics
import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm import tqdm

from dataset.image_video_dataset import Batch
from modules.training.files import TrainingFiles
from modules.training.state import Progress
from utils.files import parse_json, read_text, write_text

BANDS = 5  # of equal width in sigma 0..1, for the loss by timestep
SMOOTHING = 0.98
MEDIAN_OF_STEPS = 50
FIRST_STEPS = 10  # the loss at the start of a run is the mean over these steps


def band_name(band: int) -> str:
    """Band 0 of 5 -> `0-200`, in timesteps."""
    return f"{1000 * band // BANDS}-{1000 * (band + 1) // BANDS}"


def band_of(sigma: float) -> int:
    return min(int(sigma * BANDS), BANDS - 1)


def smoothed(past: float | None, value: float) -> float:
    """Exponential moving average that starts at the first value."""
    return value if past is None else SMOOTHING * past + (1 - SMOOTHING) * value


@dataclass
class StepResult:
    """Losses of the samples of one step on this process, with and without the weight of --weighting_scheme."""

    losses: list[Tensor] = field(default_factory=list)
    errors: list[Tensor] = field(default_factory=list)
    sigmas: list[Tensor] = field(default_factory=list)
    items: list[str] = field(default_factory=list)

    def add(self, losses: Tensor, errors: Tensor, sigma: Tensor, batch: Batch) -> None:
        """Adds a batch; losses, errors (losses without weight) and sigma are (B,)."""
        self.losses.append(losses)
        self.errors.append(errors)
        self.sigmas.append(sigma)
        self.items += [f"{name} (bucket {batch.bucket})" for name in batch.names]

    def samples(self) -> list[tuple[str, float, float]]:
        """(item, sigma, loss) of each sample."""
        return list(zip(self.items, numbers(self.sigmas), numbers(self.losses), strict=True))

    def totals(self) -> list[float]:
        """The sum of the losses, the sum of the errors, and for each band of sigma the sum and the number of losses."""
        bands, counts = [0.0] * BANDS, [0.0] * BANDS
        for _, sigma, loss in self.samples():
            bands[band_of(sigma)] += loss
            counts[band_of(sigma)] += 1
        return [sum(numbers(self.losses)), sum(numbers(self.errors)), *bands, *counts]


@dataclass(frozen=True)
class StepSummary:
    """What every process knows of a step: mean losses, and whether a checkpoint was asked for.

    Attributes:
        error: the mean loss without weights, which tells whether the model is as good as before.
    """

    loss: float
    error: float
    loss_by_band: dict[str, float]
    save: bool

    @classmethod
    def of(cls, totals: Sequence[float], samples: int, save: bool) -> "StepSummary":
        """The means of a step of so many samples; `totals` are `StepResult.totals`, added up over all processes."""
        loss, error, *rest = totals
        bands, counts = rest[:BANDS], rest[BANDS:]
        means = {band_name(i): bands[i] / counts[i] for i in range(BANDS) if counts[i]}
        return cls(loss / samples, error / samples, means, save)


class TrainingLog:
    """The log of a run, written by the main process. Runs of other names keep their lines in the file."""

    def __init__(self, files: TrainingFiles, accelerator: Accelerator, progress: Progress, total_steps: int) -> None:
        self.path, self.run, self.accelerator, self.progress = files.log, files.name, accelerator, progress
        self.active = accelerator.is_main_process
        self.seconds: deque[float] = deque(maxlen=MEDIAN_OF_STEPS)
        self.losses: deque[float] = deque(maxlen=FIRST_STEPS)  # without the weight of --weighting_scheme
        self.skipped = 0
        self.step_started = time.perf_counter()
        if self.active:
            _cut_after(self.path, self.run, progress.step)
            self.file = open(self.path, "a", encoding="utf-8", newline="\n")  # noqa: SIM115 - closed by __exit__
        self.bar = tqdm(
            total=total_steps,
            initial=progress.step,
            disable=not self.active,
            desc="training",
            bar_format="{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}{postfix}]",
        )

    def __enter__(self) -> "TrainingLog":
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()
        if self.active:
            self.file.close()

    def summary(self) -> list[tuple[str, object]]:
        """Rows for the table that is printed at the end."""
        rows: list[tuple[str, object]] = [("log", self.path)]
        # The first and the last steps do not overlap, also in a short run.
        each = min(len(self.losses), len(self.progress.first_losses), self.progress.step // 2)
        if each:
            first = statistics.mean(self.progress.first_losses[:each])
            last = statistics.mean(list(self.losses)[-each:])
            rows.append((f"loss, mean of the first and of the last {each} steps", f"{first:.4f} -> {last:.4f}"))
        if self.skipped:
            rows.append(("steps skipped, not finite", self.skipped))
        if self.seconds:
            rows.append(("seconds per step, median", f"{statistics.median(self.seconds):.3f}"))
        return rows

    def record(self, step: int, **values: Any) -> None:
        """Writes a line to the file; steps count from 1."""
        if self.active:
            line = {"run": self.run, "step": step, **values}
            self.file.write(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n")
            self.file.flush()

    def say(self, text: str) -> None:
        """Prints a line above the progress bar."""
        if self.active:
            self.bar.write(text, file=sys.stderr)

    def step(
        self,
        step: int,
        epoch: int,
        loss: float,
        error: float,
        loss_by_band: Mapping[str, float],
        norm: float,
        rates: Sequence[float],
        facts: Mapping[str, float],
        **extra: Any,
    ) -> None:
        """Logs a step that changed the weights; steps and epochs count from 1.

        Args:
            error: the loss without the weight of --weighting_scheme.
            facts: further numbers by name.
        """
        progress = self.progress
        self.losses.append(error)
        if len(progress.first_losses) < FIRST_STEPS:
            progress.first_losses.append(error)
        self.record(
            step,
            epoch=epoch,
            loss=loss,
            smoothed_loss=progress.smoothed_loss,
            gradient_norm=norm,
            lr=rates[0] if len(rates) == 1 else list(rates),
            loss_by_timestep=dict(loss_by_band),
            **facts,
            **extra,
        )
        seconds = self._tick()
        self.track(
            {
                "loss": loss,
                "loss/smoothed": progress.smoothed_loss,
                "gradient_norm": norm,
                "seconds_per_step": seconds,
                "memory/peak_gib": peak_memory(self.accelerator.device) / 2**30,
                **{f"lr/{index}": rate for index, rate in enumerate(rates)},
                **{f"loss/timestep {name}": value for name, value in progress.loss_by_band.items()},
                **facts,
            },
            step,
        )

    def track(self, values: Mapping[str, float], step: int) -> None:
        """Logs numbers to TensorBoard and wandb."""
        if self.accelerator.trackers:
            self.accelerator.log(dict(values), step=step)

    def _tick(self) -> float:
        """Moves the progress bar; returns the seconds of this step."""
        now = time.perf_counter()
        seconds, self.step_started = now - self.step_started, now
        self.seconds.append(seconds)
        median = statistics.median(self.seconds)
        left = tqdm.format_interval(median * (self.bar.total - self.bar.n - 1))
        loss = f", loss {statistics.mean(self.losses):.4f}" if self.losses else ""
        self.bar.set_postfix_str(f"{median:.2f} s/step, {left} left{loss}", refresh=False)
        self.bar.update()
        return seconds

    def skipped_step(self) -> None:
        """Counts a step that did not change the weights."""
        self.skipped += 1
        self._tick()

    def pause(self) -> "_Pause":
        """Inside, time does not count as time of a step; for saving, validation and previews."""
        return _Pause(self)


class _Pause:
    def __init__(self, log: TrainingLog) -> None:
        self.log = log

    def __enter__(self) -> None:
        self.started = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self.log.step_started += time.perf_counter() - self.started


def peak_memory(device: torch.device) -> int:
    """Bytes: the most that torch has allocated on a GPU, or what this process now uses of main memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return psutil.Process().memory_info().rss


def _cut_after(path: Path, run: str, step: int) -> None:
    """Removes the lines of this run after `step`, which the resumed run writes again; all of them if `step` is 0."""
    lines = read_text(path, "training log").splitlines() if path.exists() else []
    kept = [line for line in lines if _is_kept(line, run, step)]
    if kept != lines:
        write_text(path, "".join(f"{line}\n" for line in kept))


def _is_kept(line: str, run: str, step: int) -> bool:
    try:
        values = parse_json(line)
        return values["run"] != run or (step > 0 and values["step"] <= step)
    except (ValueError, KeyError, TypeError):  # a line that a killed run left incomplete
        return False


def numbers(tensors: Sequence[Tensor]) -> list[float]:
    """The values of tensors (B,), one after another."""
    return [value for tensor in tensors for value in tensor.tolist()]


def describe(samples: Sequence[tuple[str, float, float]]) -> list[str]:
    """Samples (item, sigma, loss) in words, for the log."""
    return [f"{item} at timestep {1000 * sigma:.0f}: loss {loss:.4g}" for item, sigma, loss in samples]
