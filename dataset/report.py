"""What the caching script tells: the intake of each dataset before any model is loaded, and the outcome at the end."""

from collections import Counter
from collections.abc import Sequence

from dataset.config_utils import DatasetSettings
from dataset.intake import TakenDataset, TakenSource
from dataset.latent_caching import Outcome
from utils.cli import print_table

NATIVE_FPS = 24.0
FPS_TOLERANCE = 0.05
# Longer tables are cut on the screen; the trouble that a file makes is always listed below the table.
ROWS = 40


def _video_row(taken: TakenSource) -> list[str]:
    found, plan = taken.probe, taken.plan
    used = Counter(item.clip.length for item in plan.items)
    return [
        taken.source.path.name,
        str(found.frames),
        f"{found.fps:.3f}" if found.fps else "-",
        f"{found.last_time:.2f}" if found.last_time else "-",
        f"{found.width}x{found.height}",
        "x".join(map(str, plan.items[0].bucket)) if plan.items else "-",
        " ".join(f"{frames}({count})" for frames, count in sorted(used.items())) or "-",
        " ".join(map(str, plan.dropped_targets)) or "-",
        ", ".join(found.notes),
    ]


def _image_row(taken: TakenSource) -> list[str]:
    found, plan = taken.probe, taken.plan
    bucket = "x".join(map(str, plan.items[0].bucket)) if plan.items else "-"
    return [taken.source.path.name, f"{found.width}x{found.height}", bucket, ", ".join(found.notes)]


def _upscales(taken: TakenSource) -> bool:
    return any(max(item.bucket[0] / item.size[0], item.bucket[1] / item.size[1]) > 1 for item in taken.plan.items)


def _listed(names: Sequence[str], limit: int = 10) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def warnings_of(dataset: TakenDataset) -> list[str]:
    """One line for each kind of thing that is probably not meant so, with the files it concerns."""
    settings, usable = dataset.settings, [taken for taken in dataset.sources if taken.plan.items]
    found = {
        f'not {NATIVE_FPS:g} fps, so learned at a wrong speed (source_fps = "auto" resamples)': [
            f"{taken.source.path.name} ({taken.probe.fps:.2f})" for taken in usable if _is_off_speed(taken, settings)
        ],
        "too short for some of target_frames": [
            f"{taken.source.path.name} ({' '.join(map(str, taken.plan.dropped_targets))})"
            for taken in usable
            if taken.plan.dropped_targets
        ],
        "empty captions": [taken.source.path.name for taken in usable if not taken.source.caption],
        "smaller than their bucket, so enlarged": [
            f"{taken.source.path.name} ({taken.probe.width}x{taken.probe.height})"
            for taken in usable
            if _upscales(taken)
        ],
        "same content": [" = ".join(names) for names in dataset.duplicates()],
        f"buckets with fewer items than batch_size {settings.batch_size}": [
            name for name, count in dataset.buckets().items() if count * settings.num_repeats < settings.batch_size
        ],
    }
    return [f"{what} ({len(names)}): {_listed(names)}" for what, names in found.items() if names]


def _is_off_speed(taken: TakenSource, settings: DatasetSettings) -> bool:
    fps = taken.probe.fps
    return settings.source_fps is None and fps > 0 and abs(fps / NATIVE_FPS - 1) > FPS_TOLERANCE


def _steps(settings: DatasetSettings, buckets: Counter[str]) -> int:
    return sum(-(-count * settings.num_repeats // settings.batch_size) for count in buckets.values())


def print_intake(datasets: Sequence[TakenDataset]) -> None:
    """A table of files and one of buckets for each dataset, warnings, and the steps of an epoch."""
    total = 0
    for dataset in datasets:
        settings, usable = dataset.settings, [taken for taken in dataset.sources if taken.probe]
        if settings.is_video:
            header = ["file", "frames", "fps", "seconds", "size", "bucket", "targets(clips)", "too short for", "notes"]
            rows = [_video_row(taken) for taken in usable]
        else:
            header, rows = ["file", "size", "bucket", "notes"], [_image_row(taken) for taken in usable]
        print_table(f"{dataset.heading}: {settings.location}, {len(dataset.sources)} files", rows[:ROWS], header)
        if len(rows) > ROWS:
            print(f"  ... and {len(rows) - ROWS} more files")
        buckets = dataset.buckets()
        rows = [
            [
                name,
                count,
                settings.num_repeats,
                settings.batch_size,
                -(-count * settings.num_repeats // settings.batch_size),
            ]
            for name, count in sorted(buckets.items())
        ]
        print_table(f"{dataset.heading}: buckets", rows, ["bucket", "items", "repeats", "batch size", "steps"])
        for line in warnings_of(dataset):
            print(f"  warning: {line}")
        for problem in dataset.problems:
            print(f"  skipped: {problem}")
        if dataset.heading.startswith("[[datasets]]"):
            total += _steps(settings, buckets)
    print(
        f"\nsteps per epoch: {total} (items x num_repeats / batch_size, rounded up in each bucket; "
        "with N processes or N accumulated gradients divide by N)"
    )


def print_outcome(datasets: Sequence[TakenDataset], outcomes: dict[str, Outcome], pruned: bool) -> None:
    """The closing table: what was new, changed, kept, failed and orphaned; reasons below."""
    rows = []
    for dataset in datasets:
        outcome = outcomes[dataset.heading]
        counts = [outcome.count(word) for word in ("new", "changed", "kept")]
        skipped = len(dataset.problems) + len(outcome.failures)
        rows.append([dataset.heading, *counts, skipped, len(outcome.orphaned), dataset.settings.cache_directory])
    header = ["dataset", "new", "changed", "kept", "skipped", "deleted" if pruned else "orphaned", "cache directory"]
    print_table("latent caches", rows, header)
    for dataset in datasets:
        outcome = outcomes[dataset.heading]
        reasons = Counter(verdict.reason for verdict in outcome.verdicts.values() if verdict.word == "changed")
        for reason, count in reasons.items():
            print(f"  {dataset.heading}: {count} made again: {reason}")
        by_musubi = sum(verdict.by_musubi for verdict in outcome.verdicts.values())
        if by_musubi:
            print(f"  {dataset.heading}: {by_musubi} caches were made by musubi-tuner; used as they are")
        if outcome.orphaned and not pruned:
            print(f"  {dataset.heading}: orphans belong to no item and are not used; --prune deletes them")
        for name, reason in outcome.failures.items():
            print(f"  skipped: {reason if name in reason else f'{name}: {reason}'}")
