"""From jobs to files with one load per model: all texts are encoded, all latents sampled, then all videos decoded.

Latents are saved before the VAE is loaded. A job that fails does not stop the others.
"""

import contextlib
import errno
import functools
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor
from tqdm import tqdm

from hunyuan_model.vae import SCALING_FACTOR
from modules.blocks.step_cache import StepCache
from modules.generation.decoding import Decoder, lazy_vae
from modules.generation.models import lazy_dit, verify_attention
from modules.generation.options import GenerationOptions
from modules.generation.outputs import Job, OutputFolder, load_latents
from modules.generation.requests import Request
from modules.generation.sampler import Conditioning, NonFiniteError, sample_latents
from modules.generation.settings import decode_command
from modules.generation.source_pixels import source_pixels
from modules.generation.text_encoding import encode_texts, lazy_text_encoders
from modules.memory.plan import explain_out_of_memory
from networks.hooks import LoraHooks
from utils.device_utils import is_out_of_memory, own_device, release_memory
from utils.errors import UserError, one_line

# What a user can do when memory runs out.
ENCODING_ADVICE = "use --vae_chunk_size, --vae_tiling or a smaller size"
SAMPLING_ADVICE = "use --blocks_to_swap, --fp8, --split_uncond, a smaller size or fewer frames"
FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


