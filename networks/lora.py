"""LoRA (Hu et al. 2021, arXiv:2106.09685) and, with use_dora=True, DoRA (Liu et al. 2024, arXiv:2402.09353).

The update of a weight W (out, in) is alpha / rank * up @ down with down (rank, in) and up (out, rank). DoRA trains the
norm of each row of W separately from its direction: W' = dora_scale * (W + update) / |W + update|, row by row.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from networks.adapters import AdapterModule, AdapterNetwork, build_network
from networks.factors import LoraFactors
from networks.merging import float32_weight

KNOWN_ARGUMENTS = [
    "rank_dropout",
    "module_dropout",
    "loraplus_lr_ratio",
    "use_dora",
    "exclude_patterns",
    "include_patterns",
    "verbose",
    "conv_dim",
    "conv_alpha",
]


class LoraModule(AdapterModule):
    """LoRA or DoRA of one Linear; the update starts at zero because `lora_up` does."""

    def __init__(self, target: nn.Module, rank: int, alpha: float, use_dora: bool = False, **settings: Any):
        super().__init__(target, rank, alpha, **settings)
        self.lora_down = nn.Linear(self.in_features, rank, bias=False)
        self.lora_up = nn.Linear(rank, self.out_features, bias=False)
        nn.init.kaiming_uniform_(self.lora_down.weight, a=math.sqrt(5))
        nn.init.zeros_(self.lora_up.weight)
        self.dora_scale = None
        if use_dora:
            norm = float32_weight(target).norm(dim=1, keepdim=True)  # (out, 1)
            self.dora_scale = nn.Parameter(norm)
            self.register_buffer("target_norm", norm.flatten().clone(), persistent=False)

    def update(self, x: torch.Tensor, scale: float) -> torch.Tensor:
        # Scale and dropouts act on the small tensor between the factors: backward keeps only x and this tensor.
        inner = F.linear(x, self.lora_down.weight.to(x.dtype)) * scale  # (..., rank)
        if self.training and self.dropout:
            inner = F.dropout(inner, self.dropout)
        if self.training and self.rank_dropout:
            inner = inner * self.keep_mask([len(inner), *[1] * (inner.dim() - 2), self.rank], inner)
        return F.linear(inner, self.lora_up.weight.to(inner.dtype))

    def add_update(self, target_forward: Callable, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        if self.dora_scale is None:
            return super().add_update(target_forward, x, y)
        bias = 0.0 if self.target.bias is None else self.target.bias.to(y.dtype)
        stretch = (self.dora_scale.flatten() / self.direction_norm(target_forward, x.dtype)).to(y.dtype)  # (out,)
        change = (y - bias + self.update(x, self.scale).to(y.dtype)) * stretch + bias - y
        return y + self.multiplier * change

    @torch.no_grad()
    def direction_norm(self, target_forward: Callable, dtype: torch.dtype) -> torch.Tensor:
        """The norms |W + update| of the rows (out,), treated as constants by the gradient (section 4.3 of the paper).

        Computed as the root of |W|^2 + 2 W.update + |update|^2, which needs no matrix of W's size: W @ down.T is the
        target's own forward, in whatever form it stores W.
        """
        # Detached: autocast before torch 2.13 caches the casts made here, and `update` would reuse them without grad.
        down, up = self.lora_down.weight.detach(), self.lora_up.weight.detach() * self.scale
        bias = 0.0 if self.target.bias is None else self.target.bias
        projected = (target_forward(down.to(dtype)) - bias).T.float()  # (out, rank)
        with torch.autocast(down.device.type, enabled=False):
            square = self.target_norm**2 + 2 * (projected * up).sum(1) + ((up @ (down @ down.T)) * up).sum(1)
        return square.clamp_min(torch.finfo(torch.float32).tiny).sqrt()

    def factors(self) -> LoraFactors:
        return LoraFactors(
            down=self.lora_down.weight, up=self.lora_up.weight, alpha=self.alpha.item(), dora_scale=self.dora_scale
        )

    @classmethod
    def from_tensors(cls, target: nn.Module, tensors: Mapping[str, torch.Tensor], multiplier: float) -> "LoraModule":
        rank = len(tensors["lora_down.weight"])
        use_dora = "dora_scale" in tensors
        return cls(target, rank, tensors["alpha"].item(), use_dora=use_dora, multiplier=multiplier)


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
    """LoRA for every target of `unet` (the DiT), all of one rank.

    Args:
        multiplier: factor of the updates.
        network_dim: rank, 4 if None.
        network_alpha: alpha; 1 if None, the rank if 0.
        vae, text_encoders: never adapted.
        neuron_dropout: dropout of the values between the factors.
        network_args: values of --network_args as strings (docs/lora.md).

    Raises:
        UserError: an unknown or unreadable argument, or no target.
    """
    title = "DoRA" if str(network_args.get("use_dora", "")).lower() == "true" else "LoRA"
    return build_network(
        title, LoraModule, unet, multiplier, network_dim, network_alpha, neuron_dropout, network_args, KNOWN_ARGUMENTS
    )


def create_arch_network_from_weights(
    multiplier: float,
    weights_sd: Mapping[str, torch.Tensor],
    text_encoders: Any = None,
    unet: nn.Module | None = None,
    for_inference: bool = False,
    **_: Any,
) -> AdapterNetwork:
    """LoRA with the modules, ranks and values of a state dict of any format, ready to be applied.

    Raises:
        UserError: a module of the file is not in the DiT, or its shape differs.
    """
    return AdapterNetwork.from_weights(weights_sd, unet, LoraModule, multiplier)
