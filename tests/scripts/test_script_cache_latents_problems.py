"""cache_latents.py on broken media and wrong options: what is reported, skipped or refused."""

import itertools
import os
import random
import re
import shutil
import subprocess
import sys

import pytest

from dataset.config_utils import load_dataset_config
from dataset.image_video_dataset import TrainingDataset
from hunyuan_model.vae import AutoencoderKLCausal3D
from tests.media_samples import write_caption, write_image, write_video
from tests.media_world import ROOT, VIDEO_ITEMS, MediaWorld, counts, write_text_caches
from tests.platforms import needs_posix
from utils.errors import UserError
from utils.video_io import decoded_frames


def test_a_full_disk_is_one_line_and_keeps_what_is_cached(media: MediaWorld, monkeypatch) -> None:
    from dataset import cache

    real, written = cache.save_file, []

    def save(tensors, path, metadata):
        if len(written) == 2:
            raise OSError(28, "No space left on device")
        written.append(path)
        real(tensors, path, metadata)

    monkeypatch.setattr(cache, "save_file", save)
    with pytest.raises(UserError, match=r"cannot be written: .*No space left.*caches written so far are kept"):
        media.run()
    monkeypatch.setattr(cache, "save_file", real)
    assert counts(media.run())[0] == [1, 0, 2, 0, 0]


def test_out_of_memory_is_one_line(media: MediaWorld, monkeypatch) -> None:

    def encode(*arguments):
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(AutoencoderKLCausal3D, "encode", encode)
    with pytest.raises(UserError, match=r"out of memory while encoding .*lower --batch_size.*so far are kept"):
        media.run()


def test_a_cache_directory_that_cannot_be_made_is_one_line(media: MediaWorld) -> None:
    (media.folder / "c1").write_text("a file")
    with pytest.raises(UserError, match="c1: the cache directory cannot be written"):
        media.run()


@pytest.mark.parametrize(("mode", "kept", "others"), [("chunk", 9 + 1, 9 + 1), ("uniform", 6 + 5, 6 + 5)])
def test_a_video_with_fewer_frames_than_its_packets_promise_is_planned_again(
    media: MediaWorld, monkeypatch, mode: str, kept: int, others: int
) -> None:
    config = media.config.read_text()
    media.config.write_text(config.replace("'chunk'", f"'{mode}'\nframe_sample = 6"))
    monkeypatch.setattr(
        "dataset.media.video.decoded_frames", lambda *stream: itertools.islice(decoded_frames(*stream), 9)
    )
    output = media.run()
    assert "planned again" in output and "v.mp4: 14 frames were counted, but 9 are decoded" in output
    assert counts(output)[1] == [kept + others, 0, 0, 0, 0]
    assert {name[1:11] for name in media.caches() if name[0] == "v"} == {
        name[1:11] for name in media.caches() if name[0] == "w"
    }, "both videos have nine frames now"
    write_text_caches(media)
    assert TrainingDataset(load_dataset_config(media.config), seed=0).num_items == 3 + kept + others

    monkeypatch.setattr("av.open", lambda *a, **k: pytest.fail("a video was opened"))
    assert counts(media.run())[1] == [0, 0, kept + others, 0, 0]


def test_a_video_is_planned_again_by_the_process_that_finds_it_out(media: MediaWorld, monkeypatch) -> None:
    monkeypatch.setattr(
        "dataset.media.video.decoded_frames", lambda *stream: itertools.islice(decoded_frames(*stream), 9)
    )
    media.run()
    alone = set(media.caches())
    shutil.rmtree(media.folder / "c2")
    for rank in "0120":
        monkeypatch.setenv("WORLD_SIZE", "3")
        monkeypatch.setenv("RANK", rank)
        media.run()
    assert set(media.caches()) == alone
    write_text_caches(media)
    assert TrainingDataset(load_dataset_config(media.config), seed=0).num_items == len(alone)
    monkeypatch.setattr("av.open", lambda *a, **k: pytest.fail("a video was opened"))
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert counts(media.run()) == [[0, 0, 3, 0, 0], [0, 0, len(alone) - 3, 0, 0]]


def test_damage_in_the_middle_costs_only_the_clips_that_show_it(media: MediaWorld) -> None:
    (media.videos / "v.mp4").unlink()
    path = write_video(media.videos / "v.mov", frames=12, size=(64, 32), codec="png", pix_fmt="rgb24")
    data = path.read_bytes().split(b"\x89PNG")  # data[0] stands before the first frame
    data[1 + 6] = bytes(len(data[1 + 6]))
    path.write_bytes(b"\x89PNG".join(data))
    (media.videos / "v.txt").write_text("a caption")
    output = media.run()
    assert re.search(r"skipped: .*v\.mov: frame 6 is damaged", output)
    assert counts(output)[1] == [11 + 1 + 10, 0, 0, 2, 0]


