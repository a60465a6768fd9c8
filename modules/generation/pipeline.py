"""Many videos with one load per model: all texts, then all latents, then all videos.

Latents are on disk before the VAE is loaded, and what fails for one video does not stop the others.
"""

import sys
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from hunyuan_model.vae import SCALING_FACTOR
from modules.blocks.step_cache import StepCache
from modules.generation.decoding import Decoder
from modules.generation.lazy_model import LazyModel
from modules.generation.outputs import Job, OutputFolder, load_latents
from modules.generation.requests import Request
from modules.generation.sampler import Conditioning, NonFiniteError, sample_latents
from modules.generation.text_encoding import encode_texts
from modules.memory.plan import out_of_memory_in_one_line
from utils.device_utils import is_out_of_memory, release_memory
from utils.errors import UserError, one_line

# What to do where memory runs out.
ENCODE_LESS = "use --vae_chunk_size, --vae_tiling or a smaller size"
SAMPLE_LESS = "use --blocks_to_swap, --fp8, --split_uncond, a smaller size or fewer frames"


@dataclass
class Generator:
    """The models and settings with which jobs become files.

    Attributes:
        text_encoder_1, text_encoder_2: see `encode_texts`.
        dit: see `modules.generation.sampler.sample_latents`.
        source_pixels: request -> pixels (3, F, H, W) in 0..1 of the video and (3, 1, H, W) of the image that it starts
            from, each None without one.
        later_command: latent file -> the command that decodes it later.
        step_cache: already around the DiT's blocks.
        before_job: called before a job is sampled, with the DiT loaded.
    """

    text_encoder_1: LazyModel
    text_encoder_2: LazyModel
    dit: LazyModel
    decoder: Decoder
    device: torch.device
    outputs: OutputFolder
    source_pixels: Callable[[Request], tuple[Tensor | None, Tensor | None]]
    later_command: Callable[[Path], str]
    split_uncond: bool = False
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
            self.decoder.vae.release()

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
        self.decoder.vae.release()
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
        vae = self.decoder.vae.model
        vae.configure_memory(self.decoder.chunk_size, self.decoder.tile_size)
        with out_of_memory_in_one_line("while the source is encoded", lambda: ENCODE_LESS):
            posterior = vae.encode((pixels * 2 - 1)[None].to(self.device, next(vae.parameters()).dtype))
        latents = posterior.mean.float().cpu() * SCALING_FACTOR
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
            pixels = self.decoder.decode(latents)
        except Exception as error:
            reason = "out of memory" if is_out_of_memory(error) else one_line(error)
            raise UserError(
                f"decoding: {reason}; the latents are safe, decode later: {self.later_command(path)}"
            ) from error
        self.outputs.save_pixels(job, pixels)
