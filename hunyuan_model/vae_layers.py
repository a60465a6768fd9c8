"""Layers of the causal 3D VAE; each holds its input, its output and a few frames more, whatever the length.

A convolution never sees its whole input padded, normalised or upsampled: it reads a few frames at a time from a
`Clip`, which computes them on the way. Its frames come last to first, so that a layer may overwrite its own input:
causal convolutions only look back. Activations are B C F H W. Blocks have no forward but `layers()`, which the network
runs itself: the caller of a block would keep the block's input until its end.

The layers have no backward pass: activations are overwritten, and the VAE is never trained here.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# A convolution's window and its piece of the output, each 512 MB in float32, whatever chunk size is set; also keeps
# every index below 2**31.
WINDOW_ELEMENTS = 2**27


class GroupNorm(nn.GroupNorm):
    """Group normalisation as one multiplication and one addition per channel, with statistics over all frames."""

    def scale_and_shift(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """float32 scale and shift, each B C 1 1 1, such that norm(x) = x * scale + shift."""
        frames = x.split(1, dim=2)
        totals = sum(frame.sum((2, 3, 4), keepdim=True, dtype=torch.float32) for frame in frames)  # B C 1 1 1
        mean = self._group_mean(totals / x[0, 0].numel())
        # One frame of workspace: a float32 copy of the whole would be as large as the activation.
        centred = torch.empty_like(frames[0], dtype=torch.float32)
        squares = sum(torch.sub(f, mean, out=centred).square_().sum((2, 3, 4), keepdim=True) for f in frames)
        variance = self._group_mean(squares / x[0, 0].numel())
        scale = self._per_channel(self.weight) * torch.rsqrt(variance + self.eps)
        return scale, self._per_channel(self.bias) - mean * scale

    def _group_mean(self, per_channel: Tensor) -> Tensor:
        """B C 1 1 1 -> B C 1 1 1, each channel holding the mean over its group."""
        grouped = per_channel.unflatten(1, (self.num_groups, -1))
        return grouped.mean(dim=2, keepdim=True).expand_as(grouped).flatten(1, 2)

    @staticmethod
    def _per_channel(parameter: Tensor) -> Tensor:
        return parameter.float().view(1, -1, 1, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        scale, shift = self.scale_and_shift(x)
        return torch.addcmul(shift, x, scale, out=torch.empty_like(x))


class Clip:
    """What a convolution reads: frames of a tensor, as they are. `shape` is B C F H W."""

    def __init__(self, x: Tensor) -> None:
        self.x = x
        self.shape = tuple(x.shape)

    def read(self, start: int, stop: int, out: Tensor) -> None:
        """Writes the frames start..stop into `out`, B C stop-start H W."""
        out.copy_(self.x[:, :, start:stop])


class Activated(Clip):
    """Frames of silu(norm(x))."""

    def __init__(self, x: Tensor, norm: GroupNorm) -> None:
        super().__init__(x)
        self.scale, self.shift = norm.scale_and_shift(x)

    def read(self, start: int, stop: int, out: Tensor) -> None:
        torch.addcmul(self.shift, self.x[:, :, start:stop], self.scale, out=out)
        F.silu(out, inplace=True)


class Upsampled(Clip):
    """Frames of x repeated `factors` times in (time, height, width); the first frame is not repeated in time."""

    def __init__(self, x: Tensor, factors: tuple[int, int, int]) -> None:
        super().__init__(x)
        self.factors = factors
        B, C, f, h, w = x.shape
        self.shape = (B, C, (f - 1) * factors[0] + 1, h * factors[1], w * factors[2])

    def read(self, start: int, stop: int, out: Tensor) -> None:
        per_frame, per_row, per_column = self.factors
        sources = (torch.arange(start, stop, device=self.x.device) + per_frame - 1) // per_frame
        frames = self.x.index_select(2, sources)
        for row in range(per_row):
            for column in range(per_column):
                out[..., row::per_row, column::per_column] = frames


class CausalConv3d(nn.Module):
    """3D convolution whose padding repeats the edges: in space on both sides, in time the first frame before itself.

    `chunk_size` is the number of frames computed at once, unless WINDOW_ELEMENTS allow fewer; None is as many as they
    allow. Any number is exact.
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int = 3, stride: tuple[int, int, int] = (1, 1, 1)
    ) -> None:
        super().__init__()
        self.conv = nn.Conv3d(in_channels, out_channels, kernel_size, stride)
        self.chunk_size: int | None = None

    def forward(self, clip: Clip) -> Tensor:
        B, _, *size = clip.shape
        f, h, w = ((length - 1) // stride + 1 for length, stride in zip(size, self.conv.stride))
        out = clip.x.new_empty(B, self.conv.out_channels, f, h, w)
        for frames, y in self.windows(clip):
            out[:, :, frames] = y
            del y
        return out

    def windows(self, clip: Clip) -> Iterator[tuple[slice, Tensor]]:
        """Yields the output in pieces, last frames first: which frames, and the piece B C frames H W.

        A piece is computed from input frames up to its own last one, so whoever has taken it may overwrite them, and
        should let go of it before asking for the next, lest both be in memory.
        """
        _, C, f, h, w = clip.shape
        stride, past = self.conv.stride[0], self.conv.kernel_size[0] - 1
        total = (f - 1) // stride + 1
        widest = max(C, self.conv.out_channels)
        most = max(1, WINDOW_ELEMENTS // (widest * h * w * stride))
        step = min(self.chunk_size or most, most)
        for start in reversed(range(0, total, step)):
            stop = min(start + step, total)
            yield slice(start, stop), self.conv(padded(clip, start * stride - past, (stop - 1) * stride + 1))


def padded(clip: Clip, start: int, stop: int) -> Tensor:
    """Frames start..stop of a clip with repeated edges; frames before 0 are frame 0.

    Returns:
        B C stop-start H+2 W+2
    """
    B, C, _, h, w = clip.shape
    before = max(-start, 0)
    window = clip.x.new_empty(B, C, stop - start, h + 2, w + 2)
    clip.read(max(start, 0), stop, out=window[:, :, before:, 1:-1, 1:-1])
    window[..., 0, :], window[..., -1, :] = window[..., 1, :], window[..., -2, :]
    window[..., 0], window[..., -1] = window[..., 1], window[..., -2]
    window[:, :, :before] = window[:, :, before : before + 1]
    return window


class ResnetBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))), with a 1x1x1 convolution of x where the channels change."""

    def __init__(self, in_channels: int, out_channels: int, groups: int) -> None:
        super().__init__()
        self.norm1 = GroupNorm(groups, in_channels, eps=1e-6)
        self.conv1 = CausalConv3d(in_channels, out_channels)
        self.norm2 = GroupNorm(groups, out_channels, eps=1e-6)
        self.conv2 = CausalConv3d(out_channels, out_channels)
        if in_channels != out_channels:
            self.conv_shortcut = CausalConv3d(in_channels, out_channels, kernel_size=1)
        else:
            self.conv_shortcut = None

    def forward(self, x: Tensor) -> Tensor:
        """Overwrites x, B C F H W."""
        h = self.conv1(Activated(x, self.norm1))
        out = x if self.conv_shortcut is None else h
        for frames, y in self.conv2.windows(Activated(h, self.norm2)):
            residual = x[:, :, frames] if self.conv_shortcut is None else self.conv_shortcut.conv(x[:, :, frames])
            torch.add(y, residual, out=out[:, :, frames])
            del y, residual
        return out


class FrameCausalAttention(nn.Module):
    """One-headed attention; a token sees all tokens of its own and of earlier frames."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.group_norm = GroupNorm(groups, channels, eps=1e-6)
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, x: Tensor) -> Tensor:
        """Overwrites x, B C F H W. Frame by frame, so that no mask is needed."""
        frames, (h, w) = x.shape[2], x.shape[3:]
        tokens = self.group_norm(x).flatten(3).permute(0, 2, 3, 1)  # B F HW C
        k = self.to_k(tokens).flatten(1, 2).unsqueeze(1)  # B 1 FHW C
        v = self.to_v(tokens).flatten(1, 2).unsqueeze(1)
        for index in range(frames):
            q = self.to_q(tokens[:, index]).unsqueeze(1)  # B 1 HW C
            seen = (index + 1) * h * w
            attended = F.scaled_dot_product_attention(q, k[:, :, :seen], v[:, :, :seen]).squeeze(1)
            x[:, :, index] += self.to_out[0](attended).transpose(1, 2).unflatten(2, (h, w))
        return x


