"""hv_generate_video.py: the memory plan, and the video that the settings it chose make."""

import re

import pytest
import torch

from utils.errors import UserError
from utils.safetensors_utils import load_file


def latents_of(folder) -> torch.Tensor:
    (path,) = folder.glob("*_latent.safetensors")
    return load_file(path)["latent"]


def test_dry_run_prints_what_is_needed_and_loads_nothing(generate, capfd, monkeypatch):
    monkeypatch.setattr("hunyuan_model.checkpoints.load_dit", lambda *_: pytest.fail("loaded"))
    folder = generate("--prompt", "a cat", "--dry_run")
    printed = capfd.readouterr().out
    assert "memory plan, latents 2x4x6" in printed
    assert "GPU memory of decoding" in printed
    assert not folder.exists()


def test_vram_gb_swaps_blocks_and_the_video_stays_the_same(generate, capfd, monkeypatch):
    monkeypatch.setattr("modules.memory_plan.DEVICE_OVERHEAD", 0)
    words = ["--prompt", "a cat", "--seed", 3, "--output_type", "latent", "--fp8"]
    plain = latents_of(generate(*words, folder="plain"))
    capfd.readouterr()
    generate(*words, "--dry_run")
    needed = float(re.search(r"needed in all +([\d.]+) MiB", capfd.readouterr().out)[1])
    planned = latents_of(generate(*words, "--vram_gb", (needed - 0.2) / 1024, folder="planned"))
    assert "--fp8 --blocks_to_swap" in capfd.readouterr().out
    assert torch.equal(planned, plain)


def test_what_does_not_fit_ends_before_a_model_is_loaded(generate):
    with pytest.raises(UserError, match=r"nothing fits 102\.4 MiB of GPU memory: even with --fp8 --blocks_to_swap 4"):
        generate("--prompt", "a cat", "--vram_gb", 0.1)
