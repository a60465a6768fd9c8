r"""Encodes images and clips of a dataset into latent caches.

Before: media files and captions, described in a dataset config (dataset/dataset_config.md). After: one
`{item}_{width}x{height}_hv.safetensors` per image or clip in the cache directory; then run
cache_text_encoder_outputs.py. Run again at any time: only what is new or changed is encoded.

    python cache_latents.py --dataset_config dataset.toml --vae ckpts/hunyuan-video-t2v-720p/vae/pytorch_model.pt \
        --vae_chunk_size 32 --vae_tiling

Look at the dataset first, without any model: --debug_mode html. Share the work between GPUs:
`accelerate launch --multi_gpu --num_processes 4 cache_latents.py ...`.
"""

import dataclasses
import functools
import math
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from modules.options import DeviceOptions, VaeOptions, require
from utils.cli import option, parse_options, print_table, run_script
from utils.errors import UserError
from utils.processes import own_device, process_share

if TYPE_CHECKING:
    import torch

    from dataset.intake import TakenDataset
    from dataset.latent_caching import Outcome, Task


@dataclass(frozen=True, kw_only=True)
class CachingOptions:
    """caching"""

    dataset_config: Path = option(help="dataset config, TOML or JSON", path="file")
    batch_size: int | None = option(None, help="upper limit of the dataset's batch size while encoding", minimum=1)
    num_workers: int | None = option(None, help="threads that decode; processors - 1 when unset", minimum=0)
    skip_existing: bool = option(False, help="trust the names of cache files, compare nothing else")
    keep_cache: bool = option(False, help="accepted for old command lines: nothing is deleted without --prune")
    prune: bool = option(False, help="delete caches in the cache directories that belong to no item")
    strict: bool = option(False, help="stop at the first media file that cannot be used instead of skipping it")
    disable_cudnn_backend: bool = option(False, help="switch cuDNN off, which may help AMD GPUs")
    vram_gb: float | None = option(
        None, help="choose the VAE's tiles so that encoding fits so many GiB; 0: what is free", minimum=0
    )
    dry_run: bool = option(False, help="print what there is and the memory that encoding it needs, and end")

    def __post_init__(self) -> None:
        if self.prune and self.keep_cache:
            raise UserError("--prune deletes what --keep_cache keeps; give one of them")


@dataclass(frozen=True, kw_only=True)
class DebugOptions:
    """looking at the dataset instead of caching"""

    debug_mode: str | None = option(
        None, help="show what would be encoded and end", choices=("image", "console", "video", "html")
    )
    debug_output: Path = option(Path("dataset_preview.html"), help="the page that --debug_mode html writes")
    console_width: int = option(80, help="characters in a line of --debug_mode console", minimum=8)
    console_back: str | None = option(None, help="background of --debug_mode console, a name of ascii_magic.Back")
    console_num_images: int | None = option(
        None, help="show that many items of each dataset without waiting for keys", minimum=1
    )


def main() -> None:
    options, vae, device, debug = parse_options(__doc__, CachingOptions, VaeOptions, DeviceOptions, DebugOptions)
    if debug.debug_mode is None:
        require(vae, "vae")
    from dataset.config_utils import load_dataset_config

    config = load_dataset_config(options.dataset_config)
    if debug.debug_mode is None:
        ingredients, chosen = fingerprint(vae), own_device(device.device)

    from dataset.intake import nothing_usable, take_in
    from dataset.report import print_intake, print_outcome

    rank, processes = process_share()
    datasets = take_in(config, options.num_workers, show_progress=rank == 0)
    if rank == 0:
        print(config.effective_text())
        for note in config.notes:
            print(f"note: {note}", file=sys.stderr)
        print_intake(datasets)
    if options.strict:
        stop_at_problem(datasets)
    if debug.debug_mode is not None:
        from dataset.preview import show

        show(datasets, debug)
        return
    if options.dry_run or options.vram_gb is not None:
        vae = plan_memory(datasets, options, vae, chosen)
    if options.dry_run:
        return
    outcomes = cache(datasets, ingredients, options, vae, chosen)
    if rank == 0:
        print_outcome(datasets, outcomes, options.prune)
    for dataset in datasets if processes == 1 else []:  # a share that fails says nothing of the others
        outcome = outcomes[dataset.heading]
        if len(outcome.failures) == len(outcome.verdicts) > 0:
            raise nothing_usable(dataset, list(outcome.failures.values()))


def fingerprint(vae: VaeOptions) -> dict[str, str]:
    """What all latents depend on: the VAE and the dtype they are stored in.

    Raises:
        UserError: the file is no VAE of HunyuanVideo.
    """
    from hunyuan_model.checkpoints.identification import VAE, identify
    from utils.device_utils import dtype_word

    file = identify(vae.vae)
    file.tensors(VAE)
    return {"vae": file.checkpoint.fingerprint, "dtype": dtype_word(cache_dtype(vae))}


