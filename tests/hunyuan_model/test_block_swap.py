"""Block swap on = off, bit for bit; on the CPU the same code streams into CPU buffers."""

import functools

import pytest
import torch
from torch import Tensor

from hunyuan_model.block_swap import enable_block_swap, max_blocks_to_swap, offload_embedders, swapped_blocks
from hunyuan_model.models import HYVideoDiffusionTransformer
from modules.blocks.activation_checkpointing import checkpoint_activations
from networks.lora import create_arch_network
from tests.small_dit import random_dit, small_config
from utils.errors import UserError

CONFIG = small_config(text_dim=16, text_dim_2=8)


def new_model(dtype: torch.dtype = torch.float32) -> HYVideoDiffusionTransformer:
    return random_dit(CONFIG, dtype=dtype)


def inputs(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "x": torch.randn(2, 16, 2, 4, 4, generator=generator),
        "timestep": torch.tensor([900.0, 100.0]),
        "text_states": torch.randn(2, 6, 16, generator=generator),
        "text_mask": torch.tensor([[1, 1, 1, 1, 1, 0], [1, 1, 0, 0, 0, 0]]),
        "text_states_2": torch.randn(2, 8, generator=generator),
        "guidance": torch.tensor([6000.0, 1000.0]),
    }


def train_and_preview(model: HYVideoDiffusionTransformer, checkpointing: str | None) -> list[Tensor]:
    """Three rounds of a training step and two previews; returns all outputs and gradients."""
    if checkpointing:
        checkpoint_activations(model.blocks, checkpointing)
    torch.manual_seed(1)
    network = create_arch_network(1.0, 4, 4.0, None, None, model)
    network.apply_to(None, model, False, True)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    seen = []
    for seed in range(3):
        given = inputs(seed)
        given["x"].requires_grad_()
        output = model(**given)
        output.square().mean().backward()
        seen += [output.detach(), given["x"].grad, *(p.grad.clone() for p in network.parameters())]
        network.zero_grad()
        with torch.no_grad():
            seen += [model(**inputs(10 + seed)), model(**inputs(20 + seed))]
    return seen


@functools.cache
def without_swap(checkpointing: str | None) -> list[Tensor]:
    return train_and_preview(new_model(), checkpointing)


@pytest.mark.parametrize("checkpointing", [None, "full", "selective", "offload"])
@pytest.mark.parametrize("ring_size", [1, 2, 3])
@pytest.mark.parametrize(("count", "training"), [(1, True), (4, True), (6, False)])
def test_swap_on_is_swap_off(count: int, training: bool, ring_size: int, checkpointing: str | None) -> None:
    expected = without_swap(checkpointing)
    model = new_model()
    enable_block_swap(model, count, "cpu", ring_size, training)
    for ours, plain in zip(train_and_preview(model, checkpointing), expected, strict=True):
        assert torch.equal(ours, plain)


def test_weights_are_never_written() -> None:
    model, twin = new_model(), new_model()
    swap = enable_block_swap(model, 6, "cpu")
    before = [block.flat.clone() for block in swap.blocks]
    train_and_preview(model, None)
    assert all(torch.equal(block.flat, old) for block, old in zip(swap.blocks, before, strict=True))
    for name, value in twin.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name


def test_only_the_ring_holds_swapped_weights() -> None:
    model = new_model(torch.bfloat16)
    swap = enable_block_swap(model, 6, "cpu", ring_size=2)
    assert [len(block.packed) for block in swap.blocks] == [10] * 3 + [3] * 7
    train_and_preview(model, "full")
    assert len(swap.ring) == 2
    in_ring = {index for index, block in enumerate(swap.blocks) for p in block.packed if _inside(p.parameter, swap)}
    assert in_ring == set(swap.slot_of)
    assert len(in_ring) == 2


