"""cache_latents.py on real media: what it writes, what it does again, what it survives."""

import enum
import itertools
import json
import os
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import cache_latents as script
from dataset.cache import text_cache_path, write_text_cache
from dataset.config_utils import load_dataset_config
from dataset.image_video_dataset import TrainingDataset
from dataset.latent_caching import posterior_noise
from dataset.manifest import Manifest
from dataset.media import load_image, resize_to_bucket
from dataset.sources import list_sources
from hunyuan_model.vae import AutoencoderKLCausal3D
from modules.caching.latents import LatentCaching
from modules.memory.meter import MemoryMeter, nbytes
from tests.media_samples import number_of, write_caption, write_image, write_video
from tests.platforms import needs_posix
from utils.errors import UserError
from utils.safetensors_utils import load_file, read_header

ROOT = Path(__file__).parents[2]


@dataclass
class World:
    """A config with one image and one video dataset, and the way to run the script on it."""

    folder: Path
    config: Path
    vae: Path
    run: Callable[..., str]

    @property
    def images(self) -> Path:
        return self.folder / "images"

    @property
    def videos(self) -> Path:
        return self.folder / "videos"

    def caches(self) -> dict[str, Path]:
        return {path.name: path for path in self.folder.glob("c*/*_hv.safetensors")}

    def stamps(self) -> dict[str, int]:
        return {name: path.stat().st_mtime_ns for name, path in self.caches().items()}

    def command(self, *more: object) -> list[str]:
        words = ["--dataset_config", self.config, "--vae", self.vae, "--device", "cpu", *more]
        return [sys.executable, str(ROOT / "cache_latents.py"), *map(str, words)]


@pytest.fixture
def world(tmp_path: Path, tiny_models, monkeypatch, capsys) -> World:
    """Three images and two videos; `run` calls the script's main in this process and returns its output."""
    for folder in ("images", "videos"):
        (tmp_path / folder).mkdir()
    for name, size in (("a.png", (100, 80)), ("b c.jpg", (64, 64)), ("猫#[1].png", (50, 90))):
        write_caption(write_image(tmp_path / "images" / name, size))
    for name, frames in (("v.mp4", 14), ("w.webm", 9)):
        codec = "libvpx" if name.endswith("webm") else "libx264"
        write_caption(write_video(tmp_path / "videos" / name, frames=frames, size=(64, 32), codec=codec))
    config = tmp_path / "data.toml"
    root = tmp_path.as_posix()
    config.write_text(
        f"[general]\nresolution = [32, 32]\nenable_bucket = true\n"
        f"[[datasets]]\nimage_directory = '{root}/images'\ncache_directory = '{root}/c1'\n"
        f"[[datasets]]\nvideo_directory = '{root}/videos'\ncache_directory = '{root}/c2'\n"
        f"target_frames = [1, 5]\nframe_extraction = 'chunk'\n",
        encoding="utf-8",
    )

    def run(*more: object) -> str:
        made = World(tmp_path, config, tiny_models.vae, run)
        monkeypatch.setattr(sys, "argv", made.command(*more)[1:])
        capsys.readouterr()
        script.main()
        return capsys.readouterr().out

    return World(tmp_path, config, tiny_models.vae, run)


def counts(output: str) -> list[list[int]]:
    """(new, changed, kept, skipped, orphaned) of each dataset in the closing table."""
    rows = re.findall(r"^  \[\[\w+\]\] \d +((?:\d+ +){5})\S", output.split("latent caches")[-1], re.M)
    return [[int(word) for word in row.split()] for row in rows]


VIDEO_ITEMS = 14 + 2 + 9 + 1  # every frame of both, and the chunks of 5 that fit


def test_what_is_written_is_what_the_formats_say(world: World) -> None:
    assert counts(world.run()) == [[3, 0, 0, 0, 0], [VIDEO_ITEMS, 0, 0, 0, 0]]
    names = set(world.caches())
    assert {"a_0100x0080_hv.safetensors", "b c_0064x0064_hv.safetensors", "猫#[1]_0050x0090_hv.safetensors"} < names
    assert {"v_00005-005_0064x0032_hv.safetensors", "v_00013-001_0064x0032_hv.safetensors"} < names

    infos, metadata = read_header(world.caches()["v_00005-005_0064x0032_hv.safetensors"])
    assert {name: info.shape for name, info in infos.items()} == {"latents_2x4x4_float16": (16, 2, 4, 4)}
    assert metadata["architecture"] == "hunyuan_video" and metadata["format_version"] == "1.0.1"
    assert (metadata["width"], metadata["height"], metadata["frame_count"]) == ("64", "32", "5")
    assert "frame_count" not in read_header(world.caches()["a_0100x0080_hv.safetensors"])[1]


