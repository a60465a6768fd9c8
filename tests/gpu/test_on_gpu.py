"""Tests that need a GPU; each has a counterpart that runs on the CPU.

pytest tests/gpu -m gpu
"""

import contextlib
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from hunyuan_model.attention import SAGE_TOLERANCE, TOLERANCE, attention_backend, exact_attention
from hunyuan_model.attention_modes import ATTENTION_MODES
from hunyuan_model.block_swap import enable_block_swap, swapped_blocks
from hunyuan_model.checkpoints import is_quantized_in_dit
from hunyuan_model.models import HYVideoDiffusionTransformer
from hunyuan_model.quantization import quantize_linears
from modules.blocks import activation_offload
from modules.memory.measure import measure_dit
from modules.memory.plan import predict
from tests.small_dit import prepare, random_dit, small_config
from utils.device_utils import release_memory

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA and -m gpu")]

DEVICE = torch.device("cuda")
CONFIG = small_config(hidden_size=512, heads=4, mlp_hidden=2048, rope_dims=(16, 56, 56))
SHAPE = (1, 16, 5, 64, 64)


def new_model(dtype: torch.dtype = torch.bfloat16) -> HYVideoDiffusionTransformer:
    return random_dit(CONFIG, std=0.05, dtype=dtype)


def inputs(shape: tuple[int, ...], device: torch.device) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    given = {
        "x": torch.randn(shape, generator=generator),
        "timestep": torch.full((shape[0],), 500.0),
        "text_states": torch.randn(shape[0], 32, 64, generator=generator),
        "text_mask": torch.ones(shape[0], 32),
        "text_states_2": torch.randn(shape[0], 64, generator=generator),
        "guidance": torch.full((shape[0],), 6000.0),
    }
    return {name: value.to(device) for name, value in given.items()}


def step(dit: HYVideoDiffusionTransformer, shape: tuple[int, ...]) -> Tensor:
    """Forward and backward; returns the output."""
    output = dit(**inputs(shape, DEVICE))
    output.float().square().mean().backward()
    return output.detach()


@sdpa_kernel(SDPBackend.MATH)  # the others add up the gradient of q in an order that changes from run to run
def train(dit: HYVideoDiffusionTransformer, checkpointing: str) -> list[Tensor]:
    torch.manual_seed(2)
    network = prepare(dit, checkpointing).to(DEVICE)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.05)
    seen = []
    for _ in range(3):
        output = step(dit, (1, 16, 3, 32, 32))
        with torch.no_grad():
            seen += [output, dit(**inputs((1, 16, 1, 32, 32), DEVICE))]
    return seen + [parameter.grad for parameter in network.get_trainable_params()]


@pytest.mark.parametrize("fp8", [False, True], ids=["bf16", "fp8"])
@pytest.mark.parametrize("ring_size", [1, 2, 3])
def test_block_swap_on_is_off(ring_size: int, fp8: bool) -> None:
    results = []
    for swap in (0, 6):
        dit = new_model()
        if fp8:
            quantize_linears(dit, is_quantized_in_dit)
        enable_block_swap(dit, swap, DEVICE, ring_size)
        results.append(train(dit, "full"))
    for swapped, plain in zip(*results, strict=True):
        assert torch.equal(swapped, plain)


@pytest.mark.parametrize("checkpointing", ["full", "selective", "offload"])
def test_checkpointing_gives_the_same_gradients(checkpointing: str) -> None:
    for ours, plain in zip(
        train(new_model().to(DEVICE), checkpointing), train(new_model().to(DEVICE), "none"), strict=True
    ):
        assert torch.equal(ours, plain)


def kept_after_forward(checkpointing: str) -> int:
    """Bytes saved on the GPU for the backward pass, in the second step: the first allocates lasting buffers too."""
    dit = new_model().to(DEVICE)
    prepare(dit, checkpointing).to(DEVICE)
    step(dit, SHAPE)
    release_memory(DEVICE)
    before = torch.cuda.memory_allocated()
    output = dit(**inputs(SHAPE, DEVICE))
    kept = torch.cuda.memory_allocated() - before
    del output  # until here it holds the graph
    return kept


def test_offloaded_checkpoints_leave_the_gpu() -> None:
    block_input = (5 * 32 * 32 + 32) * CONFIG.hidden_size * 2
    # 10 of 12 blocks: the input of the first needs no gradient, that of the last is still being copied.
    assert kept_after_forward("full") - kept_after_forward("offload") >= 9.5 * block_input


def test_offloading_waits_for_slow_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a wait, the computation would read tensors before they are copied, or write while a copy reads."""
    on_copy_stream = activation_offload._on_copy_stream

    @contextlib.contextmanager
    def slow(device: torch.device) -> Iterator[None]:
        with on_copy_stream(device):
            torch.cuda._sleep(20_000_000)
            yield

    expected = train(new_model().to(DEVICE), "none")
    monkeypatch.setattr(activation_offload, "_on_copy_stream", slow)
    for ours, plain in zip(train(new_model().to(DEVICE), "offload"), expected, strict=True):
        assert torch.equal(ours, plain)


def test_bfloat16_is_near_the_float32_of_the_cpu() -> None:
    with torch.no_grad():
        exact = new_model(torch.float32)(**inputs((2, 16, 1, 16, 16), torch.device("cpu")))
        rounded = new_model().to(DEVICE)(**inputs((2, 16, 1, 16, 16), DEVICE)).float().cpu()
    assert (rounded - exact).norm() <= 0.03 * exact.norm()


@pytest.mark.parametrize("mode", ["flash", "flash3", "sageattn", "xformers"])
def test_installed_backends_are_exact(mode: str) -> None:
    pytest.importorskip(ATTENTION_MODES[mode].module)
    q, k, v = torch.randn(3, 2, 4, 300, 128, device=DEVICE, dtype=torch.bfloat16)
    counts = torch.arange(300) < torch.tensor([[300], [270]])  # B L; what a padded row attends to is not defined
    for key_mask in (None, counts[:, None, None].to(DEVICE)):
        ours = attention_backend(mode)(q, k, v, key_mask).double().cpu()
        expected = exact_attention(q, k, v, key_mask)
        error = (ours - expected)[counts].norm() / expected[counts].norm()
        assert error <= (SAGE_TOLERANCE if mode == "sageattn" else TOLERANCE[torch.bfloat16])


@pytest.mark.parametrize("fp8", [False, True], ids=["bf16", "fp8"])
@pytest.mark.parametrize("swap", [0, 4])
@pytest.mark.parametrize("checkpointing", ["selective", "full"])
def test_planner_is_within_a_tenth(checkpointing: str, swap: int, fp8: bool) -> None:
    kept_after_forward("none")  # libraries allocate lasting buffers at their first use
    dit = new_model()
    if fp8:
        quantize_linears(dit, is_quantized_in_dit)
    release_memory(DEVICE)
    before = torch.cuda.memory_allocated()
    enable_block_swap(dit, swap, DEVICE)
    network = prepare(dit, checkpointing).to(DEVICE)
    torch.cuda.reset_peak_memory_stats()
    step(dit, SHAPE)
    usage = measure_dit(CONFIG, SHAPE, 32, torch.bfloat16, fp8, True, lambda dit: prepare(dit, checkpointing))
    trained = sum(parameter.numel() for parameter in network.parameters())
    predicted = predict(usage, swapped_blocks(swap, 4, 8), trained=trained, moments=0).tensors
    assert torch.cuda.max_memory_allocated() - before == pytest.approx(predicted, rel=0.1)