class Pipeline:
    """The models and settings that turn jobs into files. Models are loaded when they are needed.

    Args:
        when_released: "keep" leaves every model loaded, for jobs that come one by one.

    Attributes:
        failures: what went wrong with each job that failed, by stem.
        seconds: the time that each job took so far, by stem.

    Raises:
        UserError: --attn_mode does not run on this device.
    """

    def __init__(self, options: GenerationOptions, when_released: Literal["free", "keep"] = "free") -> None:
        self.options, speed, vae = options, options.speed, options.vae
        self.device = own_device(options.device.device)
        if not options.output.latent_path:
            verify_attention(options, self.device)
        self.outputs = OutputFolder(options.output.save_path, options.output.output_type)
        self.step_cache = None if speed.step_cache is None else StepCache(speed.step_cache)
        self.text_encoders = lazy_text_encoders(options.text, self.device, when_released)
        self.dit = lazy_dit(options, self.device, self.step_cache, when_released)
        self.vae = lazy_vae(vae, self.device, when_released)
        self.decoder = Decoder(self.vae, self.device, vae.vae_chunk_size, vae.tile_size)
        self.failures: dict[str, str] = {}
        self.seconds: dict[str, float] = {}
        self._sampled: set[str] = set()  # stems of the jobs whose latents this run has saved

    def sample(self, jobs: Sequence[Job]) -> None:
        """Samples and saves the latents of every job that has none yet."""
        jobs = [job for job in jobs if job.latents is None and not self.outputs.latent_path(job).exists()]
        if not jobs:
            return
        prompts = self._encode_prompts(jobs)
        sources = self._encode_sources(jobs)
        self.dit.load()
        lora_hooks = LoraHooks(self.dit.model)
        for number, job in enumerate(self._unfailed(jobs), start=1):
            with self._noting_failure(job):
                if job.loras is not None:
                    lora_hooks.use(job.loras, self.options.lora.exclude_single_blocks)
                bar = tqdm(total=job.request.steps, desc=f"video {number}/{len(jobs)}", unit="step")
                with bar, explain_out_of_memory("in sampling", SAMPLING_ADVICE):
                    latents = sample_latents(
                        self.dit.model,
                        job.request,
                        prompts[job.request.prompt],
                        prompts.get(job.request.negative_prompt),
                        device=self.device,
                        split_uncond=self.options.speed.split_uncond or self.options.speed.split_attn,
                        before_step=functools.partial(self._before_step, bar),
                        **sources.get(job.stem, {}),
                    )
                    bar.update(bar.total - bar.n)
                if self.step_cache is not None:
                    self.step_cache.forget()
                self.outputs.save_latents(job, latents)
                self._sampled.add(job.stem)
        self.dit.release()

    def decode(self, jobs: Sequence[Job], save: Callable[[Job, Tensor], None] | None = None) -> None:
        """Writes the video or the images of every job, unless only latents are asked for.

        Args:
            save: called with (job, pixels (3, F, H, W) in 0..1) instead; then the latents are kept.
        """
        if not self.outputs.decodes:
            return
        for job in tqdm(self._unfailed(jobs), desc="decoding", unit="video", disable=len(jobs) < 2):
            with self._noting_failure(job):
                pixels = self._pixels(job)
                if save is not None:
                    save(job, pixels)
                else:
                    self.outputs.save_pixels(job, pixels)
                    self.remove_unwanted_latents(job)
        self.vae.release()

    def remove_unwanted_latents(self, job: Job) -> None:
        """Deletes the latents of a job if this run has sampled them and --output_type does not ask for them.

        Latents of an earlier run stay: it may have been asked for them.
        """
        if job.stem in self._sampled and not self.outputs.keeps_latents:
            self.outputs.latent_path(job).unlink(missing_ok=True)

    def _unfailed(self, jobs: Iterable[Job]) -> list[Job]:
        return [job for job in jobs if job.stem not in self.failures]

    @contextlib.contextmanager
    def _noting_failure(self, job: Job) -> Iterator[None]:
        """For one phase of one job: measures its time, and turns an exception into a note in `failures`.

        Raises:
            UserError: the disk is full or read-only, so that no other job could be saved either.
        """
        start = time.monotonic()
        try:
            yield
        except Exception as error:
            if is_out_of_memory(error):
                error = UserError("out of memory; use a smaller size, fewer frames or smaller tiles of the VAE")
            if not isinstance(error, (UserError, OSError)):
                traceback.print_exc()
            self.failures[job.stem] = one_line(error)
            print(f"failed: {job.stem}: {self.failures[job.stem]}", file=sys.stderr)
            release_memory(self.device)
            if getattr(error, "errno", None) in FULL_DISK:
                folder = self.outputs.folder
                raise UserError(
                    f"{folder}: {os.strerror(error.errno)}; stopped, because no other file could be saved; make room "
                    "and run the same command again"
                ) from error
        self.seconds[job.stem] = self.seconds.get(job.stem, 0.0) + time.monotonic() - start

    def _encode_prompts(self, jobs: Iterable[Job]) -> dict[str, Conditioning]:
        texts = [job.request.prompt for job in jobs]
        texts += [job.request.negative_prompt for job in jobs if job.request.cfg_scale != 1.0]
        return encode_texts(texts, *self.text_encoders)

    def _encode_sources(self, jobs: Iterable[Job]) -> dict[str, Mapping[str, Tensor]]:
        """By stem: the latents that a job starts from, as arguments of `sample_latents`."""
        sources = {}
        for job in jobs:
            if job.request.video_path or job.request.image_path:
                with self._noting_failure(job):
                    sources[job.stem] = self._encode_source(job.request)
        self.vae.release()
        return sources

    @torch.no_grad()
    def _encode_source(self, request: Request) -> dict[str, Tensor]:
        """Scaled latents of the video (`source`) and of the image (`image`) that a request starts from."""
        video, image = source_pixels(request)
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
        vae.configure_memory(self.decoder.chunk_size, self.decoder.tile_size)
        with explain_out_of_memory("while the source is encoded", ENCODING_ADVICE):
            posterior = vae.encode((pixels * 2 - 1)[None].to(self.device, next(vae.parameters()).dtype))
        latents = posterior.mean.float().cpu() * SCALING_FACTOR
        if not torch.isfinite(latents).all():
            raise NonFiniteError("NaN or infinity in the VAE's encoder: use --vae_dtype float32, or check the VAE file")
        return latents

    def _before_step(self, bar: tqdm, step: int, steps: int) -> None:
        bar.total = steps  # fewer than the request asks for if a video is the start
        bar.update(step - bar.n)
        if self.step_cache is not None:
            self.step_cache.begin_step(step, steps)

    def _pixels(self, job: Job) -> Tensor:
        """Pixels (3, F, H, W) in 0..1 of a job whose latents are given or already sampled.

        Raises:
            UserError: latents that were sampled cannot be decoded; names the command that decodes them later.
        """
        if job.latents is not None:
            return self.decoder.decode(job.latents)
        path = self.outputs.latent_path(job)
        latents, _ = load_latents(path)
        try:
            return self.decoder.decode(latents)
        except Exception as error:
            reason = "out of memory" if is_out_of_memory(error) else one_line(error)
            command = decode_command(self.options, path)
            raise UserError(f"decoding: {reason}; the latents are saved, decode them later: {command}") from error
