"""Batches from caches: order, repeats, workers, missing and outdated caches, and files that are not items."""

import dataclasses
import os
import pickle
import shutil
from collections import Counter, defaultdict
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

from dataset.cache import text_cache_path, write_latent_cache, write_text_cache
from dataset.config_utils import DatasetConfig, load_dataset_config
from dataset.image_video_dataset import TrainingDataset
from dataset.items import MediaInfo, item_provenance, plan_items
from dataset.manifest import Manifest
from dataset.scan import scan_datasets
from dataset.sources import list_sources
from tests.media_samples import write_caption, write_image
from utils.errors import UserError


def cache(config: DatasetConfig) -> None:
    """Writes caches as the two scripts would; every latent of an item holds the item's number."""
    for settings in config.every_dataset:
        manifest = Manifest(settings.cache_directory, "latents")
        for number, source in enumerate(list_sources(settings)):
            size = (64, 64) if number % 3 else (96, 48)
            info = MediaInfo(*size, frames=30 if settings.is_video else 1, digest="d")
            manifest.sources[source.name] = {"stamp": source.stamp, "probe": info.to_json()}
            for item in plan_items(settings, source.name, info).items:
                latents = torch.full((16, *item.latent_shape), float(number))
                frame_count = item.span.length if item.span else None
                write_latent_cache(item.path, latents, size, frame_count, item_provenance(item, settings, source.stamp))
            text = torch.full((256, 8), float(number)), torch.ones(256), torch.full((4,), float(number)), torch.ones(77)
            write_text_cache(text_cache_path(settings.cache_directory, source.name), *text, source.caption, {})
        manifest.save()


@pytest.fixture
def config(tmp_path: Path) -> DatasetConfig:
    """Seven images repeated three times, and four videos with two clips each, in buckets of odd sizes."""
    for folder, count, suffix in (("images", 7, ".png"), ("videos", 4, ".mp4")):
        (tmp_path / folder).mkdir()
        for number in range(count):
            path = tmp_path / folder / f"{folder}{number}{suffix}"
            write_image(path) if suffix == ".png" else path.write_bytes(b"x" * (number + 1))
            write_caption(path, f"caption {number}")
    root = tmp_path.as_posix()
    file = tmp_path / "data.toml"
    file.write_text(
        f"[general]\nresolution = 64\nenable_bucket = true\nbatch_size = 2\n"
        f"[[datasets]]\nimage_directory = '{root}/images'\ncache_directory = '{root}/c1'\nnum_repeats = 3\n"
        f"[[datasets]]\nvideo_directory = '{root}/videos'\ncache_directory = '{root}/c2'\n"
        f"target_frames = [1, 13]\nbatch_size = 3\n"
    )
    config = load_dataset_config(file)
    cache(config)
    return config


def epoch_names(dataset: TrainingDataset, workers: int = 0, persistent: bool = False, epochs: int = 1) -> list[list]:
    loader = DataLoader(
        dataset,
        batch_size=None,
        num_workers=workers,
        persistent_workers=persistent,
        multiprocessing_context="spawn" if workers else None,
    )
    passes = []
    for epoch in range(epochs):
        dataset.set_epoch(epoch)
        passes.append([batch.names for batch in loader])
    return passes


def test_each_item_is_seen_num_repeats_times_and_tails_are_kept(config: DatasetConfig) -> None:
    dataset = TrainingDataset(config, seed=1)
    (batches,) = epoch_names(dataset)
    counts = Counter(name for names in batches for name in names)
    assert {name: count for name, count in counts.items() if name.startswith("images")} == dict.fromkeys(
        [f"images{number}" for number in range(7)], 3
    )
    assert sum(count for name, count in counts.items() if name.startswith("videos")) == 8
    assert dataset.num_items == 29 and len(batches) == len(dataset)
    # 3 and 4 images x 3 in batches of 2; 2 and 2 videos x 1 in batches of 3, for each of two lengths
    assert len(dataset) == 5 + 6 + 4


