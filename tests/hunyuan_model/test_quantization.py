"""fp8: error against a plain cast, gradients, and that autograd keeps nothing wide."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hunyuan_model.models import HunyuanVideoConfig, MMDoubleStreamBlock, MMSingleStreamBlock
from hunyuan_model.quantization import (
    FP8,
    Fp8Linear,
    dequantize,
    has_fp8_matmul,
    quantize,
    quantize_linears,
    use_fp8_matmul,
)
from utils.errors import UserError


def _relative_error(value: torch.Tensor, reference: torch.Tensor) -> float:
    return float((value.detach().double() - reference.detach()).norm() / reference.detach().double().norm())


def _cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(F.cosine_similarity(a.detach().flatten().double(), b.detach().flatten().double(), dim=0))


@pytest.mark.parametrize(("deviation", "at_most"), [(0.01, 0.55), (0.04, 1.0)])
def test_output_error_of_a_3072_linear_against_a_plain_cast(deviation: float, at_most: float) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(3072, 3072, bias=False)
    nn.init.normal_(linear.weight, std=deviation)
    x = torch.randn(32, 3072)
    reference = linear(x)
    plain = F.linear(x, linear.weight.to(FP8).float())
    assert _relative_error(Fp8Linear.from_linear(linear)(x), reference) <= at_most * _relative_error(plain, reference)


def test_quantize_keeps_the_range_zeros_and_tiny_rows() -> None:
    rows = torch.tensor([[448.0, -1.0], [0.0, 0.0], [1e-20, -3e-20], [1e6, 1.0], [448.5, 2.0]])
    quantized, scale = quantize(rows)
    assert torch.isfinite(quantized.float()).all()
    assert torch.equal(dequantize(quantized, scale, torch.float32)[:2], rows[:2])
    assert _relative_error(dequantize(quantized, scale, torch.float32)[2:], rows[2:]) < 1 / 16
    assert torch.equal(torch.frexp(scale).mantissa, torch.full_like(scale, 0.5)), "scales are powers of two"


def test_dequantize_rounds_once_in_every_dtype() -> None:
    torch.manual_seed(0)
    weight, scale = torch.randn(8, 16).to(FP8), torch.rand(8, 1)  # a scale of another program: no power of two
    exact = weight.double() * scale.double()
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert torch.equal(dequantize(weight, scale, dtype), exact.float().to(dtype))


def _blocks() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(1)
    config = HunyuanVideoConfig(hidden_size=128, heads=2, mlp_hidden=512, rope_dims=(8, 28, 28))
    block = MMDoubleStreamBlock(config).bfloat16().requires_grad_(False)
    twin = MMDoubleStreamBlock(config).bfloat16().requires_grad_(False)
    twin.load_state_dict(block.state_dict())
    assert quantize_linears(twin, lambda name: "_mod" not in name) == 8
    return block, twin


def _lora_gradients(block: nn.Module, saved: list[torch.Tensor]) -> list[torch.Tensor]:
    """Gradients of LoRA factors that hooks add to every linear layer of a double block."""
    torch.manual_seed(2)
    factors = []
    for module in block.modules():
        if isinstance(module, (nn.Linear, Fp8Linear)):
            down = (torch.randn(4, module.in_features) / module.in_features**0.5).bfloat16().requires_grad_()
            up = (0.1 * torch.randn(module.out_features, 4)).bfloat16().requires_grad_()
            factors += [down, up]
            module.register_forward_hook(lambda _, x, y, down=down, up=up: y + x[0] @ down.T @ up.T)
    img, txt, vec = (torch.randn(shape).bfloat16() for shape in ((1, 24, 128), (1, 8, 128), (1, 128)))
    freqs = (torch.ones(32, 32), torch.zeros(32, 32))

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        img, txt = block(img, txt, vec, freqs, None)
    (img.square().mean() + txt.square().mean()).backward()
    return [factor.grad for factor in factors]


def test_lora_gradients_of_a_block_and_nothing_wide_kept_for_backward() -> None:
    block, twin = _blocks()
    saved: list[torch.Tensor] = []
    reference = _lora_gradients(block, [])
    gradients = _lora_gradients(twin, saved)
    everything = [torch.cat([gradient.flatten().float() for gradient in each]) for each in (gradients, reference)]
    assert _cosine(*everything) >= 0.995
    assert min(_cosine(a, b) for a, b in zip(gradients, reference, strict=True)) >= 0.995
    quantized = {module.weight.shape for module in twin.modules() if isinstance(module, Fp8Linear)}
    wide = [tensor for tensor in saved if tensor.shape in quantized and tensor.dtype != FP8]
    assert not wide, f"kept for backward: {[(tensor.shape, tensor.dtype) for tensor in wide]}"
    assert any(tensor.dtype == FP8 for tensor in saved)


def test_gradient_of_the_input_is_exactly_that_of_the_dequantized_layer() -> None:
    torch.manual_seed(0)
    layer = Fp8Linear.from_linear(nn.Linear(32, 16))
    x = torch.randn(2, 5, 32, requires_grad=True)
    twin = x.detach().clone().requires_grad_()
    gradient = torch.randn(2, 5, 16)
    layer(x).backward(gradient)
    reference = F.linear(twin, layer.dequantized(torch.float32), layer.bias)
    reference.backward(gradient)
    torch.testing.assert_close(layer(x), reference, rtol=0, atol=0)
    torch.testing.assert_close(x.grad, twin.grad)


def test_casting_the_model_leaves_weight_and_scale() -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.LayerNorm(16))
    quantize_linears(model, lambda name: name == "0")
    before = model[0].dequantized(torch.float32)
    model.to(torch.bfloat16)
    assert [parameter.dtype for parameter in model[0].parameters()] == [FP8, torch.float32, torch.bfloat16]
    assert torch.equal(model[0].dequantized(torch.float32), before)
    assert model(torch.randn(2, 16).bfloat16()).dtype == torch.bfloat16


def test_autocast_decides_the_dtype_as_for_a_plain_linear() -> None:
    layer = Fp8Linear.from_linear(nn.Linear(16, 16))
    with torch.autocast("cpu", torch.bfloat16):
        x = torch.randn(2, 16, requires_grad=True)
        y = layer(x)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert x.grad.dtype == torch.float32


def test_only_wanted_linears_are_replaced_and_the_meta_device_stays(monkeypatch) -> None:
    """Row by row through a model of full size, nothing would take minutes too."""
    monkeypatch.setattr(
        "hunyuan_model.quantization.quantize", lambda weight: pytest.fail("there is nothing to quantise")
    )
    with torch.device("meta"):
        block = MMSingleStreamBlock(HunyuanVideoConfig(hidden_size=64, heads=2, mlp_hidden=256, rope_dims=(4, 14, 14)))
    assert quantize_linears(block, lambda name: "modulation" not in name) == 2
    assert isinstance(block.linear1, Fp8Linear) and block.linear1.weight.is_meta
    assert type(block.modulation.linear) is nn.Linear


@pytest.mark.skipif(not has_fp8_matmul("cpu"), reason="this torch build has no float8 matmul")
def test_fast_matmul_is_close_and_differentiable() -> None:
    torch.manual_seed(0)
    linear = nn.Linear(256, 128)
    model = nn.Sequential(linear)
    x = torch.randn(2, 24, 256, requires_grad=True)
    reference = linear(x)
    quantize_linears(model, lambda name: True)
    use_fp8_matmul(model, "cpu")
    fast = model(x)
    assert fast.shape == reference.shape
    assert 0.01 < _relative_error(fast, reference) < 0.05, "rounding weights and activations costs about 4%"
    fast.sum().backward()
    assert _cosine(x.grad, linear.weight.sum(0).expand(2, 24, 256)) > 0.995


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_fast_matmul_rounds_activations_as_weights_are(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = (torch.randn(70, 32) * torch.logspace(-6, 4, 70)[:, None]).to(dtype)
    x[3] = 0
    given = {}

    def multiply(tokens: torch.Tensor, weight: torch.Tensor, scale_a: torch.Tensor, **named: object) -> torch.Tensor:
        given.update(tokens=tokens, scale=scale_a)
        return torch.zeros(len(tokens), weight.shape[1])

    layer = Fp8Linear.from_linear(nn.Linear(32, 16))
    layer.fast = True
    monkeypatch.setattr(torch, "_scaled_mm", multiply)
    layer(x)
    tokens, scale = quantize(x)
    assert torch.equal(given["scale"], scale)
    assert torch.equal(given["tokens"].float(), tokens.float())


def test_fast_matmul_without_support_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(*arguments: object, **named: object) -> None:
        raise RuntimeError("not on this device")

    monkeypatch.setattr(torch, "_scaled_mm", unsupported)
    with pytest.raises(UserError, match="--fp8_fast: cpu has no float8"):
        use_fp8_matmul(nn.Sequential(), "cpu")
