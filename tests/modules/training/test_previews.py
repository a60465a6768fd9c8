"""Previews: what TensorBoard is shown, and that prompts are encoded once."""

import io

import numpy as np
import torch
from PIL import Image

from modules.generation.requests import Request
from modules.training.previews import encode_prompts, image_summary


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

    def encode(self, prompts):
        self.seen.append(prompts)
        vector = torch.full((1, 4), float(len(prompts[0])))
        return vector if self.pooled else (vector[:, None], torch.ones(1, 1))


def test_every_text_is_encoded_once_alone():
    seen, requests = [], [Request(prompt="a"), Request(prompt="bb", negative_prompt="a"), Request(prompt="a")]
    device = torch.device("cpu")
    prompts = encode_prompts(requests, lambda: Encoder(seen, False), lambda: Encoder(seen, True), device)
    assert seen == [["a"], [""], ["bb"]] * 2
    assert [prompt[1].text_states_2[0, 0].item() for prompt in prompts] == [1, 2, 1]
    assert prompts[1][2].text_states[0, 0, 0].item() == 1


def test_without_prompts_no_encoder_is_loaded():
    assert encode_prompts([], lambda: 1 / 0, lambda: 1 / 0, torch.device("cpu")) == []
