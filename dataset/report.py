"""What the caching scripts print: warnings about each dataset before a model is loaded, and the outcome at the end."""

import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from dataset.cache import PROVENANCE_KEY
from dataset.config_utils import DatasetSettings
from dataset.latent_caching import Outcome
from dataset.scan import ScannedDataset, ScannedSource
from dataset.text_caching import CUT_KEY, CaptionDataset, CaptionEntry
from utils.cli import print_table
from utils.errors import UserError
from utils.files import parse_json
from utils.safetensors_utils import read_header

NATIVE_FPS = 24.0
FPS_TOLERANCE = 0.05
# Tables of files end after this many rows; problems are listed below the table for all files.
MAX_ROWS = 40
MAX_SHOWN = 5  # captions that a warning lists, and words that it shows of each


def _video_row(scanned: ScannedSource) -> list[str]:
    info, plan = scanned.info, scanned.plan
    clips = Counter(item.frame_count for item in plan.items)
    return [
        scanned.source.path.name,
        str(info.frames),
        f"{info.fps:.3f}" if info.fps else "-",
        f"{info.last_time:.2f}" if info.last_time else "-",
        f"{info.width}x{info.height}",
        "x".join(map(str, plan.items[0].bucket)) if plan.items else "-",
        " ".join(f"{frames}({count})" for frames, count in sorted(clips.items())) or "-",
        " ".join(map(str, plan.dropped_targets)) or "-",
        ", ".join(info.notes),
    ]


def _image_row(scanned: ScannedSource) -> list[str]:
    info, plan = scanned.info, scanned.plan
    bucket = "x".join(map(str, plan.items[0].bucket)) if plan.items else "-"
    return [scanned.source.path.name, f"{info.width}x{info.height}", bucket, ", ".join(info.notes)]


def _upscales(scanned: ScannedSource) -> bool:
    return any(max(item.bucket[0] / item.size[0], item.bucket[1] / item.size[1]) > 1 for item in scanned.plan.items)


def _listed(names: Sequence[str], limit: int = 10) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def warnings_of(dataset: ScannedDataset) -> list[str]:
    """One line for each kind of probable mistake in a dataset, with the files that have it."""
    settings, usable = dataset.settings, [scanned for scanned in dataset.sources if scanned.plan.items]
    found = {
        f'not {NATIVE_FPS:g} fps, so learned at a wrong speed (source_fps = "auto" resamples)': [
            f"{scanned.source.path.name} ({scanned.info.fps:.2f})"
            for scanned in usable
            if _has_wrong_speed(scanned, settings)
        ],
        "too short for some of target_frames": [
            f"{scanned.source.path.name} ({' '.join(map(str, scanned.plan.dropped_targets))})"
            for scanned in usable
            if scanned.plan.dropped_targets
        ],
        "empty captions": [scanned.source.path.name for scanned in usable if not scanned.source.caption],
        "smaller than their bucket, so enlarged": [
            f"{scanned.source.path.name} ({scanned.info.width}x{scanned.info.height})"
            for scanned in usable
            if _upscales(scanned)
        ],
        "same content": [" = ".join(names) for names in dataset.duplicates()],
        f"buckets with fewer items than batch_size {settings.batch_size}": [
            name for name, count in dataset.buckets().items() if count * settings.num_repeats < settings.batch_size
        ],
    }
    return [f"{what} ({len(names)}): {_listed(names)}" for what, names in found.items() if names]


def _has_wrong_speed(scanned: ScannedSource, settings: DatasetSettings) -> bool:
    fps = scanned.info.fps
    return settings.source_fps is None and fps > 0 and abs(fps / NATIVE_FPS - 1) > FPS_TOLERANCE


