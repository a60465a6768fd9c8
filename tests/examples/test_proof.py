"""That the small models show what they are told, and that a LoRA trained here changes videos the right way."""

import json
import random
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

import pytest

from examples.shapes import proof
from examples.shapes.judge import Verdict, score
from examples.shapes.proof import (
    concept_dataset,
    concept_scenes,
    judged_videos,
    known_scenes,
    share_of_concept,
    train_lora,
    training_words,
)
from examples.shapes.recipe import STEPS
from examples.shapes.scripts import ROOT, TWO_PROCESSES, models_in
from examples.shapes.vae_training import TOTAL_STEPS, psnr
from examples.shapes.world import CONCEPT, Scene, random_scene, render
from hunyuan_model.checkpoints import load_vae
from tests.platforms import needs_posix

MODELS = models_in(proof.SHIPPED)
SAVINGS = (["--fp8_base"], ["--blocks_to_swap", "2", "--gradient_checkpointing"])
SHORT, FEW = ("--max_train_epochs", 20), 20
MISTAKES = {
    "the target's sign is turned": "trainer.velocity_target = lambda latents, noise: latents - noise",
    "noise and data are swapped": "trainer.interpolate = lambda latents, noise, sigma: mixed(noise, latents, sigma); "
    "trainer.velocity_target = lambda latents, noise: velocity(noise, latents)",
    "the latents are scaled twice": "denoiser.SCALING_FACTOR **= 2",
}
WITH_MISTAKE = """
from hv_train_network import main
from modules.training import denoiser
from modules.training import loop as trainer

mixed, velocity = trainer.interpolate, trainer.velocity_target
{}
main()
"""
LARGEST = 16e6  # bytes of all small models together


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    """The concept's clips and their caches."""
    return concept_dataset(MODELS, tmp_path_factory.mktemp("concept"))


def presence(folder: Path, lora: Path | None = None) -> float:
    """In how many videos of the concept's prompts the judge sees it."""
    options = [] if lora is None else ["--lora_weight", lora]
    return share_of_concept(judged_videos(MODELS, concept_scenes(), folder, *options))


def share_agreeing(verdicts: Sequence[Verdict], scenes: Sequence[Scene]) -> float:
    """In how many clips everything is as told, in 0..1."""
    return fmean(verdict.agrees(scene) for verdict, scene in zip(verdicts, scenes, strict=True))


def test_the_small_models_are_small():
    files = [path for path in proof.SHIPPED.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= LARGEST
    assert proof.SHIPPED / "LICENSE" in files


@pytest.mark.parametrize(("name", "steps"), [("vae_log.jsonl", TOTAL_STEPS), ("dit_log.jsonl", STEPS)])
def test_the_small_models_went_the_whole_course_of_the_recipe(name, steps):
    last = (proof.SHIPPED / name).read_text(encoding="utf-8").splitlines()[-1]
    assert json.loads(last)["step"] == steps


def test_the_vae_reproduces_unseen_clips():
    vae, generator = load_vae(MODELS.vae), random.Random("unseen")
    clips = [render(random_scene(generator, concept), 9, 64, 64) * 2 - 1 for concept in (False, True) for _ in range(6)]
    errors = [vae.decode(vae.encode(clip[None].clone()).mean).clamp(-1, 1)[0] - clip for clip in clips]
    assert fmean(psnr(error.square().mean().item()) for error in errors) >= 27


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> list[Verdict]:
    """What the base model shows for the known prompts."""
    return judged_videos(MODELS, known_scenes(), tmp_path_factory.mktemp("base"))


@pytest.mark.slow
def test_the_base_model_shows_what_the_prompt_says(base):
    found = score(base, known_scenes())
    assert found["colour"] >= 0.9 and found["shape"] >= 0.8 and found["motion"] >= 0.8


@pytest.mark.slow
def test_a_forgotten_guidance_factor_cannot_hide(tmp_path, base):
    scenes = known_scenes()[:FEW]
    forgotten = judged_videos(MODELS, scenes, tmp_path, "--embedded_cfg_scale", 0.006)
    assert share_agreeing(forgotten, scenes) < 0.5 * share_agreeing(base[:FEW], scenes)


@pytest.mark.slow
def test_a_lora_adds_the_concept_and_keeps_the_rest(tmp_path, config, base):
    lora = train_lora(MODELS, config, tmp_path / "lora")
    assert presence(tmp_path / "before") <= 0.1
    assert presence(tmp_path / "after", lora) >= 0.8
    scenes = known_scenes()
    verdicts = judged_videos(MODELS, scenes, tmp_path / "known", "--lora_weight", lora)
    before, after = score(base, scenes), score(verdicts, scenes)
    assert all(after[name] >= before[name] - 0.15 for name in before)


@pytest.mark.slow
@pytest.mark.parametrize("options", SAVINGS, ids=" ".join)
def test_what_saves_memory_learns_the_same(tmp_path, config, options):
    lora = train_lora(MODELS, config, tmp_path / "lora", *options)
    assert presence(tmp_path / "after", lora) >= 0.8


@pytest.mark.slow
def test_two_processes_learn_the_same(tmp_path, config):
    lora = train_lora(MODELS, config, tmp_path / "lora", script=(*TWO_PROCESSES, "hv_train_network.py"))
    assert presence(tmp_path / "after", lora) >= 0.8


@needs_posix
@pytest.mark.slow
def test_a_training_that_was_killed_and_resumed_learns_the_same(tmp_path, config):
    folder, states = tmp_path / "lora", ("--save_state", "--save_every_n_steps", 100)
    words = training_words(MODELS, config, folder, *states)
    state = folder / f"{CONCEPT}-step00000300-state"
    training = subprocess.Popen([sys.executable, "hv_train_network.py", *map(str, words)], cwd=ROOT)
    while training.poll() is None and not state.exists():
        time.sleep(0.1)
    training.kill()
    assert training.wait() == -signal.SIGKILL
    lora = train_lora(MODELS, config, folder, *states, "--resume", state)
    assert presence(tmp_path / "after", lora) >= 0.8


def share_after(mistake: str, config: Path, folder: Path) -> float:
    """Trains for a while with a mistake in the trainer; returns in how many known videos everything is as told."""
    scenes = known_scenes()[:FEW]
    lora = train_lora(MODELS, config, folder / "lora", *SHORT, script=("-c", WITH_MISTAKE.format(mistake)))
    return share_agreeing(judged_videos(MODELS, scenes, folder / "videos", "--lora_weight", lora), scenes)


@pytest.fixture(scope="module")
def right_share(config, tmp_path_factory) -> float:
    """The share after a training as short as the wrong ones, without a mistake."""
    return share_after("", config, tmp_path_factory.mktemp("right"))


@pytest.mark.slow
@pytest.mark.parametrize("mistake", MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_in_training_cannot_hide(tmp_path, config, right_share, mistake):
    assert share_after(mistake, config, tmp_path) < 0.5 * right_share
