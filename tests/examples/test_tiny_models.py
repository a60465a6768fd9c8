"""The small model set: official key names and shapes, sane activations, loadable by transformers."""

from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, CLIPTextModel, LlamaForCausalLM

from examples.tiny_models import dit_shapes, vae_shapes, write_tiny_models
from hunyuan_model.checkpoints import load_dit, load_vae
from hunyuan_model.models import HunyuanVideoConfig
from hunyuan_model.vae import VaeConfig

DATA = Path(__file__).parent.parent / "data"


def table(name: str) -> dict[str, tuple[int, ...]]:
    rows = [line.split("\t") for line in (DATA / name).read_text(encoding="utf-8").splitlines()]
    return {key: tuple(map(int, shape.split("x"))) for key, shape in rows}


def test_the_dit_of_official_size_has_exactly_the_official_keys_and_shapes():
    assert dit_shapes(HunyuanVideoConfig()) == table("hunyuanvideo_dit_keys.tsv")


def test_the_vae_of_official_size_has_exactly_the_official_keys_and_shapes():
    assert vae_shapes(VaeConfig()) == table("hunyuanvideo_vae_keys.tsv")


def test_the_same_seed_gives_the_same_weights_and_another_seed_others(tiny_models, tmp_path):
    def weights(models):
        return torch.load(models.dit, weights_only=True)["module"]["double_blocks.0.img_attn_qkv.weight"]

    assert torch.equal(weights(write_tiny_models(tmp_path / "same")), weights(tiny_models))
    assert not torch.equal(weights(write_tiny_models(tmp_path / "other", seed=1)), weights(tiny_models))


def test_transformers_loads_both_text_encoders_strictly(tiny_models):
    for model_class, folder in [
        (LlamaForCausalLM, tiny_models.text_encoder1),
        (CLIPTextModel, tiny_models.text_encoder2),
    ]:
        _, info = model_class.from_pretrained(folder, output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]


@pytest.mark.parametrize("encoder", ["text_encoder1", "text_encoder2"])
def test_transformers_loads_both_tokenizers(tiny_models, encoder):
    tokenizer = AutoTokenizer.from_pretrained(getattr(tiny_models, encoder))
    ids = tokenizer("a cat walks on the grass").input_ids
    assert tokenizer.decode(ids, skip_special_tokens=True).strip() == "a cat walks on the grass"
    assert len(ids) < 10  # words, not bytes: a caption of usual length fits


def test_the_llm_neither_explodes_nor_vanishes(tiny_models):
    model = LlamaForCausalLM.from_pretrained(tiny_models.text_encoder1)
    with torch.no_grad():
        states = model(torch.arange(100)[None], output_hidden_states=True).hidden_states
    assert all(0.1 < state.std() < 5 for state in states)


def test_the_dit_neither_explodes_nor_vanishes_and_every_parameter_matters(tiny_models):
    model = load_dit(tiny_models.dit, dtype=torch.float32).requires_grad_(True)
    generator = torch.Generator().manual_seed(0)
    latents, states, pooled = (
        torch.randn(shape, generator=generator) for shape in [(1, 16, 3, 8, 8), (1, 20, 64), (1, 128)]
    )
    mask, timestep, guidance = torch.ones(1, 20, dtype=torch.int64), torch.tensor([500.0]), torch.tensor([6000.0])
    velocity = model(latents, timestep, states, mask, pooled, guidance=guidance)
    assert velocity.shape == latents.shape and 0.3 < velocity.std() < 3
    velocity.square().mean().backward()
    assert [name for name, parameter in model.named_parameters() if not parameter.grad.abs().max() > 1e-7] == []


def test_the_vae_neither_explodes_nor_vanishes(tiny_models):
    vae = load_vae(tiny_models.vae)
    with torch.no_grad():
        posterior = vae.encode(torch.rand(1, 3, 5, 32, 48, generator=torch.Generator().manual_seed(0)) * 2 - 1)
        pixels = vae.decode(posterior.mean)
    assert posterior.mean.shape == (1, 16, 2, 4, 6) and 0.1 < posterior.mean.std() < 5
    assert pixels.shape == (1, 3, 5, 32, 48) and 0.1 < pixels.std() < 5
