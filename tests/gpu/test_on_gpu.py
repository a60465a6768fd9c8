"""What only a GPU can show; everything here has a twin that runs on the CPU.

pytest tests/gpu -m gpu
"""

import contextlib
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from hunyuan_model.attention import attention_backend
from hunyuan_model.block_swap import enable_block_swap, swapped_blocks
from hunyuan_model.checkpoints import is_quantized_in_dit
from hunyuan_model.memory import measure_dit
from hunyuan_model.models import HYVideoDiffusionTransformer
from modules import parking
from modules.memory_plan import predict
from tests.small_dit import prepare, random_dit, small_config
from utils.fp8 import quantize_linears

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]

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


def train(dit: HYVideoDiffusionTransformer, checkpointing: str) -> list[Tensor]:
    torch.manual_seed(2)
    network = prepare(dit, checkpointing).to(DEVICE)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.05)
    seen = []
    for _ in range(3):
        output = dit(**inputs(SHAPE, DEVICE))
        output.float().square().mean().backward()
        with torch.no_grad():
            seen += [output.detach(), dit(**inputs((1, 16, 1, 32, 32), DEVICE))]
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


def test_offloaded_checkpoints_leave_the_gpu() -> None:
    kept = {}
    for checkpointing in ("full", "offload"):
        dit = new_model().to(DEVICE)
        network = prepare(dit, checkpointing).to(DEVICE)
        before = torch.cuda.memory_allocated()
        output = dit(**inputs(SHAPE, DEVICE))
        kept[checkpointing] = torch.cuda.memory_allocated() - before
        del dit, network, output
    block_input = (5 * 32 * 32 + 32) * CONFIG.hidden_size * 2
    assert kept["full"] - kept["offload"] >= 10 * block_input  # of 12: the first needs no gradient, the last is leaving


def test_offloading_waits_for_slow_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever does not wait reads tensors that are not there yet, or writes where a copy still reads."""
    copies = parking._copies

    @contextlib.contextmanager
    def slow(device: torch.device) -> Iterator[None]:
        with copies(device):
            torch.cuda._sleep(20_000_000)
            yield

    expected = train(new_model().to(DEVICE), "none")
    monkeypatch.setattr(parking, "_copies", slow)
    for ours, plain in zip(train(new_model().to(DEVICE), "offload"), expected, strict=True):
        assert torch.equal(ours, plain)


def test_bfloat16_is_near_the_float32_of_the_cpu() -> None:
    with torch.no_grad():
        exact = new_model(torch.float32)(**inputs((2, 16, 1, 16, 16), torch.device("cpu")))
        rounded = new_model().to(DEVICE)(**inputs((2, 16, 1, 16, 16), DEVICE)).float().cpu()
    assert (rounded - exact).norm() <= 0.03 * exact.norm()


@pytest.mark.parametrize("mode", ["flash", "flash3", "sageattn", "xformers"])
def test_installed_backends_agree_with_torch(mode: str) -> None:
    pytest.importorskip({"flash": "flash_attn", "flash3": "flash_attn_interface"}.get(mode, mode))
    q, k, v = torch.randn(3, 2, 4, 300, 128, device=DEVICE, dtype=torch.bfloat16)
    mask = (torch.arange(300, device=DEVICE) < torch.tensor([[300], [270]], device=DEVICE))[:, None, None]
    for key_mask in (None, mask):
        ours, plain = (attention_backend(name)(q, k, v, key_mask).float() for name in (mode, "torch"))
        assert (ours - plain).norm() <= 0.05 * plain.norm()


@pytest.mark.parametrize("fp8", [False, True], ids=["bf16", "fp8"])
@pytest.mark.parametrize("swap", [0, 4])
@pytest.mark.parametrize("checkpointing", ["selective", "full"])
def test_planner_is_within_a_tenth(checkpointing: str, swap: int, fp8: bool) -> None:
    usage = measure_dit(CONFIG, SHAPE, 32, torch.bfloat16, fp8, True, lambda dit: prepare(dit, checkpointing))
    predicted = predict(usage, swapped_blocks(swap, 4, 8)).tensors
    dit = new_model()
    if fp8:
        quantize_linears(dit, is_quantized_in_dit)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    enable_block_swap(dit, swap, DEVICE)
    prepare(dit, checkpointing).to(DEVICE)
    dit(**inputs(SHAPE, DEVICE)).float().square().mean().backward()
    assert torch.cuda.max_memory_allocated() - before == pytest.approx(predicted, rel=0.1)
