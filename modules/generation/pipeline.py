"""Many videos with one load per model: all texts, then all latents, then all videos.

Latents are on disk before the VAE is loaded, and what fails for one video does not stop the others.
"""

import sys
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from modules.blocks.step_cache import StepCache
from modules.generation.outputs import Job, OutputFolder, load_latents
from modules.generation.requests import Request
from modules.generation.sampler import Conditioning, NonFiniteError, sample_latents
from modules.memory.plan import out_of_memory_in_one_line
from utils.device_utils import is_out_of_memory, release_memory
from utils.errors import UserError, one_line

SMALLEST_TILE = 64  # pixels; below it the overlap of tiles is most of the work
# What to do where memory runs out.
LOAD_LESS = "use --fp8, --fp8_llm or --blocks_to_swap"
ENCODE_LESS = "use --vae_chunk_size, --vae_tiling or a smaller size"
SAMPLE_LESS = "use --blocks_to_swap, --fp8, --split_uncond, a smaller size or fewer frames"


class LazyModel:
    """A model that is loaded when first needed and freed by `release`, unless everything is to be kept loaded."""

    def __init__(self, load: Callable[[], Any], device: torch.device, keep: bool = False) -> None:
        self._load, self._device, self._keep = load, device, keep
        self._model: Any = None

    @property
    def model(self) -> Any:
        self.load()
        return self._model

    def load(self) -> None:
        if self._model is None:
            with out_of_memory_in_one_line("while a model is loaded", lambda: LOAD_LESS):
                self._model = self._load()

    def release(self) -> None:
        if self._model is not None and not self._keep:
            self._model = None
            release_memory(self._device)


@torch.no_grad()
def encode_texts(texts: Iterable[str], encoder_1: LazyModel, encoder_2: LazyModel) -> dict[str, Conditioning]:
    """Every different text once, with one encoder in memory at a time, on the CPU.

    One text at a time, so that its encoding does not depend on its company.

    Args:
        encoder_1: `encode([text])` -> states (1, L, D), mask (1, L); `truncated(texts)` -> what is cut off each.
        encoder_2: `encode([text])` -> pooled (1, D2).
    """
    texts = list(dict.fromkeys(texts))
    states, pooled = {}, {}
    encoder_1.load()
    for cut in filter(None, encoder_1.model.truncated(texts)):
        print(f"warning: a prompt is too long for the text encoder and loses its end: '{cut}'", file=sys.stderr)
    for text in tqdm(texts, desc="text encoder 1", disable=len(texts) < 3):
        states[text] = [tensor.cpu() for tensor in encoder_1.model.encode([text])]
    encoder_1.release()
    for text in texts:
        pooled[text] = encoder_2.model.encode([text]).cpu()
    encoder_2.release()
    return {text: Conditioning(*states[text], pooled[text]) for text in texts}