class MidBlock(nn.Module):
    """Resnet, attention, resnet at the lowest resolution."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.resnets = nn.ModuleList([ResnetBlock(channels, channels, groups) for _ in range(2)])
        self.attentions = nn.ModuleList([FrameCausalAttention(channels, groups)])

    def layers(self) -> list[nn.Module]:
        return [self.resnets[0], self.attentions[0], self.resnets[1]]


class Downsample(nn.Module):
    """A convolution with a stride of 1 or 2 in (time, height, width)."""

    def __init__(self, channels: int, factors: tuple[int, int, int]) -> None:
        super().__init__()
        self.conv = CausalConv3d(channels, channels, stride=factors)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(Clip(x))


class Upsample(nn.Module):
    """Nearest-neighbour enlargement by 1 or 2 in (time, height, width), then a convolution."""

    def __init__(self, channels: int, factors: tuple[int, int, int]) -> None:
        super().__init__()
        self.factors = factors
        self.conv = CausalConv3d(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(Upsampled(x, self.factors))


def resnets(in_channels: int, out_channels: int, depth: int, groups: int) -> nn.ModuleList:
    """`depth` blocks, of which the first changes the number of channels."""
    return nn.ModuleList(
        [ResnetBlock(out_channels if index else in_channels, out_channels, groups) for index in range(depth)]
    )


class DownBlock(nn.Module):
    """Resnets, then a downsampler unless all `factors` are 1."""

    def __init__(
        self, in_channels: int, out_channels: int, depth: int, groups: int, factors: tuple[int, int, int]
    ) -> None:
        super().__init__()
        self.resnets = resnets(in_channels, out_channels, depth, groups)
        self.downsamplers = nn.ModuleList([Downsample(out_channels, factors)] if max(factors) > 1 else [])

    def layers(self) -> list[nn.Module]:
        return [*self.resnets, *self.downsamplers]


class UpBlock(nn.Module):
    """Resnets, then an upsampler unless all `factors` are 1."""

    def __init__(
        self, in_channels: int, out_channels: int, depth: int, groups: int, factors: tuple[int, int, int]
    ) -> None:
        super().__init__()
        self.resnets = resnets(in_channels, out_channels, depth, groups)
        self.upsamplers = nn.ModuleList([Upsample(out_channels, factors)] if max(factors) > 1 else [])

    def layers(self) -> list[nn.Module]:
        return [*self.resnets, *self.upsamplers]
