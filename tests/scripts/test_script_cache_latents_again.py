"""cache_latents.py run again: what it keeps, what it encodes again, and how it continues a run that was killed."""

import json
import os
import random
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from dataset.config_utils import load_dataset_config
from dataset.image_video_dataset import TrainingDataset
from dataset.manifest import Manifest
from modules.caching.latents import LatentCaching
from tests.media_samples import write_caption, write_image, write_video
from tests.media_world import VIDEO_ITEMS, MediaWorld, counts, write_text_caches
from utils.errors import UserError
from utils.safetensors_utils import load_file, read_header


def test_a_second_run_opens_no_media_and_loads_no_model(media: MediaWorld, monkeypatch) -> None:
    media.run()
    before = media.stamps()
    with monkeypatch.context() as patch:
        for name in ("av.open", "PIL.Image.open", "modules.caching.latents.load_vae"):
            patch.setattr(name, lambda *a, **k: pytest.fail("opened"))
        assert counts(media.run()) == [[0, 0, 3, 0, 0], [0, 0, VIDEO_ITEMS, 0, 0]]
    assert media.stamps() == before


def changed_files(media: MediaWorld, before: dict[str, int]) -> set[str]:
    after = media.stamps()
    return {name for name in after if before.get(name) != after[name]}


def test_only_what_changed_is_encoded_again(media: MediaWorld) -> None:
    media.run()
    before = media.stamps()
    write_video(media.videos / "w.webm", frames=9, fps=25, size=(64, 32), codec="libvpx")
    assert counts(media.run()) == [[0, 0, 3, 0, 0], [0, 10, 16, 0, 0]]
    assert changed_files(media, before) == {name for name in before if name.startswith("w_")}

    before = media.stamps()
    write_caption(media.images / "a.png", "another caption")
    media.run()
    assert changed_files(media, before) == set()

    media.config.write_text(media.config.read_text().replace("[32, 32]", "[48, 48]"))
    assert counts(media.run()) == [[0, 3, 0, 0, 0], [0, VIDEO_ITEMS, 0, 0, 0]]


def test_a_copy_of_the_dataset_is_not_encoded_again(media: MediaWorld, monkeypatch) -> None:
    media.run()
    write_text_caches(media)
    for path in (*media.images.iterdir(), *media.videos.iterdir()):
        os.utime(path, ns=(1, 1))
    assert counts(media.run()) == [[0, 0, 3, 0, 0], [0, 0, VIDEO_ITEMS, 0, 0]]
    monkeypatch.setattr("dataset.sources.file_identity", lambda *a, **k: pytest.fail("read again"))
    assert TrainingDataset(load_dataset_config(media.config), seed=0).num_items == 3 + VIDEO_ITEMS
    assert counts(media.run()) == [[0, 0, 3, 0, 0], [0, 0, VIDEO_ITEMS, 0, 0]]


def test_an_image_that_was_changed_in_its_middle_alone_is_encoded_again(media: MediaWorld) -> None:
    path = media.images / "large.bmp"
    write_caption(write_image(path, (1200, 900)))
    media.run()
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 255
    path.write_bytes(data)
    os.utime(path, ns=(1, 1))
    assert counts(media.run())[0] == [0, 1, 3, 0, 0]


def test_the_trainer_takes_what_was_kept_by_its_name(media: MediaWorld) -> None:
    media.run()
    write_text_caches(media)
    path = media.images / "a.png"
    write_image(path, (100, 80), (9, 9, 200))
    media.config.write_text(media.config.read_text() + "source_fps = 24\n")
    assert counts(media.run("--skip_existing")) == [[0, 0, 3, 0, 0], [0, 0, VIDEO_ITEMS, 0, 0]]
    assert TrainingDataset(load_dataset_config(media.config), seed=0).num_items == 3 + VIDEO_ITEMS
    write_image(path, (100, 80), (9, 200, 9))
    with pytest.raises(UserError, match=r"the media file changed: a\)"):
        TrainingDataset(load_dataset_config(media.config), seed=0)
    assert counts(media.run()) == [[0, 1, 2, 0, 0], [0, VIDEO_ITEMS, 0, 0, 0]]


