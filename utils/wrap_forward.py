"""The one way to put something around the `forward` of a module from outside.

    def doubled(forward, x):
        return 2 * forward(x)

    wrapper = wrap_forward(module, WrapperKind.OUTPUT_CHANGE, doubled)
    module(torch.ones(2, 4))
    wrapper.remove()

The contract:

- Arguments: a wrapper is called as `wrapper(forward, *arguments)`. `forward` is what it wraps: the module's own
  `forward` or the next wrapper inside. All arguments are positional, in the order of the module's own `forward`, also
  where the caller of the module passed keywords. The wrapper passes all of them on, by position.
- Result: a wrapper returns what `forward` would return: the same number of tensors, with the same shapes.
- Calls: a wrapper may call `forward` once, not at all, or again in the backward pass.
- Order: the kinds of wrappers are nested as `WrapperKind` lists them. Wrap from the inside out. Only wrappers of the
  kind OUTPUT_CHANGE may be stacked; there is at most one of every other kind.
- Children: what changes the children of a module (a wrapper around a Linear of a block) must be in place before the
  module itself is compiled and first runs.
- torch.compile: it traces through every wrapper inside of COMPILATION and through those of the children, so these must
  only compute with tensors. What is outside is not compiled.
- Removal: `remove()` restores the previous `forward`. The outermost wrapper is removed first.
- Hooks: PyTorch's forward hooks run outside of all wrappers.
- accelerate: wrap a module before `accelerator.prepare(module)`. accelerate also wraps `forward`, and its wrapper must
  be the outermost when accelerate removes it. The modules inside a prepared one may be wrapped at any time.
"""

import inspect
from collections.abc import Callable
from enum import IntEnum
from types import MethodType
from typing import Any

from torch import nn


class WrapperKind(IntEnum):
    """What a wrapper does, from the innermost to the outermost."""

    OUTPUT_CHANGE = 0
    """Adds something to the output, as an adapter does; the only kind that may be stacked."""
    COMPILATION = 1
    WEIGHT_STREAMING = 2
    """Brings the weights to the device before the module runs."""
    REMATERIALIZATION = 3
    """Keeps cheap operations instead of their results for the backward pass."""
    CHECKPOINTING = 4
    """Keeps the inputs and runs the module again in the backward pass."""
    RESULT_CACHE = 5
    """Returns an earlier result, changed or not, instead of running the module."""


class ForwardWrapper:
    """A wrapper in its place; what `wrap_forward` returns."""

    def __init__(self, module: nn.Module, kind: WrapperKind, around: Callable[..., Any]) -> None:
        present, inner = wrappers_of(module), module.forward
        parameters = present[0]._parameters if present else _positional_parameters(inner)
        self.kind, self._module, self._parameters = kind, module, parameters
        self._replaced = module.__dict__.get("forward")  # None: the method of the class

        def forward(self: nn.Module, *arguments: Any, **named: Any) -> Any:
            if named:
                arguments = _by_position(self, parameters, arguments, named)
            return around(inner, *arguments)

        # A bound method without `__wrapped__`: accelerate can wrap this and find it again.
        self._installed = MethodType(forward, module)
        module.forward = self._installed

    def remove(self) -> None:
        """Restores the `forward` that was there before.

        Raises:
            ValueError: something else was put around this wrapper, or it was removed already.
        """
        wrappers = wrappers_of(self._module)
        if not wrappers or wrappers[-1] is not self or self._module.forward != self._installed:
            raise ValueError(f"{self!r} is not the outermost wrapper: remove what was put around it first")
        if wrappers[:-1]:
            self._module._forward_wrappers = wrappers[:-1]
        else:
            del self._module._forward_wrappers
        if self._replaced is None:
            del self._module.forward
        else:
            self._module.forward = self._replaced

    def __repr__(self) -> str:
        return f"{self.kind.name} around {type(self._module).__name__}"


def wrap_forward(module: nn.Module, kind: WrapperKind, around: Callable[..., Any]) -> ForwardWrapper:
    """Calls `around(forward, *arguments)` wherever `module.forward(...)` was called; see the contract above.

    Args:
        module: any module.
        kind: decides what this wrapper may be put around.
        around: takes the wrapped `forward` and its arguments, and returns what `forward` would return.

    Raises:
        ValueError: an existing wrapper belongs outside of the new one or is of the same kind; or accelerate has
            already wrapped the module.
    """
    wrappers = wrappers_of(module)
    for present in wrappers:
        if kind < present.kind or kind == present.kind != WrapperKind.OUTPUT_CHANGE:
            order = " < ".join(kind.name for kind in WrapperKind)
            raise ValueError(f"{kind.name} cannot be put around {present!r}; the order from the inside is {order}")
    if "_original_forward" in module.__dict__:
        raise ValueError(f"{type(module).__name__} must be wrapped before accelerator.prepare")
    wrapper = ForwardWrapper(module, kind, around)
    module._forward_wrappers = [*wrappers, wrapper]
    return wrapper


def wrappers_of(module: nn.Module) -> list[ForwardWrapper]:
    """The wrappers of a module, the innermost first."""
    return module.__dict__.get("_forward_wrappers", [])


def is_wrapped(module: nn.Module, kind: WrapperKind) -> bool:
    """Whether a wrapper of this kind is around the module."""
    return any(wrapper.kind == kind for wrapper in wrappers_of(module))


def _positional_parameters(forward: Callable[..., Any]) -> list[inspect.Parameter]:
    """The parameters that can be passed by position, in their order."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return [parameter for parameter in inspect.signature(forward).parameters.values() if parameter.kind in kinds]


def _by_position(
    module: nn.Module, parameters: list[inspect.Parameter], arguments: tuple[Any, ...], named: dict[str, Any]
) -> tuple[Any, ...]:
    """All arguments as positional ones, with defaults for those between that were left out.

    Raises:
        TypeError: an argument has no position in the module's own `forward`, or one is missing.
    """
    remaining, found = dict(named), list(arguments)
    for parameter in parameters[len(arguments) :]:
        if not remaining:
            break
        value = remaining.pop(parameter.name, parameter.default)
        if value is inspect.Parameter.empty:
            raise TypeError(f"{type(module).__name__}.forward: argument {parameter.name!r} is missing")
        found.append(value)
    if remaining:
        names = ", ".join(map(repr, remaining))
        raise TypeError(f"{type(module).__name__}.forward: {names} cannot be passed by position, or was passed twice")
    return tuple(found)
