"""One attention entry: heads in, tokens out; the backend is chosen once, when a model is loaded.

Every backend has the signature `(q, k, v, key_mask=None)` with q, k, v (B, H, L, D) and key_mask (B, 1, 1, L) bool,
True for keys that count, and returns (B, L, H x D). Nobody here ever builds an L x L mask.
"""

from collections.abc import Callable

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from utils.errors import UserError

Attention = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]


def torch_attention(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None = None) -> Tensor:
    """PyTorch's scaled dot product attention."""
    x = F.scaled_dot_product_attention(q, k, v, attn_mask=key_mask)
    return rearrange(x, "B H L D -> B L (H D)")


_BACKENDS: dict[str, Attention] = {"torch": torch_attention, "sdpa": torch_attention}


def attention_backend(name: str) -> Attention:
    """The backend called `name` (a value of --attn_mode).

    Raises:
        UserError: the name is unknown.
    """
    try:
        return _BACKENDS[name]
    except KeyError:
        raise UserError(f"attention mode '{name}' is not one of {', '.join(_BACKENDS)}") from None