@dataclass
class Generator:
    """The models and settings with which jobs become files.

    Attributes:
        text_encoder_1, text_encoder_2: see `encode_texts`.
        dit: see `modules.generation.sampler.sample_latents`.
        vae: `decode(latents)` -> pixels in -1..1, `configure_memory(chunk_size, tile_size)`.
        scaling_factor: latents of the DiT / latents of the VAE.
        source_pixels: request -> pixels (3, F, H, W) in 0..1 of the video and (3, 1, H, W) of the image that it starts
            from, each None without one.
        later_command: latent file -> the command that decodes it later.
        step_cache: already around the DiT's blocks.
        before_job: called before a job is sampled, with the DiT loaded.
    """

    text_encoder_1: LazyModel
    text_encoder_2: LazyModel
    dit: LazyModel
    vae: LazyModel
    scaling_factor: float
    device: torch.device
    outputs: OutputFolder
    source_pixels: Callable[[Request], tuple[Tensor | None, Tensor | None]]
    later_command: Callable[[Path], str]
    split_uncond: bool = False
    chunk_size: int | None = None
    tile_size: int | None = None
    step_cache: StepCache | None = None
    before_job: Callable[[Job], None] | None = None
    failures: dict[str, str] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    def run(self, jobs: Sequence[Job]) -> None:
        """Makes every job's files; `failures` has a line for each job that failed, by stem."""
        self._sample_all([job for job in jobs if not self.outputs.latent_path(job).exists()])
        if self.outputs.decodes:
            for job in tqdm(self._unfailed(jobs), desc="decoding", unit="video", disable=len(jobs) < 2):
                self.attempt(job, self._decode)
            self.vae.release()

    def _sample_all(self, jobs: Sequence[Job]) -> None:
        if not jobs:
            return
        texts = [job.request.prompt for job in jobs]
        texts += [job.request.negative_prompt for job in jobs if job.request.cfg_scale != 1.0]
        prompts = encode_texts(texts, self.text_encoder_1, self.text_encoder_2)
        sources = self._encode_sources(jobs)
        self.dit.load()
        for number, job in enumerate(self._unfailed(jobs), start=1):
            label = f"video {number}/{len(jobs)}"
            self.attempt(job, lambda job, label=label: self._sample(job, prompts, sources, label))
        self.dit.release()

    def _unfailed(self, jobs: Iterable[Job]) -> list[Job]:
        return [job for job in jobs if job.stem not in self.failures]

    def attempt(self, job: Job, action: Callable[[Job], None]) -> None:
        """One phase of one job; a failure is noted and the next job goes on."""
        start = time.monotonic()
        try:
            action(job)
        except Exception as error:
            if is_out_of_memory(error):
                error = UserError("out of memory; use a smaller size, fewer frames or smaller tiles of the VAE")
            if not isinstance(error, (UserError, OSError)):
                traceback.print_exc()
            self.failures[job.stem] = one_line(error)
            print(f"failed: {job.stem}: {self.failures[job.stem]}", file=sys.stderr)
            release_memory(self.device)
        self.seconds[job.stem] = self.seconds.get(job.stem, 0.0) + time.monotonic() - start

    def _encode_sources(self, jobs: Iterable[Job]) -> dict[str, dict[str, Tensor]]:
        """Scaled latents of the video (`source`) and the image (`image`) that a job starts from, by stem."""
        sources: dict[str, dict[str, Tensor]] = {}
        for job in jobs:
            if job.request.video_path or job.request.image_path:
                self.attempt(job, lambda job: sources.update({job.stem: self._encode_source(job.request)}))
        self.vae.release()
        return sources

    @torch.no_grad()
    def _encode_source(self, request: Request) -> dict[str, Tensor]:
        video, image = self.source_pixels(request)
        encoded = {}
        if video is not None:
            encoded["source"] = self._encode(video)
        if image is not None:
            first = self._encode(image)  # 1 C 1 h w
            rest = first.new_zeros(*first.shape[:2], request.latent_frames - 1, *first.shape[3:])
            encoded["image"] = torch.cat((first, rest), dim=2)  # 1 C f h w
        return encoded

    def _encode(self, pixels: Tensor) -> Tensor:
        """Pixels (3, F, H, W) in 0..1 -> scaled latents (1, C, f, h, w), the mean of the posterior, on the CPU.

        Raises:
            UserError: out of memory.
            NonFiniteError: the VAE makes NaN.
        """
        vae = self.vae.model
        vae.configure_memory(self.chunk_size, self.tile_size)
        with out_of_memory_in_one_line("while the source is encoded", lambda: ENCODE_LESS):
            posterior = vae.encode((pixels * 2 - 1)[None].to(self.device, next(vae.parameters()).dtype))
        latents = posterior.mean.float().cpu() * self.scaling_factor
        if not torch.isfinite(latents).all():
            raise NonFiniteError("NaN or infinity in the VAE's encoder: use --vae_dtype float32, or check the VAE file")
        return latents

    def _sample(
        self,
        job: Job,
        prompts: Mapping[str, Conditioning],
        sources: Mapping[str, Mapping[str, Tensor]],
        label: str,
    ) -> None:
        if self.before_job is not None:
            self.before_job(job)
        bar = tqdm(total=job.request.steps, desc=label, unit="step")
        with bar, out_of_memory_in_one_line("in sampling", lambda: SAMPLE_LESS):

            def before_step(step: int, steps: int) -> None:
                bar.total = steps
                bar.update(step - bar.n)
                if self.step_cache is not None:
                    self.step_cache.begin_step(step, steps)

            latents = sample_latents(
                self.dit.model,
                job.request,
                prompts[job.request.prompt],
                prompts.get(job.request.negative_prompt),
                device=self.device,
                split_uncond=self.split_uncond,
                before_step=before_step,
                **sources.get(job.stem, {}),
            )
            bar.update(bar.total - bar.n)
        if self.step_cache is not None:
            self.step_cache.forget()
        self.outputs.save_latents(job, latents)

    def _decode(self, job: Job) -> None:
        path = self.outputs.latent_path(job)
        latents, _ = load_latents(path)
        try:
            pixels = self.decode(latents)
        except Exception as error:
            reason = "out of memory" if is_out_of_memory(error) else one_line(error)
            raise UserError(
                f"decoding: {reason}; the latents are safe, decode later: {self.later_command(path)}"
            ) from error
        self.outputs.save_pixels(job, pixels)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Scaled latents (1, C, f, h, w) -> pixels (3, F, H, W) in 0..1 on the CPU; smaller tiles if memory runs out.

        Raises:
            NonFiniteError: the VAE makes NaN even in float32.
        """
        vae = self.vae.model
        pixels = self._decode_in_tiles(latents)
        if not _is_finite(pixels) and next(vae.parameters()).dtype != torch.float32:
            print("warning: the VAE made NaN; decoding again in float32", file=sys.stderr)
            vae.float()
            pixels = self._decode_in_tiles(latents)
        if not _is_finite(pixels):
            raise NonFiniteError("NaN or infinity in the VAE's decoder, also in float32: check the VAE file")
        return pixels[0].div_(2).add_(0.5).clamp_(0, 1)  # in place: a long video takes gigabytes

    def _decode_in_tiles(self, latents: Tensor) -> Tensor:
        vae = self.vae.model
        scaled = (latents / self.scaling_factor).to(self.device, next(vae.parameters()).dtype)
        while True:
            vae.configure_memory(self.chunk_size, self.tile_size)
            try:
                return vae.decode(scaled).cpu().float()  # both dtypes would be in the GPU's memory otherwise
            except Exception as error:
                smaller = (self.tile_size or 2 * 256) // 2
                if not is_out_of_memory(error) or smaller < SMALLEST_TILE:
                    raise
            release_memory(self.device)
            self.tile_size = smaller
            print(f"warning: out of memory while decoding; trying tiles of {smaller} pixels", file=sys.stderr)


def _is_finite(tensor: Tensor) -> bool:
    """As `torch.isfinite(tensor).all()`, which would need as much memory again."""
    return all(bool(torch.isfinite(extreme)) for extreme in tensor.aminmax())
