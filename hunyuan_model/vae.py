"""HunyuanVideo's causal 3D VAE "884-16c-hy": 4x compression in time, 8x8 in space, 16 latent channels.

Key names are those of the official checkpoint (and of diffusers' AutoencoderKLHunyuanVideo).
"""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hunyuan_model.vae_layers import Activated, CausalConv3d, Clip, DownBlock, GroupNorm, MidBlock, UpBlock
from hunyuan_model.vae_tiling import SPACE_COMPRESSION, TIME_COMPRESSION, Spans, overlapping, pixel_spans, run_tiles
from utils.errors import UserError

# Latents for the DiT = latents of the VAE x this factor (the official checkpoint's config.json).
SCALING_FACTOR = 0.476986
# Latent frames of a tile and their overlap. 33 are 129 frames, the longest clips of the DiT, so usual clips stay whole.
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
                f"VAE: {uneven[0]} channels cannot be divided into {groups} norm groups; a checkpoint with another "
                "number of groups states it in its metadata, key 'config', as {\"norm_num_groups\": N}"
            )

    @classmethod
    def from_shapes(
        cls, shapes: Mapping[str, tuple[int, ...]], metadata_config: Mapping[str, object] | None = None
    ) -> "VaeConfig":
        """The config of a state dict with these shapes by official key.

        Args:
            metadata_config: what shapes do not tell, `norm_num_groups`; other keys are ignored.

        Raises:
            UserError: no HunyuanVideo VAE, or one with another compression than 4x8x8.
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

    def _check_compression(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        for index in range(len(self.block_out_channels)):
            for key, factors in (
                (f"encoder.down_blocks.{index}.downsamplers.0.conv.conv.weight", self.down_factors(index)),
                (f"decoder.up_blocks.{index}.upsamplers.0.conv.conv.weight", self.up_factors(index)),
            ):
                if (max(factors) > 1) != (key in shapes):
                    found = "there" if key in shapes else "missing"
                    raise UserError(f"VAE: the key '{key}' is {found}, which is not a compression of 4x8x8 (884)")

    def down_factors(self, index: int) -> tuple[int, int, int]:
        """By how much encoder block `index` shrinks (time, height, width): space in the first three, time in the two
        before the last (the official model's rule for 4x8x8)."""
        last = len(self.block_out_channels) - 1
        time = 2 if last - 2 <= index < last else 1
        space = 2 if index < 3 else 1
        return time, space, space

    def up_factors(self, index: int) -> tuple[int, int, int]:
        """By how much decoder block `index` enlarges: the same rule, counted from the decoder's own first block."""
        return self.down_factors(index)


def _norm_groups(metadata_config: Mapping[str, object]) -> int:
    groups = metadata_config.get("norm_num_groups", VaeConfig.norm_num_groups)
    if type(groups) is not int or groups < 1:
        raise UserError(f"VAE metadata key 'config': norm_num_groups = {groups!r}: a whole number from 1 is expected")
    return groups


class DiagonalGaussian:
    """The encoder's answer: a normal distribution per latent element.

    Args:
        moments: B 2C f h w, means then log-variances.
    """

    def __init__(self, moments: Tensor) -> None:
        self.mean, logvar = moments.chunk(2, dim=1)
        self.logvar = logvar.clamp(-30.0, 20.0)  # the official limits, which keep exp finite

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """One draw, B C f h w. The noise is drawn in float32 on the generator's device (the CPU without one), so that
        a seed means the same for every dtype and device of the model."""
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
            DownBlock(before, after, config.layers_per_block, groups, config.down_factors(index))
            for index, (before, after) in enumerate(zip((channels[0], *channels), channels))
        )
        self.mid_block = MidBlock(channels[-1], groups)
        self.conv_norm_out = GroupNorm(groups, channels[-1], eps=1e-6)
        self.conv_out = CausalConv3d(channels[-1], 2 * config.latent_channels)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(Clip(x))
        for block in [*self.down_blocks, self.mid_block]:
            for layer in block.layers():
                x = layer(x)
        return self.conv_out(Activated(x, self.conv_norm_out))