def test_latents_are_unscaled_samples_of_the_posterior(world: World) -> None:
    world.run()
    from hunyuan_model.checkpoints import load_vae

    pixels = torch.from_numpy(resize_to_bucket(load_image(world.images / "a.png"), (32, 32)).copy())
    posterior = load_vae(world.vae).encode(pixels.permute(2, 0, 1)[None, :, None] / 127.5 - 1)
    noise = posterior_noise("a", posterior.mean.shape[1:])
    expected = posterior.mean[0] + (0.5 * posterior.logvar[0]).exp() * noise
    (latents,) = load_file(world.caches()["a_0100x0080_hv.safetensors"]).values()
    assert torch.allclose(latents.float(), expected, atol=2e-3, rtol=2e-3)


def test_vae_dtype_decides_the_cache_dtype(world: World) -> None:
    world.run("--vae_dtype", "bfloat16")
    infos, _ = read_header(world.caches()["a_0100x0080_hv.safetensors"])
    assert list(infos) == ["latents_1x4x4_bfloat16"]
    assert counts(world.run())[0] == [0, 3, 0, 0, 0]


def test_batches_give_what_single_items_give(world: World) -> None:
    world.run()
    single = {name: load_file(path) for name, path in world.caches().items()}
    for path in world.caches().values():
        path.unlink()
    world.config.write_text(world.config.read_text().replace("enable", "batch_size = 4\nenable"))
    world.run()
    for name, path in world.caches().items():
        for key, tensor in load_file(path).items():
            assert torch.allclose(tensor.float(), single[name][key].float(), atol=4e-3), name


def test_a_second_run_opens_no_media_and_loads_no_model(world: World, monkeypatch) -> None:
    world.run()
    before = world.stamps()
    with monkeypatch.context() as patch:
        for name in ("av.open", "PIL.Image.open", "modules.caching.latents.load_vae"):
            patch.setattr(name, lambda *a, **k: pytest.fail("opened"))
        assert counts(world.run()) == [[0, 0, 3, 0, 0], [0, 0, VIDEO_ITEMS, 0, 0]]
    assert world.stamps() == before


def changed_files(world: World, before: dict[str, int]) -> set[str]:
    after = world.stamps()
    return {name for name in after if before.get(name) != after[name]}


def test_only_what_changed_is_encoded_again(world: World) -> None:
    world.run()
    before = world.stamps()
    write_video(world.videos / "w.webm", frames=9, fps=25, size=(64, 32), codec="libvpx")
    assert counts(world.run()) == [[0, 0, 3, 0, 0], [0, 10, 16, 0, 0]]
    assert changed_files(world, before) == {name for name in before if name.startswith("w_")}

    before = world.stamps()
    write_caption(world.images / "a.png", "another caption")
    world.run()
    assert changed_files(world, before) == set()

    world.config.write_text(world.config.read_text().replace("[32, 32]", "[48, 48]"))
    assert counts(world.run()) == [[0, 3, 0, 0, 0], [0, VIDEO_ITEMS, 0, 0, 0]]


def test_a_copy_of_the_dataset_is_not_encoded_again(world: World, monkeypatch) -> None:
    world.run()
    write_text_caches(world)
    for path in (*world.images.iterdir(), *world.videos.iterdir()):
        os.utime(path, ns=(1, 1))
    assert counts(world.run()) == [[0, 0, 3, 0, 0], [0, 0, VIDEO_ITEMS, 0, 0]]
    monkeypatch.setattr("dataset.sources.file_identity", lambda *a, **k: pytest.fail("read again"))
    assert TrainingDataset(load_dataset_config(world.config), seed=0).num_items == 3 + VIDEO_ITEMS
    assert counts(world.run()) == [[0, 0, 3, 0, 0], [0, 0, VIDEO_ITEMS, 0, 0]]


def test_an_image_that_was_changed_in_its_middle_alone_is_encoded_again(world: World) -> None:
    path = world.images / "large.bmp"
    write_caption(write_image(path, (1200, 900)))
    world.run()
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 255
    path.write_bytes(data)
    os.utime(path, ns=(1, 1))
    assert counts(world.run())[0] == [0, 1, 3, 0, 0]


