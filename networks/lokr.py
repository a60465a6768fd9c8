"""LoKr: the update is a Kronecker product of a small matrix and a low-rank one (LyCORIS, arXiv:2309.14859).

update = scale * kron(w1, w2) with w1 (out_1, in_1) and w2 (out_2, in_2). w1 is stored whole. w2 is stored as
w2_a @ w2_b with scale alpha / rank, or whole with scale 1 if the rank is so high that two factors would save nothing.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from networks.adapters import AdapterModule, AdapterNetwork, build_network
from networks.factors import LokrFactors

KNOWN_ARGUMENTS = ["factor", "rank_dropout", "module_dropout", "exclude_patterns", "include_patterns", "verbose"]

MATRICES = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b")


def factor_pair(size: int, factor: int = -1) -> tuple[int, int]:
    """(m, n) with m <= n and m * n = size.

    One of them is `factor` if that divides `size`; otherwise m is the largest divisor up to `factor`. With factor -1,
    m is the largest divisor up to the square root.
    """
    if factor > 0 and size % factor == 0:
        return min(factor, size // factor), max(factor, size // factor)
    limit = math.isqrt(size) if factor < 0 else min(factor, math.isqrt(size))
    small = next(divisor for divisor in range(limit, 0, -1) if size % divisor == 0)
    return small, size // small


class LokrModule(AdapterModule):
    """LoKr of one Linear; the update starts at zero because w2 does. `dropout` has no effect, as in musubi-tuner."""

    def __init__(self, target: nn.Module, rank: int, alpha: float, factor: int = -1, **settings: Any):
        (out_1, out_2), (in_1, in_2) = factor_pair(target.out_features, factor), factor_pair(target.in_features, factor)
        whole = rank >= max(out_2, in_2) / 2
        super().__init__(target, rank, rank if whole else alpha, **settings)
        matrices = {"lokr_w1": torch.empty(out_1, in_1)}
        nn.init.kaiming_uniform_(matrices["lokr_w1"], a=math.sqrt(5))
        if whole:
            matrices["lokr_w2"] = torch.zeros(out_2, in_2)
        else:
            matrices |= {"lokr_w2_a": torch.empty(out_2, rank), "lokr_w2_b": torch.zeros(rank, in_2)}
            nn.init.kaiming_uniform_(matrices["lokr_w2_a"], a=math.sqrt(5))
        self.set_matrices(matrices)

    def set_matrices(self, matrices: Mapping[str, Tensor]) -> None:
        """Makes these the trained matrices: for each of w1 and w2 either the whole matrix or its two factors."""
        for name in MATRICES:
            self.register_parameter(name, nn.Parameter(matrices[name].float()) if name in matrices else None)

    def update(self, x: Tensor, scale: float) -> Tensor:
        # Rematerialised in the backward pass: the intermediate values are as large as the output.
        y = checkpoint(self._multiply, x, scale, use_reentrant=False, preserve_rng_state=False)
        if self.training and self.rank_dropout:
            y = y * self.keep_mask([self.out_features], y)
        return y

    def _multiply(self, x: Tensor, scale: float) -> Tensor:
        """kron(w1, w2) @ x, computed as w1 @ X @ w2.T, where X is x reshaped to a matrix (in_1, in_2)."""
        w1 = self.lokr_w1_a @ self.lokr_w1_b if self.lokr_w1 is None else self.lokr_w1
        w1 = (w1 * scale).to(x.dtype)
        matrix = x.unflatten(-1, (w1.shape[1], -1))  # (..., in_1, in_2)
        if self.lokr_w2 is not None:
            matrix = F.linear(matrix, self.lokr_w2.to(x.dtype))  # (..., in_1, out_2)
        else:
            matrix = F.linear(F.linear(matrix, self.lokr_w2_b.to(x.dtype)), self.lokr_w2_a.to(x.dtype))
        return (w1 @ matrix).flatten(-2)  # (..., out_1 * out_2)

    def factors(self) -> LokrFactors:
        return LokrFactors(
            **{name.removeprefix("lokr_"): getattr(self, name) for name in MATRICES}, alpha=self.alpha.item()
        )

    @classmethod
    def from_tensors(cls, target: nn.Module, tensors: Mapping[str, Tensor], multiplier: float) -> "LokrModule":
        given = [tensors[name] for name in ("lokr_w1_b", "lokr_w2_b") if name in tensors]
        module = cls(target, len(given[0]) if given else 1, tensors["alpha"].item(), multiplier=multiplier)
        module.set_matrices(tensors)
        return module


def create_arch_network(
    multiplier: float,
    network_dim: int | None,
    network_alpha: float | None,
    vae: Any,
    text_encoders: Any,
    unet: nn.Module,
    neuron_dropout: float | None = None,
    **network_args: Any,
) -> AdapterNetwork:
    """LoKr for every target of `unet`; arguments and errors are those of `networks.lora`."""
    return build_network(
        "LoKr", LokrModule, unet, multiplier, network_dim, network_alpha, neuron_dropout, network_args, KNOWN_ARGUMENTS
    )


def create_arch_network_from_weights(
    multiplier: float,
    weights_sd: Mapping[str, Tensor],
    text_encoders: Any = None,
    unet: nn.Module | None = None,
    for_inference: bool = False,
    **_: Any,
) -> AdapterNetwork:
    """LoKr with the modules, ranks and values of a state dict; errors are those of `networks.lora`."""
    return AdapterNetwork.from_weights(weights_sd, unet, LokrModule, multiplier)
