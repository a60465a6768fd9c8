"""The HunyuanVideo diffusion transformer (arXiv 2412.03603), "HYVideo-T/2-cfgdistill" and smaller ones of its kind.

Shapes: latents B C f h w, tokens B L D, heads B H L D. Image tokens come first, text tokens follow.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from hunyuan_model.attention import attention_backend
from hunyuan_model.layers import (
    MLP,
    FinalLayer,
    Modulation,
    PatchEmbed,
    RMSNorm,
    TimestepEmbedder,
    TokenRefiner,
    VectorEmbedder,
    apply_rotary,
    modulate,
    rotary_frequencies,
    split_heads,
)
from hunyuan_model.shapes import Shapes, depth
from utils.errors import UserError

ROPE_THETA = 256.0


@dataclass(frozen=True)
class HunyuanVideoConfig:
    """Sizes of a DiT. The defaults are the official 13B model."""

    hidden_size: int = 3072
    heads: int = 24
    mlp_hidden: int = 12288
    depth_double: int = 20
    depth_single: int = 40
    depth_refiner: int = 2
    patch_size: tuple[int, int, int] = (1, 2, 2)
    in_channels: int = 16
    out_channels: int = 16
    text_dim: int = 4096
    text_dim_2: int = 768
    frequency_dim: int = 256
    rope_dims: tuple[int, int, int] = (16, 56, 56)
    guidance_embed: bool = True

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.heads

    @classmethod
    def from_shapes(cls, shapes: Shapes, rope_dims: Sequence[int] | None = None) -> "HunyuanVideoConfig":
        """Reads every size from the shapes of an official state dict.

        Args:
            shapes: {name: shape} with official names.
            rope_dims: rotary channels of frames, height and width; by default head_dim x (1/8, 7/16, 7/16).

        Raises:
            UserError: a key that every HunyuanVideo DiT has is missing, or the sizes contradict each other.
        """
        try:
            hidden, in_channels, *patch = shapes["img_in.proj.weight"]
            mlp_hidden = shapes["double_blocks.0.img_mlp.fc1.weight"][0]
            head_dim = shapes["double_blocks.0.img_attn_q_norm.weight"][0]
            text_dim = shapes["txt_in.input_embedder.weight"][1]
            text_dim_2 = shapes["vector_in.in_layer.weight"][1]
            frequency_dim = shapes["time_in.mlp.0.weight"][1]
            patch_values = shapes["final_layer.linear.weight"][0]
        except KeyError as error:
            raise UserError(f"not a HunyuanVideo DiT: the tensor {error} is missing") from None
        return cls(
            hidden_size=hidden,
            heads=hidden // head_dim,
            mlp_hidden=mlp_hidden,
            depth_double=depth(shapes, "double_blocks."),
            depth_single=depth(shapes, "single_blocks."),
            depth_refiner=depth(shapes, "txt_in.individual_token_refiner.blocks."),
            patch_size=tuple(patch),
            in_channels=in_channels,
            out_channels=patch_values // math.prod(patch),
            text_dim=text_dim,
            text_dim_2=text_dim_2,
            frequency_dim=frequency_dim,
            rope_dims=_rope_dims(head_dim, rope_dims),
            guidance_embed="guidance_in.mlp.0.weight" in shapes,
        )


def _rope_dims(head_dim: int, given: Sequence[int] | None) -> tuple[int, int, int]:
    frames, height, width = given or (head_dim // 8, head_dim * 7 // 16, head_dim * 7 // 16)
    if frames + height + width != head_dim or any(dim % 2 for dim in (frames, height, width)):
        raise UserError(
            f"rope_dims {frames}, {height}, {width} must be even and add up to head_dim {head_dim}; "
            "give them as JSON under the safetensors metadata key 'config'"
        )
    return frames, height, width


class MMDoubleStreamBlock(nn.Module):
    """Image and text tokens have separate weights and attend to each other in one joint attention."""

    def __init__(self, config: HunyuanVideoConfig) -> None:
        super().__init__()
        dim = config.hidden_size
        self.heads = config.heads
        self.attention = attention_backend("torch")

        self.img_mod = Modulation(dim, 6)
        self.img_attn_qkv = nn.Linear(dim, 3 * dim)
        self.img_attn_q_norm = RMSNorm(config.head_dim)
        self.img_attn_k_norm = RMSNorm(config.head_dim)
        self.img_attn_proj = nn.Linear(dim, dim)
        self.img_mlp = MLP(dim, config.mlp_hidden, nn.GELU(approximate="tanh"))

        self.txt_mod = Modulation(dim, 6)
        self.txt_attn_qkv = nn.Linear(dim, 3 * dim)
        self.txt_attn_q_norm = RMSNorm(config.head_dim)
        self.txt_attn_k_norm = RMSNorm(config.head_dim)
        self.txt_attn_proj = nn.Linear(dim, dim)
        self.txt_mlp = MLP(dim, config.mlp_hidden, nn.GELU(approximate="tanh"))

    def forward(
        self, img: Tensor, txt: Tensor, vec: Tensor, freqs: tuple[Tensor, Tensor], key_mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """img (B, L_img, D), txt (B, L_txt, D), vec (B, D) -> img, txt."""
        img_shift1, img_scale1, img_gate1, img_shift2, img_scale2, img_gate2 = self.img_mod(vec)
        txt_shift1, txt_scale1, txt_gate1, txt_shift2, txt_scale2, txt_gate2 = self.txt_mod(vec)

        img_q, img_k, img_v = split_heads(self.img_attn_qkv(modulate(img, img_shift1, img_scale1)), self.heads)
        txt_q, txt_k, txt_v = split_heads(self.txt_attn_qkv(modulate(txt, txt_shift1, txt_scale1)), self.heads)
        q = torch.cat((self.img_attn_q_norm(img_q), self.txt_attn_q_norm(txt_q)), dim=2)  # B H L_img+L_txt D
        k = torch.cat((self.img_attn_k_norm(img_k), self.txt_attn_k_norm(txt_k)), dim=2)
        v = torch.cat((img_v, txt_v), dim=2)
        attended = self.attention(apply_rotary(q, freqs), apply_rotary(k, freqs), v, key_mask)
        img_attended, txt_attended = attended.split((img.shape[1], txt.shape[1]), dim=1)

        img = img + img_gate1.unsqueeze(1) * self.img_attn_proj(img_attended)
        txt = txt + txt_gate1.unsqueeze(1) * self.txt_attn_proj(txt_attended)
        img = img + img_gate2.unsqueeze(1) * self.img_mlp(modulate(img, img_shift2, img_scale2))
        txt = txt + txt_gate2.unsqueeze(1) * self.txt_mlp(modulate(txt, txt_shift2, txt_scale2))
        return img, txt


class MMSingleStreamBlock(nn.Module):
    """Image and text tokens as one sequence; attention and MLP run in parallel (arXiv 2302.05442)."""

    def __init__(self, config: HunyuanVideoConfig) -> None:
        super().__init__()
        dim = config.hidden_size
        self.heads = config.heads
        self.attention = attention_backend("torch")
        self.widths = (3 * dim, config.mlp_hidden)
        self.linear1 = nn.Linear(dim, sum(self.widths))
        self.linear2 = nn.Linear(dim + config.mlp_hidden, dim)
        self.q_norm = RMSNorm(config.head_dim)
        self.k_norm = RMSNorm(config.head_dim)
        self.activation = nn.GELU(approximate="tanh")
        self.modulation = Modulation(dim, 3)

    def forward(self, x: Tensor, vec: Tensor, freqs: tuple[Tensor, Tensor], key_mask: Tensor | None) -> Tensor:
        """x (B, L, D), vec (B, D) -> (B, L, D)."""
        shift, scale, gate = self.modulation(vec)
        qkv, mlp = self.linear1(modulate(x, shift, scale)).split(self.widths, dim=-1)
        q, k, v = split_heads(qkv, self.heads)
        q, k = apply_rotary(self.q_norm(q), freqs), apply_rotary(self.k_norm(k), freqs)
        attended = self.attention(q, k, v, key_mask)
        return x + gate.unsqueeze(1) * self.linear2(torch.cat((attended, self.activation(mlp)), dim=-1))


class HYVideoDiffusionTransformer(nn.Module):
    """Predicts the velocity, noise - latents, of a noisy latent video."""

    def __init__(self, config: HunyuanVideoConfig) -> None:
        super().__init__()
        dim = config.hidden_size
        self.config = config
        self.img_in = PatchEmbed(config.patch_size, config.in_channels, dim)
        self.txt_in = TokenRefiner(
            config.text_dim, dim, config.heads, config.mlp_hidden, config.depth_refiner, config.frequency_dim
        )
        self.time_in = TimestepEmbedder(dim, config.frequency_dim)
        self.vector_in = VectorEmbedder(config.text_dim_2, dim)
        self.guidance_in = TimestepEmbedder(dim, config.frequency_dim) if config.guidance_embed else None
        self.double_blocks = nn.ModuleList(MMDoubleStreamBlock(config) for _ in range(config.depth_double))
        self.single_blocks = nn.ModuleList(MMSingleStreamBlock(config) for _ in range(config.depth_single))
        self.final_layer = FinalLayer(dim, math.prod(config.patch_size) * config.out_channels)

    @property
    def dtype(self) -> torch.dtype:
        return self.img_in.proj.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.img_in.proj.weight.device

    @property
    def blocks(self) -> list[nn.Module]:
        """All double and single blocks, in the order in which they run."""
        return [*self.double_blocks, *self.single_blocks]

    def set_attention(self, name: str, split: bool = False) -> None:
        """Sets the attention backend of every block; see `hunyuan_model.attention.attention_backend`."""
        backend = attention_backend(name, split)
        for module in self.modules():
            if hasattr(module, "attention"):
                module.attention = backend

    def forward(
        self,
        x: Tensor,
        timestep: Tensor,
        text_states: Tensor,
        text_mask: Tensor,
        text_states_2: Tensor,
        guidance: Tensor | None = None,
    ) -> Tensor:
        """The velocity (B, C, f, h, w) of noisy latents.

        Args:
            x: noisy latents (B, C, f, h, w); h and w are multiples of the patch size.
            timestep: (B,) in 0..1000, 1000 x sigma.
            text_states: (B, L, D_text) of the LLM, padded on the right.
            text_mask: (B, L), nonzero for valid tokens, at least one in each row.
            text_states_2: (B, D_text_2), pooled CLIP text.
            guidance: (B,) embedded guidance scale x 1000; required if the model has a guidance embedding.
        """
        grid = tuple(size // patch for size, patch in zip(x.shape[2:], self.config.patch_size, strict=True))
        text_states, text_mask, text_key_mask = drop_padding(text_states, text_mask)

        vec = self._condition(timestep, text_states_2, guidance)
        img = self.img_in(x.to(self.dtype))  # B C f h w -> B L_img D
        txt = self.txt_in(text_states.to(self.dtype), timestep, text_mask, text_key_mask)  # B L D_text -> B L_txt D
        freqs = rotary_frequencies(grid, txt.shape[1], self.config.rope_dims, ROPE_THETA, img.device)
        key_mask = with_image_keys(text_key_mask, image_tokens=img.shape[1])

        for block in self.double_blocks:
            img, txt = block(img, txt, vec, freqs, key_mask)
        joint = torch.cat((img, txt), dim=1)  # B L_img+L_txt D
        for block in self.single_blocks:
            joint = block(joint, vec, freqs, key_mask)
        patches = self.final_layer(joint[:, : img.shape[1]], vec)  # B L_img (C pt ph pw)
        return self._unpatchify(patches, grid)

    def _condition(self, timestep: Tensor, text_states_2: Tensor, guidance: Tensor | None) -> Tensor:
        """The vector (B, D) that modulates every block."""
        vec = self.time_in(timestep) + self.vector_in(text_states_2.to(self.dtype))
        if self.guidance_in is None:
            return vec
        if guidance is None:
            raise ValueError("this model has a guidance embedding: guidance (B,) is required")
        return vec + self.guidance_in(guidance)

    def _unpatchify(self, patches: Tensor, grid: tuple[int, int, int]) -> Tensor:
        """Patches (B, f h w, C pt ph pw) -> latents (B, C, f pt, h ph, w pw)."""
        f, h, w = grid
        pt, ph, pw = self.config.patch_size
        return rearrange(
            patches, "B (f h w) (C pt ph pw) -> B C (f pt) (h ph) (w pw)", f=f, h=h, w=w, pt=pt, ph=ph, pw=pw
        )


def drop_padding(text: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """Cuts text to the length of the longest caption in the batch.

    Args:
        text: (B, L, D).
        mask: (B, L), nonzero for valid tokens.

    Returns:
        text (B, L', D), mask (B, L') bool, and key_mask (B, 1, 1, L') bool, None if all remaining tokens are valid.
    """
    mask = mask.bool()
    length = int(mask.any(dim=0).nonzero().max()) + 1
    text, mask = text[:, :length], mask[:, :length]
    return text, mask, None if bool(mask.all()) else mask[:, None, None, :]


def with_image_keys(text_key_mask: Tensor | None, image_tokens: int) -> Tensor | None:
    """(B, 1, 1, L_txt) -> (B, 1, 1, L_img + L_txt): every image token is valid. None stays None."""
    if text_key_mask is None:
        return None
    return F.pad(text_key_mask, (image_tokens, 0), value=True)