def _inside(parameter: Tensor, swap) -> bool:
    return parameter.untyped_storage().data_ptr() in swap.storages


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointed"])
def test_the_next_block_is_copied_ahead(checkpointing: bool) -> None:
    model = new_model()
    swap = enable_block_swap(model, 4, "cpu", ring_size=2, training=True)
    if checkpointing:
        checkpoint_activations(model.blocks)
    copied, original = [], swap._copy
    swap._copy = lambda index, keep: (copied.append((swap.current, index)), original(index, keep))
    output = model(**inputs(0) | {"x": inputs(0)["x"].requires_grad_()})
    last = len(swap.blocks) - 1
    assert copied == [(0, 0), (0, 1)] + [(i, i + 1) for i in range(1, last)]
    copied.clear()
    output.sum().backward()
    assert copied == [(i, i - 1) for i in range(last - 1, 0, -1)]


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointed"])
def test_the_last_block_of_a_preview_copies_the_first(checkpointing: bool) -> None:
    model = new_model()
    swap = enable_block_swap(model, 4, "cpu", ring_size=2, training=True)
    if checkpointing:
        checkpoint_activations(model.blocks)
    model(**inputs(0) | {"x": inputs(0)["x"].requires_grad_()}).sum().backward()
    copied, original = [], swap._copy
    swap._copy = lambda index, keep: (copied.append((swap.current, index)), original(index, keep))
    with torch.no_grad():
        model(**inputs(0))
        copied.clear()
        model(**inputs(0))
    count = len(swap.blocks)
    assert copied == [(i, (i + 1) % count) for i in range(count)]


@pytest.mark.parametrize("checkpointing", [None, "full", "selective", "offload"])
def test_a_block_is_launched_before_the_next_is_copied(checkpointing: str | None) -> None:
    """The CPU waits for a copy from memory that is not pinned, so it must queue the GPU's work first."""
    model, order = new_model(), []
    indices = swapped_blocks(4, CONFIG.depth_double, CONFIG.depth_single, training=True)
    for index, block in enumerate(model.blocks[i] for i in indices):
        modulation = block.img_mod if hasattr(block, "img_mod") else block.modulation
        modulation.register_forward_hook(lambda *_, index=index: order.append(("run", index)))
    swap = enable_block_swap(model, 4, "cpu", ring_size=2, training=True)
    original = swap._copy
    swap._copy = lambda index, keep: (order.append(("copy", index)), original(index, keep))
    if checkpointing:
        checkpoint_activations(model.blocks, checkpointing)
    output = model(**inputs(0) | {"x": inputs(0)["x"].requires_grad_()})
    last = len(indices) - 1
    pairs = [step for i in range(last) for step in (("run", i), ("copy", i + 1))]
    assert order == [("copy", 0), *pairs, ("run", last)]
    order.clear()
    output.sum().backward()
    if checkpointing:
        pairs = [step for i in range(last - 1, 0, -1) for step in (("run", i), ("copy", i - 1))]
        assert order == [("run", last), *pairs, ("run", 0)]


def test_counts_and_limits() -> None:
    assert max_blocks_to_swap(20, 40, training=False) == 38
    assert max_blocks_to_swap(20, 40, training=True) == 36
    for count, doubles, singles in ((1, 0, 3), (20, 10, 21), (36, 18, 37), (38, 19, 39)):
        chosen = swapped_blocks(count, 20, 40)
        assert sum(index < 20 for index in chosen) == doubles
        assert sum(index >= 20 for index in chosen) == singles
        assert len(set(chosen)) == len(chosen)
    with pytest.raises(UserError, match=r"--blocks_to_swap 37.*training is 36"):
        swapped_blocks(37, 20, 40, training=True)
    with pytest.raises(UserError, match="generation is 38"):
        swapped_blocks(39, 20, 40)


def test_trained_weights_are_refused() -> None:
    with pytest.raises(ValueError, match="frozen"):
        enable_block_swap(new_model().requires_grad_(True), 2, "cpu")


def test_offloaded_embedders_change_nothing() -> None:
    model, plain = new_model(), new_model()
    offload_embedders(model, "cpu")
    assert torch.equal(model(**inputs(0)), plain(**inputs(0)))


def test_offloaded_embedders_are_not_copied_back(monkeypatch: pytest.MonkeyPatch) -> None:
    model = new_model()
    offload_embedders(model, "cpu")
    embedders = (model.img_in, model.txt_in)

    def to(module: torch.nn.Module, _: str) -> torch.nn.Module:
        """As between devices, where every move is a copy."""
        for parameter in module.parameters():
            parameter.data = parameter.data.clone()
        return module

    monkeypatch.setattr(torch.nn.Module, "to", to)
    before = [parameter.data_ptr() for module in embedders for parameter in module.parameters()]
    model(**inputs(0))
    assert [parameter.data_ptr() for module in embedders for parameter in module.parameters()] == before
