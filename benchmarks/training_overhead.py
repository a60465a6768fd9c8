"""What the training loop costs beside the model: wall time of a step of hv_train_network.py against the bare step.

The bare step is forward, backward, clipping and optimizer of the same batches on the same small model, in the same
process, with the noise drawn beforehand. Both run alternately, so that a busy machine slows both.

    python -m benchmarks.training_overhead [--steps 60] [--rounds 5]
"""

import argparse
import contextlib
import io
import statistics
import tempfile
import time
from pathlib import Path

import torch
from tqdm import tqdm

LIMIT = 1.25


def bare_steps(trainer, steps: int) -> float:
    """Median seconds of a step that does nothing but learn."""
    from modules.flow_matching import interpolate, velocity_target, weighted_mse

    data = trainer.loader.dataset.dataset
    batches = [data.batch_of(0, index % len(data)) for index in range(steps)]
    parameters = list(trainer.trained.tensors.values())
    optimizer = torch.optim.AdamW(parameters, lr=0.0)
    seconds = []
    for batch in batches:
        latents = trainer.model.latents(batch)
        noise, sigma = torch.randn_like(latents), torch.rand(len(latents))
        started = time.perf_counter()
        velocity = trainer.model.velocity(interpolate(latents, noise, sigma), sigma, batch)
        weighted_mse(velocity, velocity_target(latents, noise)).mean().backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


def whole_steps(words: list[str]) -> tuple[float, object]:
    """Median seconds of a step of the script, and its trainer."""
    import hv_train_network
    from modules import trainer as loop

    kept, train = [], loop.train
    loop.train = lambda trainer: (kept.append(trainer), train(trainer))
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            hv_train_network.main(words)
    finally:
        loop.train = train
    return statistics.median(kept[0].log.seconds), kept[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60, help="steps of each round (default: 60)")
    parser.add_argument("--rounds", type=int, default=5, help="rounds; the median counts (default: 5)")
    options = parser.parse_args()

    from tests.training_world import command, write_world
    from utils.tiny_models import write_tiny_models

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        world = write_world(folder / "world", items=8)
        words = ["--max_train_steps", options.steps, "--learning_rate", 1e-4, "--logging_dir", folder / "logs"]
        words = command(world, write_tiny_models(folder / "models").dit, folder / "out", *words)
        ratios = []
        for _ in tqdm(range(options.rounds), desc="rounds"):
            whole, trainer = whole_steps(words)
            bare = bare_steps(trainer, options.steps)
            ratios.append(whole / bare)
            print(f"step {1000 * whole:.1f} ms, bare {1000 * bare:.1f} ms, ratio {ratios[-1]:.3f}")
    print(f"median ratio {statistics.median(ratios):.3f} (at most {LIMIT} is wanted)")


if __name__ == "__main__":
    main()
