"""Encodes every caption of a dataset once, with LLaVA-Llama-3 and CLIP-L, so that training needs no text encoder.

Before: captions as described in dataset/dataset_config.md; cache_latents.py may run before or after.
After:  {name}_hv_te.safetensors for each captioned file, in the dataset's cache_directory.

    python cache_text_encoder_outputs.py --dataset_config dataset.toml --batch_size 16 \
        --text_encoder1 ckpts/text_encoder --text_encoder2 ckpts/text_encoder_2 --fp8_llm

A second run encodes only what changed. One text encoder is in memory at a time. --vram_gb 0 takes --fp8_llm only where
it is needed.
"""

import json
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modules.options import DeviceOptions, TextEncoderOptions, require
from utils.cli import option, parse_options, print_table, run_script
from utils.errors import UserError
from utils.processes import own_device, process_share

if TYPE_CHECKING:
    import torch

    from dataset.cache import Manifest, Verdict
    from dataset.config_utils import DatasetConfig, DatasetSettings
    from dataset.sources import Source
    from hunyuan_model.text_encoder import ClipTextEncoder, LlmTextEncoder

DEFAULT_WORKERS = 8
# In a cache file's `made_from`: the end of the caption that the LLM does not see, because it takes 256 tokens.
CUT_KEY = "cut"
SHOWN = 5  # captions named in a warning, and so many words of each


@dataclass(frozen=True, kw_only=True)
class CachingOptions:
    """caching"""

    dataset_config: Path = option(help="dataset config, a .toml or .json file", path="file")
    batch_size: int | None = option(
        None, help="captions encoded at once; where a dataset's batch_size is smaller, that counts", minimum=1
    )
    num_workers: int | None = option(
        None, help=f"threads that look at existing cache files; {DEFAULT_WORKERS} when unset", minimum=1
    )
    skip_existing: bool = option(
        False, help="keep every complete cache file by its name, also when its caption changed"
    )
    keep_cache: bool = option(False, help="accepted; cache files are kept anyway unless --prune is given")
    prune: bool = option(False, help="delete cache files in the cache directories that belong to no caption")
    strict: bool = option(False, help="stop when a file of the dataset cannot be used, instead of skipping it")
    vram_gb: float | None = option(
        None, help="take --fp8_llm where text encoder 1 does not fit into so many GiB; 0: what is free", minimum=0
    )
    dry_run: bool = option(False, help="print what there is and the memory that encoding it needs, and end")

    def __post_init__(self) -> None:
        if self.prune and self.keep_cache:
            raise UserError("--prune deletes what --keep_cache keeps; give one of them")


@dataclass
class Entry:
    """One caption and what is to be done with its cache file."""

    source: "Source"
    cache: Path
    verdict: "Verdict"
    manifest: "Manifest"
    written: bool = False


@dataclass
class Work:
    """One dataset: its captions, and what lies in its cache directory."""

    settings: "DatasetSettings"
    manifest: "Manifest"
    entries: list[Entry]
    skipped: list["Source"]
    orphaned: list[Path]

    @property
    def share(self) -> list[Entry]:
        """This process's part, cut from the whole list, which all see alike; what is left to do changes meanwhile."""
        rank, processes = process_share()
        return self.entries[rank::processes]

    def remove_leftovers(self) -> None:
        """Removes what killed runs left of this process's files; others may be writing theirs."""
        from dataset.cache import remove_leftovers

        rank, _ = process_share()
        lists = [self.manifest.share(rank).path, *([self.manifest.path] if rank == 0 else [])]
        remove_leftovers(self.settings.cache_directory, [*(entry.cache for entry in self.share), *lists])

    def batches(self, limit: int | None) -> Iterator[list[Entry]]:
        """The captions that this process encodes, at most `limit` at once."""
        pending = [entry for entry in self.share if not entry.verdict.kept]
        size = batch_size(self.settings, limit)
        for start in range(0, len(pending), size):
            yield pending[start : start + size]


def main() -> None:
    options, encoders, device = parse_options(__doc__, CachingOptions, TextEncoderOptions, DeviceOptions)
    require(encoders, "text_encoder1", "text_encoder2")
    from dataset.config_utils import load_dataset_config

    config = load_dataset_config(options.dataset_config)
    if options.dry_run or options.vram_gb is not None:
        encoders = plan_memory(config, options, encoders, device.device)
    made_from = fingerprint(encoders)
    from dataset.cache import kept_when_stopped

    rank, _ = process_share()
    shares: list[tuple[Manifest, list[Path]]] = []
    with kept_when_stopped(shares, rank):
        works = [survey(settings, options, made_from, shares) for settings in config.every_dataset]
        if rank == 0:
            name_skipped(works, options.strict)
        if options.dry_run:
            if rank == 0:  # which alone looks at all files
                print_works(works)
            return
        for work in works:
            work.remove_leftovers()
        batches = [batch for work in works for batch in work.batches(options.batch_size)]
        if batches:
            encode(batches, encoders, device.device, made_from)
    if rank == 0:
        finish(works, options.prune)
    else:
        for manifest, mine in shares:
            manifest.save_share(rank, mine)


