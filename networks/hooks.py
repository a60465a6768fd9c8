"""LoRAs beside the weights of a loaded model, by forward hooks: exchanging them costs nothing.

A model with merged LoRAs runs faster, so that is how videos are generated. Hooks are for comparing many LoRAs with one
loaded model, and for weights that merging would harm because they are stored as fp8. They work for weights of any
kind: plain, quantised or swapped to host memory.
"""

import os
import weakref
from collections.abc import Callable, Sequence

import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from networks.factors import Factors, LoraFactors
from networks.merging import count_matches, float32_weight, read_loras, require_shape


class LoraHooks:
    """The LoRAs that a model has at present, as forward hooks on its Linear modules; does not keep the model alive."""

    def __init__(self, model: nn.Module) -> None:
        self._model = weakref.ref(model)
        self._hooks: list[RemovableHandle] = []

    def use(self, loras: Sequence[tuple[str | os.PathLike, float]], exclude_single_blocks: bool = False) -> None:
        """Replaces the present LoRAs by these files (path, multiplier) of any format; an empty list removes all LoRAs.

        Raises:
            UserError: a file cannot be read, has no module of the model, or is for other shapes. Then the present
                LoRAs stay.
        """
        linears = {name: module for name, module in self._model().named_modules() if hasattr(module, "in_features")}
        by_module, files = read_loras(loras, exclude_single_blocks)
        reports = count_matches([path for path, _ in loras], files, linears)
        by_module = {name: own for name, own in by_module.items() if name in linears}
        for name, own in by_module.items():
            for factors, _ in own:
                require_shape(name, factors, linears[name].out_features, linears[name].in_features)
        for report in reports:
            report.announce()
        for hook in self._hooks:
            hook.remove()
        self._hooks = [
            linears[name].register_forward_hook(_hook(linears[name], own)) for name, own in by_module.items()
        ]


def _hook(linear: nn.Module, loras: Sequence[tuple[Factors, float]]) -> Callable:
    """A forward hook that adds what LoRAs (factors, multiplier) add to the output of a Linear."""
    device = linear.weight.device
    loras = [(factors.map(lambda tensor: tensor.to(device)), multiplier) for factors, multiplier in loras]

    def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        for factors, multiplier in loras:
            output = output + _lora_output(module, inputs[0], factors, multiplier)
        return output

    return hook


def _lora_output(linear: nn.Module, x: Tensor, factors: Factors, multiplier: float) -> Tensor:
    """What a LoRA adds to the output of a Linear for x (..., in) -> (..., out)."""
    # Only copies if the block of this Linear is swapped: its factors then wait in host memory too.
    factors = factors.map(lambda tensor: tensor.to(x.device))
    if isinstance(factors, LoraFactors) and factors.dora_scale is None:
        down, up = factors.down.flatten(1).to(x.dtype), factors.up.flatten(1).to(x.dtype)
        return F.linear(F.linear(x, down), up) * (multiplier * factors.scale)
    weight = float32_weight(linear)
    return F.linear(x, (factors.apply(weight, multiplier) - weight).to(x.dtype))
