"""What several tests of scripts use: generation on the small models, in this process, and what to train on."""

import gc
import sys
from pathlib import Path

import pytest
import torch

from tests.media_world import MediaWorld, write_media
from tests.training_world import World, write_small_dit, write_world

SMALL = ["--video_size", "32", "48", "--video_length", "5", "--infer_steps", "3", "--device", "cpu"]


@pytest.fixture
def generate(tiny_models, tmp_path, monkeypatch, capfd):
    """Runs the script's main in this process: options -> the folder that it wrote to."""
    import hv_generate_video

    models = [f"--{name}={path}" for name, path in vars(tiny_models).items()]

    def run(*words: object, folder: str = "out", size: list[str] = SMALL) -> Path:
        argv = ["hv_generate_video.py", *models, *size, f"--save_path={tmp_path / folder}", *map(str, words)]
        monkeypatch.setattr(sys, "argv", argv)
        gc.freeze()  # the script collects garbage after every model: without pytest's own objects that is quick
        hv_generate_video.main()
        return tmp_path / folder

    yield run
    gc.unfreeze()


@pytest.fixture(scope="session")
def loras(tiny_models, tmp_path_factory):
    """Two LoRAs with a visible effect."""
    from hunyuan_model.checkpoints import load_dit
    from networks.lora import create_arch_network

    model, paths = load_dit(tiny_models.dit, dtype=torch.float32), []
    for seed in (1, 2):
        network = create_arch_network(1.0, 4, 4.0, None, None, model)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
        paths.append(tmp_path_factory.mktemp("loras") / f"lora{seed}.safetensors")
        network.save_weights(paths[-1], torch.float32, {})
    return paths


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> World:
    """A dataset of five cached images."""
    return write_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def dit(tmp_path_factory) -> Path:
    return write_small_dit(tmp_path_factory.mktemp("dit"))


@pytest.fixture
def media(tmp_path, tiny_models, monkeypatch, capsys) -> MediaWorld:
    """Three images and two videos, and cache_latents.py: `run` calls its main in this process, returns its output."""
    import cache_latents

    config = write_media(tmp_path)

    def run(*more: object) -> str:
        monkeypatch.setattr(sys, "argv", world.command(*more)[1:])
        capsys.readouterr()
        cache_latents.main()
        return capsys.readouterr().out

    world = MediaWorld(tmp_path, config, tiny_models.vae, run)
    return world
