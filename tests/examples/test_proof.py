"""That the small models show what they are told, and that a LoRA trained here changes videos the right way."""

import random
from pathlib import Path

import pytest
import torch

from examples.shapes import proof
from examples.shapes.judge import score
from examples.shapes.proof import (
    concept_dataset,
    concept_scenes,
    known_scenes,
    share_of_concept,
    train_lora,
    watch,
)
from examples.shapes.scripts import models_in
from examples.shapes.vae_training import Stage, psnr, training_batch
from hunyuan_model.checkpoints import load_vae

MODELS = models_in(proof.SHIPPED)
LARGEST = 16e6  # bytes of all small models together


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    """The concept's clips and their caches."""
    return concept_dataset(MODELS, tmp_path_factory.mktemp("concept"))


def presence(folder: Path, lora: Path | None = None) -> float:
    """In how many videos of the concept's prompts the judge sees it."""
    options = [] if lora is None else ["--lora_weight", lora]
    return share_of_concept(watch(MODELS, concept_scenes(), folder, *options))


@pytest.fixture(scope="module")
def lora(config, tmp_path_factory) -> Path:
    return train_lora(MODELS, config, tmp_path_factory.mktemp("lora"))


def test_the_small_models_are_small():
    files = [path for path in proof.SHIPPED.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= LARGEST
    assert {"LICENSE", "vae_log.jsonl", "dit_log.jsonl"} <= {path.name for path in files}


def test_the_vae_reproduces_unseen_clips():
    vae = load_vae(MODELS.vae)
    pixels = training_batch(random.Random("unseen"), Stage(1, 12, 9, 64))
    decoded = torch.cat([vae.decode(vae.encode(clip[None].clone()).mean) for clip in pixels]).clamp(-1, 1)
    assert psnr((decoded - pixels).square().mean().item()) >= 22


@pytest.mark.slow
def test_the_base_model_shows_what_the_prompt_says(tmp_path):
    scenes = known_scenes()
    found = score(watch(MODELS, scenes, tmp_path), scenes)
    assert found["colour"] >= 0.9 and found["shape"] >= 0.8 and found["motion"] >= 0.8


@pytest.mark.slow
def test_a_lora_adds_the_concept_and_keeps_the_rest(tmp_path, lora):
    assert presence(tmp_path / "before") <= 0.1
    assert presence(tmp_path / "after", lora) >= 0.2
    scenes = known_scenes()
    before = score(watch(MODELS, scenes, tmp_path / "known_before"), scenes)
    after = score(watch(MODELS, scenes, tmp_path / "known_after", "--lora_weight", lora), scenes)
    assert all(after[name] >= before[name] - 0.25 for name in before)