def test_the_trainer_takes_what_was_kept_by_its_name(world: World) -> None:
    world.run()
    write_text_caches(world)
    path = world.images / "a.png"
    write_image(path, (100, 80), (9, 9, 200))
    world.config.write_text(world.config.read_text() + "source_fps = 24\n")
    assert counts(world.run("--skip_existing")) == [[0, 0, 3, 0, 0], [0, 0, VIDEO_ITEMS, 0, 0]]
    assert TrainingDataset(load_dataset_config(world.config), seed=0).num_items == 3 + VIDEO_ITEMS
    write_image(path, (100, 80), (9, 200, 9))
    with pytest.raises(UserError, match=r"the media file changed: a\)"):
        TrainingDataset(load_dataset_config(world.config), seed=0)
    assert counts(world.run()) == [[0, 1, 2, 0, 0], [0, VIDEO_ITEMS, 0, 0, 0]]


def test_another_vae_encodes_everything_again_and_a_copy_of_it_nothing(world: World, tmp_path: Path) -> None:
    world.run()
    folder = tmp_path / "vae"
    shutil.copytree(world.vae.parent, folder)
    copy = folder / world.vae.name
    assert counts(world.run("--vae", copy))[0] == [0, 0, 3, 0, 0]
    state = torch.load(copy, weights_only=True)
    state["state_dict"]["encoder.conv_in.conv.weight"] += 1
    torch.save(state, copy)
    output = world.run("--vae", copy)
    assert counts(output)[0] == [0, 3, 0, 0, 0] and "3 made again: vae" in output
    assert counts(world.run("--skip_existing"))[0] == [0, 0, 3, 0, 0]


def test_damaged_caches_are_made_again_and_others_stay(world: World) -> None:
    world.run()
    whole = {name: load_file(path) for name, path in world.caches().items()}
    before = world.stamps()
    names = sorted(name for name in whole if name.startswith("v_"))[:5]
    paths = [world.caches()[name] for name in names]
    paths[0].write_bytes(paths[0].read_bytes()[:-7])
    paths[1].write_bytes(b"")
    save_file({"weights": torch.zeros(3)}, paths[2])
    metadata = read_header(paths[3])[1]
    save_file({key: torch.full_like(value, float("nan")) for key, value in whole[names[3]].items()}, paths[3], metadata)
    paths[4].unlink()
    assert counts(world.run()) == [[0, 0, 3, 0, 0], [1, 4, VIDEO_ITEMS - 5, 0, 0]]
    assert changed_files(world, before) == set(names)
    for name, path in world.caches().items():
        assert all(torch.equal(tensor, whole[name][key]) for key, tensor in load_file(path).items())


def test_caches_of_musubi_tuner_are_used_and_its_scaled_ones_made_again(world: World) -> None:
    world.run()
    for name, version, scale in (("a_0100x0080", "1.0.1", 2.0), ("b c_0064x0064", "1.0.0", 1.0)):
        path = world.caches()[f"{name}_hv.safetensors"]
        metadata = {"architecture": "hunyuan_video", "width": "1", "height": "1", "format_version": version}
        save_file({"latents_1x4x4_float16": (scale * torch.randn(16, 1, 4, 4)).half()}, path, metadata)
    output = world.run()
    assert counts(output)[0] == [0, 1, 2, 0, 0]
    assert "1 caches were made by musubi-tuner" in output and "1 made again: scaled latents" in output


def test_orphans_are_told_and_deleted_only_when_asked(world: World) -> None:
    world.run()
    (world.images / "a.png").unlink()
    output = world.run()
    assert counts(output)[0] == [0, 0, 2, 0, 1] and "--prune deletes them" in output
    assert "a_0100x0080_hv.safetensors" in world.caches()
    world.run("--prune")
    assert "a_0100x0080_hv.safetensors" not in world.caches() and len(world.caches()) == 2 + VIDEO_ITEMS


def test_files_with_the_same_stem_get_caches_of_their_own(world: World) -> None:
    write_image(world.images / "a.jpg", (100, 80), (10, 200, 30))
    world.run()
    first, second = (world.caches()[f"a-{kind}_0100x0080_hv.safetensors"] for kind in ("png", "jpg"))
    (one,), (two,) = load_file(first).values(), load_file(second).values()
    assert not torch.equal(one, two)


