"""Attention backends with one signature. A model gets its backend when it is loaded.

Every backend is a function `(q, k, v, key_mask=None)` with q, k, v (B, H, L, D) and key_mask (B, 1, 1, L) bool, True
for valid keys. It returns (B, L, H x D). In each row the valid keys come first, because text is padded on the right. No
backend builds an L x L mask.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from hunyuan_model.attention_modes import require_attention
from utils.device_utils import dtype_word
from utils.errors import UserError, one_line

Attention = Callable[..., Tensor]

# The largest relative error against exact attention that a backend may have: a few roundings of its dtype. The value
# for float32 allows TF32. SageAttention rounds q and k to 8 bits.
TOLERANCE = {torch.float32: 2e-3, torch.float16: 5e-3, torch.bfloat16: 2e-2}
SAGE_TOLERANCE = 0.1


def torch_attention(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None = None) -> Tensor:
    """PyTorch's scaled dot product attention."""
    x = F.scaled_dot_product_attention(q, k, v, attn_mask=key_mask)
    return rearrange(x, "B H L D -> B L (H D)")


def _sequence_ends(key_mask: Tensor) -> Tensor:
    """Cumulative sequence lengths (2B + 1,) int32 of all rows, one after the other.

    Each row counts as two sequences, its valid tokens and its padding. So padding attends only to padding, and the
    rows need not be packed before attention.
    """
    batch, length = key_mask.shape[0], key_mask.shape[-1]
    starts = torch.arange(batch, device=key_mask.device) * length
    ends = torch.stack((starts + key_mask.flatten(1).sum(1), starts + length), dim=1).flatten()  # B 2 -> 2B
    return F.pad(ends, (1, 0)).to(torch.int32)


def _flash() -> Attention:
    from flash_attn import flash_attn_func, flash_attn_varlen_func

    return _flash_like(flash_attn_func, flash_attn_varlen_func)


def _flash3() -> Attention:
    from flash_attn_interface import flash_attn_func, flash_attn_varlen_func

    return _flash_like(flash_attn_func, flash_attn_varlen_func)


def _flash_like(dense: Callable[..., Tensor], ragged: Callable[..., Tensor]) -> Attention:
    """FlashAttention 2 or 3. `dense` takes (B, L, H, D); `ragged` takes all rows as one, (B L, H, D)."""

    def attention(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None = None) -> Tensor:
        batch, _, length, _ = q.shape
        if key_mask is None:
            q, k, v = (rearrange(x, "B H L D -> B L H D") for x in (q, k, v))
            return _only_output(dense(q, k, v)).flatten(2)  # B L H D -> B L (H D)
        q, k, v = (rearrange(x, "B H L D -> (B L) H D") for x in (q, k, v))
        ends = _sequence_ends(key_mask)
        x = _only_output(ragged(q, k, v, ends, ends, length, length))
        return rearrange(x, "(B L) H D -> B L (H D)", B=batch)

    return attention


def _only_output(result: Tensor | tuple[Tensor, ...]) -> Tensor:
    """The attention output; some releases of FlashAttention 3 also return the log-sum-exp."""
    return result[0] if isinstance(result, tuple) else result


def _sageattn() -> Attention:
    from sageattention import sageattn, sageattn_varlen

    def attention(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None = None) -> Tensor:
        batch, _, length, _ = q.shape
        if key_mask is None:
            return rearrange(sageattn(q, k, v, tensor_layout="HND", is_causal=False), "B H L D -> B L (H D)")
        q, k, v = (rearrange(x, "B H L D -> (B L) H D") for x in (q, k, v))
        ends = _sequence_ends(key_mask)
        x = sageattn_varlen(q, k, v, ends, ends, length, length, is_causal=False)
        return rearrange(x, "(B L) H D -> B L (H D)", B=batch)

    return attention