def is_first_process() -> bool:
    return process_share()[0] == 0


def plan_memory(
    config: "DatasetConfig", options: CachingOptions, encoders: TextEncoderOptions, device: str | None
) -> TextEncoderOptions:
    """Prints what the largest batch needs; --vram_gb takes --fp8_llm if it does not fit without."""
    from modules.memory.text_encoder import plan_text_encoder_1

    captions = max(batch_size(settings, options.batch_size) for settings in config.every_dataset)
    encoders, rows = plan_text_encoder_1(encoders, own_device(device), options.vram_gb, captions)
    if is_first_process():
        print_table(f"memory plan, batch of {captions}", rows)
    return encoders


def batch_size(settings: "DatasetSettings", limit: int | None) -> int:
    return min(settings.batch_size, limit or settings.batch_size)


def fingerprint(encoders: TextEncoderOptions) -> dict[str, Any]:
    """What the embeddings depend on besides the caption, read from headers and tokenizer files.

    Raises:
        UserError: a path does not hold the model that its option names, or a tokenizer is missing.
    """
    from hunyuan_model import tokenizers
    from hunyuan_model.checkpoints.identification import CLIP, LLM, identify

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
        "dtype": stored_dtype(encoders),
        "fp8_llm": encoders.fp8_llm,
    }


def stored_dtype(encoders: TextEncoderOptions) -> str:
    """The word of the dtype in the cache files."""
    from utils.device_utils import DTYPES, dtype_word

    return dtype_word(DTYPES[encoders.text_encoder_dtype or "float16"])


def survey(
    settings: "DatasetSettings",
    options: CachingOptions,
    made_from: Mapping[str, Any],
    shares: "list[tuple[Manifest, list[Path]]]",
) -> Work:
    """What a dataset needs: nothing is encoded whose cache file was made from the same things.

    Appends the manifest and this process's cache files to `shares` before it reads any.
    """
    from dataset.cache import TEXT_SUFFIX, Manifest, Verdict, check_text, orphans, text_cache_path
    from dataset.sources import explain_empty, list_sources

    sources = list_sources(settings)
    usable = [source for source in sources if source.problem is None]
    if not usable:
        raise UserError(sources[0].problem if sources else explain_empty(settings))
    manifest = Manifest.load(settings.cache_directory, "text")
    caches = {source.name: text_cache_path(settings.cache_directory, source.name) for source in sources}
    trusted = usable if options.skip_existing else ()
    manifest.trusted = {caches[source.name].name: {"caption": source.caption} for source in trusted}
    rank, processes = process_share()
    mine = [caches[source.name] for source in usable[rank::processes]]
    shares.append((manifest, mine))
    read_whole = set(caches.values() if rank == 0 else mine)  # the first process counts all of them in its table
    if options.dry_run:
        read_whole = set()
    choices = [made_from]
    if options.vram_gb is not None:  # what it chose last time, when another amount was free, is as good
        choices.append({**made_from, "fp8_llm": not made_from["fp8_llm"]})

    def entry(source: "Source") -> Entry:
        cache = caches[source.name]
        verdicts = [check_text(cache, source.caption, choice, trust_name=options.skip_existing) for choice in choices]
        verdict = next((each for each in verdicts if each.kept), verdicts[0])
        if verdict.kept and cache in read_whole and not manifest.is_sound(cache):
            verdict = Verdict("changed", "the cache file is damaged")
        return Entry(source, cache, verdict, manifest)

    with ThreadPoolExecutor(options.num_workers or DEFAULT_WORKERS) as pool:
        entries = list(pool.map(entry, usable))
    skipped = [source for source in sources if source.problem is not None]
    return Work(settings, manifest, entries, skipped, orphans(settings.cache_directory, TEXT_SUFFIX, caches.values()))


def name_skipped(works: Sequence[Work], strict: bool) -> None:
    """Names what is skipped.

    Raises:
        UserError: with `strict`, a file of a dataset cannot be used.
    """
    for source in [source for work in works for source in work.skipped]:
        if strict:
            raise UserError(f"{source.problem} (--strict)")
        print(f"warning: skipped: {source.problem}", file=sys.stderr)


def encode(
    batches: Sequence[list[Entry]], encoders: TextEncoderOptions, device_name: str | None, made_from: Mapping[str, Any]
) -> None:
    """Encodes and writes; CLIP goes first, because its small results can wait for the LLM's."""
    from hunyuan_model.checkpoints import load_text_encoder_1, load_text_encoder_2
    from utils.device_utils import default_dtype, is_out_of_memory, release_memory

    device = own_device(device_name)
    dtype = default_dtype(encoders.text_encoder_dtype, device)
    try:
        clip = load_text_encoder_2(encoders.text_encoder2, device, dtype, encoders.tokenizer2)
        pooled = [encode_clip(clip, batch) for batch in progress(batches, "text encoder 2")]
        del clip
        release_memory(device)
        llm = load_text_encoder_1(encoders.text_encoder1, device, dtype, encoders.fp8_llm, encoders.tokenizer1)
        for batch, of_clip in zip(progress(batches, "text encoder 1"), pooled, strict=True):
            write_batch(llm, batch, of_clip, made_from)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(f"{device}: out of memory; use --fp8_llm, a smaller --batch_size or --device cpu") from None