def _steps(settings: DatasetSettings, count: int) -> int:
    """Steps per epoch of a bucket with `count` items."""
    return -(-count * settings.num_repeats // settings.batch_size)


def print_scan(datasets: Sequence[ScannedDataset]) -> None:
    """Prints a table of files and one of buckets for each dataset, the warnings, and the steps of an epoch."""
    total = 0
    for dataset in datasets:
        settings, usable = dataset.settings, [scanned for scanned in dataset.sources if scanned.info]
        if settings.is_video:
            header = ["file", "frames", "fps", "seconds", "size", "bucket", "targets(clips)", "too short for", "notes"]
            rows = [_video_row(scanned) for scanned in usable]
        else:
            header, rows = ["file", "size", "bucket", "notes"], [_image_row(scanned) for scanned in usable]
        print_table(f"{dataset.heading}: {settings.location}, {len(dataset.sources)} files", rows[:MAX_ROWS], header)
        if len(rows) > MAX_ROWS:
            print(f"  ... and {len(rows) - MAX_ROWS} more files")
        rows = [
            [name, count, settings.num_repeats, settings.batch_size, _steps(settings, count)]
            for name, count in sorted(dataset.buckets().items())
        ]
        print_table(f"{dataset.heading}: buckets", rows, ["bucket", "items", "repeats", "batch size", "steps"])
        for line in warnings_of(dataset):
            print(f"  warning: {line}")
        for problem in dataset.problems:
            print(f"  skipped: {problem}")
        if dataset.heading.startswith("[[datasets]]"):
            total += sum(_steps(settings, count) for count in dataset.buckets().values())
    print(
        f"\nsteps per epoch: {total} (items x num_repeats / batch_size, rounded up in each bucket; "
        "divide by the number of processes and by --gradient_accumulation_steps)"
    )


def print_latent_outcome(datasets: Sequence[ScannedDataset], outcomes: dict[str, Outcome], pruned: bool) -> None:
    """Prints the closing table: how many items were new, changed, kept, skipped and orphaned. Reasons stand below."""
    rows = []
    for dataset in datasets:
        outcome = outcomes[dataset.heading]
        counts = [outcome.count(state) for state in ("new", "changed", "kept")]
        skipped = len(dataset.problems) + len(outcome.failures)
        rows.append([dataset.heading, *counts, skipped, len(outcome.orphaned), dataset.settings.cache_directory])
    header = ["dataset", "new", "changed", "kept", "skipped", "deleted" if pruned else "orphaned", "cache directory"]
    print_table("latent caches", rows, header)
    for dataset in datasets:
        outcome = outcomes[dataset.heading]
        reasons = Counter(status.reason for status in outcome.statuses.values() if status.state == "changed")
        for reason, count in reasons.items():
            print(f"  {dataset.heading}: {count} made again: {reason}")
        by_musubi = sum(status.by_musubi for status in outcome.statuses.values())
        if by_musubi:
            print(f"  {dataset.heading}: {by_musubi} caches were made by musubi-tuner and are used unchanged")
        if outcome.orphaned and not pruned:
            print(f"  {dataset.heading}: orphaned caches belong to no item and are not used; --prune deletes them")
        for reason in outcome.recounted:
            print(f"  planned again: {reason}")
        for name, reason in outcome.failures.items():
            print(f"  skipped: {reason if name in reason else f'{name}: {reason}'}")


def report_skipped(datasets: Sequence[CaptionDataset], strict: bool) -> None:
    """Prints a warning for each source that cannot be used.

    Raises:
        UserError: there is one, and `strict` is set.
    """
    for source in [source for dataset in datasets for source in dataset.skipped]:
        if strict:
            raise UserError(f"{source.problem} (--strict)")
        print(f"warning: skipped: {source.problem}", file=sys.stderr)


def report_captions(datasets: Sequence[CaptionDataset]) -> None:
    """Prints warnings about captions that are too long or empty, and a note about caches of musubi-tuner."""
    entries = [entry for dataset in datasets for entry in dataset.entries]
    _report_cut(entries)
    empty = [entry.source.path for entry in entries if not entry.source.caption]
    if empty:
        print(f"warning: {len(empty)} captions are empty; the first is that of {empty[0]}", file=sys.stderr)
    by_musubi = sum(entry.status.by_musubi for entry in entries)
    if by_musubi:
        print(f"note: {by_musubi} cache files were made by musubi-tuner and are used unchanged")


def _report_cut(entries: Sequence[CaptionEntry]) -> None:
    """Lists captions that exceed the LLM's 256 tokens, also those that an earlier run encoded."""
    cached = [entry for entry in entries if entry.written or entry.status.kept]
    cut = [(entry.source.path, text) for entry in cached if (text := _cut_text(entry.path))]
    if cut:
        print(f"warning: {len(cut)} captions exceed 256 tokens; this is cut off:", file=sys.stderr)
    for path, text in cut[:MAX_SHOWN]:
        words = text.split()
        print(f"  {path}: {' '.join(words[:MAX_SHOWN])}{' ...' if len(words) > MAX_SHOWN else ''}", file=sys.stderr)


def _cut_text(path: Path) -> str:
    """The end of the caption that was cut off, as its cache file says; empty if none was or the file does not say."""
    _, metadata = read_header(path)
    try:
        return parse_json(metadata[PROVENANCE_KEY])[CUT_KEY]
    except (KeyError, ValueError, TypeError):
        return ""


def print_text_outcome(datasets: Sequence[CaptionDataset], pruned: bool) -> None:
    """Prints the closing table: how many captions were new, changed, kept, orphaned and skipped, and why."""
    orphaned = "deleted" if pruned else "orphaned"
    header = ["cache directory", "captions", "new", "changed", "kept", orphaned, "skipped", "changed because"]
    print_table("Text encoder outputs", [_table_row(dataset) for dataset in datasets], header)


def _table_row(dataset: CaptionDataset) -> list[object]:
    states = Counter(entry.status.state for entry in dataset.entries)
    reasons = Counter(entry.status.reason for entry in dataset.entries if entry.status.state == "changed")
    counts = [len(dataset.entries), *(states[state] for state in ("new", "changed", "kept"))]
    why = ", ".join(f"{reason} ({number})" for reason, number in reasons.items())
    return [dataset.settings.cache_directory, *counts, len(dataset.orphaned), len(dataset.skipped), why]
