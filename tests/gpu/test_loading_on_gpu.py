"""Loading directly to a GPU; the same tests for the CPU are in tests/hunyuan_model.

pytest tests/gpu -m gpu
"""

import pytest
import torch

from examples.tiny_models import dit_shapes, random_weights
from hunyuan_model.attention import TOLERANCE, verify_attention
from hunyuan_model.checkpoints import load_dit
from hunyuan_model.quantization import FP8, Fp8Linear, has_fp8_matmul
from tests.hunyuan_model.model_layouts import DIT_LAYOUTS

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA and -m gpu")]


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("layout", ["official .pt, module", "safetensors"])
def test_weights_on_the_gpu_are_those_on_the_cpu(layout: str, fp8: bool, tmp_path) -> None:
    """Quantised weights too, since scales are computed without rounding on both."""
    path = DIT_LAYOUTS[layout](tmp_path, random_weights(dit_shapes(), seed=0))
    there, here = (load_dit(path, device, torch.bfloat16, fp8).state_dict() for device in ("cuda", "cpu"))
    for name, tensor in here.items():
        assert there[name].is_cuda and there[name].dtype == tensor.dtype
        assert torch.equal(there[name].cpu().float(), tensor.float()), name
    assert any(tensor.dtype == FP8 for tensor in here.values()) == fp8


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_self_check_passes_pytorchs_attention(dtype: torch.dtype) -> None:
    assert verify_attention("torch", "cuda", dtype) <= TOLERANCE[dtype]


def test_fast_matmul_is_near_the_exact_one() -> None:
    if not has_fp8_matmul("cuda"):
        pytest.skip("this GPU has no float8 matmul")
    torch.manual_seed(0)
    layer = Fp8Linear.from_linear(torch.nn.Linear(3072, 3072).cuda().bfloat16())
    x = torch.randn(512, 3072, device="cuda", dtype=torch.bfloat16)
    exact = layer(x).float()
    layer.fast = True
    assert (layer(x).float() - exact).norm() / exact.norm() < 0.05