def test_batches_hold_one_bucket_and_the_right_tensors(config: DatasetConfig) -> None:
    dataset = TrainingDataset(config, seed=1)
    for index in range(len(dataset)):
        batch = dataset[index]
        numbers = [int(name.split("_")[0][-1]) for name in batch.names]
        width, height, frames = map(int, batch.bucket.split("x"))
        assert batch.latents.shape == (len(numbers), 16, (frames - 1) // 4 + 1, height // 8, width // 8)
        assert batch.latents[:, 0, 0, 0, 0].tolist() == numbers
        assert batch.text_states[:, 0, 0].tolist() == numbers and batch.text_states_2[:, 0].tolist() == numbers
        assert batch.text_mask.dtype == torch.int64 and batch.text_states.dtype == torch.float32
        assert len({name.startswith("images") for name in batch.names}) == 1


def test_order_is_a_function_of_seed_and_epoch(config: DatasetConfig) -> None:
    one, two = TrainingDataset(config, seed=1), TrainingDataset(config, seed=1)
    two.set_epoch(5)
    assert epoch_names(one, epochs=3) == epoch_names(two, epochs=3)
    passes = epoch_names(one, epochs=2)
    assert passes[0] != passes[1]
    # Not only the order of the batches changes: they also hold other combinations of items.
    assert sorted(map(sorted, passes[0])) != sorted(map(sorted, passes[1]))
    assert epoch_names(TrainingDataset(config, seed=2)) != [passes[0]]
    one.set_epoch(1)
    assert one[4].names == passes[1][4] == one.names_of(4) == two.batch_of(1, 4).names


def test_the_order_of_an_epoch_is_frozen(config: DatasetConfig) -> None:
    """A resumed run of a later version goes on with the same batches. Items of one bucket are not in sequence."""
    short = {"images": "i", "videos": "v", "_00000-001": ".1", "_00000-013": ".13"}
    found = []
    for batches in epoch_names(TrainingDataset(config, seed=1), epochs=2):
        text = ", ".join(" ".join(names) for names in batches)
        for long in short:
            text = text.replace(long, short[long])
        found.append(text)
    assert found == [
        "i1 i4, i3 i3, i5 i1, i6 i3, i6, v2.13 v1.13, i2 i4, v2.1 v1.1, "
        "v3.1 v0.1, i2 i5, i5 i2, i6 i0, i1 i4, v0.13 v3.13, i0 i0",
        "i2 i2, i3 i0, i4 i5, i0, i4 i4, i5 i1, i0 i6, v1.13 v2.13, "
        "v0.13 v3.13, i3 i6, i5 i2, i3 i6, v3.1 v0.1, i1 i1, v1.1 v2.1",
    ]


def test_datasets_of_the_same_items_have_orders_of_their_own(config: DatasetConfig) -> None:
    """The number of the dataset belongs to the seed of the order."""
    twice = dataclasses.replace(config, datasets=config.datasets[:1] * 2)
    dataset = TrainingDataset(twice, seed=1)
    orders = defaultdict(list)
    for number, items in dataset._batches(0):
        bucket = dataset._buckets[number]
        orders[bucket.name].append((bucket.dataset, [item.name for item in items]))
    for batches in orders.values():
        first, second = ([names for number, names in batches if number == each] for each in (0, 1))
        assert sorted(first) != sorted(second)


def test_names_alone_decide_what_is_held_out(config: DatasetConfig) -> None:
    """Not their place in the alphabet: new files would move it."""
    held_out = TrainingDataset(config, seed=1, subset="validation", validation_split=0.3)
    assert sorted({name.split("_")[0] for names in epoch_names(held_out)[0] for name in names}) == [
        "images0",
        "images2",
        "videos3",
    ]


@pytest.mark.parametrize(("workers", "persistent"), [(2, True)])
def test_spawned_workers_change_nothing(config: DatasetConfig, workers: int, persistent: bool) -> None:
    alone = epoch_names(TrainingDataset(config, seed=3), epochs=2)
    assert epoch_names(TrainingDataset(config, seed=3), workers, persistent, epochs=2) == alone


@pytest.mark.slow
@pytest.mark.parametrize(("workers", "persistent"), [(1, False), (1, True), (2, False), (4, True)])
def test_any_number_of_workers_changes_nothing(config: DatasetConfig, workers: int, persistent: bool) -> None:
    test_spawned_workers_change_nothing(config, workers, persistent)


def test_a_copy_for_a_worker_gives_the_same_batches(config: DatasetConfig) -> None:
    dataset = TrainingDataset(config, seed=3)
    assert epoch_names(pickle.loads(pickle.dumps(dataset))) == epoch_names(dataset)


def test_the_split_holds_out_whole_sources(config: DatasetConfig) -> None:
    train = TrainingDataset(config, seed=1, validation_split=0.3)
    held_out = TrainingDataset(config, seed=1, subset="validation", validation_split=0.3)
    seen = {name.split("_")[0] for names in epoch_names(train)[0] for name in names}
    kept = {name.split("_")[0] for names in epoch_names(held_out)[0] for name in names}
    assert len(kept) == 3 and not seen & kept and len(seen | kept) == 11
    assert Counter(name for names in epoch_names(held_out)[0] for name in names).most_common(1)[0][1] == 1
    assert len(TrainingDataset(config, seed=1, subset="validation")) == 0


def test_validation_datasets_are_never_trained_on(config: DatasetConfig, tmp_path: Path) -> None:
    file = tmp_path / "validation.toml"
    file.write_text(config.path.read_text().replace("[[datasets]]\nvideo", "[[validation]]\nvideo"))
    config = load_dataset_config(file)
    assert all(name.startswith("images") for names in epoch_names(TrainingDataset(config, 1))[0] for name in names)
    held_out = epoch_names(TrainingDataset(config, 1, subset="validation"))[0]
    assert all(name.startswith("videos") for names in held_out for name in names)


def test_files_that_lie_in_the_cache_directory_are_not_items(config: DatasetConfig) -> None:
    directory = config.datasets[0].cache_directory
    shutil.copy(directory / "images1_0064x0064_hv.safetensors", directory / "stray_0064x0064_hv.safetensors")
    shutil.copy(directory / "images1_hv_te.safetensors", directory / "stray_hv_te.safetensors")
    assert "stray" not in {name for names in epoch_names(TrainingDataset(config, 1))[0] for name in names}


def test_a_removed_image_is_not_trained_on(config: DatasetConfig, tmp_path: Path) -> None:
    (tmp_path / "images" / "images3.png").unlink()
    assert "images3" not in {name for names in epoch_names(TrainingDataset(config, 1))[0] for name in names}


def test_caches_alone_are_enough(config: DatasetConfig, tmp_path: Path) -> None:
    expected = epoch_names(TrainingDataset(config, seed=1))
    shutil.rmtree(tmp_path / "images")
    for path in (tmp_path / "videos").iterdir():
        path.unlink()
    assert epoch_names(TrainingDataset(config, seed=1)) == expected


def refused(config: DatasetConfig) -> str:
    with pytest.raises(UserError) as caught:
        TrainingDataset(config, seed=1)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_is_missing_or_stale_is_named_with_the_script(config: DatasetConfig, tmp_path: Path) -> None:
    directory = config.datasets[0].cache_directory
    (directory / "images1_0064x0064_hv.safetensors").unlink()
    message = refused(config)
    assert "not cached: images1)" in message and "run cache_latents.py" in message and "c1" in message

    cache(config)
    write_caption(tmp_path / "images" / "images2.png", "another caption")
    (directory / "images4_hv_te.safetensors").unlink()
    message = refused(config)
    assert "caption" in message and "not cached" in message and "run cache_text_encoder_outputs.py" in message
    assert "cache_latents.py" not in message

    cache(config)
    write_caption(write_image(tmp_path / "images" / "new.png"), "new")
    assert "not cached: new)" in refused(config)


def test_a_changed_medium_is_refused_and_a_mere_copy_is_not(config: DatasetConfig, tmp_path: Path) -> None:
    path = tmp_path / "videos" / "videos2.mp4"
    path.write_bytes(b"other content")
    assert "the media file changed" in refused(config)

    cache(config)
    manifest = Manifest.load(config.datasets[1].cache_directory, "latents")
    from dataset.sources import file_identity

    manifest.sources["videos2"]["probe"]["digest"] = file_identity(path)
    manifest.save()
    os.utime(path, ns=(5, 5))
    assert TrainingDataset(config, seed=1).num_items == 29


def test_a_changed_config_is_refused(config: DatasetConfig) -> None:
    text = config.path.read_text()
    config.path.write_text(text.replace("resolution = 64", "resolution = 128"))
    assert "cache_latents.py" in refused(load_dataset_config(config.path))
    config.path.write_text(text.replace("target_frames = [1, 13]", "target_frames = [1, 17]"))
    assert "not cached" in refused(load_dataset_config(config.path))
    config.path.write_text(text.replace("target_frames = [1, 13]", "target_frames = [1]"))
    assert TrainingDataset(load_dataset_config(config.path), 1).num_items == 25


def test_nothing_cached_at_all_is_one_line(config: DatasetConfig, tmp_path: Path) -> None:
    shutil.rmtree(tmp_path / "c1")
    assert "run cache_latents.py" in refused(config)


def test_items_that_could_not_be_cached_are_left_out(config: DatasetConfig) -> None:
    directory = config.datasets[0].cache_directory
    (directory / "images1_0064x0064_hv.safetensors").unlink()
    stamp = Manifest.load(directory, "latents").sources["images1"]["stamp"]
    Manifest(directory, "failures-0", {"images1": {"stamp": stamp, "problem": "broken"}}).save()
    dataset = TrainingDataset(config, seed=1)
    assert dataset.num_items == 26
    assert any("1 items could not be cached and are left out; the first: images1" in note for note in dataset.notes)


def test_a_file_that_could_not_be_opened_is_left_out(config: DatasetConfig, tmp_path: Path) -> None:
    path = tmp_path / "images" / "broken.png"
    path.write_bytes(b"x")
    write_caption(path)
    assert "not cached: broken" in refused(config)
    manifest = Manifest.load(config.datasets[0].cache_directory, "latents")
    stat = path.stat()
    manifest.sources["broken"] = {"stamp": [stat.st_size, stat.st_mtime_ns], "problem": "no image"}
    manifest.save()
    assert TrainingDataset(config, seed=1).num_items == 29


def test_description_and_largest_batch(config: DatasetConfig) -> None:
    dataset = TrainingDataset(config, seed=1)
    first, second = dataset.description()["datasets"]
    assert first["num_items"] == 21 and second["num_items"] == 8
    assert first["resolution"] == [64, 64] and second["target_frames"] == [1, 13]
    assert second["buckets"]["64x64x13"] == 2
    batch = dataset.largest_batch()
    assert batch.bucket.endswith("x13") and len(batch.names) == 2
    # The worst case for memory: one caption of the maximum length beside a shorter one.
    assert batch.text_mask.sum(1).tolist() == [256, 255]


def test_the_largest_batch_has_the_most_latents_of_all_its_items(config: DatasetConfig) -> None:
    """Two clips of 4 latent frames are 8 frames; in batches of 9, the nine images of a bucket are more."""
    large = config.path.read_text().replace("num_repeats = 3", "num_repeats = 3\nbatch_size = 9")
    config.path.write_text(large)
    batch = TrainingDataset(load_dataset_config(config.path), seed=1).largest_batch()
    assert batch.bucket.endswith("x1") and len(batch.names) == 9


def test_a_caption_that_came_after_the_latents_is_not_forgotten(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    for number in range(3):
        write_image(tmp_path / "images" / f"{number}.png")
    for number in (0, 1):
        write_caption(tmp_path / "images" / f"{number}.png", "a caption")
    file = tmp_path / "data.toml"
    file.write_text(
        f"[[datasets]]\nresolution = 64\nimage_directory = '{tmp_path.as_posix()}/images'\n"
        f"cache_directory = '{tmp_path.as_posix()}/cache'\n"
    )
    for dataset in scan_datasets(load_dataset_config(file)):
        dataset.manifest.save()
    write_caption(tmp_path / "images" / "2.png", "a caption")
    with pytest.raises(UserError, match=r"not cached: 0 and 2 more\); run cache_latents\.py"):
        TrainingDataset(load_dataset_config(file), seed=0)


def test_a_jsonl_dataset_trains_where_only_its_caches_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = tmp_path / "images"
    images.mkdir()
    lines = []
    for number in range(3):
        write_image(images / f"{number}.png")
        lines.append(f'{{"image_path": "{(images / f"{number}.png").as_posix()}", "caption": "caption {number}"}}')
    (tmp_path / "list.jsonl").write_text("\n".join(lines))
    file = tmp_path / "data.toml"
    file.write_text(
        f"[[datasets]]\nresolution = 64\nimage_jsonl_file = '{tmp_path.as_posix()}/list.jsonl'\n"
        f"cache_directory = '{tmp_path.as_posix()}/cache'\n"
    )
    cache(load_dataset_config(file))
    shutil.rmtree(images)
    assert TrainingDataset(load_dataset_config(file), seed=0).num_items == 3
