"""Tensors that a third-party network changes in place: never a wrong gradient."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from modules.blocks.activation_checkpointing import checkpoint_activations
from modules.blocks.rematerialization import rematerialize_pointwise


def changed_before_it_is_saved(x: Tensor, w: Tensor) -> Tensor:
    y = nn.functional.silu(x @ w)
    y.add_(1)
    return y * w.sum()


def changed_twice(x: Tensor, w: Tensor) -> Tensor:
    y = (x @ w) * 3
    z = y.view(-1)[:4]
    z.mul_(2)
    return nn.functional.silu(y) * y


def kept_and_then_changed(x: Tensor, w: Tensor) -> Tensor:
    y = x @ w
    z = y * w.sum()
    y.add_(1)
    return z


class Block(nn.Module):
    def __init__(self, function: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function
        self.w = nn.Parameter(torch.randn(4, 4, generator=torch.Generator().manual_seed(1)))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.w)


def gradient(function: Callable, way: Callable | None) -> Tensor:
    block = Block(function)
    if way:
        way([block])
    block(torch.randn(3, 4, generator=torch.Generator().manual_seed(2))).square().sum().backward()
    return block.w.grad


WAYS = pytest.mark.parametrize("way", [rematerialize_pointwise, checkpoint_activations])


@WAYS
@pytest.mark.parametrize("function", [changed_before_it_is_saved, changed_twice])
def test_what_was_changed_in_place_has_the_gradient_of_plain_autograd(function: Callable, way: Callable) -> None:
    expected = gradient(function, None)
    assert expected.abs().max() > 1
    assert torch.equal(gradient(function, way), expected)


@WAYS
def test_what_was_changed_after_it_was_kept_is_refused_as_by_plain_autograd(way: Callable) -> None:
    for tried in (None, way):
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            gradient(kept_and_then_changed, tried)