def test_strange_and_long_names_work_from_media_to_batch(world: World) -> None:
    for name in ("e" * 200, "猫の写真" * 19, "50% [x] #1 & 'y'", "with.dots.v2"):
        write_caption(write_image(world.images / f"{name}.png", (40, 40)), f"caption of {name}")
    assert counts(world.run())[0] == [7, 0, 0, 0, 0]
    assert f"{'e' * 200}_0040x0040_hv.safetensors" in world.caches()
    assert counts(world.run())[0] == [0, 0, 7, 0, 0]
    write_text_caches(world)
    assert TrainingDataset(load_dataset_config(world.config), seed=0).num_items == 7 + VIDEO_ITEMS


def test_a_full_disk_is_one_line_and_keeps_what_is_cached(world: World, monkeypatch) -> None:
    from dataset import cache

    real, written = cache.save_file, []

    def save(tensors, path, metadata):
        if len(written) == 2:
            raise OSError(28, "No space left on device")
        written.append(path)
        real(tensors, path, metadata)

    monkeypatch.setattr(cache, "save_file", save)
    with pytest.raises(UserError, match=r"cannot be written: .*No space left.*caches written so far are kept"):
        world.run()
    monkeypatch.setattr(cache, "save_file", real)
    assert counts(world.run())[0] == [1, 0, 2, 0, 0]


def test_out_of_memory_is_one_line(world: World, monkeypatch) -> None:
    from hunyuan_model.vae import AutoencoderKLCausal3D

    def encode(*arguments):
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(AutoencoderKLCausal3D, "encode", encode)
    with pytest.raises(UserError, match=r"out of memory while encoding .*lower --batch_size.*so far are kept"):
        world.run()


def test_a_dry_run_predicts_what_encoding_really_needs(world: World, monkeypatch) -> None:
    used, encode = [], AutoencoderKLCausal3D.encode

    def measured(vae: AutoencoderKLCausal3D, pixels: torch.Tensor) -> object:
        with MemoryMeter() as meter:
            posterior = encode(vae, pixels)
        used.append(meter.peak + nbytes(pixels) + sum(map(nbytes, vae.parameters())))
        return posterior

    monkeypatch.setattr("modules.memory.plan.DEVICE_OVERHEAD", 0)
    monkeypatch.setattr("modules.memory.plan.FRAGMENTATION", 1)
    printed = world.run("--dry_run")
    assert "memory plan, batch of 1, 32x32x5" in printed
    assert not world.caches()
    planned = float(re.search(r"GPU memory of encoding +([\d.]+) MiB", printed)[1])
    monkeypatch.setattr(AutoencoderKLCausal3D, "encode", measured)
    world.run()
    assert planned == pytest.approx(max(used) / 2**20, rel=0.1)


def test_vram_gb_chooses_the_tiles_unless_the_user_has(world: World, monkeypatch) -> None:
    def estimate(config: object, shape: tuple, dtype: torch.dtype, chunk: int | None, tile: int | None) -> int:
        return {None: 20, 256: 10, 128: 5, 64: 2}[tile] << 30

    chosen, configure = [], AutoencoderKLCausal3D.configure_memory
    monkeypatch.setattr("modules.memory.vae_encoding.estimate_vae", estimate)
    monkeypatch.setattr(
        AutoencoderKLCausal3D, "configure_memory", lambda vae, *sizes: chosen.append(sizes) or configure(vae, *sizes)
    )
    world.run("--vram_gb", 8, "--vae_chunk_size", 4)
    assert chosen == [(4, 128)]
    assert re.search(r"VAE tiles +256", world.run("--dry_run", "--vram_gb", 8, "--vae_tiling"))


def test_a_cache_directory_that_cannot_be_made_is_one_line(world: World) -> None:
    (world.folder / "c1").write_text("a file")
    with pytest.raises(UserError, match="c1: the cache directory cannot be written"):
        world.run()


def test_processes_share_the_items(world: World, monkeypatch) -> None:
    world.run()
    alone = {name: load_file(path) for name, path in world.caches().items()}
    for path in world.caches().values():
        path.unlink()
    monkeypatch.setenv("WORLD_SIZE", "2")
    written = []
    for rank in ("1", "0"):
        monkeypatch.setenv("RANK", rank)
        before = set(world.caches())
        output = world.run()
        assert ("latent caches" in output) == (rank == "0")
        written.append(set(world.caches()) - before)
    assert not written[0] & written[1] and written[0] | written[1] == set(alone)
    assert abs(len(written[0]) - len(written[1])) <= 2
    for name, path in world.caches().items():
        assert all(torch.equal(tensor, alone[name][key]) for key, tensor in load_file(path).items())


