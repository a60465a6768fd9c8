"""Manifests: which cache files are known to be intact, and damaged manifests."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from dataset.cache import write_latent_cache
from dataset.manifest import Manifest


def test_a_cache_file_is_read_again_only_after_a_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a"
    write_latent_cache(path, torch.ones(16, 2, 4, 4), (32, 32), 5, {})
    manifest = Manifest(tmp_path, "latents")
    assert manifest.is_intact(path)
    manifest.save()
    reloaded = Manifest.load(tmp_path, "latents")
    with monkeypatch.context() as patch:
        patch.setattr("dataset.manifest.load_file", lambda path: pytest.fail("read again"))
        assert reloaded.is_intact(path)
    latents = torch.zeros(16, 2, 4, 4)
    latents[3, 1, 1, 0] = float("inf")
    save_file({"latents_2x4x4_float32": latents}, path)
    assert not reloaded.is_intact(path)


def test_a_damaged_manifest_is_an_empty_one(tmp_path: Path) -> None:
    manifest = Manifest(tmp_path, "latents", {"a": {}}, {})
    manifest.save()
    assert Manifest.load(tmp_path, "latents").sources == {"a": {}}
    for text in ("", "{", "[]", '{"version": 1}', '{"version": 99, "sources": {}, "sound": {}}'):
        manifest.path.write_text(text)
        assert Manifest.load(tmp_path, "latents").sources == {}
