"""Videos and images of the model in training, through the sampler that generation uses."""

import dataclasses
import io
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from tqdm import tqdm

from modules.generation.requests import Request
from modules.generation.sampler import Conditioning, sample_latents
from modules.training.files import TrainingFiles
from modules.training.log import TrainingLog
from utils.device_utils import release_memory
from utils.errors import one_line
from utils.video_io import save_image, save_video, to_uint8

if TYPE_CHECKING:
    from tensorboard.compat.proto.summary_pb2 import Summary

Decode = Callable[[Tensor], Tensor]
"""Scaled latents (1, C, f, h, w) -> pixels (3, F, H, W) in 0..1."""


PreviewPrompt = tuple[Request, Conditioning, Conditioning | None]
"""A request with its encoded positive and negative prompt."""


@torch.no_grad()
def encode_prompts(
    requests: Sequence[Request], load_1: Callable[[], Any], load_2: Callable[[], Any], device: torch.device
) -> list[PreviewPrompt]:
    """Encodes every prompt, with one text encoder in memory at a time.

    Args:
        load_1: loads an encoder with `encode([prompt])` -> states (1, L, D), mask (1, L).
        load_2: loads an encoder with `encode([prompt])` -> pooled (1, D2).
    """
    if not requests:
        return []
    texts = list({text: None for request in requests for text in (request.prompt, request.negative_prompt)})
    encoder = load_1()
    states = {text: [tensor.cpu() for tensor in encoder.encode([text])] for text in texts}
    del encoder
    release_memory(device)
    encoder = load_2()
    pooled = {text: encoder.encode([text]).cpu() for text in texts}
    del encoder
    release_memory(device)
    encoded = {text: Conditioning(*states[text], pooled[text]) for text in texts}
    return [(request, encoded[request.prompt], encoded[request.negative_prompt]) for request in requests]


class Previewer:
    """Makes the previews of a run; one that fails is reported, and training goes on.

    Args:
        prompts: requests with their encoded positive and negative prompts.
        decode: needed on the main process only, which makes the previews.
        seed: of requests that have none.
    """

    def __init__(
        self,
        dit: nn.Module,
        prompts: Sequence[PreviewPrompt],
        decode: Decode | None,
        files: TrainingFiles,
        accelerator: Accelerator,
        seed: int,
    ) -> None:
        self.dit, self.prompts, self.decode = dit, prompts, decode
        self.files, self.accelerator, self.seed = files, accelerator, seed

    def run(self, moment: str, log: TrainingLog) -> None:
        """Makes every preview; `moment` is `e{epoch:06d}` or the step as `{step:06d}`, for the names."""
        for index, prompt in enumerate(self.prompts):
            try:
                pixels = self._make(index, moment, *prompt)
                _track(self.accelerator, index, pixels, prompt[0], log.progress.step)
                log.record(log.progress.step, preview=f"{self.files.name}_{moment}_{index:02d}")
            except Exception as error:
                log.record(log.progress.step, preview_failed=index, reason=one_line(error))
                log.say(f"preview {index + 1} failed, training goes on: {type(error).__name__}: {one_line(error)}")
            release_memory(self.accelerator.device)

    def _make(
        self, index: int, moment: str, request: Request, positive: Conditioning, negative: Conditioning | None
    ) -> Tensor:
        device = self.accelerator.device
        seeded = dataclasses.replace(request, seed=self.seed if request.seed is None else request.seed)
        silent = not self.accelerator.is_main_process
        bar = tqdm(total=request.steps, desc=f"preview {index + 1}", unit="step", leave=False, disable=silent)

        def before_step(step: int, steps: int) -> None:
            bar.update(step - bar.n)

        with bar, self.accelerator.autocast():
            latents = sample_latents(self.dit, seeded, positive, negative, device=device, before_step=before_step)
        with torch.no_grad():
            pixels = self.decode(latents)
        seed = "" if request.seed is None else f"_{request.seed}"
        stem = f"{self.files.name}_{moment}_{index:02d}_{time.strftime('%Y%m%d%H%M%S')}{seed}"
        if pixels.shape[1] == 1:
            path = self.files.previews / f"{stem}.png"
            save_image(pixels, path)
        else:
            path = self.files.previews / f"{stem}.mp4"
            save_video(pixels, path, request.fps)
        return pixels


def _track(accelerator: Accelerator, index: int, pixels: Tensor, request: Request, step: int) -> None:
    """Shows a preview (3, F, H, W) in TensorBoard and wandb."""
    for tracker in accelerator.trackers:
        if tracker.name == "tensorboard":
            tracker.writer.file_writer.add_summary(image_summary(f"preview {index}", pixels, request.fps), step)
        elif tracker.name == "wandb":
            import wandb

            frames = to_uint8(pixels)
            video = wandb.Video(frames.permute(0, 3, 1, 2).numpy(), fps=request.fps)  # F H W 3 -> F 3 H W
            shown = video if len(frames) > 1 else wandb.Image(frames[0].numpy())
            tracker.log({f"preview {index}": shown}, step=step)


def image_summary(tag: str, pixels: Tensor, fps: float) -> "Summary":
    """TensorBoard's summary of pixels (3, F, H, W) in 0..1: a GIF, which moves if there is more than one frame."""
    from PIL import Image
    from tensorboard.compat.proto.summary_pb2 import Summary

    first, *rest = [Image.fromarray(frame) for frame in to_uint8(pixels).numpy()]
    buffer = io.BytesIO()
    first.save(buffer, "GIF", save_all=True, append_images=rest, duration=1000 / fps, loop=0)
    image = Summary.Image(height=first.height, width=first.width, colorspace=3, encoded_image_string=buffer.getvalue())
    return Summary(value=[Summary.Value(tag=tag, image=image)])