@pytest.mark.parametrize("ending", [KeyboardInterrupt(), UserError("out of memory")], ids=repr)
def test_what_was_known_to_be_sound_is_not_read_again_whoever_found_it_and_however_it_ended(
    world: World, monkeypatch, ending: BaseException
) -> None:
    """Also where the last run was of fewer processes, of which none renews the list of the second."""
    encode = LatentCaching.encode

    def encode_and_end(*arguments) -> None:
        encode(*arguments)
        raise ending

    monkeypatch.setattr(LatentCaching, "encode", encode_and_end)
    for run, (processes, rank) in enumerate([(2, 1), (2, 0), (2, 1), (1, 0), (2, 1), (1, 0)]):
        monkeypatch.setenv("WORLD_SIZE", str(processes))
        monkeypatch.setenv("RANK", str(rank))
        if run < 2:
            with pytest.raises(type(ending)):
                world.run()
            monkeypatch.setattr("dataset.manifest.load_file", lambda path: pytest.fail(f"{path.name} was read whole"))
        else:
            world.run()
    assert list(world.folder.glob("c*/*-sound-*")) == []


def write_text_caches(world: World) -> None:
    for settings in load_dataset_config(world.config).datasets:
        for source in (source for source in list_sources(settings) if source.problem is None):
            tensors = torch.zeros(256, 8), torch.ones(256), torch.zeros(4), torch.ones(77)
            write_text_cache(text_cache_path(settings.cache_directory, source.name), *tensors, source.caption, {})


def test_the_trainer_reads_what_was_cached(world: World) -> None:
    world.run()
    write_text_caches(world)
    dataset = TrainingDataset(load_dataset_config(world.config), seed=0)
    assert dataset.num_items == 3 + VIDEO_ITEMS
    batch = dataset[0]
    (latents,) = load_file(next(p for n, p in world.caches().items() if n.startswith(f"{batch.names[0]}_"))).values()
    assert torch.equal(batch.latents[0], latents.float())


def test_a_clip_that_breaks_while_decoding_is_listed_skipped_and_not_trained_on(world: World, monkeypatch) -> None:
    from dataset.video import _decoded as real

    monkeypatch.setattr("dataset.video._decoded", lambda *stream: itertools.islice(real(*stream), 9))
    output = world.run()
    assert counts(output)[1] == [VIDEO_ITEMS - 6, 0, 0, 6, 0]  # five single frames and one chunk beyond
    assert "v.mp4: frame 9 of 14 cannot be decoded" in output
    write_text_caches(world)
    names = TrainingDataset(load_dataset_config(world.config), seed=0).num_items
    assert names == 3 + VIDEO_ITEMS - 6

    monkeypatch.setattr("dataset.video._decoded", real)
    assert counts(world.run())[1] == [6, 0, VIDEO_ITEMS - 6, 0, 0]
    assert not list(world.folder.glob("c2/hv_failures*"))


def test_values_that_are_not_finite_are_listed_and_never_written(world: World, monkeypatch) -> None:
    from hunyuan_model.vae import AutoencoderKLCausal3D

    real = AutoencoderKLCausal3D.encode

    def encode(self, pixels):
        posterior = real(self, pixels)
        posterior.mean[:, 0, 0, 0, 0] = float("nan") if pixels.shape[3] > pixels.shape[4] else 0.0
        return posterior

    monkeypatch.setattr(AutoencoderKLCausal3D, "encode", encode)
    output = world.run()
    assert counts(output)[0] == [2, 0, 0, 1, 0]
    assert "猫#[1]" in output and "try --vae_dtype float32" in output
    assert "猫#[1]_0050x0090_hv.safetensors" not in world.caches()


def test_broken_sources_are_listed_and_skipped_and_strict_stops(world: World) -> None:
    (world.images / "broken.png").write_bytes(b"\x89PNG")
    write_caption(world.images / "broken.png")
    write_image(world.images / "no caption.png")
    write_caption(write_video(world.videos / "short.mp4", frames=3, size=(64, 32)))
    output = world.run()
    assert counts(output)[0] == [3, 0, 0, 2, 0]
    assert "skipped" in output and "broken.png" in output and "no caption.txt: caption not found" in output
    assert re.search(r"short\.mp4 +3 .* 5\n", output)
    write_text_caches(world)
    assert TrainingDataset(load_dataset_config(world.config), seed=0).num_items == 3 + VIDEO_ITEMS + 3
    before = world.stamps()
    with pytest.raises(UserError, match="--strict"):
        world.run("--strict")
    assert world.stamps() == before