def _xformers() -> Attention:
    from xformers.ops import fmha

    def attention(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None = None) -> Tensor:
        batch = q.shape[0]
        if key_mask is None:
            q, k, v = (rearrange(x, "B H L D -> B L H D") for x in (q, k, v))
            return fmha.memory_efficient_attention(q, k, v).flatten(2)  # B L H D -> B L (H D)
        q, k, v = (rearrange(x, "B H L D -> 1 (B L) H D") for x in (q, k, v))
        lengths = _sequence_ends(key_mask).diff().tolist()
        rows = fmha.BlockDiagonalMask.from_seqlens([length for length in lengths if length])
        x = fmha.memory_efficient_attention(q, k, v, attn_bias=rows)
        return rearrange(x, "1 (B L) H D -> B L (H D)", B=batch)

    return attention


_BACKENDS: dict[str, Callable[[], Attention]] = {
    "torch": lambda: torch_attention,
    "sdpa": lambda: torch_attention,
    "flash": _flash,
    "flash3": _flash3,
    "sageattn": _sageattn,
    "xformers": _xformers,
}


def attention_backend(name: str, split: bool = False) -> Attention:
    """The backend called `name` (a value of --attn_mode).

    Args:
        split: compute one item of the batch after the other, without its padding (--split_attn).

    Raises:
        UserError: the name is unknown, or its package is not installed or cannot be imported.
    """
    require_attention(name)
    try:
        backend = _BACKENDS[name]()
    except Exception as error:  # compiled extensions fail to import in many ways
        message = f"its package cannot be imported ({one_line(error)[:200]}); install it again"
        raise UserError(f"attention mode '{name}': {message}") from None
    return _one_by_one(backend) if split else backend


def _one_by_one(backend: Attention) -> Attention:
    """The same backend, called for one item of the batch after the other."""

    def attention(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None = None) -> Tensor:
        batch, _, longest, _ = q.shape
        lengths = [longest] * batch if key_mask is None else key_mask.flatten(1).sum(1).tolist()
        rows = []
        for index, length in enumerate(lengths):
            row = backend(*(x[index : index + 1, :, :length] for x in (q, k, v)))  # 1 H length D -> 1 length (H D)
            rows.append(F.pad(row, (0, 0, 0, longest - length)))
        return torch.cat(rows)

    return attention


def exact_attention(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(D)) v in float64 on the CPU, the reference for every backend."""
    q, k, v = (x.double().cpu() for x in (q, k, v))
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])  # B H L L
    if key_mask is not None:
        scores = scores.masked_fill(~key_mask.cpu(), -math.inf)
    return rearrange(scores.softmax(-1) @ v, "B H L D -> B L (H D)")


def verify_attention(
    name: str, device: torch.device | str, dtype: torch.dtype, head_dim: int = 128, split: bool = False
) -> float:
    """Compares a backend with exact attention on a small batch, with and without padding.

    Returns:
        The larger relative error of the two.

    Raises:
        UserError: the backend is missing, does not run on this device or with this dtype, or computes wrong results.
    """
    backend = attention_backend(name, split)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 4, 96, head_dim, generator=generator).to(device, dtype) for _ in range(3))
    lengths = torch.tensor([96, 77], device=device)
    padded = (torch.arange(96, device=device) < lengths[:, None])[:, None, None, :]  # B 1 1 L
    errors = []
    for key_mask in (None, padded):
        valid = torch.ones(2, 96, dtype=torch.bool) if key_mask is None else padded[:, 0, 0].cpu()
        expected = exact_attention(q, k, v, key_mask)[valid]
        try:
            found = backend(q, k, v, key_mask).double().cpu()[valid]
        except Exception as error:  # kernels raise anything for a GPU or dtype that they were not built for
            message = f"does not run on {device} with {dtype_word(dtype)}: {one_line(error)[:200]}"
            raise UserError(f"attention mode '{name}' {message}; use --attn_mode torch or --sdpa") from None
        errors.append(float((found - expected).norm() / expected.norm()))
    allowed = SAGE_TOLERANCE if name == "sageattn" else TOLERANCE[dtype]
    if not all(error <= allowed for error in errors):
        message = f"relative error {max(errors):.2g} on {device} with {dtype_word(dtype)}, allowed {allowed:g}"
        raise UserError(f"attention mode '{name}' computes wrong results here ({message}); use --attn_mode torch")
    return max(errors)
