"""HunyuanVideo's causal 3D VAE "884-16c-hy": 4x compression in time, 8x8 in space, 16 latent channels.

Key names are those of the official checkpoint (and of diffusers' AutoencoderKLHunyuanVideo).
"""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hunyuan_model.shapes import Shapes
from hunyuan_model.vae_layers import ActivatedFrames, CausalConv3d, DownBlock, GroupNorm, MidBlock, UpBlock
from hunyuan_model.vae_tiling import (
    SPACE_COMPRESSION,
    TIME_COMPRESSION,
    Spans,
    overlapping_spans,
    pixel_spans,
    run_tiles,
)
from utils.errors import UserError

# The DiT's latents are the VAE's latents times this factor (config.json of the official checkpoint).
SCALING_FACTOR = 0.476986
# Latent frames of a tile, and of the overlap of two. 33 latent frames are 129 frames, the longest clip that the DiT was
# trained on, so usual clips are not cut in time.
TIME_TILE, TIME_OVERLAP = 33, 9


@dataclass(frozen=True)
class VaeConfig:
    """Sizes of the network; the defaults are the official model's."""

    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    pixel_channels: int = 3
    latent_channels: int = 16
    norm_num_groups: int = 32

    def __post_init__(self) -> None:
        groups = self.norm_num_groups
        uneven = [channels for channels in self.block_out_channels if channels % groups]
        if uneven:
            raise UserError(
                f"VAE: {uneven[0]} channels cannot be divided into {groups} norm groups; if this VAE has another "
                "number of groups, write it into the file's metadata, key 'config', as {\"norm_num_groups\": N}"
            )

    @classmethod
    def from_shapes(cls, shapes: Shapes, metadata_config: Mapping[str, object] | None = None) -> "VaeConfig":
        """Reads every size from the shapes of an official state dict.

        Args:
            shapes: {name: shape} with official names.
            metadata_config: the checkpoint's config, of which `norm_num_groups` is used: shapes do not tell it.

        Raises:
            UserError: not a HunyuanVideo VAE, or one whose compression is not 4x8x8.
        """

        def shape(key: str) -> tuple[int, ...]:
            if key not in shapes:
                raise UserError(f"not a HunyuanVideo VAE: the key '{key}' is missing among {len(shapes)} keys")
            return tuple(shapes[key])

        def count(pattern: str) -> int:
            return next(n for n in itertools.count() if pattern.format(n) not in shapes)

        blocks = count("encoder.down_blocks.{}.resnets.0.conv1.conv.weight")
        config = cls(
            block_out_channels=tuple(
                shape(f"encoder.down_blocks.{index}.resnets.0.conv1.conv.weight")[0] for index in range(max(blocks, 1))
            ),
            layers_per_block=count("encoder.down_blocks.0.resnets.{}.conv1.conv.weight"),
            pixel_channels=shape("decoder.conv_out.conv.weight")[0],
            latent_channels=shape("post_quant_conv.weight")[0],
            norm_num_groups=_norm_groups(metadata_config or {}),
        )
        config._check_compression(shapes)
        return config

    def _check_compression(self, shapes: Shapes) -> None:
        for index in range(len(self.block_out_channels)):
            for key in (
                f"encoder.down_blocks.{index}.downsamplers.0.conv.conv.weight",
                f"decoder.up_blocks.{index}.upsamplers.0.conv.conv.weight",
            ):
                if (max(self.factors(index)) > 1) != (key in shapes):
                    found = "there" if key in shapes else "missing"
                    raise UserError(
                        f"VAE: the key '{key}' is {found}, but only a compression of 4x8x8 (884) is supported"
                    )

    def factors(self, index: int) -> tuple[int, int, int]:
        """(time, height, width) factors by which encoder block `index` shrinks and decoder block `index` enlarges.

        The official model's rule for 4x8x8: space in the first three blocks, time in the two before the last.
        """
        last = len(self.block_out_channels) - 1
        time = 2 if last - 2 <= index < last else 1
        space = 2 if index < 3 else 1
        return time, space, space


def _norm_groups(metadata_config: Mapping[str, object]) -> int:
    groups = metadata_config.get("norm_num_groups", VaeConfig.norm_num_groups)
    if type(groups) is not int or groups < 1:
        raise UserError(
            f"VAE metadata key 'config': norm_num_groups = {groups!r}: a whole number of at least 1 is expected"
        )
    return groups


class DiagonalGaussian:
    """The encoder's output: a normal distribution for each latent element.

    Args:
        moments: B 2C f h w, means then log-variances.
    """

    def __init__(self, moments: Tensor) -> None:
        self.mean, logvar = moments.chunk(2, dim=1)
        self.logvar = logvar.clamp(-30.0, 20.0)  # the official limits, which keep exp finite

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """One sample, B C f h w.

        Noise is drawn in float32 on the generator's device, or on the CPU without a generator. So a seed gives the same
        noise whatever the model's dtype and device are.
        """
        device = generator.device if generator is not None else "cpu"
        noise = torch.randn(self.mean.shape, generator=generator, device=device)
        return self.mean + torch.exp(0.5 * self.logvar) * noise.to(self.mean)