def test_another_vae_encodes_everything_again_and_a_copy_of_it_nothing(media: MediaWorld, tmp_path: Path) -> None:
    media.run()
    folder = tmp_path / "vae"
    shutil.copytree(media.vae.parent, folder)
    copy = folder / media.vae.name
    assert counts(media.run("--vae", copy))[0] == [0, 0, 3, 0, 0]
    state = torch.load(copy, weights_only=True)
    state["state_dict"]["encoder.conv_in.conv.weight"] += 1
    torch.save(state, copy)
    output = media.run("--vae", copy)
    assert counts(output)[0] == [0, 3, 0, 0, 0] and "3 made again: vae" in output
    assert counts(media.run("--skip_existing"))[0] == [0, 0, 3, 0, 0]


def test_only_caches_that_an_older_decoder_read_wrongly_are_made_again(media: MediaWorld) -> None:
    """AVI files with B-frames; the caches and the manifest are changed to what the first version wrote."""
    options = {"x264-params": "b-adapt=0:bframes=3"}
    write_caption(write_video(media.videos / "x.avi", frames=10, size=(64, 32), options=options))
    media.run()
    for name, path in media.caches().items():
        if name.startswith("x_"):
            (tensors, (_, metadata)) = load_file(path), read_header(path)
            made_from = json.loads(metadata["made_from"])
            assert made_from.pop("decoder") == 2
            save_file(tensors, path, metadata | {"made_from": json.dumps(made_from)})
    for manifest in media.folder.glob("c*/hv_latents.manifest.json"):
        values = json.loads(manifest.read_text())
        for entry in values["sources"].values():
            del entry["probe"]["decoder"], entry["probe"]["probe_version"]
        manifest.write_text(json.dumps(values))
    write_text_caches(media)
    assert TrainingDataset(load_dataset_config(media.config), seed=0).num_items == 3 + VIDEO_ITEMS + 12
    output = media.run()
    assert counts(output) == [[0, 0, 3, 0, 0], [0, 12, VIDEO_ITEMS, 0, 0]] and "12 made again: decoder" in output
    assert counts(media.run())[1] == [0, 0, VIDEO_ITEMS + 12, 0, 0]


def test_a_folder_whose_frames_were_exchanged_is_encoded_again(media: MediaWorld) -> None:
    folder = media.videos / "scene"
    folder.mkdir()
    (media.videos / "scene.txt").write_text("a caption")
    for number in range(5):
        write_image(folder / f"{number}.bmp", (32, 32), (50 * number, 0, 0))
    media.run()
    before = media.stamps()
    (folder / "1.bmp").rename(folder / "x")
    (folder / "2.bmp").rename(folder / "1.bmp")
    (folder / "x").rename(folder / "2.bmp")
    assert counts(media.run())[1] == [0, 6, VIDEO_ITEMS, 0, 0]
    assert changed_files(media, before) == {name for name in before if name.startswith("scene_")}


def test_damaged_caches_are_made_again_and_others_stay(media: MediaWorld) -> None:
    media.run()
    whole = {name: load_file(path) for name, path in media.caches().items()}
    before = media.stamps()
    names = sorted(name for name in whole if name.startswith("v_"))[:5]
    paths = [media.caches()[name] for name in names]
    paths[0].write_bytes(paths[0].read_bytes()[:-7])
    paths[1].write_bytes(b"")
    save_file({"weights": torch.zeros(3)}, paths[2])
    metadata = read_header(paths[3])[1]
    save_file({key: torch.full_like(value, float("nan")) for key, value in whole[names[3]].items()}, paths[3], metadata)
    paths[4].unlink()
    assert counts(media.run()) == [[0, 0, 3, 0, 0], [1, 4, VIDEO_ITEMS - 5, 0, 0]]
    assert changed_files(media, before) == set(names)
    for name, path in media.caches().items():
        assert all(torch.equal(tensor, whole[name][key]) for key, tensor in load_file(path).items())


def test_caches_of_musubi_tuner_are_used_and_its_scaled_ones_made_again(media: MediaWorld) -> None:
    media.run()
    for name, version, scale in (("a_0100x0080", "1.0.1", 2.0), ("b c_0064x0064", "1.0.0", 1.0)):
        path = media.caches()[f"{name}_hv.safetensors"]
        metadata = {"architecture": "hunyuan_video", "width": "1", "height": "1", "format_version": version}
        save_file({"latents_1x4x4_float16": (scale * torch.randn(16, 1, 4, 4)).half()}, path, metadata)
    output = media.run()
    assert counts(output)[0] == [0, 1, 2, 0, 0]
    assert "1 caches were made by musubi-tuner" in output and "1 made again: scaled latents" in output