def progress(batches: Sequence[list[Entry]], title: str) -> Iterator[list[Entry]]:
    """The batches, with a bar that counts captions."""
    from tqdm import tqdm

    with tqdm(total=sum(map(len, batches)), desc=title, unit="caption", disable=not is_first_process()) as bar:
        for batch in batches:
            yield batch
            bar.update(len(batch))


def encode_clip(clip: "ClipTextEncoder", batch: Sequence[Entry]) -> tuple["torch.Tensor", "torch.Tensor"]:
    """Pooled vectors (B, D2) and the masks of the tokens (B, 77), on the CPU."""
    captions = [entry.source.caption for entry in batch]
    return clip.encode(captions).cpu(), clip.tokenizer(captions)[1]


def write_batch(
    llm: "LlmTextEncoder",
    batch: Sequence[Entry],
    of_clip: tuple["torch.Tensor", "torch.Tensor"],
    made_from: Mapping[str, Any],
) -> None:
    from dataset.cache import write_text_cache
    from utils.device_utils import DTYPES

    dtype = DTYPES[made_from["dtype"]]
    captions = [entry.source.caption for entry in batch]
    states, mask = (each.cpu() for each in llm.encode(captions))  # (B, 256, D), (B, 256)
    cut = llm.truncated(captions)
    for index, (entry, caption) in enumerate(zip(batch, captions, strict=True)):
        pooled, pooled_mask = (each[index] for each in of_clip)
        try:
            write_text_cache(
                entry.cache,
                states[index].to(dtype),
                mask[index],
                pooled.to(dtype),
                pooled_mask,
                caption,
                {**made_from, CUT_KEY: cut[index]},
            )
        except ValueError as error:
            raise UserError(
                f"{entry.source.path}: {error} in {made_from['dtype']}; use --text_encoder_dtype bfloat16 or float32"
            ) from None
        entry.written = True
        entry.manifest.mark_sound(entry.cache)


def finish(works: Sequence[Work], prune: bool) -> None:
    """Says what was done and what deserves attention, and deletes orphans if asked to."""
    entries = [entry for work in works for entry in work.entries]
    report_cut(entries)
    empty = [entry.source.path for entry in entries if not entry.source.caption]
    if empty:
        print(f"warning: {len(empty)} captions are empty, the first is that of {empty[0]}", file=sys.stderr)
    foreign = sum(entry.verdict.by_musubi for entry in entries)
    if foreign:
        print(f"note: {foreign} cache files were made by musubi-tuner and are used as they are")
    for work in works:
        close(work, prune)
    print_works(works, "deleted" if prune else "orphaned")


def print_works(works: Sequence[Work], orphaned: str = "orphaned") -> None:
    header = ["cache directory", "captions", "new", "changed", "kept", orphaned, "skipped", "changed because"]
    print_table("Text encoder outputs", [table_row(work) for work in works], header)


def report_cut(entries: Sequence[Entry]) -> None:
    """Names the captions of which the LLM sees only a part, those of earlier runs too."""
    cached = [entry for entry in entries if entry.written or entry.verdict.kept]
    cut = [(entry.source.path, text) for entry in cached if (text := cut_text(entry.cache))]
    if cut:
        print(f"warning: {len(cut)} captions exceed 256 tokens; what is cut:", file=sys.stderr)
    for path, text in cut[:SHOWN]:
        words = text.split()
        print(f"  {path}: {' '.join(words[:SHOWN])}{' ...' if len(words) > SHOWN else ''}", file=sys.stderr)


def cut_text(cache: Path) -> str:
    """The end of a caption that its cache file says was cut; empty where nothing was, or nothing is known."""
    from utils.safetensors_utils import read_header

    _, metadata = read_header(cache)
    try:
        return json.loads(metadata["made_from"])[CUT_KEY]
    except (KeyError, ValueError):
        return ""


def close(work: Work, prune: bool) -> None:
    """Saves which files are sound, and deletes the orphans."""
    work.manifest.save_all(process_share()[1])
    for path in work.orphaned if prune else []:
        path.unlink()


def table_row(work: Work) -> list[object]:
    words = Counter(entry.verdict.word for entry in work.entries)
    reasons = Counter(entry.verdict.reason for entry in work.entries if entry.verdict.word == "changed")
    counts = [len(work.entries), words["new"], words["changed"], words["kept"], len(work.orphaned), len(work.skipped)]
    why = ", ".join(f"{reason} ({number})" for reason, number in reasons.items())
    return [work.settings.cache_directory, *counts, why]


if __name__ == "__main__":
    run_script(main)
