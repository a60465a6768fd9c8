"""Limits of cache_latents.py: constant memory, decoding in parallel with encoding, and no work done twice.

    python -m benchmarks.caching
    python -m benchmarks.caching memory     # peak of 50 clips of 5 s at 960x544, above torch and the model
    python -m benchmarks.caching overlap    # wall time against decoding or encoding alone, the longer of both
    python -m benchmarks.caching again      # time of a second run over 300 cached clips, without imports

The VAE is replaced by averages of blocks of pixels, so that everything except the VAE is measured. Linux only.
"""

import argparse
import contextlib
import io
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace

import torch

from benchmarks.comparison import Comparison, print_comparisons
from dataset.config_utils import load_dataset_config
from dataset.latent_caching import (
    LatentWriter,
    Outcome,
    Pending,
    encode_clips,
    members_of_process,
    plan_jobs,
)
from dataset.media.ahead import read_ahead
from dataset.scan import ScannedDataset, scan_datasets
from examples.tiny_models import write_tiny_models
from tests.media_samples import write_caption, write_video

ROOT = Path(__file__).resolve().parent.parent
LIMIT_MB, LIMIT_SECONDS = 1500, 2


class AveragingVae:
    """Latents are averages of 1x8x8 pixels of every fourth frame, computed `passes` times to take longer."""

    def __init__(self, passes: int = 1) -> None:
        self.passes = passes

    def encode(self, pixels: torch.Tensor) -> SimpleNamespace:
        for _ in range(self.passes):
            mean = torch.nn.functional.avg_pool3d(pixels[:, :, ::4], (1, 8, 8))
        mean = mean.mean(dim=1, keepdim=True).expand(-1, 16, -1, -1, -1)
        return SimpleNamespace(mean=mean, logvar=torch.zeros_like(mean))


def write_clips(folder: Path, count: int, frames: int, size: tuple[int, int]) -> Path:
    """Writes `count` identical clips with captions, and their dataset config."""
    videos = folder / "videos"
    videos.mkdir()
    first = write_video(videos / "clip000.mp4", frames, 24, size, options={"preset": "ultrafast"})
    write_caption(first)
    for number in range(1, count):
        write_caption(Path(shutil.copy(first, videos / f"clip{number:03d}.mp4")))
    config = folder / "data.toml"
    config.write_text(
        f"[[datasets]]\nvideo_directory = '{videos.as_posix()}'\ncache_directory = '{(folder / 'cache').as_posix()}'\n"
        f"resolution = [{size[0]}, {size[1]}]\ntarget_frames = [{frames}]\n"
    )
    return config


def pending_of(config: Path) -> tuple[ScannedDataset, list[Pending]]:
    """The dataset, and all its items."""
    with contextlib.redirect_stderr(io.StringIO()):
        (dataset,) = scan_datasets(load_dataset_config(config))
    return dataset, [(dataset, source, item) for source, item in members_of_process(dataset, 0, 1)]


def run_writer(config: Path, vae: AveragingVae) -> float:
    dataset, pending = pending_of(config)
    place, dtypes = torch.device("cpu"), (torch.float32, torch.float16)
    writer = LatentWriter(vae, place, *dtypes, vae_provenance={}, max_batch_size=1, strict=True)
    start = time.perf_counter()
    writer.run(pending, {dataset.heading: Outcome()}, workers=os.cpu_count() or 1, show_progress=False)
    return time.perf_counter() - start


def peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def memory(folder: Path) -> Iterator[Comparison]:
    before = peak()
    for count in (5, 50):
        (folder / str(count)).mkdir()
        run_writer(write_clips(folder / str(count), count, 121, (960, 544)), AveragingVae())
        yield Comparison(f"caching {count} clips of 5 s, 960x544: memory", peak() - before, LIMIT_MB, "MB", "limit")


def overlap(folder: Path) -> Iterator[Comparison]:
    config = write_clips(folder, 12, 49, (960, 544))
    vae = AveragingVae(passes=6)
    _, pending = pending_of(config)
    start = time.perf_counter()
    loaded = [clip for _, _, clip in read_ahead(plan_jobs(pending[:4], check_counts=True), 1)]
    decoding = (time.perf_counter() - start) * len(pending) / 4
    start = time.perf_counter()
    for clip in loaded:
        encode_clips(vae, [clip], ["clip"], torch.device("cpu"), torch.float32)
    encoding = (time.perf_counter() - start) * len(pending) / 4
    both, longer = run_writer(config, vae), max(decoding, encoding)
    yield Comparison("caching 12 clips: time", both, longer, "s", "the longer of decoding and encoding alone", None)


def again(folder: Path) -> Iterator[Comparison]:
    config = write_clips(folder, 300, 9, (64, 32))
    vae = write_tiny_models(folder / "models").vae
    command = [sys.executable, "cache_latents.py", "--dataset_config", config, "--vae", vae, "--device", "cpu"]
    modules = "cache_latents, modules.caching.latents"
    imports = f"import {modules}"
    seconds = {}
    for name, words in (("first", command), ("second", command), ("imports", [sys.executable, "-c", imports])):
        start = time.perf_counter()
        subprocess.run(list(map(str, words)), cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        seconds[name] = time.perf_counter() - start
    beyond = seconds["second"] - seconds["imports"]
    yield Comparison("caching 300 cached clips again: time beyond imports", beyond, LIMIT_SECONDS, "s", "limit")


def main(argv: Sequence[str] | None = None) -> list[Comparison]:
    measures = {"memory": memory, "overlap": overlap, "again": again}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("measure", nargs="?", choices=measures, help="default: all")
    chosen = parser.parse_args(argv).measure
    torch.manual_seed(0)
    comparisons = []
    for measure in [measures[chosen]] if chosen else measures.values():
        with tempfile.TemporaryDirectory() as folder:
            comparisons += measure(Path(folder))
    print_comparisons("cache_latents.py", comparisons)
    return comparisons


if __name__ == "__main__":
    main()