def test_values_that_are_not_finite_are_listed_and_never_written(media: MediaWorld, monkeypatch) -> None:

    real = AutoencoderKLCausal3D.encode

    def encode(self, pixels):
        posterior = real(self, pixels)
        posterior.mean[:, 0, 0, 0, 0] = float("nan") if pixels.shape[3] > pixels.shape[4] else 0.0
        return posterior

    monkeypatch.setattr(AutoencoderKLCausal3D, "encode", encode)
    output = media.run()
    assert counts(output)[0] == [2, 0, 0, 1, 0]
    assert "猫#[1]" in output and "try --vae_dtype float32" in output
    assert "猫#[1]_0050x0090_hv.safetensors" not in media.caches()


def test_broken_sources_are_listed_and_skipped_and_strict_stops(media: MediaWorld) -> None:
    (media.images / "broken.png").write_bytes(b"\x89PNG")
    write_caption(media.images / "broken.png")
    write_image(media.images / "no caption.png")
    write_caption(write_video(media.videos / "short.mp4", frames=3, size=(64, 32)))
    output = media.run()
    assert counts(output)[0] == [3, 0, 0, 2, 0]
    assert "skipped" in output and "broken.png" in output and "no caption.txt: caption not found" in output
    assert re.search(r"short\.mp4 +3 .* 5\n", output)
    write_text_caches(media)
    assert TrainingDataset(load_dataset_config(media.config), seed=0).num_items == 3 + VIDEO_ITEMS + 3
    before = media.stamps()
    with pytest.raises(UserError, match="--strict"):
        media.run("--strict")
    assert media.stamps() == before


@needs_posix
def test_a_name_that_is_not_utf8_is_listed_and_skipped(media: MediaWorld) -> None:
    path = media.images / os.fsdecode(b"caf\xe9.png")
    try:
        write_caption(write_image(path))
    except OSError:
        pytest.skip("this file system takes UTF-8 alone")
    assert "caf\\udce9.png: the name is not UTF-8" in media.run(
        "--debug_mode", "html", "--debug_output", media.folder / "page.html"
    )
    output = media.run()
    assert counts(output)[0] == [3, 0, 0, 1, 0] and "caf\\udce9.png: the name is not UTF-8; rename the file" in output
    write_text_caches(media)
    assert "rename the file" in TrainingDataset(load_dataset_config(media.config), seed=0).notes[0]


def test_no_usable_item_is_one_line(media: MediaWorld) -> None:
    text = media.config.read_text()
    media.config.write_text(text.replace("video_directory", "image_directory").split("target_frames")[0])
    with pytest.raises(UserError, match=r"2 videos.*write video_directory"):
        media.run()
    media.config.write_text(text.replace("[1, 5]", "[45]"))
    with pytest.raises(UserError, match=r"no usable item: .*v\.mp4: 14 frames, too short .* 45, and 1 more"):
        media.run()


def refused(*words: object) -> str:
    """The one line on stderr of a run that ends with exit code 2."""
    run = subprocess.run([sys.executable, str(ROOT / "cache_latents.py"), *map(str, words)], capture_output=True)
    error = run.stderr.decode()
    assert run.returncode == 2 and error.count("\n") == 1, error
    return error


def test_mistakes_are_one_line_and_exit_code_2(media: MediaWorld) -> None:
    assert "required and not given: --dataset_config" in refused()
    assert "no such file" in refused("--dataset_config", "gone.toml")
    assert "--vae" in refused("--dataset_config", media.config)
    assert "did you mean" in refused("--dataset_config", media.config, "--vae_tilling")
    dit = media.vae.parents[1] / "transformers" / "mp_rank_00_model_states.pt"
    assert "a VAE of HunyuanVideo is expected" in refused("--dataset_config", media.config, "--vae", dit)


def test_an_unknown_device_is_refused_before_anything_is_done(media: MediaWorld) -> None:
    with pytest.raises(UserError, match="--device abacus"):
        media.run("--device", "abacus")
    assert not (media.folder / "c1").exists()


def fuzzed(data: bytes, seed: int) -> bytes:
    """The data truncated, emptied, replaced or with some random bytes; `seed` decides."""
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


def test_a_hundred_damaged_inputs_harm_nobody(media: MediaWorld) -> None:
    samples = [media.images / "a.png", media.images / "b c.jpg", media.videos / "v.mp4", media.videos / "w.webm"]
    extensions = [".png", ".jpg", ".mp4", ".webm"]
    for number in range(100):
        data = fuzzed(samples[number % 4].read_bytes(), number)
        # Every tenth file has the extension of another format.
        extension = extensions[(number + (number % 10 == 0)) % 4]
        folder = media.videos if extension in (".mp4", ".webm") else media.images
        (folder / f"x{number}{extension}").write_bytes(data)
        write_caption(folder / f"x{number}{extension}")
    media.config.write_text(media.config.read_text().replace("[1, 5]", "[5]"))
    output = media.run()
    caches = media.caches()
    assert {"a_0100x0080_hv.safetensors", "v_00005-005_0064x0032_hv.safetensors"} < set(caches)
    for number in range(100):
        assert any(name.startswith(f"x{number}_") for name in caches) or re.search(rf"skipped: .*\bx{number}\.", output)
    assert counts(media.run())[0][:2] == [0, 0]
