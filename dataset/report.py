"""What latent caching prints: the scan of each dataset before any model is loaded, and the outcome at the end."""

from collections import Counter
from collections.abc import Sequence

from dataset.config_utils import DatasetSettings
from dataset.latent_caching import Outcome
from dataset.scan import ScannedDataset, ScannedSource
from utils.cli import print_table

NATIVE_FPS = 24.0
FPS_TOLERANCE = 0.05
# Tables of files end after this many rows; problems are listed below the table for all files.
MAX_ROWS = 40


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


def print_outcome(datasets: Sequence[ScannedDataset], outcomes: dict[str, Outcome], pruned: bool) -> None:
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
        for name, reason in outcome.failures.items():
            print(f"  skipped: {reason if name in reason else f'{name}: {reason}'}")
