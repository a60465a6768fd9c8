"""cache_latents.py on real media: the caches it writes, its memory plan, and several processes."""

import os
import re
import subprocess
from collections.abc import Iterator

import pytest
import torch

from dataset.config_utils import load_dataset_config
from dataset.image_video_dataset import TrainingDataset
from dataset.latent_caching import LatentWriter, posterior_noise
from dataset.media import load_image, resize_to_bucket
from hunyuan_model.vae import AutoencoderKLCausal3D
from modules.memory.meter import MemoryMeter, nbytes
from tests.media_samples import write_caption, write_image
from tests.media_world import ROOT, VIDEO_ITEMS, MediaWorld, counts, write_text_caches
from utils.safetensors_utils import load_file, read_header
from utils.video_io import decoded_frames


def test_what_is_written_is_what_the_formats_say(media: MediaWorld) -> None:
    assert counts(media.run()) == [[3, 0, 0, 0, 0], [VIDEO_ITEMS, 0, 0, 0, 0]]
    names = set(media.caches())
    assert {"a_0100x0080_hv.safetensors", "b c_0064x0064_hv.safetensors", "猫#[1]_0050x0090_hv.safetensors"} < names
    assert {"v_00005-005_0064x0032_hv.safetensors", "v_00013-001_0064x0032_hv.safetensors"} < names

    infos, metadata = read_header(media.caches()["v_00005-005_0064x0032_hv.safetensors"])
    assert {name: info.shape for name, info in infos.items()} == {"latents_2x4x4_float16": (16, 2, 4, 4)}
    assert metadata["architecture"] == "hunyuan_video" and metadata["format_version"] == "1.0.1"
    assert (metadata["width"], metadata["height"], metadata["frame_count"]) == ("64", "32", "5")
    assert "frame_count" not in read_header(media.caches()["a_0100x0080_hv.safetensors"])[1]


def test_latents_are_unscaled_samples_of_the_posterior(media: MediaWorld) -> None:
    media.run()
    from hunyuan_model.checkpoints import load_vae

    pixels = torch.from_numpy(resize_to_bucket(load_image(media.images / "a.png"), (32, 32)).copy())
    posterior = load_vae(media.vae).encode(pixels.permute(2, 0, 1)[None, :, None] / 127.5 - 1)
    noise = posterior_noise("a", posterior.mean.shape[1:])
    expected = posterior.mean[0] + (0.5 * posterior.logvar[0]).exp() * noise
    (latents,) = load_file(media.caches()["a_0100x0080_hv.safetensors"]).values()
    assert torch.allclose(latents.float(), expected, atol=2e-3, rtol=2e-3)


def test_vae_dtype_decides_the_cache_dtype(media: MediaWorld) -> None:
    media.run("--vae_dtype", "bfloat16")
    infos, _ = read_header(media.caches()["a_0100x0080_hv.safetensors"])
    assert list(infos) == ["latents_1x4x4_bfloat16"]
    assert counts(media.run())[0] == [0, 3, 0, 0, 0]


def test_batches_give_what_single_items_give(media: MediaWorld) -> None:
    media.run()
    single = {name: load_file(path) for name, path in media.caches().items()}
    for path in media.caches().values():
        path.unlink()
    media.config.write_text(media.config.read_text().replace("enable", "batch_size = 4\nenable"))
    media.run()
    for name, path in media.caches().items():
        for key, tensor in load_file(path).items():
            assert torch.allclose(tensor.float(), single[name][key].float(), atol=4e-3), name


def test_files_with_the_same_stem_get_caches_of_their_own(media: MediaWorld) -> None:
    write_image(media.images / "a.jpg", (100, 80), (10, 200, 30))
    media.run()
    first, second = (media.caches()[f"a-{kind}_0100x0080_hv.safetensors"] for kind in ("png", "jpg"))
    (one,), (two,) = load_file(first).values(), load_file(second).values()
    assert not torch.equal(one, two)


def test_strange_and_long_names_work_from_media_to_batch(media: MediaWorld) -> None:
    for name in ("e" * 200, "猫の写真" * 19, "50% [x] #1 & 'y'", "with.dots.v2"):
        write_caption(write_image(media.images / f"{name}.png", (40, 40)), f"caption of {name}")
    assert counts(media.run())[0] == [7, 0, 0, 0, 0]
    assert f"{'e' * 200}_0040x0040_hv.safetensors" in media.caches()
    assert counts(media.run())[0] == [0, 0, 7, 0, 0]
    write_text_caches(media)
    assert TrainingDataset(load_dataset_config(media.config), seed=0).num_items == 7 + VIDEO_ITEMS


def test_a_dry_run_predicts_what_encoding_really_needs(media: MediaWorld, monkeypatch) -> None:
    used, encode = [], AutoencoderKLCausal3D.encode

    def measured(vae: AutoencoderKLCausal3D, pixels: torch.Tensor) -> object:
        with MemoryMeter() as meter:
            posterior = encode(vae, pixels)
        used.append(meter.peak + nbytes(pixels) + sum(map(nbytes, vae.parameters())))
        return posterior

    monkeypatch.setattr("modules.memory.plan.DEVICE_OVERHEAD", 0)
    monkeypatch.setattr("modules.memory.plan.FRAGMENTATION", 1)
    printed = media.run("--dry_run")
    assert "memory plan, batch of 1, 32x32x5" in printed
    assert not media.caches()
    planned = float(re.search(r"GPU memory of encoding +([\d.]+) MiB", printed)[1])
    monkeypatch.setattr(AutoencoderKLCausal3D, "encode", measured)
    media.run()
    assert planned == pytest.approx(max(used) / 2**20, rel=0.1)


