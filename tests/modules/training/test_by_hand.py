"""The trainer on a model of one number, against numpy: what a step computes, and what of it is random.

Comparisons of two runs cannot see a mistake that both make. Here every figure is computed by hand or frozen.
"""

import contextlib
import multiprocessing
import os
import socket
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from torch import Tensor, nn

from modules.training.files import SaveOptions, TrainingFiles
from modules.training.log import TrainingLog, band_name, band_of, smoothed
from modules.training.loop import Trainer
from modules.training.options import PreviewOptions, TrainingOptions, ValidationOptions
from modules.training.saver import CheckpointSaver
from modules.training.state import Progress
from modules.training.step_plan import (
    DROPOUT,
    VALIDATION,
    StepPlan,
    batch_loader,
    draw_noise,
    generator_for,
    seed_dropout,
    seed_for,
    step_generators,
)
from modules.training.stop_requests import StopRequests
from modules.training.timesteps import LoraTimestepOptions, sample_sigmas
from modules.training.validation import validation_losses
from tests.platforms import needs_posix
from tests.training_world import log_of

SEED, RATE, START = 7, 0.05, 0.3
SHAPE = (1, 1, 2, 2)  # C f h w
# By name, the items of a batch are not in the order of the epoch.
BATCHES = [["m", "c"], ["k"], ["a", "z"], ["b", "y"], ["x"]]


@dataclass
class Batch:
    """What the trainer reads of a batch."""

    latents: Tensor
    names: list[str]
    bucket: str = "16x16x1"


def latents_of(name: str) -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(ord(name)))


@dataclass
class Batches:
    """A dataset without files; every epoch has the same batches."""

    names: Sequence[Sequence[str]]

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Batch:
        return self.batch_of(0, index)

    def batch_of(self, epoch: int, index: int) -> Batch:
        return Batch(torch.stack([latents_of(name) for name in self.names[index]]), list(self.names[index]))


