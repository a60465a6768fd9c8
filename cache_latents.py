"""Encodes images and clips of a dataset into latent caches.

Before: media files and captions, described in a dataset config (dataset/dataset_config.md). After: one
`{item}_{width}x{height}_hv.safetensors` per image or clip in the cache directory; then run
cache_text_encoder_outputs.py. Run again at any time: only what is new or changed is encoded.

    python cache_latents.py --dataset_config dataset.toml --vae ckpts/hunyuan-video-t2v-720p/vae/pytorch_model.pt \
        --vae_chunk_size 32 --vae_tiling

Look at the dataset first, without any model: --debug_mode html. Share the work between GPUs:
`accelerate launch --num_processes 4 cache_latents.py ...`.
"""

import os
import sys
from dataclasses import dataclass
from pathlib import Path

from utils.cli import option, parse_options, run_script
from utils.option_groups import DeviceOptions, VaeOptions, require


@dataclass(frozen=True, kw_only=True)
class CachingOptions:
    """caching"""

    dataset_config: Path = option(help="dataset config, TOML or JSON", path="file")
    batch_size: int | None = option(None, help="upper limit of the dataset's batch size while encoding", minimum=1)
    num_workers: int | None = option(None, help="threads that decode; processors - 1 when unset", minimum=1)
    skip_existing: bool = option(False, help="trust the names of cache files, compare nothing else")
    keep_cache: bool = option(False, help="accepted for old command lines: nothing is deleted without --prune")
    prune: bool = option(False, help="delete caches in the cache directories that belong to no item")
    strict: bool = option(False, help="stop at the first media file that cannot be used instead of skipping it")
    disable_cudnn_backend: bool = option(False, help="switch cuDNN off, which may help AMD GPUs")


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
    options, vae_options, device_options, debug = parse_options(
        __doc__, CachingOptions, VaeOptions, DeviceOptions, DebugOptions
    )
    if debug.debug_mode is None:
        require(vae_options, "vae")
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    from dataset.config_utils import load_dataset_config

    config = load_dataset_config(options.dataset_config)

    from dataset.intake import take_in
    from dataset.report import print_intake, print_outcome
    from utils.errors import UserError

    datasets = take_in(config, options.num_workers)
    if rank == 0:
        print(config.effective_text())
        for note in config.notes:
            print(f"note: {note}", file=sys.stderr)
        print_intake(datasets)
    problems = [problem for dataset in datasets for problem in dataset.problems]
    if problems and options.strict:
        raise UserError(f"{problems[0]} (--strict)")
    if debug.debug_mode is not None:
        from dataset.preview import show

        show(datasets, debug.debug_mode, debug)
        return

    outcomes = cache(datasets, options, vae_options, device_options, rank, world_size)
    if rank == 0:
        print_outcome(datasets, outcomes, options.prune)


def cache(datasets, options, vae_options, device_options, rank, world_size):
    """Encodes what is to do; loads the VAE only if there is something."""
    import torch

    from dataset.cache import file_identity
    from dataset.latent_caching import LatentWriter, Outcome, begin, finish, judge, tasks_of
    from utils.device_utils import DTYPES, dtype_word, resolve_device

    local_rank = os.environ.get("LOCAL_RANK")
    on_gpu = device_options.device is None and torch.cuda.is_available()
    device = resolve_device(f"cuda:{local_rank}" if on_gpu and local_rank is not None else device_options.device)
    given = DTYPES.get(vae_options.vae_dtype)
    cache_dtype = given or torch.float16
    dtype = given or (torch.float32 if device.type == "cpu" else torch.float16)
    ingredients = {"vae": file_identity(vae_options.vae), "dtype": dtype_word(cache_dtype)}

    outcomes, tasks = {}, []
    for dataset in datasets:
        mine = begin(dataset, rank, world_size)
        outcome = outcomes[dataset.heading] = Outcome(judge(dataset, mine, ingredients, options.skip_existing))
        to_do = [(source, item) for source, item in mine if not outcome.verdicts[item.name].kept]
        batch_size = min(dataset.settings.batch_size, options.batch_size or dataset.settings.batch_size)
        tasks += tasks_of(dataset, to_do, batch_size)
    if tasks:
        from hunyuan_model.checkpoints import load_vae

        if options.disable_cudnn_backend:
            torch.backends.cudnn.enabled = False
        vae = load_vae(vae_options.vae, device, dtype)
        vae.configure_memory(vae_options.vae_chunk_size, vae_options.tile_size)
        writer = LatentWriter(vae, device, dtype, cache_dtype, ingredients, options.strict)
        workers = options.num_workers or max((os.cpu_count() or 2) - 1, 1)
        writer.run(tasks, outcomes, workers, show_progress=rank == 0)
    for dataset in datasets:
        outcome = outcomes[dataset.heading]
        finish(dataset, outcome, rank, world_size, options.prune)
    return outcomes


if __name__ == "__main__":
    run_script(main)
