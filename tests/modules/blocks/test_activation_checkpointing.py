"""All ways to save activations give the gradients of plain autograd, bit for bit."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from benchmarks.saved_bytes import inputs, kept_bytes
from modules.blocks.activation_checkpointing import checkpoint_activations
from modules.blocks.rematerialization import rematerialize_pointwise
from modules.memory.meter import MemoryMeter
from networks.lora import create_arch_network
from tests.small_dit import random_dit, small_config

WAYS: dict[str, Callable[[list[nn.Module]], None]] = {
    "rematerialized": rematerialize_pointwise,
    "full": checkpoint_activations,
    "selective": lambda blocks: checkpoint_activations(blocks, "selective"),
    "offload": lambda blocks: checkpoint_activations(blocks, "offload"),
}


def gradients(
    way: Callable[[list[nn.Module]], None] | None,
    dtype: torch.dtype,
    dropout: float | None,
    autocast: bool = False,
    **arguments: str,
) -> list[Tensor]:
    model = random_dit(small_config(depth_double=2, depth_single=3), dtype=dtype)
    network = create_arch_network(1.0, 4, 4.0, None, None, model, neuron_dropout=dropout, **arguments)
    network.apply_to(None, model, False, True)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.1)
    if way:
        way(model.blocks)
    torch.manual_seed(7)
    seen = []
    for _ in range(2):  # the second round would show if the first left anything behind
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            output = model(**inputs((1, 4, 4), 40, dtype))
        output.float().square().mean().backward()
        seen += [output.detach(), torch.rand(1)]
    return seen + [parameter.grad for parameter in network.get_trainable_params()]


@pytest.mark.parametrize("dropout", [None, 0.5], ids=["plain", "dropout"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("way", WAYS)
def test_gradients_are_those_of_plain_autograd(way: str, dtype: torch.dtype, dropout: float | None) -> None:
    expected = gradients(None, dtype, dropout)
    for ours, plain in zip(gradients(WAYS[way], dtype, dropout), expected, strict=True):
        assert torch.equal(ours, plain)


@pytest.mark.parametrize("way", WAYS)
def test_the_second_run_is_autocast_like_the_first(way: str) -> None:
    expected = gradients(None, torch.float32, None, autocast=True)
    for ours, plain in zip(gradients(WAYS[way], torch.float32, None, autocast=True), expected, strict=True):
        assert torch.equal(ours, plain)


@pytest.mark.parametrize(
    "patterns", ["['double_blocks.*']", "['(?!.*img_mlp).*']"], ids=["single only", "img_mlp only"]
)
@pytest.mark.parametrize("way", WAYS)
def test_blocks_without_trained_weights(way: str, patterns: str) -> None:
    expected = gradients(None, torch.float32, None, exclude_patterns=patterns)
    for ours, plain in zip(gradients(WAYS[way], torch.float32, None, exclude_patterns=patterns), expected, strict=True):
        assert torch.equal(ours, plain)


@pytest.mark.parametrize("way", WAYS)
def test_a_backward_pass_leaves_no_more_than_plain_autograd(way: str) -> None:
    assert left_behind(WAYS[way]) == left_behind(None)


def left_behind(way: Callable[[list[nn.Module]], None] | None) -> int:
    """Bytes that a second backward pass leaves behind while its output is still referenced.

    The gradients of the LoRA and the buffers of offloading exist since the first.
    """
    model = random_dit(small_config(depth_double=2, depth_single=3))
    network = create_arch_network(1.0, 4, 4.0, None, None, model)
    network.apply_to(None, model, False, True)
    if way:
        way(model.blocks)
    given = inputs((1, 4, 4), 40, torch.float32)
    model(**given).sum().backward()
    with MemoryMeter() as meter:
        output = model(**given)
        output.sum().backward()
        meter.drop_released()
    return meter.live


@pytest.mark.slow
@pytest.mark.parametrize(("way", "limit"), [("none", 185e6), ("selective", 115e6)])
def test_kept_bytes_at_full_width(way: str, limit: float) -> None:
    assert kept_bytes(way)[0] <= limit
