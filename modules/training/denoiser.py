"""A video DiT as training sees it: batches in, velocities out; and what of it is trained."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from modules.generation.sampler import GUIDANCE_SCALE, TIMESTEP_SCALE
from utils.errors import UserError


@dataclass(frozen=True)
class TrainingModel:
    """A DiT with what its call needs besides the batch.

    Attributes:
        dit: called as dit(x, timestep, text_states, text_mask, text_states_2, guidance), with `config.in_channels` and
            `config.guidance_embed`.
        latent_scale: latents of the DiT = latents of the cache x this.
        guidance: embedded guidance scale; the model is given it x 1000.
        split_batches: run the items of a batch one by one.
    """

    dit: nn.Module
    latent_scale: float
    guidance: float
    device: torch.device
    split_batches: bool = False

    def latents(self, batch: Any) -> Tensor:
        """Scaled latents x0 of a batch, (B, C, f, h, w) float32 on the device."""
        return batch.latents.to(self.device, torch.float32) * self.latent_scale

    def velocity(self, x_t: Tensor, sigma: Tensor, batch: Any) -> Tensor:
        """What the DiT predicts for noisy latents x_t (B, C, f, h, w) at sigma (B,) and the captions of the batch."""
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
        # Casts that autocast keeps from one item to the next would sum the items' gradients in half precision; and
        # selective checkpointing, which counts operations, would miss them where a block's second run makes its own.
        torch.clear_autocast_cache()
        return self.dit(*arguments)

    def _with_image(self, x_t: Tensor, batch: Any) -> Tensor:
        """Image-to-video models with doubled input channels see the first frame, and zeros after it, beside x_t."""
        if self.dit.config.in_channels == x_t.shape[1]:
            return x_t
        image = torch.zeros_like(x_t)
        image[:, :, :1] = self.latents(batch)[:, :, :1]
        return torch.cat((x_t, image), dim=1)  # B 2C f h w


def check_input_channels(path: Path, channels: int, latent_channels: int, previews: bool) -> None:
    """Whether a DiT takes what `TrainingModel` gives it: latents, alone or beside those of an image.

    Raises:
        UserError: the DiT at `path` takes something else, or an image where previews, which have none, are wanted.
    """
    doubled = 2 * latent_channels
    if channels not in (latent_channels, doubled):
        raise UserError(
            f"{path}: {channels} input channels; only {latent_channels} (text to video) and {doubled} (latents and an "
            "image, as in SkyReels-V1-I2V) can be trained"
        )
    if channels == doubled and previews:
        raise UserError(
            f"--sample_prompts: {path} makes videos of an image, and previews start from no image; leave it out"
        )


class Trained(Protocol):
    """What is trained: a network beside the frozen DiT, or parts of the DiT itself."""

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Every trained tensor by name."""

    def parameter_groups(self, learning_rate: float) -> list[dict[str, Any]]:
        """Groups for the optimizer."""

    def start_epoch(self) -> None: ...

    def start_step(self) -> None: ...

    def after_update(self) -> None:
        """Called after every optimizer step."""

    def evaluation(self) -> AbstractContextManager[None]:
        """Without dropout, as what is saved is used later."""

    def switched_off(self) -> AbstractContextManager[None]:
        """The DiT as it was before training."""

    def save(self, path: Path, dtype: torch.dtype | None, metadata: Mapping[str, str]) -> None: ...
