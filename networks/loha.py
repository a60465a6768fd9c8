"""LoHa: the update is the element-wise product of two low-rank matrices (arXiv:2108.06098, LyCORIS).

update = alpha / rank * (w1_a @ w1_b) * (w2_a @ w2_b). The rank of this product can be rank^2; it has as many parameters
as a LoRA of rank 2 x rank.
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from networks.adapters import AdapterModule, AdapterNetwork, build_network
from networks.factors import LohaFactors

KNOWN_ARGUMENTS = ["rank_dropout", "module_dropout", "exclude_patterns", "include_patterns", "verbose"]


class LohaModule(AdapterModule):
    """LoHa of one Linear; the update starts at zero because `hada_w2_a` does. `dropout` has no effect."""

    def __init__(self, target: nn.Module, rank: int, alpha: float, **settings: Any):
        super().__init__(target, rank, alpha, **settings)
        # The standard deviations of LyCORIS, so that learning rates carry over.
        self.hada_w1_a = nn.Parameter(torch.randn(self.out_features, rank) * 0.1)
        self.hada_w1_b = nn.Parameter(torch.randn(rank, self.in_features))
        self.hada_w2_a = nn.Parameter(torch.zeros(self.out_features, rank))
        self.hada_w2_b = nn.Parameter(torch.randn(rank, self.in_features))

    def update(self, x: Tensor, scale: float) -> Tensor:
        # Rematerialised in the backward pass; otherwise three matrices of the weight's size would be kept.
        y = checkpoint(self._multiply, x, scale, use_reentrant=False, preserve_rng_state=False)
        if self.training and self.rank_dropout:
            y = y * self.keep_mask([self.out_features], y)
        return y

    def _multiply(self, x: Tensor, scale: float) -> Tensor:
        factors = (self.hada_w1_a * scale, self.hada_w1_b, self.hada_w2_a, self.hada_w2_b)
        w1_a, w1_b, w2_a, w2_b = (factor.to(x.dtype) for factor in factors)
        return F.linear(x, (w1_a @ w1_b) * (w2_a @ w2_b))

    def factors(self) -> LohaFactors:
        return LohaFactors(
            w1_a=self.hada_w1_a,
            w1_b=self.hada_w1_b,
            w2_a=self.hada_w2_a,
            w2_b=self.hada_w2_b,
            alpha=self.alpha.item(),
        )

    @classmethod
    def from_tensors(cls, target: nn.Module, tensors: Mapping[str, Tensor], multiplier: float) -> "LohaModule":
        return cls(target, len(tensors["hada_w1_b"]), tensors["alpha"].item(), multiplier=multiplier)


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
    """LoHa for every target of `unet`; arguments and errors are those of `networks.lora`."""
    return build_network(
        "LoHa", LohaModule, unet, multiplier, network_dim, network_alpha, neuron_dropout, network_args, KNOWN_ARGUMENTS
    )


def create_arch_network_from_weights(
    multiplier: float,
    weights_sd: Mapping[str, Tensor],
    text_encoders: Any = None,
    unet: nn.Module | None = None,
    for_inference: bool = False,
    **_: Any,
) -> AdapterNetwork:
    """LoHa with the modules, ranks and values of a state dict; errors are those of `networks.lora`."""
    return AdapterNetwork.from_weights(weights_sd, unet, LohaModule, multiplier)
