"""Text caching: plans the memory, and encodes new or changed captions with LLaVA-Llama-3 and CLIP-L."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from dataset.config_utils import DatasetConfig, DatasetSettings
from dataset.manifest import Manifest, save_shares_on_error
from dataset.options import DEFAULT_TEXT_WORKERS, TextCachingOptions
from dataset.report import print_text_outcome, report_captions, report_skipped
from dataset.text_caching import (
    CUT_KEY,
    CaptionDataset,
    CaptionEntry,
    TextCacheChecker,
    write_entry,
)
from hunyuan_model import tokenizers
from hunyuan_model.checkpoints import identify, load_text_encoder_1, load_text_encoder_2
from hunyuan_model.checkpoints.identification import CLIP, LLM
from hunyuan_model.text_encoder import ClipTextEncoder, LlmTextEncoder
from modules.memory.text_encoder import plan_text_encoder_1
from modules.options import TextEncoderOptions
from utils.cli import print_table
from utils.device_utils import DTYPES, default_dtype, dtype_word, is_out_of_memory, own_device, release_memory
from utils.errors import UserError
from utils.processes import process_share


def text_provenance(encoders: TextEncoderOptions) -> dict[str, Any]:
    """Everything that the embeddings depend on, except the caption; reads only headers and tokenizer files.

    Raises:
        UserError: a path does not hold the model that its option names, or a tokenizer is missing.
    """
    llm, clip = identify(encoders.text_encoder1), identify(encoders.text_encoder2)
    for file, part in ((llm, LLM), (clip, CLIP)):
        file.tensors(part)
    tokenizer1 = tokenizers.find_tokenizer(encoders.text_encoder1, encoders.tokenizer1, tokenizers.LLM_REPOSITORY)
    tokenizer2 = tokenizers.find_tokenizer(encoders.text_encoder2, encoders.tokenizer2, tokenizers.CLIP_REPOSITORY)
    return {
        "text_encoder1": llm.checkpoint.fingerprint,
        "text_encoder2": clip.checkpoint.fingerprint,
        "tokenizer1": tokenizers.fingerprint(tokenizer1, tokenizers.VIDEO_TEMPLATE),
        "tokenizer2": tokenizers.fingerprint(tokenizer2, "{}"),
        "dtype": dtype_word(DTYPES[encoders.text_encoder_dtype or "float16"]),
        "fp8_llm": encoders.fp8_llm,
    }


class TextCaching:
    """The work of one process: which captions are encoded, with which text encoders, on which device."""

    def __init__(
        self, config: DatasetConfig, options: TextCachingOptions, encoders: TextEncoderOptions, device: str | None
    ) -> None:
        self.config, self.options, self.encoders, self.device_name = config, options, encoders, device
        self.rank, self.world_size = process_share()

    def plan_memory(self) -> None:
        """Prints what encoding the largest batch needs; with --vram_gb also chooses --fp8_llm if it is needed."""
        captions = max(self._batch_size(settings) for settings in self.config.every_dataset)
        device = own_device(self.device_name)
        self.encoders, rows = plan_text_encoder_1(self.encoders, device, self.options.vram_gb, captions)
        if self.rank == 0:
            print_table(f"memory plan, batch of {captions}", rows)

    def _batch_size(self, settings: DatasetSettings) -> int:
        return min(settings.batch_size, self.options.batch_size or settings.batch_size)

    def run(self) -> None:
        """Encodes what is new or changed and prints what was done; with --dry_run only shows what there is.

        Raises:
            UserError: a model file is wrong, a dataset has no usable caption, or memory runs out.
        """
        provenance = text_provenance(self.encoders)
        checker = self._checker(provenance)
        shares: list[tuple[Manifest, list[Path]]] = []
        with save_shares_on_error(shares, self.rank):
            datasets = [checker.scan(settings, shares) for settings in self.config.every_dataset]
            if self.rank == 0:
                report_skipped(datasets, self.options.strict)
            if not self.options.dry_run:
                self._encode_pending(datasets, provenance)
        if self.options.dry_run:
            if self.rank == 0:
                print_text_outcome(datasets, pruned=False)
        elif self.rank == 0:
            report_captions(datasets)
            for dataset in datasets:
                dataset.finish(self.options.prune)
            print_text_outcome(datasets, self.options.prune)
        else:
            for manifest, own_paths in shares:
                manifest.save_share(self.rank, own_paths)

    def _checker(self, provenance: Mapping[str, Any]) -> TextCacheChecker:
        accepted = [provenance]
        if self.options.vram_gb is not None:  # an earlier run, with other free memory, may have chosen differently
            accepted.append({**provenance, "fp8_llm": not provenance["fp8_llm"]})
        return TextCacheChecker(
            accepted,
            trust_names=self.options.skip_existing,
            read_whole=not self.options.dry_run,
            workers=self.options.num_workers or DEFAULT_TEXT_WORKERS,
            rank=self.rank,
            world_size=self.world_size,
        )

    def _encode_pending(self, datasets: Sequence[CaptionDataset], provenance: Mapping[str, Any]) -> None:
        batches = [batch for dataset in datasets for batch in dataset.batches(self._batch_size(dataset.settings))]
        if batches:
            self.encode(batches, provenance)

    def encode(self, batches: Sequence[list[CaptionEntry]], provenance: Mapping[str, Any]) -> None:
        """Encodes the batches with one text encoder after the other, and writes the caches.

        CLIP comes first: its outputs are small and can stay in memory until the LLM is done.
        """
        encoders, device = self.encoders, own_device(self.device_name)
        dtype = default_dtype(encoders.text_encoder_dtype, device)
        try:
            clip = load_text_encoder_2(encoders.text_encoder2, device, dtype, encoders.tokenizer2)
            clip_outputs = [encode_clip(clip, batch) for batch in self._progress(batches, "text encoder 2")]
            del clip
            release_memory(device)
            llm = load_text_encoder_1(encoders.text_encoder1, device, dtype, encoders.fp8_llm, encoders.tokenizer1)
            for batch, output in zip(self._progress(batches, "text encoder 1"), clip_outputs, strict=True):
                encode_llm_and_write(llm, batch, output, provenance)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise UserError(f"{device}: out of memory; use --fp8_llm, a smaller --batch_size or --device cpu") from None

    def _progress(self, batches: Sequence[list[CaptionEntry]], title: str) -> Iterator[list[CaptionEntry]]:
        """The batches, with a progress bar that counts captions."""
        with tqdm(total=sum(map(len, batches)), desc=title, unit="caption", disable=self.rank > 0) as bar:
            for batch in batches:
                yield batch
                bar.update(len(batch))


def encode_clip(clip: ClipTextEncoder, batch: Sequence[CaptionEntry]) -> tuple[torch.Tensor, torch.Tensor]:
    """Pooled outputs (B, D2) and the masks of valid tokens (B, 77), on the CPU."""
    captions = [entry.source.caption for entry in batch]
    return clip.encode(captions).cpu(), clip.tokenizer(captions)[1]


def encode_llm_and_write(
    llm: LlmTextEncoder,
    batch: Sequence[CaptionEntry],
    clip_output: tuple[torch.Tensor, torch.Tensor],
    provenance: Mapping[str, Any],
) -> None:
    """Encodes a batch with the LLM and writes its caches; `clip_output` is what `encode_clip` gave for the batch."""
    captions = [entry.source.caption for entry in batch]
    states, mask = (tensor.cpu() for tensor in llm.encode(captions))  # (B, 256, D), (B, 256)
    pooled, pooled_mask = clip_output
    cut = llm.truncated(captions)
    for i, entry in enumerate(batch):
        write_entry(
            entry,
            (states[i], mask[i]),
            (pooled[i], pooled_mask[i]),
            DTYPES[provenance["dtype"]],
            {**provenance, CUT_KEY: cut[i]},
        )
