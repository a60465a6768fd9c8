"""LoRAs that compute beside the weights instead of inside them: exchanged in a loaded model at no cost.

Merging is faster to run, and what generation does; this serves comparisons of many LoRAs with one loaded model,
whatever form its weights have (fp8, swapped to host memory).
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
    """The LoRAs that a model currently has, by forward hooks on its Linear modules; does not keep the model alive."""

    def __init__(self, model: nn.Module) -> None:
        self._model = weakref.ref(model)
        self._hooks: list[RemovableHandle] = []

    def use(self, loras: Sequence[tuple[str | os.PathLike, float]], exclude_single_blocks: bool = False) -> None:
        """These LoRAs (path, multiplier) of any format instead of the present ones; none: the bare model.

        Raises:
            UserError: a file cannot be read, matches nothing, or is for other shapes; the present ones stay.
        """
        modules = {name: module for name, module in self._model().named_modules() if hasattr(module, "in_features")}
        changes, files = read_loras(loras, exclude_single_blocks)
        reports = count_matches([path for path, _ in loras], files, modules)
        changes = {name: own for name, own in changes.items() if name in modules}
        for name, own in changes.items():
            for factors, _ in own:
                require_shape(name, factors, modules[name].out_features, modules[name].in_features)
        for report in reports:
            report.announce()
        for hook in self._hooks:
            hook.remove()
        self._hooks = [
            modules[name].register_forward_hook(_addition([(_beside(modules[name], f), m) for f, m in own]))
            for name, own in changes.items()
        ]


def _beside(module: nn.Module, factors: Factors) -> Factors:
    """The factors on the device of the module's weight."""
    return factors.map(lambda tensor: tensor.to(module.weight.device))


def _addition(changes: Sequence[tuple[Factors, float]]) -> Callable:
    def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        for factors, multiplier in changes:
            output = output + changed_output(module, inputs[0], factors, multiplier)
        return output

    return hook


def changed_output(module: nn.Module, x: Tensor, factors: Factors, multiplier: float) -> Tensor:
    """What a LoRA adds to the output of a Linear for x (..., in) -> (..., out)."""
    # Without effect but where the block of the module is kept in host memory.
    factors = factors.map(lambda tensor: tensor.to(x.device))
    if isinstance(factors, LoraFactors) and factors.dora_scale is None:
        down, up = factors.down.flatten(1).to(x.dtype), factors.up.flatten(1).to(x.dtype)
        return F.linear(F.linear(x, down), up) * (multiplier * factors.scale)
    weight = float32_weight(module)
    return F.linear(x, (factors.apply(weight, multiplier) - weight).to(x.dtype))