def test_vram_gb_chooses_the_tiles_unless_the_user_has(media: MediaWorld, monkeypatch) -> None:
    def estimate(config: object, shape: tuple, dtype: torch.dtype, chunk: int | None, tile: int | None) -> int:
        return {None: 20, 256: 10, 128: 5, 64: 2}[tile] << 30

    chosen, configure = [], AutoencoderKLCausal3D.configure_memory
    monkeypatch.setattr("modules.memory.vae_encoding.estimate_vae", estimate)
    monkeypatch.setattr(
        AutoencoderKLCausal3D, "configure_memory", lambda vae, *sizes: chosen.append(sizes) or configure(vae, *sizes)
    )
    media.run("--vram_gb", 8, "--vae_chunk_size", 4)
    assert chosen == [(4, 128)]
    assert re.search(r"VAE tiles +256", media.run("--dry_run", "--vram_gb", 8, "--vae_tiling"))


def test_processes_share_the_items(media: MediaWorld, monkeypatch) -> None:
    media.run()
    alone = {name: load_file(path) for name, path in media.caches().items()}
    for path in media.caches().values():
        path.unlink()
    monkeypatch.setenv("WORLD_SIZE", "2")
    written = []
    for rank in ("1", "0"):
        monkeypatch.setenv("RANK", rank)
        before = set(media.caches())
        output = media.run()
        assert ("latent caches" in output) == (rank == "0")
        written.append(set(media.caches()) - before)
    assert not written[0] & written[1] and written[0] | written[1] == set(alone)
    assert abs(len(written[0]) - len(written[1])) <= 2
    for name, path in media.caches().items():
        assert all(torch.equal(tensor, alone[name][key]) for key, tensor in load_file(path).items())


def test_each_video_is_decoded_once_for_all_datasets(media: MediaWorld, monkeypatch) -> None:
    text = media.config.read_text()
    second = text[text.rindex("[[datasets]]") :].replace("/c2", "/c3").replace("chunk", "uniform")
    media.config.write_text(f"{text}{second}resolution = [48, 48]\nframe_sample = 3\n")
    decoded = []

    def counted(*stream: object) -> Iterator[object]:
        for frame in decoded_frames(*stream):
            decoded.append(frame)
            yield frame

    monkeypatch.setattr("dataset.media.video.decoded_frames", counted)
    assert counts(media.run()) == [[3, 0, 0, 0, 0], [VIDEO_ITEMS, 0, 0, 0, 0], [12, 0, 0, 0, 0]]
    assert len(decoded) == 14 + 9


def test_clips_of_many_lengths_wait_in_bounded_memory_for_their_batches(media: MediaWorld, monkeypatch) -> None:
    """Batches stay incomplete where full ones would need more memory; all clips are encoded all the same."""
    media.config.write_text(media.config.read_text().replace("enable", "batch_size = 100\nenable"))
    held, encode = [], LatentWriter.encode_batch

    def watched(writer: LatentWriter, batch: list, pixels: list) -> Iterator[object]:
        held.append(sum(clip.nbytes for clip in pixels))
        yield from encode(writer, batch, pixels)

    monkeypatch.setattr("dataset.latent_caching.MAX_UNBATCHED_BYTES", 40_000)
    monkeypatch.setattr(LatentWriter, "encode_batch", watched)
    assert counts(media.run())[1] == [VIDEO_ITEMS, 0, 0, 0, 0]
    assert max(held) <= 40_000 + 5 * 32 * 64 * 3 and len(held) > 4


def test_the_trainer_reads_what_was_cached(media: MediaWorld) -> None:
    media.run()
    write_text_caches(media)
    dataset = TrainingDataset(load_dataset_config(media.config), seed=0)
    assert dataset.num_items == 3 + VIDEO_ITEMS
    batch = dataset[0]
    (latents,) = load_file(next(p for n, p in media.caches().items() if n.startswith(f"{batch.names[0]}_"))).values()
    assert torch.equal(batch.latents[0], latents.float())


def test_as_a_program(media: MediaWorld) -> None:
    run = subprocess.run(
        media.command("--vae_chunk_size", 4, "--vae_tiling"), capture_output=True, check=True, cwd=ROOT
    )
    output = run.stdout.decode()
    assert counts(output) == [[3, 0, 0, 0, 0], [VIDEO_ITEMS, 0, 0, 0, 0]]
    assert "Traceback" not in run.stderr.decode() and "encoding" in run.stderr.decode()


@pytest.mark.slow
def test_accelerate_launch_shares_the_items(media: MediaWorld) -> None:
    launch = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0"]
    launch += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    python, *script_and_options = media.command()
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    subprocess.run([python, *launch, *script_and_options], check=True, capture_output=True, env=environment)
    assert len(media.caches()) == 3 + VIDEO_ITEMS
    assert counts(media.run()) == [[0, 0, 3, 0, 0], [0, 0, VIDEO_ITEMS, 0, 0]]
