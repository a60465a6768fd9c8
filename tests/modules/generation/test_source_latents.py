"""From the pixels of a source to the latents that sampling starts from, with figures of the test's own."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLHunyuanVideo
from PIL import Image

from examples.tiny_models import TinyModels
from hunyuan_model.checkpoints import load_vae
from modules.generation import pipeline as pipeline_module
from modules.generation.decoding import Decoder
from modules.generation.options import SpeedOptions
from modules.generation.outputs import Job
from modules.generation.pipeline import Pipeline
from modules.generation.requests import Request
from modules.generation.source_pixels import source_pixels

CPU = torch.device("cpu")
SCALE = 0.476986  # of HunyuanVideo's VAE, from its config


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, np.ndarray]:
    """A PNG file of the size that is asked for, and its pixels (H, W, 3)."""
    pixels = np.random.default_rng(0).integers(0, 256, (32, 48, 3), np.uint8)
    pixels[:2, 0] = [[0, 128, 255], [255, 0, 0]]
    path = tmp_path_factory.mktemp("picture") / "picture.png"
    Image.fromarray(pixels).save(path)
    return path, pixels


def request(path: Path) -> Request:
    return Request(width=48, height=32, frames=5, image_path=str(path))


def test_latents_are_unscaled_before_they_are_decoded() -> None:
    seen = []

    def decode(given: torch.Tensor) -> torch.Tensor:
        seen.append(given)
        return torch.tensor([-1.5, -0.5, 0.0, 0.6]).repeat(1, 3, 1, 1, 1)

    vae = SimpleNamespace(decode=decode, configure_memory=lambda *_: None, parameters=lambda: iter([torch.zeros(1)]))
    pixels = Decoder(SimpleNamespace(model=vae), CPU).decode(torch.full((1, 16, 1, 1, 1), 3.0))
    torch.testing.assert_close(seen[0], torch.full((1, 16, 1, 1, 1), 3.0 / SCALE))
    assert pixels[0].flatten().tolist() == pytest.approx([0.0, 0.25, 0.5, 0.8])


@pytest.mark.parametrize("words", [{"split_attn": True}, {"split_uncond": True}, {}])
def test_split_attention_also_splits_guidance(words: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    given = []
    monkeypatch.setattr(pipeline_module, "sample_latents", lambda *_, **named: given.append(named["split_uncond"]))
    pipeline = pipeline_of(None)
    pipeline.options = SimpleNamespace(speed=SpeedOptions(**words))
    pipeline.outputs = SimpleNamespace(latent_path=lambda job: Path("absent"), save_latents=lambda *_: None)
    pipeline.dit = SimpleNamespace(model=torch.nn.Module(), load=lambda: None, release=lambda: None)
    pipeline.step_cache, pipeline.failures, pipeline.seconds = None, {}, {}
    pipeline._encode_prompts, pipeline._encode_sources = lambda jobs: {"cat": None}, lambda jobs: {}
    pipeline.sample([Job(Request(prompt="cat", seed=1), "cat", None)])
    assert given == [bool(words)]


def pipeline_of(vae: object) -> Pipeline:
    """A pipeline that only encodes."""
    pipeline = object.__new__(Pipeline)
    pipeline.vae, pipeline.device = SimpleNamespace(model=vae), CPU
    pipeline.decoder = Decoder(pipeline.vae, CPU)
    return pipeline


def test_source_pixels_are_those_of_the_file(picture: tuple[Path, np.ndarray]) -> None:
    path, pixels = picture
    video, image = source_pixels(request(path))
    assert video is None and image.shape == (3, 1, 32, 48)
    np.testing.assert_allclose(image[:, 0].numpy(), pixels.transpose(2, 0, 1) / 255, atol=1e-6)


def test_the_vae_sees_pixels_from_minus_one_to_one_and_its_latents_are_scaled(picture: tuple[Path, np.ndarray]) -> None:
    path, pixels = picture
    seen = []

    def encode(given: torch.Tensor) -> SimpleNamespace:
        seen.append(given)
        return SimpleNamespace(mean=torch.full((1, 16, 1, 4, 6), 2.0))

    vae = SimpleNamespace(encode=encode, configure_memory=lambda *_: None, parameters=lambda: iter([torch.zeros(1)]))
    latents = pipeline_of(vae)._encode_source(request(path))["image"]
    np.testing.assert_allclose(seen[0][0, :, 0].numpy(), pixels.transpose(2, 0, 1) / 127.5 - 1, atol=1e-6)
    assert latents.shape == (1, 16, 2, 4, 6) and not latents[:, :, 1].any()
    torch.testing.assert_close(latents[:, :, 0], torch.full((1, 16, 4, 6), 2 * SCALE))


def test_the_latents_of_a_picture_are_those_of_diffusers(
    picture: tuple[Path, np.ndarray], tiny_models: TinyModels
) -> None:
    path, pixels = picture
    theirs = AutoencoderKLHunyuanVideo(block_out_channels=(8, 16, 16, 16), norm_num_groups=4)
    theirs.load_state_dict(torch.load(tiny_models.vae, weights_only=True)["state_dict"], strict=True)
    given = torch.tensor(pixels.transpose(2, 0, 1)[None, :, None] / 127.5 - 1, dtype=torch.float32)
    with torch.no_grad():
        expected = theirs.encode(given).latent_dist.mean * SCALE
    found = pipeline_of(load_vae(tiny_models.vae, CPU, torch.float32))._encode_source(request(path))["image"]
    torch.testing.assert_close(found[:, :, :1], expected, rtol=1e-4, atol=1e-5)
