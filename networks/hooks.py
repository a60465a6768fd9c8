"""LoRAs beside the weights of a loaded model, by forward hooks: exchanging them costs nothing.

A model with merged LoRAs runs faster, so that is how videos are generated. Hooks are for comparing many LoRAs with one
loaded model, and for weights that merging would harm because they are stored as fp8. They work for weights of any
kind: plain, quantised or swapped to host memory.
"""

import copy
import math
import os
import weakref
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from networks.factors import Factors, LoraFactors
from networks.merging import (
    Changes,
    ChangesByTensor,
    count_matches,
    float32_weight,
    merge_into_weight,
    read_loras,
    require_shape,
)


class LoraHooks:
    """The LoRAs that a model has at present, as forward hooks on its modules; does not keep the model alive."""

    def __init__(self, model: nn.Module) -> None:
        self._model = weakref.ref(model)
        self._hooks: list[RemovableHandle] = []

    def use(self, loras: Sequence[tuple[str | os.PathLike, float]], exclude_single_blocks: bool = False) -> None:
        """Replaces the present LoRAs by these files (path, multiplier) of any format; an empty list removes all LoRAs.

        Raises:
            UserError: a file cannot be read, has no module of the model, or is for other shapes. Then the present
                LoRAs stay.
        """
        modules = {name: module for name, module in self._model().named_modules() if _tensors_of(module)}
        known = {f"{name}.{tensor}" for name, module in modules.items() for tensor in _tensors_of(module)}
        by_tensor, files = read_loras(loras, exclude_single_blocks)
        reports = count_matches(loras, files, known)
        by_module: dict[str, ChangesByTensor] = {}
        for name, own in by_tensor.items():
            owner, _, tensor = name.rpartition(".")
            if name not in known:
                continue
            for change, _ in own:
                require_shape(owner, change, *_shape(modules[owner], tensor))
            by_module.setdefault(owner, {})[tensor] = own
        for report in reports:
            report.announce()
        for hook in self._hooks:
            hook.remove()
        owners = [(modules[name], own) for name, own in by_module.items()]
        self._hooks = [module.register_forward_hook(_hook(module, own)) for module, own in owners]


def _tensors_of(module: nn.Module) -> list[str]:
    """The names of the tensors of a module that a LoRA can change."""
    return [name for name in ("weight", "bias") if isinstance(getattr(module, name, None), Tensor)]


def _shape(module: nn.Module, tensor: str) -> tuple[int, ...]:
    """(rows, columns) of a weight, (rows,) of a vector."""
    if tensor == "weight" and hasattr(module, "in_features"):
        return module.out_features, module.in_features
    first, *others = getattr(module, tensor).shape
    return (first, math.prod(others)) if others else (first,)


def _hook(module: nn.Module, changes: ChangesByTensor) -> Callable:
    """A forward hook that changes the output of a module as `changes` of its weight and bias would."""
    device = module.weight.device
    changes = {name: [(_moved(change, device), factor) for change, factor in own] for name, own in changes.items()}

    def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        if not hasattr(module, "in_features"):
            return _with_changed_tensors(module, inputs, changes)
        output = output + _lora_output(module, inputs[0], changes.get("weight", []))
        for vector, multiplier in changes.get("bias", []):
            output = output + (multiplier * vector.to(output.device)).to(output.dtype)
        return output

    return hook


def _moved(change: Factors | Tensor, device: torch.device) -> Factors | Tensor:
    # Only copies if the block of this module is swapped: its factors then wait in host memory too.
    return change.to(device) if isinstance(change, Tensor) else change.map(lambda tensor: tensor.to(device))


def _lora_output(linear: nn.Module, x: Tensor, loras: Changes) -> Tensor | float:
    """What LoRAs (factors, multiplier) add to the output of a Linear for x (..., in) -> (..., out)."""
    loras = [(_moved(factors, x.device), multiplier) for factors, multiplier in loras]
    if all(isinstance(factors, LoraFactors) and factors.dora_scale is None for factors, _ in loras):
        return sum(_plain_output(x, factors, multiplier) for factors, multiplier in loras)
    # DoRA depends on the weight with the LoRAs before it, so all of them are applied in turn, as merging does.
    weight = float32_weight(linear)
    changed = weight
    for factors, multiplier in loras:
        changed = factors.apply(changed, multiplier)
    return F.linear(x, (changed - weight).to(x.dtype))


def _plain_output(x: Tensor, factors: LoraFactors, multiplier: float) -> Tensor:
    down, up = factors.down.flatten(1).to(x.dtype), factors.up.flatten(1).to(x.dtype)
    return F.linear(F.linear(x, down), up) * (multiplier * factors.scale)


def _with_changed_tensors(module: nn.Module, inputs: tuple[Tensor, ...], changes: ChangesByTensor) -> Tensor:
    """The output of a norm or a convolution whose weight and bias are changed."""
    twin = copy.copy(module)
    twin._parameters = dict(module._parameters)
    for name, own in changes.items():
        old = module._parameters[name]
        moved = [(_moved(change, old.device), multiplier) for change, multiplier in own]
        changed = merge_into_weight(name, old.detach().to(torch.float32, copy=True), moved)
        twin._parameters[name] = nn.Parameter(changed.to(old.dtype), requires_grad=False)
    return twin.forward(*inputs)
