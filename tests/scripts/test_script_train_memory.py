"""hv_train_network.py: the memory plan, from the command line to the settings that are saved and used."""

from types import SimpleNamespace

import pytest
import torch

import modules.training.loop
from hunyuan_model import checkpoints
from hunyuan_model.block_swap import swapped_blocks
from hunyuan_model.checkpoints.stored_tensors import StoredTensors
from modules.memory.plan import MemoryPlan
from modules.training.network import load_model
from modules.training.options import LoraTrainerOptions
from tests.training_world import command, train, write_world
from utils.errors import UserError


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return write_world(tmp_path_factory.mktemp("world"), items=3)


def test_vram_gb_chooses_what_fits_and_saves_it(world, tiny_models, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("modules.memory.plan.DEVICE_OVERHEAD", 0)
    words = ["--max_train_steps", 1]
    train(world, tiny_models.dit, tmp_path / "all", *words, "--vram_gb", 10)
    assert "settings                               no option" in capsys.readouterr().out
    tight = 6.5 / 1024  # GiB: 6.8 MiB are the least in float32
    train(world, tiny_models.dit, tmp_path / "tight", *words, "--vram_gb", tight)
    saved = (tmp_path / "tight" / "lora.settings.toml").read_text(encoding="utf-8")
    assert "fp8_base = true" in saved
    assert "vram_gb =" not in saved


def test_what_does_not_fit_ends_before_the_model_is_loaded(world, tiny_models, tmp_path, monkeypatch):
    monkeypatch.setattr("hunyuan_model.checkpoints.load_dit", lambda *_, **__: pytest.fail("loaded"))
    with pytest.raises(UserError, match=r"nothing fits 102\.4 MiB of GPU memory: even with --fp8_base"):
        train(world, tiny_models.dit, tmp_path, "--vram_gb", 0.1)


def test_all_processes_choose_by_the_gpu_that_has_the_least_free(world, tiny_models, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("modules.memory.plan.DEVICE_OVERHEAD", 0)
    monkeypatch.setattr("modules.memory.plan.free_device_memory", lambda device: 10 << 30)
    monkeypatch.setattr("modules.training.distributed.gather_object", lambda numbers: [*numbers, int(6.5 * (1 << 20))])
    train(world, tiny_models.dit, tmp_path, "--vram_gb", 0, "--dry_run")
    assert "--fp8_base" in capsys.readouterr().out


def test_the_plan_counts_what_the_optimizer_keeps(world, tiny_models, tmp_path, monkeypatch):
    """Adam's moments were counted for every optimizer (T20). Weight and gradient are 8 bytes of each weight."""
    sizes, names = [], ("SGD", "AdamW", "Lion", "AdamW8bit", "Adafactor")
    monkeypatch.setattr(MemoryPlan, "print", lambda plan: sizes.append(plan.predicted(plan.settings).trained))
    for name in names:
        train(world, tiny_models.dit, tmp_path, "--dry_run", "--optimizer_type", name, "--lr_scheduler", "constant")
    each = [8 * size / sizes[0] for size in sizes]
    assert each == pytest.approx([8, 16, 12, 10, 8], abs=0.1)


def out_of_memory(*_, **__):
    raise torch.OutOfMemoryError("CUDA out of memory")


def test_running_out_while_the_models_are_loaded_says_what_to_try(world, tiny_models, tmp_path, monkeypatch):
    monkeypatch.setattr("hunyuan_model.checkpoints.load_dit", out_of_memory)
    with pytest.raises(UserError, match=r"out of GPU memory while the models are loaded: batch of 1.*; lower"):
        train(world, tiny_models.dit, tmp_path)


def test_running_out_on_the_largest_batch_says_what_to_try(world, tiny_models, tmp_path, monkeypatch):
    monkeypatch.setattr(modules.training.loop.Denoiser, "velocity", out_of_memory)
    with pytest.raises(UserError, match=r"out of GPU memory on the largest batch.*batch of 1, latents 1x6x8"):
        train(world, tiny_models.dit, tmp_path)
    assert not (tmp_path / "lora.safetensors").exists()


@pytest.mark.parametrize("words", [[], ["--fp8_base"]])
def test_only_swapped_blocks_pass_through_main_memory(world, tiny_models, tmp_path, monkeypatch, words):
    """The meta device takes the place of a GPU; nothing can be computed on it."""
    monkeypatch.setattr("hunyuan_model.attention.verify_attention", lambda *_: 0.0)
    monkeypatch.setattr(StoredTensors, "_require_finite", lambda self, name, tensor: tensor)
    monkeypatch.setattr(checkpoints, "load_dit", lambda *words, load=checkpoints.load_dit, **_: load(*words))
    argv = [str(word) for word in command(world, tiny_models.dit, tmp_path, "--blocks_to_swap", 2, *words)]
    accelerator = SimpleNamespace(device=torch.device("meta"), mixed_precision="no")
    dit = load_model(SimpleNamespace(options=LoraTrainerOptions.parse("", argv), accelerator=accelerator))
    swapped = swapped_blocks(2, len(dit.double_blocks), len(dit.single_blocks))
    on_host = {name for name, weight in dit.named_parameters() if weight.device.type == "cpu"}
    expected = {id(weight) for index in swapped for weight in dit.blocks[index].parameters()}
    assert on_host == {name for name, weight in dit.named_parameters() if id(weight) in expected}


@pytest.mark.parametrize(("precision", "dtype"), [("bf16", torch.bfloat16), ("no", torch.float32)])
def test_attention_is_tried_in_the_dtype_that_it_computes_in(
    world, tiny_models, tmp_path, monkeypatch, precision, dtype
):
    tried = []
    monkeypatch.setattr("hunyuan_model.attention.verify_attention", lambda *given: tried.append(given[2]))
    words = ["--dit_dtype", "float32", "--mixed_precision", precision, "--max_train_steps", 1]
    train(world, tiny_models.dit, tmp_path, *words)
    assert tried == [dtype]
