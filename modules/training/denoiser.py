"""The DiT as training calls it: batches in, velocities out; and the protocol of what is trained."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from dataset.image_video_dataset import Batch
from hunyuan_model.models import HYVideoDiffusionTransformer
from hunyuan_model.vae import SCALING_FACTOR
from modules.generation.sampler import GUIDANCE_SCALE, TIMESTEP_SCALE


@dataclass(frozen=True)
class Denoiser:
    """A DiT, called with the batches of training.

    Attributes:
        guidance: embedded guidance scale; the DiT takes it times 1000.
        device: where the DiT runs.
        split_batches: run the items of a batch one by one.
    """

    dit: HYVideoDiffusionTransformer
    guidance: float
    device: torch.device
    split_batches: bool = False

    def latents(self, batch: Batch) -> Tensor:
        """The latents x0 of a batch in the scale of the DiT, (B, C, f, h, w) float32 on the device."""
        return batch.latents.to(self.device, torch.float32) * SCALING_FACTOR

    def velocity(self, x_t: Tensor, sigma: Tensor, batch: Batch) -> Tensor:
        """The velocity that the DiT predicts, (B, C, f, h, w).

        Args:
            x_t: noisy latents (B, C, f, h, w).
            sigma: their noise levels (B,) in 0..1.
            batch: its captions condition the DiT; an image-to-video DiT also gets its first frames.
        """
        guidance = torch.full_like(sigma, self.guidance * GUIDANCE_SCALE) if self.dit.config.guidance_embed else None
        captions = [batch.text_states, batch.text_mask, batch.text_states_2]
        captions = [tensor.to(self.device, non_blocking=True) for tensor in captions]
        x = self._with_image(x_t, batch)
        arguments = (x, sigma * TIMESTEP_SCALE, *captions, guidance)
        if not self.split_batches:
            return self.dit(*arguments)
        items = [[None if a is None else a[i : i + 1] for a in arguments] for i in range(len(sigma))]
        return torch.cat([self._velocity_of_item(item) for item in items])

    def _velocity_of_item(self, arguments: Sequence[Tensor | None]) -> Tensor:
        # Autocast would reuse its cast weights for the next item. Then the gradients of the items would be summed in
        # half precision, and selective checkpointing, which counts operations, would find fewer of them in the second
        # run of a block than in the first.
        torch.clear_autocast_cache()
        return self.dit(*arguments)

    def _with_image(self, x_t: Tensor, batch: Batch) -> Tensor:
        """For an image-to-video DiT with twice the input channels: x_t, and the first frame followed by zeros."""
        if self.dit.config.in_channels == x_t.shape[1]:
            return x_t
        image = torch.zeros_like(x_t)
        image[:, :, :1] = self.latents(batch)[:, :, :1]
        return torch.cat((x_t, image), dim=1)  # B 2C f h w


class Trained(Protocol):
    """What is trained: a network beside the frozen DiT, or parameters of the DiT itself."""

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Every trained tensor by name."""

    @property
    def facts(self) -> dict[str, Any]:
        """Fields of `networks.files.metadata.RunFacts` that describe it in the metadata of a checkpoint."""

    def parameter_groups(self, learning_rate: float) -> list[dict[str, Any]]:
        """Parameter groups for the optimizer."""

    def start_epoch(self) -> None:
        """Called before the first step of every epoch."""

    def start_step(self) -> None:
        """Called before every step."""

    def after_update(self) -> dict[str, float]:
        """Called after every optimizer step; returns numbers for the log by name."""

    def evaluation(self) -> AbstractContextManager[None]:
        """Inside, dropout is off, as it will be when the checkpoint is used."""

    def switched_off(self) -> AbstractContextManager[None]:
        """Inside, the DiT is as it was before training."""

    def save(self, path: Path, metadata: Mapping[str, str]) -> list[Path]:
        """Writes a checkpoint; returns every file that was written, `path` first."""
