"""hv_train_network.py: the memory plan, from the command line to the settings that are saved and used."""

import pytest
import torch

import modules.trainer
from tests.training_world import train, write_world
from utils.errors import UserError


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return write_world(tmp_path_factory.mktemp("world"), items=3)


def test_vram_gb_chooses_what_fits_and_saves_it(world, tiny_models, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("modules.memory_plan.DEVICE_OVERHEAD", 0)
    words = ["--max_train_steps", 1]
    train(world, tiny_models.dit, tmp_path / "all", *words, "--vram_gb", 10)
    assert "settings                               no option" in capsys.readouterr().out
    tight = 4.2 / 1024  # GiB: the weights alone are 4.2 MB in float32
    train(world, tiny_models.dit, tmp_path / "tight", *words, "--vram_gb", tight)
    saved = (tmp_path / "tight" / "lora.settings.toml").read_text(encoding="utf-8")
    assert "fp8_base = true" in saved
    assert "vram_gb =" not in saved


def test_what_does_not_fit_ends_before_the_model_is_loaded(world, tiny_models, tmp_path, monkeypatch):
    monkeypatch.setattr("hunyuan_model.checkpoints.load_dit", lambda *_: pytest.fail("loaded"))
    with pytest.raises(UserError, match=r"nothing fits 102\.4 MiB of GPU memory: even with --fp8_base"):
        train(world, tiny_models.dit, tmp_path, "--vram_gb", 0.1)


def test_all_processes_choose_by_the_gpu_that_has_the_least_free(world, tiny_models, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("modules.memory_plan.DEVICE_OVERHEAD", 0)
    monkeypatch.setattr("modules.memory_plan.free_memory", lambda device: 10 << 30)
    monkeypatch.setattr("modules.distributed.gather_object", lambda numbers: [*numbers, int(4.2 * (1 << 20))])
    train(world, tiny_models.dit, tmp_path, "--vram_gb", 0, "--dry_run")
    assert "--fp8_base" in capsys.readouterr().out


def out_of_memory(*_):
    raise torch.OutOfMemoryError("CUDA out of memory")


def test_running_out_while_the_models_are_loaded_says_what_to_try(world, tiny_models, tmp_path, monkeypatch):
    monkeypatch.setattr("hunyuan_model.checkpoints.load_dit", out_of_memory)
    with pytest.raises(UserError, match=r"out of GPU memory while the models are loaded: batch of 1.*; lower"):
        train(world, tiny_models.dit, tmp_path)


def test_running_out_on_the_largest_batch_says_what_to_try(world, tiny_models, tmp_path, monkeypatch):
    monkeypatch.setattr(modules.trainer.TrainingModel, "velocity", out_of_memory)
    with pytest.raises(UserError, match=r"out of GPU memory on the largest batch.*batch of 1, latents 1x6x8"):
        train(world, tiny_models.dit, tmp_path)
    assert not (tmp_path / "lora.safetensors").exists()