class OneNumber(nn.Module):
    """Model and what is trained of it: the velocity is `w` times x_t."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor([START]))
        self.in_evaluation = False
        self.broken_calls: Sequence[int] = ()
        self.seen: list[SimpleNamespace] = []
        self.updates: list[float] = []

    def latents(self, batch: Batch) -> Tensor:
        return batch.latents

    def velocity(self, x_t: Tensor, sigma: Tensor, batch: Batch) -> Tensor:
        seed = torch.initial_seed()
        self.seen.append(SimpleNamespace(x_t=x_t, sigma=sigma, seed=seed, in_evaluation=self.in_evaluation))
        return x_t * self.w * (float("nan") if len(self.seen) - 1 in self.broken_calls else 1)

    @property
    def tensors(self) -> dict[str, Tensor]:
        return {"w": self.w}

    def start_epoch(self) -> None: ...

    def start_step(self) -> None: ...

    def after_update(self) -> dict[str, float]:
        self.updates.append(self.w.item())
        return {}

    @contextlib.contextmanager
    def evaluation(self) -> Iterator[None]:
        self.in_evaluation = True
        yield
        self.in_evaluation = False

    switched_off = contextlib.nullcontext


@contextlib.contextmanager
def fresh_accelerator() -> Iterator[Accelerator]:
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    try:
        yield Accelerator(cpu=True)
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)


@dataclass
class Run:
    """A run of the trainer on `OneNumber`."""

    folder: Path
    batches: Sequence[Sequence[str]] = field(default_factory=lambda: BATCHES)
    accumulation: int = 2
    epochs: int = 2
    max_grad_norm: float = 0.0
    validation: Sequence[Sequence[str]] | None = None
    timesteps: LoraTimestepOptions = LoraTimestepOptions(timestep_sampling="uniform")
    broken_calls: Sequence[int] = ()

    def train(self) -> tuple[OneNumber, Progress, list[dict[str, Any]]]:
        """The model, the counters and the lines of the log."""
        model, progress, files = OneNumber(), Progress(seed=SEED), TrainingFiles(self.folder, "toy")
        model.broken_calls = self.broken_calls
        saver = SimpleNamespace(
            files=files, save=lambda *_, **__: None, write=lambda *_, **__: None, save_best=lambda: None
        )
        saver.command = str
        options = SimpleNamespace(
            training=TrainingOptions(max_grad_norm=self.max_grad_norm),
            timesteps=self.timesteps,
            previews=PreviewOptions(),
            validation=ValidationOptions(),
            save=SaveOptions(),
        )
        with fresh_accelerator() as accelerator:
            plan = StepPlan.create(len(self.batches), self.accumulation, accelerator.num_processes, 99, self.epochs)
            optimizer, train_set = torch.optim.SGD([model.w], lr=RATE), Batches(self.batches)
            with TrainingLog(files, accelerator, progress, plan.total_steps) as log:
                Trainer(
                    options=options,
                    accelerator=accelerator,
                    plan=plan,
                    progress=progress,
                    train_set=train_set,
                    validation_set=None if self.validation is None else Batches(self.validation),
                    denoiser=model,
                    trained=model,
                    optimizer=optimizer,
                    scheduler=torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step)),
                    loader=batch_loader(train_set, plan, accelerator.process_index, 0, 0),
                    log=log,
                    saver=saver,
                    requests=StopRequests(self.folder),
                ).train()
        return model, progress, log_of(self.folder) if accelerator.is_main_process else []


@dataclass
class Step:
    """A step of the run, in numpy."""

    loss: float
    norm: float
    weight: float
    samples: int


def by_hand(batches_per_step: int, epochs: int, max_norm: float = float("inf")) -> list[Step]:
    """x_t = (1 - s) x0 + s n; loss (w x_t - (n - x0))^2, the mean over all numbers of the step; SGD."""
    weight, steps, seen = START, [], 0
    for _ in range(epochs):
        for first in range(0, len(BATCHES), batches_per_step):
            names = sorted(name for batch in BATCHES[first : first + batches_per_step] for name in batch)
            losses, gradients, number = [], [], len(steps)
            for position, name in enumerate(names):
                generator = torch.Generator().manual_seed(seed_for(0, SEED, number, position))
                sigma = torch.rand((), generator=generator, dtype=torch.float64).item()
                noise = torch.randn(SHAPE, generator=generator).numpy().astype(np.float64)
                x0 = latents_of(name).numpy().astype(np.float64)
                x_t = (1 - sigma) * x0 + sigma * noise
                error = weight * x_t - (noise - x0)
                losses.append(np.mean(error**2))
                gradients.append(np.mean(2 * error * x_t))
            gradient = sum(gradients) / len(names)
            norm, seen = abs(gradient), seen + len(names)
            weight -= RATE / (1 + number) * gradient * min(1, max_norm / norm)
            steps.append(Step(sum(losses) / len(names), norm, weight, seen))
    return steps


def assert_is(run: tuple[OneNumber, Progress, list[dict[str, Any]]], expected: list[Step]) -> None:
    model, progress, lines = run
    assert [line["loss"] for line in lines] == pytest.approx([step.loss for step in expected], rel=1e-5)
    assert [line["gradient_norm"] for line in lines] == pytest.approx([step.norm for step in expected], rel=1e-5)
    assert model.updates == pytest.approx([step.weight for step in expected], rel=1e-5)
    assert progress.samples == expected[-1].samples


def test_steps_of_three_three_and_one_item_are_those_of_numpy(tmp_path: Path) -> None:
    """The last step of an epoch has fewer items; its gradient is the mean over these."""
    run = Run(tmp_path).train()
    assert_is(run, by_hand(2, 2))
    assert [line["epoch"] for line in run[2]] == [1, 1, 1, 2, 2, 2]
    assert [line["lr"] for line in run[2]] == pytest.approx([RATE / (1 + step) for step in range(6)])


def test_a_gradient_above_the_limit_is_scaled_down_to_it(tmp_path: Path) -> None:
    limit, plain = 0.03, by_hand(2, 2)
    expected = by_hand(2, 2, limit)
    assert min(step.norm for step in plain) > limit  # so every step is clipped
    assert_is(Run(tmp_path, max_grad_norm=limit).train(), expected)
    moves = np.abs(np.diff([START, *(step.weight for step in expected)]))
    assert moves == pytest.approx([limit * RATE / (1 + step) for step in range(6)])


def _in_process(rank: int, port: int, run: Run, results: Any) -> None:
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ.update(address, RANK=str(rank), LOCAL_RANK=str(rank), ACCELERATE_USE_CPU="true")
    model, progress, lines = run.train()
    results.put((rank, model.updates, progress.samples, lines))


def in_two_processes(run: Run) -> list[tuple[int, list[float], int, list[dict]]]:
    """(rank, weights after each step, samples, log) of both processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    processes = [context.Process(target=_in_process, args=(rank, port, run, results)) for rank in range(2)]
    for process in processes:
        process.start()
    try:
        return sorted((results.get(timeout=120) for _ in processes), key=lambda result: result[0])
    finally:
        for process in processes:
            process.join(10)
            process.kill()


@needs_posix
@pytest.mark.parametrize("accumulation", [1, 2])
def test_two_processes_make_the_steps_of_numpy(tmp_path: Path, accumulation: int) -> None:
    """With accumulation, the last step of an epoch has a single batch: the second process has none."""
    (_, first, samples, lines), (_, second, _, _) = in_two_processes(Run(tmp_path, accumulation=accumulation))
    expected = by_hand(2 * accumulation, 2)
    assert first == second == pytest.approx([step.weight for step in expected], rel=1e-5)
    assert [line["loss"] for line in lines] == pytest.approx([step.loss for step in expected], rel=1e-5)
    assert [line["gradient_norm"] for line in lines] == pytest.approx([step.norm for step in expected], rel=1e-5)
    assert samples == expected[-1].samples


def test_dropout_is_seeded_by_step_and_position(tmp_path: Path) -> None:
    model, _, _ = Run(tmp_path, batches=[["b"], ["a"]], epochs=1).train()
    # The items of the step are a and b: the batch with b comes first and has position 1.
    assert [call.seed for call in model.seen] == [seed_for(DROPOUT, SEED, 0, 1), seed_for(DROPOUT, SEED, 0, 0)]