def cache_dtype(vae: VaeOptions) -> "torch.dtype":
    """The dtype of the stored latents: float16 unless the user says otherwise, whatever the VAE computes in."""
    from utils.device_utils import DTYPES

    return DTYPES[vae.vae_dtype or "float16"]


def stop_at_problem(datasets: "Sequence[TakenDataset]") -> None:
    for dataset in datasets:
        for problem in dataset.problems:
            raise UserError(f"{problem} (--strict)")


def plan_memory(
    datasets: "Sequence[TakenDataset]", options: CachingOptions, vae: VaeOptions, device: "torch.device"
) -> VaeOptions:
    """Prints what encoding the largest batch needs; --vram_gb chooses the tiles where the user has not."""
    from hunyuan_model.checkpoints import read_vae_config
    from modules.memory import plan as planner
    from modules.memory.measure import estimate_vae
    from utils.device_utils import default_dtype

    config, dtype = read_vae_config(vae.vae), default_dtype(vae.vae_dtype, device)
    B, F, H, W = largest_batch(datasets, options)
    # Before they are encoded, pixels are there as bytes, in float32 and in the VAE's dtype.
    prepared = B * config.pixel_channels * F * H * W * (1 + 4 + dtype.itemsize)

    @functools.cache
    def needed(tile: int | None) -> int:
        shape = (B, config.pixel_channels, F, H, W)
        return planner.with_overhead(max(estimate_vae(config, shape, dtype, vae.vae_chunk_size, tile), prepared))

    tiles = [vae.tile_size] if vae.tile_size else planner.TILE_SIZES
    limit = planner.memory_limit(options.vram_gb, planner.free_memory(device))
    tile = planner.first_fitting("encoding", tiles, needed, limit)
    rows = [
        ("items", sum(1 for dataset in datasets for _ in dataset.items)),
        ("VAE tiles", tile or "none"),
        ("GPU memory of encoding", planner.in_words(needed(tile))),
    ]
    if process_share()[0] == 0:
        print_table(f"memory plan, batch of {B}, {W}x{H}x{F}", rows)
    return dataclasses.replace(vae, vae_spatial_tile_sample_min_size=tile)


def largest_batch(datasets: "Sequence[TakenDataset]", options: CachingOptions) -> tuple[int, int, int, int]:
    """(B, F, H, W) of the batch that needs most; samples are encoded one by one, so their number counts last."""
    batches = []
    for dataset in datasets:
        counts, most = dataset.buckets(), batch_size(dataset, options)
        for _, item in dataset.items:
            (W, H), F = item.bucket, item.clip.length if item.clip else 1
            batches.append((min(most, counts[item.bucket_name]), F, H, W))
    return max(batches, key=lambda batch: (math.prod(batch[1:]), batch[0]))


def batch_size(dataset: "TakenDataset", options: CachingOptions) -> int:
    return min(dataset.settings.batch_size, options.batch_size or dataset.settings.batch_size)


def cache(
    datasets: "Sequence[TakenDataset]",
    ingredients: dict[str, str],
    options: CachingOptions,
    vae: VaeOptions,
    device: "torch.device",
) -> "dict[str, Outcome]":
    """Encodes what is new or changed and returns what was done, by the heading of the dataset."""
    from dataset.cache import kept_when_stopped
    from dataset.latent_caching import Outcome, begin, finish, judge, tasks_of

    rank, processes = process_share()
    outcomes, tasks, shares = {}, [], []
    with kept_when_stopped(shares, rank):
        for dataset in datasets:
            mine = begin(dataset, rank, processes)
            shares.append((dataset.manifest, [item.path for _, item in mine]))
            verdicts = judge(dataset, mine, ingredients, options.skip_existing)
            outcomes[dataset.heading] = Outcome(verdicts)
            to_do = [member for member in mine if not verdicts[member[1].name].kept]
            tasks += tasks_of(dataset, to_do, batch_size(dataset, options))
        if tasks:
            encode(tasks, outcomes, ingredients, options, vae, device)
    for dataset in datasets:
        finish(dataset, outcomes[dataset.heading], rank, processes, options.prune)
    return outcomes


def encode(
    tasks: "Sequence[Task]",
    outcomes: "dict[str, Outcome]",
    ingredients: dict[str, str],
    options: CachingOptions,
    vae: VaeOptions,
    device: "torch.device",
) -> None:
    """Loads the VAE and works through the tasks."""
    import torch

    from dataset.latent_caching import LatentWriter
    from hunyuan_model.checkpoints import load_vae
    from utils.device_utils import default_dtype

    dtype = default_dtype(vae.vae_dtype, device)
    if options.disable_cudnn_backend:
        torch.backends.cudnn.enabled = False
    model = load_vae(vae.vae, device, dtype)
    model.configure_memory(vae.vae_chunk_size, vae.tile_size)
    writer = LatentWriter(model, device, dtype, cache_dtype(vae), ingredients, options.strict)
    workers = options.num_workers or max((os.cpu_count() or 2) - 1, 1)
    writer.run(tasks, outcomes, workers, show_progress=process_share()[0] == 0)


if __name__ == "__main__":
    run_script(main)