class Encoder(nn.Module):
    """Pixels B 3 F H W -> moments B 2C f h w."""

    def __init__(self, config: VaeConfig) -> None:
        super().__init__()
        channels, groups = config.block_out_channels, config.norm_num_groups
        self.conv_in = CausalConv3d(config.pixel_channels, channels[0])
        self.down_blocks = nn.ModuleList(
            DownBlock(before, after, config.layers_per_block, groups, config.factors(index))
            for index, (before, after) in enumerate(zip((channels[0], *channels), channels))
        )
        self.mid_block = MidBlock(channels[-1], groups)
        self.conv_norm_out = GroupNorm(groups, channels[-1], eps=1e-6)
        self.conv_out = CausalConv3d(channels[-1], 2 * config.latent_channels)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for block in [*self.down_blocks, self.mid_block]:
            for layer in block.layers():
                x = layer(x)
        return self.conv_out(ActivatedFrames(x, self.conv_norm_out))


class Decoder(nn.Module):
    """Latents B C f h w -> pixels B 3 F H W."""

    def __init__(self, config: VaeConfig) -> None:
        super().__init__()
        channels, groups = config.block_out_channels[::-1], config.norm_num_groups
        self.conv_in = CausalConv3d(config.latent_channels, channels[0])
        self.mid_block = MidBlock(channels[0], groups)
        self.up_blocks = nn.ModuleList(
            UpBlock(before, after, config.layers_per_block + 1, groups, config.factors(index))
            for index, (before, after) in enumerate(zip((channels[0], *channels), channels))
        )
        self.conv_norm_out = GroupNorm(groups, channels[-1], eps=1e-6)
        self.conv_out = CausalConv3d(channels[-1], config.pixel_channels)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for block in [self.mid_block, *self.up_blocks]:
            for layer in block.layers():
                x = layer(x)
        return self.conv_out(ActivatedFrames(x, self.conv_norm_out))


class AutoencoderKLCausal3D(nn.Module):
    """Encoder and decoder, for inference only. Latents are unscaled (see SCALING_FACTOR)."""

    def __init__(self, config: VaeConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quant_conv = nn.Conv3d(2 * config.latent_channels, 2 * config.latent_channels, kernel_size=1)
        self.post_quant_conv = nn.Conv3d(config.latent_channels, config.latent_channels, kernel_size=1)
        self.tile_size: int | None = None

    def configure_memory(self, chunk_size: int | None = None, tile_size: int | None = None) -> None:
        """Saves memory and costs time.

        Args:
            chunk_size: the largest number of frames that a convolution computes at once; None: only its own limit
                applies (`vae_layers.WINDOW_ELEMENTS`). It does not change the result.
            tile_size: height and width of a tile in pixels, at least 32, rounded down to a multiple of 8. Neighbouring
                tiles overlap by a quarter. In time a tile has at most 129 frames, so that memory is bounded however
                long the clip is. Tiles change the result: each is normalised with its own statistics. None: no tiles.
        """
        if tile_size is not None and tile_size < 4 * SPACE_COMPRESSION:
            raise ValueError(f"tile_size = {tile_size}: at least {4 * SPACE_COMPRESSION} pixels")
        self.tile_size = tile_size
        for module in self.modules():
            if isinstance(module, CausalConv3d):
                module.chunk_size = chunk_size

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> DiagonalGaussian:
        """Pixels B 3 F H W in -1..1 -> the distribution of the latents B C f h w.

        Raises:
            ValueError: F is not 4n + 1, or H or W is not a multiple of 8.
        """
        B, _, F, H, W = pixels.shape
        if F % TIME_COMPRESSION != 1 or H % SPACE_COMPRESSION or W % SPACE_COMPRESSION:
            raise ValueError(
                f"{F} x {H} x {W}: frames must be 4n + 1, height and width multiples of {SPACE_COMPRESSION}"
            )
        f, h, w = F // TIME_COMPRESSION + 1, H // SPACE_COMPRESSION, W // SPACE_COMPRESSION
        tiles = self._tiles(f, h, w)
        moments = self.quant_conv.weight.new_zeros(B, 2 * self.config.latent_channels, f, h, w)
        run_tiles(self._encode_tile, pixels, pixel_spans(tiles), moments, tiles)
        return DiagonalGaussian(moments)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Unscaled latents B C f h w -> pixels B 3 F H W, about -1..1, not clamped."""
        B, _, f, h, w = latents.shape
        tiles = self._tiles(f, h, w)
        F, H, W = (axis[-1][1] for axis in pixel_spans(tiles))
        pixels = self.quant_conv.weight.new_zeros(B, self.config.pixel_channels, F, H, W)
        run_tiles(self._decode_tile, latents, tiles, pixels, pixel_spans(tiles))
        return pixels

    def _encode_tile(self, pixels: Tensor) -> Tensor:
        return self.quant_conv(self.encoder(pixels))

    def _decode_tile(self, latents: Tensor) -> Tensor:
        return self.decoder(self.post_quant_conv(latents))

    def _tiles(self, f: int, h: int, w: int) -> list[Spans]:
        if self.tile_size is None:
            return [[(0, f)], [(0, h)], [(0, w)]]
        tile = self.tile_size // SPACE_COMPRESSION
        return [overlapping_spans(f, TIME_TILE, TIME_OVERLAP), *(overlapping_spans(n, tile, tile // 4) for n in (h, w))]
