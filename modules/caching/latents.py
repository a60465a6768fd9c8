"""Latent caching: scans the datasets, plans the memory, and encodes what is new or changed with the VAE."""

import math
import sys
from collections.abc import Sequence

import torch

from dataset.config_utils import DatasetConfig
from dataset.latent_caching import (
    LatentWriter,
    Outcome,
    Pending,
    check_caches,
    finish,
    members_of_process,
    prepare_cache_directory,
)
from dataset.manifest import save_shares_on_error
from dataset.options import LatentCachingOptions
from dataset.report import print_latent_outcome, print_scan
from dataset.scan import ScannedDataset, decoding_threads, no_usable_item, scan_datasets
from hunyuan_model.checkpoints import identify, load_vae
from hunyuan_model.checkpoints.identification import VAE
from modules.memory.vae_encoding import plan_vae_encoding
from modules.options import VaeOptions
from utils.cli import print_table
from utils.device_utils import DTYPES, default_dtype, dtype_word, own_device
from utils.errors import UserError
from utils.processes import process_share


def scan_and_report(config: DatasetConfig, options: LatentCachingOptions) -> list[ScannedDataset]:
    """Scans all datasets; process 0 prints the settings, the files, the buckets and what is wrong with them.

    Raises:
        UserError: a dataset has no usable item, or with --strict any file that cannot be used.
    """
    is_first = process_share()[0] == 0
    datasets = scan_datasets(config, options.num_workers, show_progress=is_first)
    if is_first:
        print(config.effective_text())
        for note in config.notes:
            print(f"note: {note}", file=sys.stderr)
        print_scan(datasets)
    problems = [problem for dataset in datasets for problem in dataset.problems]
    if options.strict and problems:
        raise UserError(f"{problems[0]} (--strict)")
    return datasets


class LatentCaching:
    """The work of one process: which items are encoded, with which VAE, on which device.

    Raises:
        UserError: the VAE file is not a VAE of HunyuanVideo, or the device cannot be used.
    """

    def __init__(self, options: LatentCachingOptions, vae: VaeOptions, device: str | None) -> None:
        self.options, self.vae = options, vae
        self.rank, self.world_size = process_share()
        # The dtype of the stored latents does not depend on the machine, unlike the one that the VAE computes in.
        self.cache_dtype = DTYPES[vae.vae_dtype or "float16"]
        file = identify(vae.vae)
        file.tensors(VAE)
        self.provenance = {"vae": file.checkpoint.fingerprint, "dtype": dtype_word(self.cache_dtype)}
        self.device = own_device(device)

    def plan_memory(self, datasets: Sequence[ScannedDataset]) -> None:
        """Prints what encoding the largest batch needs; with --vram_gb also chooses the VAE's tiles."""
        batch = self._largest_batch(datasets)
        self.vae, rows = plan_vae_encoding(self.vae, self.device, self.options.vram_gb, batch)
        if self.rank == 0:
            B, F, H, W = batch
            items = ("items", sum(1 for dataset in datasets for _ in dataset.items))
            print_table(f"memory plan, batch of {B}, {W}x{H}x{F}", [items, *rows])

    def _largest_batch(self, datasets: Sequence[ScannedDataset]) -> tuple[int, int, int, int]:
        """(B, F, H, W) of the batch that needs the most memory.

        The VAE encodes the clips of a batch one by one, so the size of the clips counts first and their number last.
        """
        batches = []
        for dataset in datasets:
            counts, batch_size = dataset.buckets(), self._batch_size(dataset)
            for _, item in dataset.items:
                W, H = item.bucket
                batches.append((min(batch_size, counts[item.bucket_name]), item.frame_count, H, W))
        return max(batches, key=lambda batch: (math.prod(batch[1:]), batch[0]))

    def _batch_size(self, dataset: ScannedDataset) -> int:
        return min(dataset.settings.batch_size, self.options.batch_size or dataset.settings.batch_size)

    def run(self, datasets: Sequence[ScannedDataset]) -> None:
        """Encodes what is new or changed, and prints what was done.

        Raises:
            UserError: out of memory, the disk is full, or all items of a dataset failed.
        """
        outcomes: dict[str, Outcome] = {}
        pending: list[Pending] = []
        shares = []
        with save_shares_on_error(shares, self.rank):
            for dataset in datasets:
                members = members_of_process(dataset, self.rank, self.world_size)
                prepare_cache_directory(dataset, self.rank)
                shares.append((dataset.manifest, [item.path for _, item in members]))
                statuses = check_caches(dataset, members, self.provenance, self.options.skip_existing)
                outcomes[dataset.heading] = Outcome(statuses)
                pending += [(dataset, source, item) for source, item in members if not statuses[item.name].kept]
            if pending:
                self.encode(pending, outcomes)
        for dataset in datasets:
            finish(dataset, outcomes[dataset.heading], self.rank, self.world_size, self.options.prune)
        if self.rank == 0:
            print_latent_outcome(datasets, outcomes, self.options.prune)
        if self.world_size == 1:  # one process of several cannot know whether all items failed
            for dataset in datasets:
                outcome = outcomes[dataset.heading]
                if len(outcome.failures) == len(outcome.statuses) > 0:
                    raise no_usable_item(dataset, list(outcome.failures.values()))

    def encode(self, pending: Sequence[Pending], outcomes: dict[str, Outcome]) -> None:
        """Loads the VAE, encodes the items and writes their caches; failures are added to `outcomes`."""
        if self.options.disable_cudnn_backend:
            torch.backends.cudnn.enabled = False
        dtype = default_dtype(self.vae.vae_dtype, self.device)
        vae = load_vae(self.vae.vae, self.device, dtype)
        vae.configure_memory(self.vae.vae_chunk_size, self.vae.tile_size)
        writer = LatentWriter(
            vae,
            self.device,
            dtype,
            self.cache_dtype,
            self.provenance,
            max_batch_size=self.options.batch_size,
            strict=self.options.strict,
        )
        writer.run(pending, outcomes, decoding_threads(self.options.num_workers), show_progress=self.rank == 0)