@needs_posix
def test_a_name_that_is_not_utf8_is_listed_and_skipped(world: World) -> None:
    path = world.images / os.fsdecode(b"caf\xe9.png")
    try:
        write_caption(write_image(path))
    except OSError:
        pytest.skip("this file system takes UTF-8 alone")
    assert "caf\\udce9.png: rename it" in world.run(
        "--debug_mode", "html", "--debug_output", world.folder / "page.html"
    )
    output = world.run()
    assert counts(output)[0] == [3, 0, 0, 1, 0] and "caf\\udce9.png: rename it: its name is not UTF-8" in output
    write_text_caches(world)
    assert "rename it" in TrainingDataset(load_dataset_config(world.config), seed=0).notes[0]


def test_the_intake_report_tells_what_will_go_wrong(world: World) -> None:
    shutil.copy(world.images / "a.png", world.images / "twin.png")
    write_caption(world.images / "twin.png", "")
    write_image(world.images / "small.png", (20, 20))
    write_caption(world.images / "small.png")
    write_caption(write_video(world.videos / "fast.mp4", frames=10, fps=60, size=(64, 32)))
    world.config.write_text(world.config.read_text().replace("enable", "batch_size = 2\nenable"))
    output = world.run("--debug_mode", "html", "--debug_output", world.folder / "page.html")
    for words in (
        "empty captions (1): twin.png",
        "same content (1): a.png = twin.png",
        "smaller than their bucket, so enlarged (1): small.png (20x20)",
        "not 24 fps",
        "fast.mp4 (60.00)",
        "buckets with fewer items than batch_size 2",
        "steps per epoch:",
    ):
        assert words in output, words


def test_no_usable_item_is_one_line(world: World) -> None:
    text = world.config.read_text()
    world.config.write_text(text.replace("video_directory", "image_directory").split("target_frames")[0])
    with pytest.raises(UserError, match=r"2 videos.*write video_directory"):
        world.run()
    world.config.write_text(text.replace("[1, 5]", "[45]"))
    with pytest.raises(UserError, match=r"no usable item: .*v\.mp4: 14 frames, too short .* 45, and 1 more"):
        world.run()


def test_the_page_shows_the_exact_pixels(world: World) -> None:
    import base64
    import io

    from PIL import Image

    page = world.folder / "page.html"
    write_caption(world.images / "a.png", "<script>alert(1)</script> & more")
    world.run("--debug_mode", "html", "--debug_output", page)
    assert not world.caches()
    text = page.read_text(encoding="utf-8")
    assert "&lt;script&gt;" in text and "<script" not in text and "http" not in text
    assert text.count("<figure>") == 3 + VIDEO_ITEMS
    encoded = re.search(r"<b>a\.png.*?base64,([^\"]+)", text, re.S)[1]
    shown = np.asarray(Image.open(io.BytesIO(base64.b64decode(encoded))).convert("RGB")).astype(int)
    expected = resize_to_bucket(load_image(world.images / "a.png"), (32, 32)).astype(int)
    assert shown.shape == expected.shape and np.abs(shown - expected).mean() < 6
    frames = re.findall(r"base64,([^\"]+)", text.split("<b>v.mp4")[1].split("<b>w.webm")[0])[:14]
    numbers = [number_of(np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))) for data in frames]
    assert numbers == list(range(14))


@pytest.mark.slow
@pytest.mark.skipif(not (shutil.which("chromium") or shutil.which("chrome")), reason="needs Chromium")
def test_the_page_opens_in_a_browser(world: World) -> None:
    page = world.folder / "page.html"
    world.run("--debug_mode", "html", "--debug_output", page)
    shot = world.folder / "shot.png"
    browser = shutil.which("chromium") or shutil.which("chrome")
    words = ["--headless", "--no-sandbox", "--disable-gpu", "--window-size=1200,1600", f"--screenshot={shot}"]
    subprocess.run([browser, *words, page.as_uri()], check=True, capture_output=True, timeout=60)
    pixels = load_image(shot).astype(int)
    # The chart's bars, in the colour of the style sheet, and something of the red images.
    bars = (np.abs(pixels - [0x3B, 0x7D, 0xD8]).sum(axis=2) < 12).sum()
    reds = ((pixels[..., 0] > 150) & (pixels[..., 1] < 90)).sum()
    assert bars > 2000 and reds > 1000


