"""The parts of the DiT: rotary positions, embedders, modulation, norms, MLP, token refiner, final layer.

Shapes: tokens B L D, heads B H L D, conditioning vector B D.
"""

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from hunyuan_model.attention import attention_backend

NORM_EPS = 1e-6


def layer_norm(x: Tensor) -> Tensor:
    """LayerNorm without parameters over the last axis."""
    return F.layer_norm(x, x.shape[-1:], eps=NORM_EPS)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Adaptive layer norm (DiT, arXiv 2212.09748): the condition shifts and scales the normalised tokens.

    Args:
        x: (B, L, D).
        shift, scale: (B, D).
    """
    return torch.addcmul(shift.unsqueeze(1), layer_norm(x), 1 + scale.unsqueeze(1))


def split_heads(qkv: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Fused projection (B, L, 3 H D) -> q, k, v, each (B, H, L, D)."""
    return rearrange(qkv, "B L (K H D) -> K B H L D", K=3, H=heads).unbind(0)


def apply_rotary(x: Tensor, freqs: tuple[Tensor, Tensor]) -> Tensor:
    """Rotates neighbouring pairs of channels by the angles of each token (RoFormer, arXiv 2104.09864).

    Args:
        x: (B, H, L, D).
        freqs: cos and sin, each (L, D / 2) float32.
    """
    cos, sin = freqs
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)  # B H L D/2
    rotated = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1)
    return rotated.flatten(-2).to(x.dtype)