def test_stratified_sampling_counts_the_samples_of_the_run(tmp_path: Path) -> None:
    """Two steps of 4 items go once through 8 buckets."""
    timesteps = LoraTimestepOptions(timestep_sampling="uniform", num_timestep_buckets=8)
    run = Run(tmp_path, batches=[list("abcd")], accumulation=1, epochs=2, timesteps=timesteps)
    sigmas = [sigma for call in run.train()[0].seen for sigma in call.sigma.tolist()]
    assert sorted(int(8 * sigma) for sigma in sigmas) == list(range(8))


def test_a_skipped_step_moves_the_schedule_and_leaves_the_weights(tmp_path: Path) -> None:
    run = Run(tmp_path, batches=[["a"]], accumulation=1, epochs=3, broken_calls=[1])
    model, progress, lines = run.train()
    assert [line.get("lr") for line in lines] == pytest.approx([RATE, None, RATE / 3])
    assert "skipped" in lines[1] and len(model.updates) == 2 and progress.samples == 3


def test_validation_is_the_mean_over_items_without_dropout(tmp_path: Path) -> None:
    """Batches of two and one; every item and sigma has noise of its own."""
    batches, sigmas, model = [["m", "c"], ["k"]], [0.25, 0.75], OneNumber()
    with fresh_accelerator() as accelerator:
        losses = validation_losses(model, Batches(batches), sigmas, accelerator, SEED, lambda: False)
    for place, sigma in enumerate(sigmas):
        errors = []
        for index, names in enumerate(batches):
            for item, name in enumerate(names):
                generator = generator_for(VALIDATION, SEED, index, place, item)
                noise, x0 = torch.randn(SHAPE, generator=generator).numpy(), latents_of(name).numpy()
                errors.append(np.mean((START * ((1 - sigma) * x0 + sigma * noise) - (noise - x0)) ** 2))
        assert losses[place] == pytest.approx(np.mean(errors), rel=1e-5)
    model, _, _ = Run(tmp_path, validation=batches, epochs=1).train()
    flags = [call.in_evaluation for call in model.seen]
    assert flags == [True] * 10 + [False] * 5 + [True] * 10


def test_noise_and_sigma_of_a_seed_a_step_and_a_position_are_frozen() -> None:
    """A saved state goes on with the same noise in every later version."""
    assert seed_for(0, 7, 3, 5) == 430814058985589294
    generators = step_generators(7, 3, [0, 5])
    sigma = sample_sigmas(LoraTimestepOptions(timestep_sampling="uniform"), generators, [0, 5], 7)
    assert sigma.tolist() == pytest.approx([0.8604334592819214, 0.3301117718219757], rel=1e-6)
    noise = draw_noise(torch.zeros(2, 1, 1, 2, 2), generators).flatten(1)
    assert noise[0].tolist() == pytest.approx([0.9764187, 0.4442749, 0.2380601, -1.6113182], rel=1e-5)
    assert noise[1].tolist() == pytest.approx([0.2629010, -0.7039149, -0.1762134, -0.9839566], rel=1e-5)


@pytest.mark.parametrize(
    ("key", "kept"),
    [((7, 3, 0), ".x.xx..x.x....xx"), ((7, 4, 0), "xx...xxxxxx.x.xx"), ((7, 3, 1), "xx.......xx.xxx.")],
)
def test_dropout_masks_are_frozen(key: tuple[int, int, int], kept: str) -> None:
    seed_dropout(*key)
    mask = nn.functional.dropout(torch.ones(16), 0.5)
    assert "".join("x" if value else "." for value in mask) == kept


def test_bands_and_smoothing() -> None:
    assert [band_of(sigma) for sigma in (0.0, 0.199, 0.2, 0.95, 1.0)] == [0, 0, 1, 4, 4]
    assert [band_name(band) for band in range(5)] == ["0-200", "200-400", "400-600", "600-800", "800-1000"]
    assert smoothed(None, 3.0) == 3.0
    assert smoothed(1.0, 2.0) == pytest.approx(1.02)


class Averaging(torch.optim.SGD):
    """As a schedule-free optimizer: the average, to be saved, is 10 above the point where it trains."""

    def train(self) -> None: ...

    def eval(self) -> None:
        self.param_groups[0]["params"][0].data.add_(10)


def test_a_checkpoint_holds_the_average_of_a_schedule_free_optimizer_and_the_state_its_point(tmp_path: Path) -> None:
    model, written = OneNumber(), {}
    accelerator = SimpleNamespace(is_main_process=True, wait_for_everyone=lambda: None)
    options = SimpleNamespace(files=TrainingFiles(tmp_path, "toy"), settings=lambda seed: "")
    stateful = {"optimizer": Averaging([model.w], lr=0.1)}
    saver = CheckpointSaver(options, accelerator, None, Progress(seed=SEED), None, model, stateful, None)
    saver._save_checkpoint = lambda stem: written.update(checkpoint=model.w.item())
    saver._save_state = lambda stem: written.update(state=model.w.item())
    saver.save("toy", state=True)
    assert written == pytest.approx({"checkpoint": START + 10, "state": START})
