"""What hv_train_network.py does when something goes wrong: NaN in a cache, NaN in the weights, a failing preview."""

import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from hunyuan_model.checkpoints import load_dit
from tests.training_world import assert_same, log_of, train, write_world
from utils.errors import UserError
from utils.safetensors_utils import load_file, read_header


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return write_world(tmp_path_factory.mktemp("world"), items=4)


def damage(path, name, value=float("nan")):
    """Puts one bad value into a tensor of a safetensors file."""
    tensors, (_, metadata) = load_file(path), read_header(path)
    next(tensor for key, tensor in tensors.items() if key.startswith(name)).view(-1)[0] = value
    save_file(tensors, path, metadata)


@pytest.mark.parametrize(("pattern", "name"), [("item2_*_hv.safetensors", "latents"), ("item2_hv_te*", "llm_f")])
def test_nan_in_a_cache_ends_the_run_names_it_and_keeps_what_was_trained(tiny_models, tmp_path, capsys, pattern, name):
    world = write_world(tmp_path / "world", items=4)
    damage(next(world.cache.glob(pattern)), name)
    with pytest.raises(UserError, match=r"item2_.*holds values that are not finite; delete this cache"):
        train(world, tiny_models.dit, tmp_path / "out", "--max_train_epochs", 3)
    last = log_of(tmp_path / "out")[-1]["step"]
    assert load_file(tmp_path / "out" / f"lora-step{last:08d}.safetensors")
    assert f"step {last} is saved as lora-step{last:08d}; to continue:" in capsys.readouterr().err


def test_nan_in_the_weights_stops_within_five_steps(world, tiny_models, tmp_path, monkeypatch):
    def load_damaged(*arguments, **named):
        dit = load_dit(*arguments, **named)
        dit.final_layer.linear.weight.data[0, 0] = float("nan")
        return dit

    monkeypatch.setattr("hunyuan_model.checkpoints.load_dit", load_damaged)
    with pytest.raises(UserError, match=r"5 steps in a row were not finite \(--max_nonfinite_steps\).*item"):
        train(world, tiny_models.dit, tmp_path, "--max_train_steps", 50, "--save_every_n_epochs", 1)
    assert log_of(tmp_path)[-1]["step"] == 5
    written = list(tmp_path.glob("*.safetensors"))
    assert [path.name for path in written] == ["lora-000001.safetensors"]
    assert all(torch.isfinite(tensor).all() for tensor in load_file(written[0]).values())


def test_weights_that_became_infinite_are_not_written(world, tiny_models, tmp_path, monkeypatch):
    """An optimizer may overflow where the gradient is finite."""

    def overflow(self, closure=None):
        self.param_groups[0]["params"][0].data.fill_(float("inf"))

    for place in ("memory.training", "training.loop"):  # the trial steps would notice already
        monkeypatch.setattr(f"modules.{place}.try_optimizer", lambda *_: 0.0)
    monkeypatch.setattr(torch.optim.AdamW, "step", overflow)
    with pytest.raises(UserError, match="is not finite, so nothing was written"):
        train(world, tiny_models.dit, tmp_path, "--max_train_steps", 1)
    assert not list(tmp_path.glob("*.safetensors"))


def test_a_spike_is_logged_with_its_items(tiny_models, tmp_path):
    world = write_world(tmp_path / "world", items=4)
    damage(next(world.cache.glob("item1_*_hv.safetensors")), "latents", 999.0)
    train(world, tiny_models.dit, tmp_path / "out", "--max_train_epochs", 3, "--learning_rate", 1e-5)
    spikes = [line["spike"] for line in log_of(tmp_path / "out") if "spike" in line]
    assert spikes and all(spike[0].startswith("item1 ") for spike in spikes)


@pytest.fixture(scope="module")
def preview_words(tiny_models, tmp_path_factory):
    prompts = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    prompts.write_text("a ball --w 32 --h 32 --s 2\na cube --w 32 --h 32 --s 2 --f 5 --d 3\n", encoding="utf-8")
    return [
        "--sample_prompts", prompts, "--sample_every_n_steps", 2, "--sample_at_first", "--vae", tiny_models.vae,
        "--text_encoder1", tiny_models.text_encoder1, "--text_encoder2", tiny_models.text_encoder2,
    ]  # fmt: skip


def test_previews_do_not_change_the_training(world, tiny_models, tmp_path, monkeypatch, capsys, preview_words):
    dropout = ["--network_dropout", 0.2]
    without = train(world, tiny_models.dit, tmp_path / "without", *dropout)
    assert_same(train(world, tiny_models.dit, tmp_path / "with", *dropout, *preview_words), without)
    names = sorted(path.name for path in (tmp_path / "with" / "sample").iterdir())
    assert [(name[:15], name[-4:]) for name in names] == [
        (f"lora_{step:06d}_{index:02d}_", ending) for step in (0, 2, 4) for index, ending in enumerate((".png", ".mp4"))
    ]
    assert all(name.endswith("_3.mp4") for name in names if "_01_" in name)
    assert "preview 2:   0%" in capsys.readouterr().err

    def fails(*_: object, **__: object) -> None:
        torch.randn(1000)  # a preview may have drawn numbers before it failed
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("modules.training.previews.sample_latents", fails)
    assert_same(train(world, tiny_models.dit, tmp_path / "failing", *dropout, *preview_words), without)
    assert "preview 1 failed, training goes on: OutOfMemoryError: CUDA out of memory" in capsys.readouterr().err
    assert sum("preview_failed" in line for line in log_of(tmp_path / "failing")) == 6


def test_a_preview_whose_vae_overflows_float16_is_decoded_again_in_float32(
    world, tiny_models, tmp_path, capsys, preview_words
):
    vae = shutil.copytree(tiny_models.vae.parent, tmp_path / "vae") / tiny_models.vae.name
    state = torch.load(vae, weights_only=True)
    state["state_dict"]["decoder.conv_in.conv.weight"].mul_(1e5)
    torch.save(state, vae)
    words = [vae if word == tiny_models.vae else word for word in preview_words]
    train(world, tiny_models.dit, tmp_path / "out", "--max_train_steps", 2, *words, "--vae_dtype", "float16")
    pictures = list((tmp_path / "out" / "sample").glob("*.png"))
    assert pictures and all(np.asarray(Image.open(picture)).std() > 0 for picture in pictures)
    assert "the VAE made NaN; decoding again in float32" in capsys.readouterr().err
