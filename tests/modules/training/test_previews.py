"""Previews: what TensorBoard shows, which texts are encoded, and where the VAE is."""

import io
import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image

from modules.generation.lazy_model import LazyModel
from modules.generation.requests import Request
from modules.memory.meter import MemoryMeter
from modules.training import previews
from modules.training.files import TrainingFiles
from modules.training.previews import Previewer, create_previewer, image_summary

CPU = torch.device("cpu")


def test_tensorboard_is_shown_every_frame_of_a_video():
    pixels = torch.zeros(3, 4, 16, 24)
    for frame in range(4):
        pixels[0, frame] = frame / 3
    (value,) = image_summary("preview 0", pixels, fps=10).value
    assert (value.tag, value.image.height, value.image.width) == ("preview 0", 16, 24)
    gif = Image.open(io.BytesIO(value.image.encoded_image_string))
    assert gif.n_frames == 4 and gif.info["duration"] == 100
    for frame in range(4):
        gif.seek(frame)
        red = np.asarray(gif.convert("RGB"))[..., 0]
        assert abs(red.astype(int) - 85 * frame).max() <= 4


class Encoder:
    """Counts what it encodes."""

    def __init__(self, seen, pooled):
        self.seen, self.pooled = seen, pooled

    def truncated(self, prompts):
        return []

    def encode(self, prompts):
        self.seen.append(prompts)
        vector = torch.full((1, 4), float(len(prompts[0])))
        return vector if self.pooled else (vector[:, None], torch.ones(1, 1))


class Vae(torch.nn.Module):
    """Decodes to white, and notes where its weight is when it is moved and when it decodes."""

    def __init__(self):
        super().__init__()
        self.weight, self.places = torch.nn.Parameter(torch.zeros(1)), []

    def configure_memory(self, *_):
        """Nothing to save."""

    def to(self, place):
        self.places.append(str(place))
        return self

    def decode(self, _):
        self.places.append("decodes")
        return torch.full((1, 3, 8, 64, 64), 3.0)


@pytest.fixture
def options():
    vae = SimpleNamespace(vae=None, vae_dtype=None, vae_chunk_size=None, tile_size=None)
    return SimpleNamespace(vae=vae, text=None, files=None)


def test_every_text_is_encoded_once_alone(options, monkeypatch):
    seen, requests = [], [Request(prompt="a"), Request(prompt="bb", negative_prompt="a"), Request(prompt="a")]
    encoders = [LazyModel(lambda pooled=pooled: Encoder(seen, pooled), CPU) for pooled in (False, True)]
    monkeypatch.setattr(previews, "lazy_text_encoders", lambda *_: encoders)
    monkeypatch.setattr("hunyuan_model.checkpoints.load_vae", lambda *_: Vae())
    prompts = create_previewer(options, requests, Accelerator(cpu=True), seed=0).prompts
    assert seen == [["a"], [""], ["bb"]] * 2
    assert [positive.text_states_2[0, 0].item() for _, positive, _ in prompts] == [1, 2, 1]
    assert prompts[1][2].text_states[0, 0, 0].item() == 1


def test_without_prompts_no_model_is_loaded(options, monkeypatch):
    monkeypatch.setattr(previews, "lazy_text_encoders", lambda *_: pytest.fail("text encoders are loaded"))
    assert create_previewer(options, [], Accelerator(cpu=True), seed=0) is None


def test_other_processes_than_the_main_one_load_no_models(options, monkeypatch):
    monkeypatch.setattr(previews, "lazy_text_encoders", lambda *_: pytest.fail("text encoders are loaded"))
    monkeypatch.setattr("hunyuan_model.checkpoints.load_vae", lambda *_: pytest.fail("the VAE is loaded"))
    accelerator = SimpleNamespace(device=CPU, is_main_process=False)
    assert create_previewer(options, [Request(prompt="a")], accelerator, seed=0).prompts == []


def test_the_vae_is_on_the_device_only_while_it_decodes(options, monkeypatch, tmp_path):
    """And the pixels of a preview are in memory once."""
    vae, device, loaded_to = Vae(), torch.device("meta"), []

    def load(_, place, *__):
        loaded_to.append(str(place))
        return vae

    monkeypatch.setattr("hunyuan_model.checkpoints.load_vae", load)
    monkeypatch.setattr(previews, "sample_latents", lambda *_, **__: torch.zeros(1, 16, 2, 8, 8))
    decoder = previews.Decoder(previews.lazy_vae(options.vae, device, "offload"), CPU)
    made = []
    monkeypatch.setattr(previews, "save_video", lambda pixels, *_: made.append(pixels))
    log = SimpleNamespace(record=lambda *_, **__: None, say=pytest.fail, progress=SimpleNamespace(step=1))
    prompts, files = [(Request(steps=1), None, None)] * 2, TrainingFiles(tmp_path, "x")
    previewer = Previewer(prompts, decoder, files, Accelerator(cpu=True), seed=0)
    with MemoryMeter() as meter:
        previewer.run(torch.nn.Identity(), "000001", log, lambda: False)
    places = [place for place, _ in itertools.groupby(vae.places)]
    assert loaded_to == ["cpu"] and places == ["meta", "decodes", "cpu"] * 2
    assert made[0].shape == (3, 8, 64, 64) and bool((made[0] == 1).all())
    assert meter.peak < 2.2 * made[0].nbytes  # both previews