def test_orphans_are_reported_and_deleted_only_with_prune(media: MediaWorld) -> None:
    media.run()
    (media.images / "a.png").unlink()
    output = media.run()
    assert counts(output)[0] == [0, 0, 2, 0, 1] and "--prune deletes them" in output
    assert "a_0100x0080_hv.safetensors" in media.caches()
    media.run("--prune")
    assert "a_0100x0080_hv.safetensors" not in media.caches() and len(media.caches()) == 2 + VIDEO_ITEMS


@pytest.mark.parametrize("ending", [KeyboardInterrupt(), UserError("out of memory")], ids=repr)
def test_intact_caches_are_not_read_again_however_the_last_run_ended(
    media: MediaWorld, monkeypatch, ending: BaseException
) -> None:
    """Also where the last run had fewer processes, none of which rewrites the list of the second process."""
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
                media.run()
            monkeypatch.setattr("dataset.manifest.load_file", lambda path: pytest.fail(f"{path.name} was read whole"))
        else:
            media.run()
    assert list(media.folder.glob("c*/*-sound-*")) == []


@pytest.mark.slow
def test_killed_at_any_moment_it_goes_on_to_the_same_caches(media: MediaWorld) -> None:
    for number in range(6):
        write_caption(write_image(media.images / f"more {number}.png", (60 + number, 70), (number * 30, 9, 99)))
    media.run()
    expected = {name: load_file(path) for name, path in media.caches().items()}
    shutil.rmtree(media.folder / "c1")
    shutil.rmtree(media.folder / "c2")

    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    moments = random.Random(4)
    for _ in range(20):
        target = len(media.caches()) + moments.randint(1, 3)
        process = subprocess.Popen(media.command(), env=environment, stdout=-3, stderr=-3)
        while process.poll() is None and len(media.caches()) < target:
            try:
                process.wait(moments.uniform(0.0005, 0.004))
            except subprocess.TimeoutExpired:
                continue
        process.kill()
        process.wait()
        if moments.random() < 0.2 and media.caches():
            random.Random(1).choice(list(media.caches().values())).unlink()
    last = subprocess.run(media.command(), env=environment, capture_output=True, check=True)
    assert counts(last.stdout.decode())[1][2] > 0
    assert set(media.caches()) == set(expected)
    for name, path in media.caches().items():
        assert all(torch.equal(tensor, expected[name][key]) for key, tensor in load_file(path).items())
    assert not list(media.folder.glob("c*/*.partial"))


def test_a_second_run_leaves_what_the_first_one_is_writing(media: MediaWorld) -> None:
    media.run()
    busy = media.folder / "c1" / f"a_0100x0080_hv.safetensors.{os.getppid()}.partial"
    busy.write_bytes(b"half of a file that another process is writing")
    media.run("--skip_existing")
    media.config.write_text(media.config.read_text().replace("[32, 32]", "[48, 48]"))
    media.run()
    assert busy.exists()


def test_three_hundred_cached_clips_are_left_alone(media: MediaWorld, monkeypatch) -> None:
    for number in range(300):
        shutil.copy(media.videos / "w.webm", media.videos / f"copy{number:03d}.webm")
        write_caption(media.videos / f"copy{number:03d}.webm")
    media.config.write_text(media.config.read_text().replace("[1, 5]", "[1]").replace("chunk", "head"))
    latents = torch.zeros(1, 16, 1, 4, 4)
    posterior = SimpleNamespace(mean=latents, logvar=latents)
    monkeypatch.setattr("hunyuan_model.vae.AutoencoderKLCausal3D.encode", lambda vae, pixels: posterior)
    assert counts(media.run())[1][0] == 302
    monkeypatch.setattr("av.open", lambda *a, **k: pytest.fail("a video was opened"))
    assert counts(media.run())[1] == [0, 0, 302, 0, 0]


def test_the_manifest_is_plain_json(media: MediaWorld) -> None:
    media.run()
    values = json.loads(Manifest(media.folder / "c2", "latents").path.read_text(encoding="utf-8"))
    assert values["sources"]["v"]["probe"]["frames"] == 14