class Decoder(nn.Module):
    """Latents B C f h w -> pixels B 3 F H W."""

    def __init__(self, config: VaeConfig) -> None:
        super().__init__()
        channels, groups = config.block_out_channels[::-1], config.norm_num_groups
        self.conv_in = CausalConv3d(config.latent_channels, channels[0])
        self.mid_block = MidBlock(channels[0], groups)
        self.up_blocks = nn.ModuleList(
            UpBlock(before, after, config.layers_per_block + 1, groups, config.up_factors(index))
            for index, (before, after) in enumerate(zip((channels[0], *channels), channels))
        )
        self.conv_norm_out = GroupNorm(groups, channels[-1], eps=1e-6)
        self.conv_out = CausalConv3d(channels[-1], config.pixel_channels)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(Clip(x))
        for block in [self.mid_block, *self.up_blocks]:
            for layer in block.layers():
                x = layer(x)
        return self.conv_out(Activated(x, self.conv_norm_out))


class AutoencoderKLCausal3D(nn.Module):
    """Encoder and decoder of HunyuanVideo; inference only. Latents are unscaled on both sides (see SCALING_FACTOR)."""

    def __init__(self, config: VaeConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quant_conv = nn.Conv3d(2 * config.latent_channels, 2 * config.latent_channels, kernel_size=1)
        self.post_quant_conv = nn.Conv3d(config.latent_channels, config.latent_channels, kernel_size=1)
        self.tile_size: int | None = None

    def configure_memory(self, chunk_size: int | None = None, tile_size: int | None = None) -> None:
        """Trades time for memory.

        Args:
            chunk_size: most frames that a causal convolution computes at once; None leaves the choice to each. Exact.
            tile_size: pixels of a square tile (rounded down to a multiple of 8, at least 32), a quarter of it
                overlapping; longer clips are also cut into tiles of 129 frames, so that memory is bounded. None takes
                each clip whole. Tiles change the result, since each has its own statistics.
        """
        if tile_size is not None and tile_size < 4 * SPACE_COMPRESSION:
            raise ValueError(f"tile_size = {tile_size}: at least {4 * SPACE_COMPRESSION} pixels")
        self.tile_size = tile_size
        for module in self.modules():
            if isinstance(module, CausalConv3d):
                module.chunk_size = chunk_size

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> DiagonalGaussian:
        """Pixels B 3 F H W in -1..1 -> the posterior over latents B C f h w.

        Raises:
            ValueError: F is not 4n + 1, or H or W is no multiple of 8.
        """
        B, _, F, H, W = pixels.shape
        if F % TIME_COMPRESSION != 1 or H % SPACE_COMPRESSION or W % SPACE_COMPRESSION:
            raise ValueError(
                f"{F} x {H} x {W}: frames must be 4n + 1, height and width multiples of {SPACE_COMPRESSION}"
            )
        f, h, w = F // TIME_COMPRESSION + 1, H // SPACE_COMPRESSION, W // SPACE_COMPRESSION
        tiles = self._tiles(f, h, w)
        moments = self.quant_conv.weight.new_zeros(B, 2 * self.config.latent_channels, f, h, w)
        run_tiles(lambda tile: self.quant_conv(self.encoder(tile)), pixels, pixel_spans(tiles), moments, tiles)
        return DiagonalGaussian(moments)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Unscaled latents B C f h w -> pixels B 3 F H W, about -1..1, not clamped."""
        B, _, f, h, w = latents.shape
        tiles = self._tiles(f, h, w)
        F, H, W = (axis[-1][1] for axis in pixel_spans(tiles))
        pixels = self.quant_conv.weight.new_zeros(B, self.config.pixel_channels, F, H, W)
        run_tiles(lambda tile: self.decoder(self.post_quant_conv(tile)), latents, tiles, pixels, pixel_spans(tiles))
        return pixels

    def _tiles(self, f: int, h: int, w: int) -> list[Spans]:
        if self.tile_size is None:
            return [[(0, f)], [(0, h)], [(0, w)]]
        tile = self.tile_size // SPACE_COMPRESSION
        return [overlapping(f, TIME_TILE, TIME_OVERLAP), *(overlapping(n, tile, tile // 4) for n in (h, w))]
