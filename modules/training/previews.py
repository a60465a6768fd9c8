"""Videos and images from the model in training, made with the sampler and the decoder of generation."""

import contextlib
import dataclasses
import io
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from accelerate import Accelerator
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from hunyuan_model.models import HYVideoDiffusionTransformer
from modules.generation.decoding import Decoder, lazy_vae
from modules.generation.requests import Request
from modules.generation.sampler import Conditioning, sample_latents
from modules.generation.text_encoding import encode_texts, lazy_text_encoders
from modules.training.files import TrainingFiles
from modules.training.log import TrainingLog
from modules.training.options import TrainerOptions
from utils.device_utils import release_memory
from utils.errors import one_line
from utils.video_io import save_image, save_video, to_uint8

if TYPE_CHECKING:
    from tensorboard.compat.proto.summary_pb2 import Summary

PreviewPrompt = tuple[Request, Conditioning, Conditioning]
"""A request with its encoded prompt and negative prompt."""


class _BrokenOffError(Exception):
    """Somebody asked to stop."""


@contextlib.contextmanager
def _broken_off_by(stopping: Callable[[], bool], modules: Iterable[nn.Module]) -> Iterator[None]:
    """Inside, `stopping` is asked before each forward of a module; if it is true, _BrokenOffError is raised."""

    def ask(*_: object) -> None:
        if stopping():
            raise _BrokenOffError

    handles = [module.register_forward_pre_hook(ask) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class Previewer:
    """Makes the previews of a run on the main process. One that fails is reported, and training goes on.

    Args:
        decoder: its VAE is on the device only while it decodes.
        seed: for requests that have none.
    """

    def __init__(
        self,
        prompts: Sequence[PreviewPrompt],
        decoder: Decoder,
        files: TrainingFiles,
        accelerator: Accelerator,
        seed: int,
    ) -> None:
        self.prompts, self.decoder = prompts, decoder
        self.files, self.accelerator, self.seed = files, accelerator, seed

    def run(
        self, dit: HYVideoDiffusionTransformer, moment: str, log: TrainingLog, stopping: Callable[[], bool]
    ) -> None:
        """Makes every preview, unless `stopping`, which is asked before each call of the DiT, says otherwise.

        Args:
            moment: part of the file names: the epoch as `e{epoch:06d}` or the step as `{step:06d}`.
        """
        for index, prompt in enumerate(self.prompts):
            try:
                pixels = self._make(dit, index, moment, stopping, *prompt)
                _track(self.accelerator, index, pixels, prompt[0], log.progress.step)
                log.record(log.progress.step, preview=f"{self.files.name}_{moment}_{index:02d}")
            except _BrokenOffError:
                break
            except Exception as error:
                log.record(log.progress.step, preview_failed=index, reason=one_line(error))
                log.say(f"preview {index + 1} failed, training goes on: {type(error).__name__}: {one_line(error)}")
            release_memory(self.accelerator.device)

    def _make(
        self,
        dit: HYVideoDiffusionTransformer,
        index: int,
        moment: str,
        stopping: Callable[[], bool],
        request: Request,
        positive: Conditioning,
        negative: Conditioning,
    ) -> Tensor:
        """Samples, decodes and saves one preview; returns its pixels (3, F, H, W) in 0..1."""
        device = self.accelerator.device
        seeded = dataclasses.replace(request, seed=self.seed if request.seed is None else request.seed)
        bar = tqdm(total=request.steps, desc=f"preview {index + 1}", unit="step", leave=False)

        def before_step(step: int, steps: int) -> None:
            bar.update(step - bar.n)

        with bar, self.accelerator.autocast(), _broken_off_by(stopping, [dit]):
            latents = sample_latents(dit, seeded, positive, negative, device=device, before_step=before_step)
        try:
            with _broken_off_by(stopping, self.decoder.vae.model.modules()):
                pixels = self.decoder.decode(latents)
        finally:
            self.decoder.vae.release()
        seed = "" if request.seed is None else f"_{request.seed}"
        stem = f"{self.files.name}_{moment}_{index:02d}_{time.strftime('%Y%m%d%H%M%S')}{seed}"
        if pixels.shape[1] == 1:
            save_image(pixels, self.files.previews / f"{stem}.png")
        else:
            save_video(pixels, self.files.previews / f"{stem}.mp4", request.fps)
        return pixels


def create_previewer(
    options: TrainerOptions, requests: Sequence[Request], accelerator: Accelerator, seed: int
) -> Previewer | None:
    """Encodes the prompts and loads the VAE into main memory, on the main process; None without requests.

    Call it before the DiT is loaded: the text encoders need the memory of the device, and are gone afterwards.

    Args:
        seed: for requests that have none.
    """
    if not requests:
        return None
    device, vae = accelerator.device, options.vae
    decoder = Decoder(lazy_vae(vae, device, "offload"), device, vae.vae_chunk_size, vae.tile_size)
    if not accelerator.is_main_process:
        return Previewer([], decoder, options.files, accelerator, seed)
    texts = [text for request in requests for text in (request.prompt, request.negative_prompt)]
    encoded = encode_texts(texts, *lazy_text_encoders(options.text, device))
    prompts = [(request, encoded[request.prompt], encoded[request.negative_prompt]) for request in requests]
    decoder.vae.load()
    return Previewer(prompts, decoder, options.files, accelerator, seed)


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
    """TensorBoard's summary of pixels (3, F, H, W) in 0..1: a GIF, animated if there is more than one frame."""
    from tensorboard.compat.proto.summary_pb2 import Summary

    first, *rest = [Image.fromarray(frame) for frame in to_uint8(pixels).numpy()]
    buffer = io.BytesIO()
    first.save(buffer, "GIF", save_all=True, append_images=rest, duration=1000 / fps, loop=0)
    image = Summary.Image(height=first.height, width=first.width, colorspace=3, encoded_image_string=buffer.getvalue())
    return Summary(value=[Summary.Value(tag=tag, image=image)])
