"""Cache files: exact layout, what counts as changed, damage, files of other tools."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from dataset.cache import (
    check_latents,
    check_text,
    latent_cache_path,
    orphans,
    read_latent_cache,
    read_text_cache,
    text_cache_path,
    write_latent_cache,
    write_text_cache,
)
from dataset.manifest import Manifest
from utils.errors import UserError

PROVENANCE = {"source": [10, 20], "bucket": [960, 544], "vae": "x"}
SHAPE = (7, 68, 120)


def write(path: Path, scale: float = 2.0, **changes) -> Path:
    latents = (scale * torch.randn(16, *SHAPE, generator=torch.Generator().manual_seed(0))).half()
    write_latent_cache(path, latents, (1920, 1080), 25, PROVENANCE | changes)
    return path


def write_like_musubi(path: Path, version: str, scale: float, architecture: str = "hunyuan_video") -> Path:
    metadata = {"architecture": architecture, "width": "1920", "height": "1080", "format_version": version}
    latents = (scale * torch.randn(16, *SHAPE)).half()
    save_file({"latents_7x68x120_float16": latents}, path, metadata | {"frame_count": "25"})
    return path


def test_names_are_those_of_the_reference_tool() -> None:
    directory = Path("c")
    assert latent_cache_path(directory, "cat", (100, 80)).name == "cat_0100x0080_hv.safetensors"
    assert latent_cache_path(directory, "cat_00013-025", (12345, 80)).name == "cat_00013-025_12345x0080_hv.safetensors"
    assert text_cache_path(directory, "cat").name == "cat_hv_te.safetensors"


def test_latent_cache_has_the_layout_of_format_1_0_1(tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors")
    with safe_open(path, "pt") as file:
        assert list(file.keys()) == ["latents_7x68x120_float16"]
        metadata = file.metadata()
    assert json.loads(metadata.pop("made_from")) == PROVENANCE | {"version": 1}
    assert metadata == {
        "architecture": "hunyuan_video",
        "width": "1920",
        "height": "1080",
        "format_version": "1.0.1",
        "frame_count": "25",
    }
    assert read_latent_cache(path).shape == (16, *SHAPE) and read_latent_cache(path).dtype == torch.float32


def test_images_have_no_frame_count_and_bfloat16_says_so(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    write_latent_cache(path, torch.zeros(16, 1, 8, 8, dtype=torch.bfloat16), (64, 64), None, {})
    with safe_open(path, "pt") as file:
        assert list(file.keys()) == ["latents_1x8x8_bfloat16"]
        assert "frame_count" not in file.metadata()


def test_text_cache_has_the_layout_of_format_1_0_1(tmp_path: Path) -> None:
    path = tmp_path / "a_hv_te.safetensors"
    states, mask, pooled = torch.randn(256, 8).half(), torch.arange(256) < 9, torch.randn(4).half()
    write_text_cache(path, states, mask, pooled, torch.ones(77), "a cat", {"text_encoder1": "y"})
    with safe_open(path, "pt") as file:
        assert sorted(file.keys()) == ["clipL_float16", "clipL_mask", "llm_float16", "llm_mask"]
        assert file.get_tensor("llm_mask").dtype == torch.int64
        assert file.metadata()["caption1"] == "a cat" and file.metadata()["format_version"] == "1.0.1"
    read = read_text_cache(path)
    for found, expected in zip(read, (states.float(), mask.long(), pooled.float()), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, ""),
        ({"source": [10, 21]}, "source"),
        ({"vae": "y"}, "vae"),
        ({"vae": "y", "source": [11, 20]}, "source, vae"),
    ],
)
def test_latents_are_kept_unless_what_made_them_changed(tmp_path: Path, changes: dict, reason: str) -> None:
    status = check_latents(write(tmp_path / "a"), SHAPE, PROVENANCE | changes)
    assert (status.state, status.reason) == ("changed" if reason else "kept", reason)
    assert check_latents(tmp_path / "a", SHAPE, PROVENANCE | changes, trust_name=True).kept


def test_keys_that_a_trainer_does_not_know_are_not_compared(tmp_path: Path) -> None:
    known = {key: value for key, value in PROVENANCE.items() if key != "vae"}
    assert check_latents(write(tmp_path / "a"), SHAPE, known).kept


def test_another_shape_is_never_kept(tmp_path: Path) -> None:
    for trust in (False, True):
        assert not check_latents(write(tmp_path / "a"), (7, 68, 112), PROVENANCE, trust).kept


def test_musubi_caches_are_kept_and_scaled_ones_are_not(tmp_path: Path) -> None:
    current = check_latents(write_like_musubi(tmp_path / "a", "1.0.1", 2.1), SHAPE, PROVENANCE)
    assert current.kept and current.by_musubi
    # Files of version 1.0.0 hold scaled or unscaled latents; their standard deviation tells which.
    assert check_latents(write_like_musubi(tmp_path / "b", "1.0.0", 2.1), SHAPE, PROVENANCE).kept
    scaled = check_latents(write_like_musubi(tmp_path / "c", "1.0.0", 2.1 * 0.476986), SHAPE, PROVENANCE)
    assert scaled.state == "changed" and "scaled" in scaled.reason
    other = check_latents(write_like_musubi(tmp_path / "d", "1.0.1", 2.1, "wan"), SHAPE, PROVENANCE)
    assert other.state == "changed" and "another program or for another model" in other.reason


def test_damaged_files_are_found(tmp_path: Path) -> None:
    whole = write(tmp_path / "a").read_bytes()
    for name, data in {"empty": b"", "cut": whole[:-5], "head": whole[:20], "text": b"x" * 100}.items():
        (tmp_path / name).write_bytes(data)
        assert check_latents(tmp_path / name, SHAPE, PROVENANCE).state == "changed"
    assert check_latents(tmp_path / "gone", SHAPE, PROVENANCE).state == "new"


def test_text_follows_caption_and_encoders(tmp_path: Path) -> None:
    path = tmp_path / "a"
    tensors = (torch.randn(256, 8), torch.ones(256), torch.randn(4), torch.ones(77))
    write_text_cache(path, *tensors, "a cat", {"text_encoder1": "y"})
    assert check_text(path, "a cat", {"text_encoder1": "y"}).kept
    assert check_text(path, None, {}).kept
    assert check_text(path, "a dog", {"text_encoder1": "y"}).reason == "caption"
    assert check_text(path, "a cat", {"text_encoder1": "z"}).reason == "text_encoder1"
    assert check_text(path, "a dog", {}, trust_name=True).kept


def test_writers_refuse_values_that_are_not_finite(tmp_path: Path) -> None:
    bad = torch.full((16, 1, 8, 8), float("nan"))
    with pytest.raises(ValueError, match="not finite"):
        write_latent_cache(tmp_path / "a", bad, (64, 64), None, {})
    with pytest.raises(ValueError, match="not finite"):
        write_text_cache(tmp_path / "a", bad[0, 0], torch.ones(8), torch.ones(4), torch.ones(77), "c", {})
    assert not (tmp_path / "a").exists()


def test_orphans_are_caches_of_no_item(tmp_path: Path) -> None:
    for name in (
        "a_0064x0064_hv.safetensors",
        "b_0064x0064_hv.safetensors",
        "a_hv_te.safetensors",
        "a_wan.safetensors",
    ):
        (tmp_path / name).touch()
    wanted = [tmp_path / "a_0064x0064_hv.safetensors"]
    assert orphans(tmp_path, "_hv.safetensors", wanted) == [tmp_path / "b_0064x0064_hv.safetensors"]


@pytest.mark.parametrize("dtype", [torch.int16, torch.int32, torch.int64, torch.uint8])
def test_latents_that_are_no_floats_are_made_again_and_never_read(tmp_path: Path, dtype: torch.dtype) -> None:
    path = write(tmp_path / "a.safetensors")
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    save_file({"latents_7x68x120_float16": (1e3 * torch.randn(16, *SHAPE)).to(dtype)}, path, metadata)
    for trust_name in (False, True):
        status = check_latents(path, SHAPE, PROVENANCE, trust_name)
        assert (status.state, status.reason) == ("changed", "the cache file holds no floating-point numbers")
    with pytest.raises(UserError, match="floating-point numbers are expected"):
        read_latent_cache(path)


def test_values_beyond_any_latents_are_no_latents(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"latents_7x68x120_float32": 1e5 * torch.randn(16, *SHAPE)}, path)
    with pytest.raises(UserError, match="beyond 1000"):
        read_latent_cache(path)
    assert not Manifest(tmp_path, "latents").is_intact(path)


def test_embeddings_of_another_type_or_shape_are_made_again_and_never_read(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    good = {"llm_float16": torch.ones(256, 8).half(), "llm_mask": torch.ones(256).long()}
    good |= {"clipL_float16": torch.ones(8).half(), "clipL_mask": torch.ones(77).long()}
    metadata = {
        "architecture": "hunyuan_video",
        "caption1": "a",
        "format_version": "1.0.1",
        "made_from": '{"version": 1}',
    }
    save_file(good, path, metadata)
    assert check_text(path, "a", {}).kept and read_text_cache(path)[0].shape == (256, 8)
    wrong = [
        {"llm_float16": torch.ones(256, 8).int()},
        {"llm_float16": torch.ones(256).half()},
        {"clipL_float16": torch.ones(1, 8).half()},
        {"clipL_float16": torch.ones(8).short()},
    ]
    for changed in wrong:
        save_file(good | changed, path, metadata)
        assert check_text(path, "a", {}).state == "changed"
        with pytest.raises(UserError, match=r"a\.safetensors"):
            read_text_cache(path)
    save_file(good | {"llm_mask": torch.full((256,), 3)}, path, metadata)
    with pytest.raises(UserError, match="other values than 0 and 1"):
        read_text_cache(path)