def test_windows_and_letters_need_what_they_need(world: World, monkeypatch) -> None:
    for name in ("DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    if sys.platform == "linux":
        with pytest.raises(UserError, match="no display; use --debug_mode html"):
            world.run("--debug_mode", "image")
    monkeypatch.setitem(sys.modules, "ascii_magic", None)
    with pytest.raises(UserError, match="pip install ascii-magic"):
        world.run("--debug_mode", "console")


def test_windows_show_every_item_and_play_clips(world: World, monkeypatch) -> None:
    import cv2

    shown: list[np.ndarray] = []
    monkeypatch.setenv("DISPLAY", ":0")
    monkeypatch.setattr(cv2, "imshow", lambda title, pixels: shown.append(pixels))
    monkeypatch.setattr(cv2, "waitKey", lambda delay: -1)
    monkeypatch.setattr(cv2, "destroyAllWindows", lambda: None)
    world.run("--debug_mode", "image")
    assert len(shown) == 3 + VIDEO_ITEMS
    red = resize_to_bucket(load_image(world.images / "a.png"), (32, 32))
    assert np.array_equal(shown[0][..., ::-1], red)

    shown.clear()
    world.config.write_text(world.config.read_text().replace("[1, 5]", "[5]"))
    world.run("--debug_mode", "video", "--console_num_images", 1)
    assert [number_of(frame) for frame in shown[1:]] == [0, 1, 2, 3, 4]

    shown.clear()
    monkeypatch.setattr(cv2, "waitKey", lambda delay: 27)
    world.run("--debug_mode", "video")
    assert len(shown) == 1


def test_letters_are_drawn_with_ascii_magic(world: World, monkeypatch) -> None:
    drawn = []

    class Back(enum.Enum):
        BLUE = 1

    class AsciiArt:
        @classmethod
        def from_pillow_image(cls, image):
            drawn.append(image.size)
            return cls()

        def to_terminal(self, columns, back):
            drawn.append((columns, back))

    monkeypatch.setitem(sys.modules, "ascii_magic", SimpleNamespace(AsciiArt=AsciiArt, Back=Back))
    words = ["--debug_mode", "console", "--console_num_images", 1, "--console_width", 40]
    assert "a caption" in world.run(*words, "--console_back", "blue")
    assert drawn == [(32, 32), (40, Back.BLUE)] * 2
    with pytest.raises(UserError, match="--console_back pink: allowed: BLUE"):
        world.run(*words, "--console_back", "pink")


def refused(*words: object) -> str:
    """The one line on stderr of a run that ends with exit code 2."""
    run = subprocess.run([sys.executable, str(ROOT / "cache_latents.py"), *map(str, words)], capture_output=True)
    error = run.stderr.decode()
    assert run.returncode == 2 and error.count("\n") == 1, error
    return error


def test_mistakes_are_one_line_and_exit_code_2(world: World) -> None:
    assert "required and not given: --dataset_config" in refused()
    assert "no such file" in refused("--dataset_config", "gone.toml")
    assert "--vae" in refused("--dataset_config", world.config)
    assert "did you mean" in refused("--dataset_config", world.config, "--vae_tilling")
    dit = world.vae.parents[1] / "transformers" / "mp_rank_00_model_states.pt"
    assert "a VAE of HunyuanVideo is expected" in refused("--dataset_config", world.config, "--vae", dit)


def test_an_unknown_device_is_refused_before_anything_is_done(world: World) -> None:
    with pytest.raises(UserError, match="--device abacus"):
        world.run("--device", "abacus")
    assert not (world.folder / "c1").exists()


def test_as_a_program(world: World) -> None:
    run = subprocess.run(
        world.command("--vae_chunk_size", 4, "--vae_tiling"), capture_output=True, check=True, cwd=ROOT
    )
    output = run.stdout.decode()
    assert counts(output) == [[3, 0, 0, 0, 0], [VIDEO_ITEMS, 0, 0, 0, 0]]
    assert "Traceback" not in run.stderr.decode() and "encoding" in run.stderr.decode()


@pytest.mark.slow
def test_accelerate_launch_shares_the_items(world: World) -> None:
    launch = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0"]
    launch += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    python, *script_and_options = world.command()
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    subprocess.run([python, *launch, *script_and_options], check=True, capture_output=True, env=environment)
    assert len(world.caches()) == 3 + VIDEO_ITEMS
    assert counts(world.run()) == [[0, 0, 3, 0, 0], [0, 0, VIDEO_ITEMS, 0, 0]]


@pytest.mark.slow
def test_killed_at_any_moment_it_goes_on_to_the_same_caches(world: World) -> None:
    for number in range(6):
        write_caption(write_image(world.images / f"more {number}.png", (60 + number, 70), (number * 30, 9, 99)))
    world.run()
    expected = {name: load_file(path) for name, path in world.caches().items()}
    shutil.rmtree(world.folder / "c1")
    shutil.rmtree(world.folder / "c2")

    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    moments = random.Random(4)
    for _ in range(20):
        target = len(world.caches()) + moments.randint(1, 3)
        process = subprocess.Popen(world.command(), env=environment, stdout=-3, stderr=-3)
        while process.poll() is None and len(world.caches()) < target:
            try:
                process.wait(moments.uniform(0.0005, 0.004))
            except subprocess.TimeoutExpired:
                continue
        process.kill()
        process.wait()
        if moments.random() < 0.2 and world.caches():
            random.Random(1).choice(list(world.caches().values())).unlink()
    assert counts(world.run())[1][2] > 0
    assert set(world.caches()) == set(expected)
    for name, path in world.caches().items():
        assert all(torch.equal(tensor, expected[name][key]) for key, tensor in load_file(path).items())
    assert not list(world.folder.glob("c*/*.partial"))


def fuzzed(data: bytes, seed: int) -> bytes:
    """Cut, emptied, or with random bytes somewhere."""
    chance = random.Random(seed)
    match chance.randrange(5):
        case 0:
            return data[: chance.randrange(len(data))]
        case 1:
            return b""
        case 2:
            return bytes(chance.randrange(256) for _ in range(chance.randrange(1, 400)))
        case _:
            mutated = bytearray(data)
            for _ in range(chance.choice((1, 8, 64))):
                mutated[chance.randrange(len(mutated))] = chance.randrange(256)
            return bytes(mutated)


def test_a_hundred_damaged_inputs_harm_nobody(world: World) -> None:
    samples = [world.images / "a.png", world.images / "b c.jpg", world.videos / "v.mp4", world.videos / "w.webm"]
    extensions = [".png", ".jpg", ".mp4", ".webm"]
    for number in range(100):
        data = fuzzed(samples[number % 4].read_bytes(), number)
        # Every tenth carries the extension of another format.
        extension = extensions[(number + (number % 10 == 0)) % 4]
        folder = world.videos if extension in (".mp4", ".webm") else world.images
        (folder / f"x{number}{extension}").write_bytes(data)
        write_caption(folder / f"x{number}{extension}")
    world.config.write_text(world.config.read_text().replace("[1, 5]", "[5]"))
    output = world.run()
    caches = world.caches()
    assert {"a_0100x0080_hv.safetensors", "v_00005-005_0064x0032_hv.safetensors"} < set(caches)
    for number in range(100):
        assert any(name.startswith(f"x{number}_") for name in caches) or re.search(rf"skipped: .*\bx{number}\.", output)
    assert counts(world.run())[0][:2] == [0, 0]


def test_three_hundred_cached_clips_are_left_alone(world: World, monkeypatch) -> None:
    for number in range(300):
        shutil.copy(world.videos / "w.webm", world.videos / f"copy{number:03d}.webm")
        write_caption(world.videos / f"copy{number:03d}.webm")
    world.config.write_text(world.config.read_text().replace("[1, 5]", "[1]").replace("chunk", "head"))
    latents = torch.zeros(1, 16, 1, 4, 4)
    posterior = SimpleNamespace(mean=latents, logvar=latents)
    monkeypatch.setattr("hunyuan_model.vae.AutoencoderKLCausal3D.encode", lambda vae, pixels: posterior)
    assert counts(world.run())[1][0] == 302
    monkeypatch.setattr("av.open", lambda *a, **k: pytest.fail("a video was opened"))
    assert counts(world.run())[1] == [0, 0, 302, 0, 0]


def test_the_manifest_is_plain_json(world: World) -> None:
    world.run()
    values = json.loads(Manifest(world.folder / "c2", "latents").path.read_text(encoding="utf-8"))
    assert values["sources"]["v"]["probe"]["frames"] == 14
