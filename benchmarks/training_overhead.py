"""The overhead of the training loop: time of a step of hv_train_network.py against a bare step.

A bare step is forward, backward, clipping and optimizer for a batch of the same small model; the noise is drawn before
it. Both kinds of steps alternate, so that a busy machine slows both.

    python -m benchmarks.training_overhead [--steps 100]
"""

import argparse
import contextlib
import io
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import hv_train_network
from benchmarks.comparison import Comparison, print_comparisons
from benchmarks.throughput import now, timed
from examples.tiny_models import write_tiny_models
from modules.flow_matching import interpolate, velocity_target, weighted_mse
from modules.training.denoiser import Denoiser
from modules.training.loop import Trainer
from tests.training_world import command, write_world

LIMIT = 1.25
FIRST = 5  # steps that warm up


class Alternation:
    """Runs a bare step after each step of the loop and measures the time of both."""

    def __init__(self) -> None:
        self.whole: list[float] = []
        self.bare: list[float] = []
        self.optimizer: torch.optim.Optimizer | None = None
        self.started = time.perf_counter()

    def after(self, trainer: Trainer) -> None:
        device = trainer.denoiser.device
        self.whole.append(now(device) - self.started)
        data = trainer.loader.dataset.dataset
        latents = trainer.denoiser.latents(batch := data.batch_of(0, trainer.progress.step % len(data)))
        parameters = list(trainer.trained.tensors.values())
        self.optimizer = self.optimizer or torch.optim.AdamW(parameters, lr=0.0)
        noise, sigma = torch.randn_like(latents), torch.rand(len(latents), device=device)
        self.bare.append(timed(lambda: self.step(trainer.denoiser, batch, latents, noise, sigma, parameters), device))
        self.started = now(device)

    def step(self, denoiser: Denoiser, batch: Any, latents: Any, noise: Any, sigma: Any, parameters: list) -> None:
        velocity = denoiser.velocity(interpolate(latents, noise, sigma), sigma, batch)
        weighted_mse(velocity, velocity_target(latents, noise)).mean().backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()


def measure(words: list[str]) -> Alternation:
    """Runs the script with a bare step between its steps."""
    alternation, after_step = Alternation(), Trainer.after_step

    def after(trainer: Trainer, summary: Any) -> None:
        after_step(trainer, summary)
        alternation.after(trainer)

    Trainer.after_step = after
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            hv_train_network.main(words)
    finally:
        Trainer.after_step = after_step
    return alternation


def main(argv: Sequence[str] | None = None) -> list[Comparison]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100, help="steps that are measured (default: 100)")
    options = parser.parse_args(argv)

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        world = write_world(folder / "world", items=8)
        words = ["--max_train_steps", options.steps + FIRST, "--learning_rate", 1e-4, "--logging_dir", folder / "logs"]
        times = measure(command(world, write_tiny_models(folder / "models").dit, folder / "out", *words))
    whole, bare = (1000 * statistics.median(seconds[FIRST:]) for seconds in (times.whole, times.bare))
    comparisons = [Comparison("training step of the small model: time", whole, bare, "ms", "bare step", LIMIT)]
    print_comparisons("training loop", comparisons)
    return comparisons


if __name__ == "__main__":
    main()