def rotary_frequencies(
    grid: tuple[int, int, int], text_tokens: int, rope_dims: tuple[int, int, int], theta: float, device: torch.device
) -> tuple[Tensor, Tensor]:
    """cos and sin, each (f h w + text_tokens, head_dim / 2). Each axis rotates its own part of the channels.

    Args:
        grid: image tokens along frames, height and width.
        text_tokens: number of text tokens, which follow the image tokens. Their angle is 0, so they are not rotated.
        rope_dims: channels that each axis rotates; their sum is head_dim.
        theta: base of the geometric series of wavelengths (256 in HunyuanVideo).
    """
    angles = []
    for axis, (size, dim) in enumerate(zip(grid, rope_dims, strict=True)):
        speed = theta ** -(torch.arange(0, dim, 2, device=device, dtype=torch.float32) / dim)
        angle = torch.outer(torch.arange(size, device=device, dtype=torch.float32), speed)  # size dim/2
        shape = [1, 1, 1, dim // 2]
        shape[axis] = size
        angles.append(angle.view(shape).expand(*grid, dim // 2))
    image = torch.cat(angles, dim=-1).flatten(0, 2)  # f h w D/2 -> (f h w) D/2
    angle = F.pad(image, (0, 0, 0, text_tokens))
    return angle.cos(), angle.sin()


class RMSNorm(nn.Module):
    """x / rms(x) x weight over the last axis, in float32 (arXiv 1910.07467)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        normalised = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + NORM_EPS)
        return normalised.to(x.dtype) * self.weight.to(x.dtype)


class MLP(nn.Module):
    """fc2(activation(fc1(x))); GELU (tanh) in the blocks, SiLU in the token refiner."""

    def __init__(self, dim: int, hidden: int, activation: nn.Module) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.activation = activation
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.activation(self.fc1(x)))


class Modulation(nn.Module):
    """linear(silu(vec)), split into `count` vectors (B, D)."""

    def __init__(self, dim: int, count: int) -> None:
        super().__init__()
        self.count = count
        self.linear = nn.Linear(dim, count * dim)

    def forward(self, vec: Tensor) -> tuple[Tensor, ...]:
        return self.linear(F.silu(vec)).chunk(self.count, dim=-1)


class PatchEmbed(nn.Module):
    """Latents (B, C, f, h, w) -> tokens (B, L, D), one per patch."""

    def __init__(self, patch_size: tuple[int, int, int], channels: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv3d(channels, dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        return rearrange(self.proj(x), "B D f h w -> B (f h w) D")


class TimestepEmbedder(nn.Module):
    """Scalars (B,) in 0..1000 -> (B, D) by a sinusoidal embedding (arXiv 1706.03762) and an MLP."""

    def __init__(self, dim: int, frequency_dim: int) -> None:
        super().__init__()
        self.frequency_dim = frequency_dim
        self.mlp = nn.Sequential(nn.Linear(frequency_dim, dim), nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, t: Tensor) -> Tensor:
        half = self.frequency_dim // 2
        steps = torch.arange(half, device=t.device, dtype=torch.float32)
        angles = t.float().unsqueeze(-1) * torch.exp(-math.log(10000) / half * steps)  # B half
        embedding = torch.cat((angles.cos(), angles.sin()), dim=-1)  # B frequency_dim
        return self.mlp(embedding.to(self.mlp[0].weight.dtype))


class VectorEmbedder(nn.Module):
    """Two linear layers with SiLU between them, for the pooled CLIP text."""

    def __init__(self, dim_in: int, dim: int) -> None:
        super().__init__()
        self.in_layer = nn.Linear(dim_in, dim)
        self.out_layer = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.out_layer(F.silu(self.in_layer(x)))


class TextProjection(nn.Module):
    """Two linear layers with SiLU between them, for the mean of the LLM's states."""

    def __init__(self, dim_in: int, dim: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(dim_in, dim)
        self.linear_2 = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(x)))


class RefinerBlock(nn.Module):
    """A transformer block over text tokens only, gated by the timestep and the mean of the LLM's states."""

    def __init__(self, dim: int, heads: int, mlp_hidden: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention = attention_backend("torch")
        self.norm1 = nn.LayerNorm(dim, eps=NORM_EPS)
        self.self_attn_qkv = nn.Linear(dim, 3 * dim)
        self.self_attn_proj = nn.Linear(dim, dim)
        self.norm2 = nn.LayerNorm(dim, eps=NORM_EPS)
        self.mlp = MLP(dim, mlp_hidden, nn.SiLU())
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 2 * dim))

    def forward(self, x: Tensor, condition: Tensor, key_mask: Tensor | None) -> Tensor:
        attention_gate, mlp_gate = self.adaLN_modulation(condition).unsqueeze(1).chunk(2, dim=-1)
        q, k, v = split_heads(self.self_attn_qkv(self.norm1(x)), self.heads)
        x = x + attention_gate * self.self_attn_proj(self.attention(q, k, v, key_mask))
        return x + mlp_gate * self.mlp(self.norm2(x))


class IndividualTokenRefiner(nn.Module):
    """The refiner blocks, one after the other. It is a module because the official names contain it."""

    def __init__(self, dim: int, heads: int, mlp_hidden: int, depth: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(RefinerBlock(dim, heads, mlp_hidden) for _ in range(depth))

    def forward(self, x: Tensor, condition: Tensor, key_mask: Tensor | None) -> Tensor:
        for block in self.blocks:
            x = block(x, condition, key_mask)
        return x


class TokenRefiner(nn.Module):
    """LLM states (B, L, D_text) -> text tokens (B, L, D), refined by self-attention over the valid tokens."""

    def __init__(self, text_dim: int, dim: int, heads: int, mlp_hidden: int, depth: int, frequency_dim: int) -> None:
        super().__init__()
        self.input_embedder = nn.Linear(text_dim, dim)
        self.t_embedder = TimestepEmbedder(dim, frequency_dim)
        self.c_embedder = TextProjection(text_dim, dim)
        self.individual_token_refiner = IndividualTokenRefiner(dim, heads, mlp_hidden, depth)

    def forward(self, text: Tensor, timestep: Tensor, text_mask: Tensor, key_mask: Tensor | None) -> Tensor:
        weight = text_mask.unsqueeze(-1).to(torch.float32)
        mean = (text.float() * weight).sum(1) / weight.sum(1)  # B L D -> B D
        condition = self.t_embedder(timestep) + self.c_embedder(mean.to(text.dtype))
        return self.individual_token_refiner(self.input_embedder(text), condition, key_mask)


class FinalLayer(nn.Module):
    """Tokens (B, L, D) -> patches (B, L, C pt ph pw)."""

    def __init__(self, dim: int, patch_values: int) -> None:
        super().__init__()
        self.linear = nn.Linear(dim, patch_values)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 2 * dim))

    def forward(self, x: Tensor, vec: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(vec).chunk(2, dim=-1)
        return self.linear(modulate(x, shift, scale))
