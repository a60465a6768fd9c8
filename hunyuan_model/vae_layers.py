"""Layers of the causal 3D VAE, which need little more memory than their input and output, however long the clip is.

- A convolution does not pad, normalise or upsample its whole input. It asks a `Frames` object for a few frames at a
  time, which normalises or upsamples just these.
- A convolution computes the last frames first. It is causal, so the frames that it still needs are earlier ones, and a
  layer may write its output over the frames of its input that are no longer needed.
- A block has no `forward`. It lists its `layers()`, which the network runs one by one. If the network called a block,
  it would keep the block's input in memory until the block returned.

Activations are B C F H W. The layers are for inference only: they overwrite activations that a backward pass needs.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# The most elements (512 MB in float32) that a convolution reads, and that it computes, at once, whatever chunk size is
# set. It also keeps every index below 2**31.
WINDOW_ELEMENTS = 2**27


class GroupNorm(nn.GroupNorm):
    """Group normalisation with statistics over all frames, applied as one scale and one shift per channel."""

    def scale_and_shift(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """float32 scale and shift, each B C 1 1 1, such that norm(x) = x * scale + shift."""
        frames = x.split(1, dim=2)
        totals = sum(frame.sum((2, 3, 4), keepdim=True, dtype=torch.float32) for frame in frames)  # B C 1 1 1
        mean = self._group_mean(totals / x[0, 0].numel())
        # A workspace of one frame, since a float32 copy of all frames would take at least as much memory as x.
        centred = torch.empty_like(frames[0], dtype=torch.float32)
        squares = sum(torch.sub(f, mean, out=centred).square_().sum((2, 3, 4), keepdim=True) for f in frames)
        variance = self._group_mean(squares / x[0, 0].numel())
        scale = self._per_channel(self.weight) * torch.rsqrt(variance + self.eps)
        return scale, self._per_channel(self.bias) - mean * scale

    def _group_mean(self, per_channel: Tensor) -> Tensor:
        """B C 1 1 1 -> B C 1 1 1: the value of each channel becomes the mean of its group."""
        grouped = per_channel.unflatten(1, (self.num_groups, -1))
        return grouped.mean(dim=2, keepdim=True).expand_as(grouped).flatten(1, 2)

    @staticmethod
    def _per_channel(parameter: Tensor) -> Tensor:
        return parameter.float().view(1, -1, 1, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        scale, shift = self.scale_and_shift(x)
        return torch.addcmul(shift, x, scale, out=torch.empty_like(x))


class Frames:
    """The input of a convolution, read a few frames at a time; here the frames of a tensor, unchanged.

    Attributes:
        shape: (B, C, F, H, W) of the whole input.
    """

    def __init__(self, x: Tensor) -> None:
        self.x = x
        self.shape = tuple(x.shape)

    def read(self, start: int, stop: int, out: Tensor) -> None:
        """Writes the frames start to stop - 1 into `out`, B C stop-start H W."""
        out.copy_(self.x[:, :, start:stop])


class ActivatedFrames(Frames):
    """The frames of silu(norm(x))."""

    def __init__(self, x: Tensor, norm: GroupNorm) -> None:
        super().__init__(x)
        self.scale, self.shift = norm.scale_and_shift(x)

    def read(self, start: int, stop: int, out: Tensor) -> None:
        torch.addcmul(self.shift, self.x[:, :, start:stop], self.scale, out=out)
        F.silu(out, inplace=True)


class UpsampledFrames(Frames):
    """The frames of x repeated `factors` times in (time, height, width); the first frame is not repeated in time."""

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
    """3D convolution that is causal in time. Padding repeats the edges: on both sides in space, at the start in time.

    Attributes:
        chunk_size: the largest number of output frames to compute at once; None: only WINDOW_ELEMENTS limits it, which
            always applies. It does not change the result.
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int = 3, stride: tuple[int, int, int] = (1, 1, 1)
    ) -> None:
        super().__init__()
        self.conv = nn.Conv3d(in_channels, out_channels, kernel_size, stride)
        self.chunk_size: int | None = None

    def forward(self, x: Tensor | Frames) -> Tensor:
        """B C F H W -> B C f h w."""
        source = x if isinstance(x, Frames) else Frames(x)
        B, _, *size = source.shape
        f, h, w = ((length - 1) // stride + 1 for length, stride in zip(size, self.conv.stride))
        out = source.x.new_empty(B, self.conv.out_channels, f, h, w)
        for frames, y in self.chunks(source):
            out[:, :, frames] = y
            del y
        return out

    def chunks(self, source: Frames) -> Iterator[tuple[slice, Tensor]]:
        """Yields the output in chunks, the last frames first: the slice of frames, and the chunk B C frames h w.

        A chunk depends on no input frame later than its own, so with a stride of 1 the caller may overwrite the input
        frames of this slice. It should delete the chunk before it asks for the next one, so that only one is in memory.
        """
        _, C, f, h, w = source.shape
        stride, past = self.conv.stride[0], self.conv.kernel_size[0] - 1
        total = (f - 1) // stride + 1
        widest = max(C, self.conv.out_channels)
        most = max(1, WINDOW_ELEMENTS // (widest * h * w * stride))
        step = min(self.chunk_size or most, most)
        for start in reversed(range(0, total, step)):
            stop = min(start + step, total)
            yield slice(start, stop), self.conv(padded(source, start * stride - past, (stop - 1) * stride + 1))


def padded(source: Frames, start: int, stop: int) -> Tensor:
    """The frames start to stop - 1 with repeated edges; a frame before 0 is frame 0.

    Returns:
        B C stop-start H+2 W+2
    """
    B, C, _, h, w = source.shape
    before = max(-start, 0)
    window = source.x.new_empty(B, C, stop - start, h + 2, w + 2)
    source.read(max(start, 0), stop, out=window[:, :, before:, 1:-1, 1:-1])
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
        """B C F H W -> B C F H W; x is overwritten."""
        h = self.conv1(ActivatedFrames(x, self.norm1))
        out = x if self.conv_shortcut is None else h
        for frames, y in self.conv2.chunks(ActivatedFrames(h, self.norm2)):
            residual = x[:, :, frames] if self.conv_shortcut is None else self.conv_shortcut.conv(x[:, :, frames])
            torch.add(y, residual, out=out[:, :, frames])
            del y, residual
        return out


class FrameCausalAttention(nn.Module):
    """Attention with one head; a token attends to all tokens of its own frame and of earlier ones."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.group_norm = GroupNorm(groups, channels, eps=1e-6)
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, x: Tensor) -> Tensor:
        """B C F H W -> B C F H W; x is overwritten. The queries of one frame at a time, so that no mask is needed."""
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
    """A convolution whose stride is `factors`, each 1 or 2, in (time, height, width)."""

    def __init__(self, channels: int, factors: tuple[int, int, int]) -> None:
        super().__init__()
        self.conv = CausalConv3d(channels, channels, stride=factors)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class Upsample(nn.Module):
    """Nearest-neighbour upsampling by `factors`, each 1 or 2, in (time, height, width), then a convolution."""

    def __init__(self, channels: int, factors: tuple[int, int, int]) -> None:
        super().__init__()
        self.factors = factors
        self.conv = CausalConv3d(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(UpsampledFrames(x, self.factors))


def resnet_blocks(in_channels: int, out_channels: int, depth: int, groups: int) -> nn.ModuleList:
    """`depth` blocks; the first one changes the number of channels."""
    return nn.ModuleList(
        [ResnetBlock(out_channels if index else in_channels, out_channels, groups) for index in range(depth)]
    )


class DownBlock(nn.Module):
    """Resnets, then a downsampler unless all `factors` are 1."""

    def __init__(
        self, in_channels: int, out_channels: int, depth: int, groups: int, factors: tuple[int, int, int]
    ) -> None:
        super().__init__()
        self.resnets = resnet_blocks(in_channels, out_channels, depth, groups)
        self.downsamplers = nn.ModuleList([Downsample(out_channels, factors)] if max(factors) > 1 else [])

    def layers(self) -> list[nn.Module]:
        return [*self.resnets, *self.downsamplers]


class UpBlock(nn.Module):
    """Resnets, then an upsampler unless all `factors` are 1."""

    def __init__(
        self, in_channels: int, out_channels: int, depth: int, groups: int, factors: tuple[int, int, int]
    ) -> None:
        super().__init__()
        self.resnets = resnet_blocks(in_channels, out_channels, depth, groups)
        self.upsamplers = nn.ModuleList([Upsample(out_channels, factors)] if max(factors) > 1 else [])

    def layers(self) -> list[nn.Module]:
        return [*self.resnets, *self.upsamplers]
