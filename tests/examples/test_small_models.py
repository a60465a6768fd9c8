"""The recipe of the small models: what trains them is what the toolkit runs."""

import random
import shlex
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer

from examples.shapes import recipe, vae_training
from examples.shapes.scripts import TWO_PROCESSES
from examples.shapes.untrained import write_new_dit, write_text_encoders
from examples.shapes.vae_training import (
    STAGES,
    TOTAL_STEPS,
    Stage,
    decode,
    encode,
    learning_rate_at,
    new_vae,
    normalized,
    stage_of,
    training_batch,
)
from examples.shapes.world import BACKGROUNDS, COLOURS, CONCEPT, MOTIONS, SHAPES, Scene
from hunyuan_model.checkpoints import load_dit, load_text_encoder_1, load_text_encoder_2
from hunyuan_model.vae import SCALING_FACTOR
from tests.conftest import ROOT
from tests.test_readme import parse
from utils.errors import UserError
from utils.safetensors_utils import load_file


def test_hv_train_takes_the_words_of_the_recipe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(recipe, "run", lambda *words: parse(shlex.join(map(str, words[len(TWO_PROCESSES) :]))))
    recipe.train_dit(Path("out"), Path("dit.safetensors"), Path("dataset.toml"), seed=0)


@pytest.fixture(scope="module")
def text_encoders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("encoders")
    write_text_encoders(folder, seed=0)
    return (
        load_text_encoder_1(folder / "text_encoder", dtype=torch.float32),
        load_text_encoder_2(folder / "text_encoder_2", dtype=torch.float32),
    )


@pytest.mark.parametrize("encoder", ["text_encoder", "text_encoder_2"])
def test_the_recipe_makes_the_published_text_encoders_again(encoder, tmp_path):
    write_text_encoders(tmp_path, seed=0)
    made, published = (
        load_file(folder / encoder / "model.safetensors")
        for folder in (tmp_path, ROOT / "examples" / "shapes" / "models")
    )
    assert made.keys() == published.keys()
    for name, tensor in made.items():  # CPUs of other makers may round the last bit differently
        torch.testing.assert_close(tensor, published[name], rtol=2e-3, atol=1e-3)


def scrambled_vae():
    """A VAE whose every parameter matters."""
    torch.manual_seed(0)
    vae = new_vae()
    with torch.no_grad():
        for parameter in vae.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    return vae


@pytest.mark.parametrize("frames", [1, 5, 9])
def test_the_twin_with_a_backward_pass_is_the_vae(frames):
    vae = scrambled_vae()
    pixels = training_batch(random.Random(0), Stage(1, 2, frames, 32))
    with torch.no_grad():
        twin = encode(vae, pixels)
        twin_pixels = decode(vae, twin.mean)
    posterior = vae.encode(pixels.clone())
    torch.testing.assert_close(twin.mean, posterior.mean, rtol=0, atol=5e-4)
    torch.testing.assert_close(twin.logvar, posterior.logvar, rtol=0, atol=5e-4)
    torch.testing.assert_close(twin_pixels, vae.decode(posterior.mean.clone()), rtol=0, atol=5e-4)


def test_every_parameter_of_the_vae_learns():
    vae = scrambled_vae()
    pixels = training_batch(random.Random(0), Stage(1, 2, 5, 32))
    posterior = encode(vae, pixels)
    (decode(vae, posterior.mean).sum() + posterior.logvar.sum()).backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in vae.parameters())


def test_normalized_latents_have_unit_variance_and_the_same_pixels():
    vae = scrambled_vae()
    pixels = training_batch(random.Random("0/statistics"), Stage(1, 64, 9, 64))  # those that `normalized` looks at
    before = vae.decode(vae.encode(pixels.clone()).mean)
    posterior = vae.encode(pixels.clone())
    noise_before = (0.5 * posterior.logvar).exp() / posterior.mean.std((0, 2, 3, 4), keepdim=True)
    normalized(vae, seed=0)
    posterior = vae.encode(pixels.clone())
    torch.testing.assert_close(vae.decode(posterior.mean), before, rtol=0, atol=1e-3)
    assert ((posterior.mean * SCALING_FACTOR).std((0, 2, 3, 4)) - 1).abs().max() < 1e-2
    noise_after = (0.5 * posterior.logvar).exp() / posterior.mean.std((0, 2, 3, 4), keepdim=True)
    torch.testing.assert_close(noise_after, noise_before, rtol=1e-3, atol=0)


