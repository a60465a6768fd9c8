"""From latents to pixels, for generation and for the previews of training."""

import functools
import sys
from typing import Literal

import torch
from torch import Tensor

from hunyuan_model import checkpoints
from hunyuan_model.vae import SCALING_FACTOR, AutoencoderKLCausal3D
from modules.generation.lazy_model import LazyModel
from modules.generation.sampler import NonFiniteError
from modules.options import VaeOptions
from utils.device_utils import default_dtype, is_out_of_memory, release_memory

LARGEST_TILE = 256  # pixels; tried first when memory runs out without tiles
SMALLEST_TILE = 64  # pixels; with smaller ones most of the work would be their overlap


def lazy_vae(
    options: VaeOptions, device: torch.device, when_released: Literal["free", "offload", "keep"] = "free"
) -> LazyModel[AutoencoderKLCausal3D]:
    """The VAE that the options describe. It is loaded at its first use."""
    place = torch.device("cpu") if when_released == "offload" else device
    load = functools.partial(checkpoints.load_vae, options.vae, place, default_dtype(options.vae_dtype, device))
    return LazyModel(load, device, when_released, advice="use --vae_dtype float16")


class Decoder:
    """Decodes latents with a VAE that the caller releases when there is nothing more to decode.

    Args:
        chunk_size: frames that a causal convolution sees at once; None for all.
        tile_size: pixels of a tile; None for no tiles. It shrinks when memory runs out.
    """

    def __init__(
        self,
        vae: LazyModel[AutoencoderKLCausal3D],
        device: torch.device,
        chunk_size: int | None = None,
        tile_size: int | None = None,
    ) -> None:
        self.vae, self.device, self.chunk_size, self.tile_size = vae, device, chunk_size, tile_size

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Scaled latents (1, C, f, h, w) -> pixels (3, F, H, W) in 0..1, float32 on the CPU.

        A VAE that makes NaN is converted to float32 and decodes again. If memory runs out, smaller tiles are tried.

        Raises:
            NonFiniteError: the VAE makes NaN even in float32.
        """
        vae = self.vae.model
        pixels = self._decode_in_tiles(vae, latents)
        if not _is_finite(pixels) and next(vae.parameters()).dtype != torch.float32:
            print("warning: the VAE made NaN; decoding again in float32", file=sys.stderr)
            vae.float()
            pixels = self._decode_in_tiles(vae, latents)
        if not _is_finite(pixels):
            raise NonFiniteError("NaN or infinity in the VAE's decoder, also in float32: check the VAE file")
        return pixels[0].div_(2).add_(0.5).clamp_(0, 1)  # in place: a long video takes gigabytes

    def _decode_in_tiles(self, vae: AutoencoderKLCausal3D, latents: Tensor) -> Tensor:
        """Pixels (1, 3, F, H, W) in -1..1."""
        unscaled = (latents / SCALING_FACTOR).to(self.device, next(vae.parameters()).dtype)
        while True:
            vae.configure_memory(self.chunk_size, self.tile_size)
            try:
                # Converted on the CPU: the GPU would hold the pixels in both dtypes.
                return vae.decode(unscaled).cpu().float()
            except Exception as error:
                smaller = (self.tile_size or 2 * LARGEST_TILE) // 2
                if not is_out_of_memory(error) or smaller < SMALLEST_TILE:
                    raise
            release_memory(self.device)
            self.tile_size = smaller
            print(f"warning: out of memory while decoding; trying tiles of {smaller} pixels", file=sys.stderr)


def _is_finite(tensor: Tensor) -> bool:
    """Like `torch.isfinite(tensor).all()`, but without a tensor of booleans as large as the input."""
    return all(bool(torch.isfinite(extreme)) for extreme in tensor.aminmax())