def stopped_at(last_step, train_step):
    """`train_step`, interrupted by the user at that step."""

    def step_or_stop(run, step):
        if step == last_step:
            raise KeyboardInterrupt
        return train_step(run, step)

    return step_or_stop


def test_a_run_continues_where_it_was_stopped_but_only_with_the_same_plan(tmp_path, monkeypatch):
    monkeypatch.setattr(vae_training, "STAGES", (Stage(2, 2, 1, 32), Stage(2, 1, 5, 32)))
    monkeypatch.setattr(vae_training, "TOTAL_STEPS", 4)
    monkeypatch.setattr(vae_training, "SAVE_EVERY", 1)
    whole = vae_training.train(tmp_path / "whole", seed=0).vae.state_dict()
    real_step = vae_training.train_step
    monkeypatch.setattr(vae_training, "train_step", stopped_at(3, real_step))
    with pytest.raises(KeyboardInterrupt):
        vae_training.train(tmp_path / "stopped", seed=0)
    monkeypatch.setattr(vae_training, "train_step", real_step)
    stopped = vae_training.train(tmp_path / "stopped", seed=0).vae.state_dict()
    assert all(torch.equal(whole[name], stopped[name]) for name in whole)
    with pytest.raises(UserError, match="another seed or other stages"):
        vae_training.train(tmp_path / "stopped", seed=1)


def test_stages_follow_each_other_and_the_rate_falls():
    assert (
        stage_of(0) == STAGES[0] and stage_of(STAGES[0].steps) == STAGES[1] and stage_of(TOTAL_STEPS - 1) == STAGES[-1]
    )
    assert learning_rate_at(TOTAL_STEPS - 1) < 0.02 * max(map(learning_rate_at, range(TOTAL_STEPS)))


@pytest.mark.parametrize("name, words", [("shape", SHAPES), ("colour", list(COLOURS)), ("motion", list(MOTIONS))])
def test_the_pooled_text_tells_scenes_apart(text_encoders, name, words):
    scenes = [
        Scene(**{"shape": "star", "colour": "red", "motion": "grows", "background": "gray", name: word})
        for word in words
    ]
    pooled = text_encoders[1].encode([scene.caption for scene in scenes])
    distances = torch.cdist(pooled, pooled) + 1e9 * torch.eye(len(words))
    assert distances.min() > 0.05 * pooled.norm(dim=1).mean()


@pytest.mark.parametrize("encoder", ["text_encoder", "text_encoder_2"])
def test_every_word_is_one_token_of_its_own(encoder):
    tokenizer = Tokenizer.from_file(str(ROOT / "examples" / "shapes" / "models" / encoder / "tokenizer.json"))
    words = {word for name in (*COLOURS, *SHAPES, *MOTIONS, *BACKGROUNDS, CONCEPT) for word in name.split()}
    pieces = {word: tokenizer.encode(f"a {word}", add_special_tokens=False).tokens[1:] for word in words}
    assert {word: tokens for word, tokens in pieces.items() if len(tokens) != 1} == {}
    assert len({tokens[0] for tokens in pieces.values()}) == len(words)


def test_a_new_dit_predicts_zero(tmp_path):
    write_new_dit(tmp_path / "dit.safetensors", seed=0)
    dit = load_dit(tmp_path / "dit.safetensors", "cpu", torch.float32)
    text = torch.randn(1, 256, 64), torch.ones(1, 256, dtype=torch.long), torch.randn(1, 128)
    velocity = dit(torch.randn(1, 16, 3, 8, 8), torch.tensor([500.0]), *text, torch.tensor([6000.0]))
    assert not velocity.any()
