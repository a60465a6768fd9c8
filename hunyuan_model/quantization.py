"""Linear layers whose frozen weight is stored as float8, in half the memory of bfloat16.

The weight is float8_e4m3fn (arXiv 2209.05433) with one float32 scale per output channel. It is dequantised in the
forward pass and again in the backward pass, so autograd saves only the float8 weight.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from utils.errors import UserError

FP8 = torch.float8_e4m3fn
FP8_MAX = torch.finfo(FP8).max
# Rows quantised at a time. The float32 copies of the widest matrix then need only a few MB, which avoids memory
# fragmentation.
_ROWS = 64
_MANTISSA = (1 << 23) - 1


def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Quantises a weight (out, in): float8 weight (out, in) and float32 scale (out, 1), whose product is close to it.

    Scales are powers of two. So the mantissas are those of a plain cast to float8, the result is at least as exact as
    that cast, and dequantising rounds nothing. With the scale, small weights do not become float8 subnormals, which
    have fewer bits.
    """
    quantized = torch.empty(weight.shape, dtype=FP8, device=weight.device)
    scale = torch.empty(weight.shape[0], 1, dtype=torch.float32, device=weight.device)
    for start in range(0, weight.shape[0], _ROWS):
        rows = slice(start, start + _ROWS)
        wide = weight[rows].float()
        scale[rows] = _scale_of(wide)
        quantized[rows] = (wide / scale[rows]).to(FP8)
    return quantized, scale


def _scale_of(rows: Tensor) -> Tensor:
    """For each row, the smallest power of two s such that row / s is in the range of float8; 1 for rows of zeros."""
    largest = torch.maximum(rows.amax(-1, keepdim=True), -rows.amin(-1, keepdim=True)).float() / FP8_MAX
    # Rounds up to a power of two by integer arithmetic, which is exact on every device: adding the largest mantissa
    # carries into the exponent unless the mantissa is zero.
    power = ((largest.view(torch.int32) + _MANTISSA) & ~_MANTISSA).view(torch.float32)
    return torch.where(largest > 0, power, 1.0)


def dequantize(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """weight x scale in `dtype`, rounded once: casting float8 to any other dtype is exact."""
    return weight.to(dtype).mul_(scale)


def has_fp8_matmul(device: torch.device | str) -> bool:
    """Whether this device can multiply float8 matrices with one scale per row (NVIDIA: Ada, Hopper and newer)."""
    one = torch.ones(16, 1, device=device)
    matrix = torch.ones(16, 16, device=device).to(FP8)
    try:
        torch._scaled_mm(matrix, matrix.t(), scale_a=one, scale_b=one.t(), out_dtype=torch.bfloat16)
    except (RuntimeError, NotImplementedError, ValueError):
        return False
    return True


def _multiply_fast(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """x @ weight.T + bias in float8 arithmetic, with x quantised per token: (..., in) -> (..., out) of x's dtype."""
    tokens = x.reshape(-1, x.shape[-1])
    token_scale = _scale_of(tokens)
    # All rows at once, because many small steps are slower on a GPU; in x's dtype, because float32 needs more memory.
    tokens = torch.div(tokens, token_scale, out=torch.empty_like(tokens)).to(FP8)
    product = torch._scaled_mm(
        tokens, weight.t(), scale_a=token_scale, scale_b=scale.t().contiguous(), out_dtype=torch.bfloat16
    )
    product = product.to(x.dtype).unflatten(0, x.shape[:-1])
    return product if bias is None else product + bias


class _Fp8Matmul(torch.autograd.Function):
    """x @ weight.T + bias. Backward dequantises the weight again instead of saving the dequantised one."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, fast: bool) -> Tensor:
        ctx.save_for_backward(weight, scale)
        if fast:
            return _multiply_fast(x, weight, scale, bias)
        return F.linear(x, dequantize(weight, scale, x.dtype), bias)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        weight, scale = ctx.saved_tensors
        return gradient @ dequantize(weight, scale, gradient.dtype), None, None, None, None


class Fp8Linear(nn.Module):
    """A frozen nn.Linear with a float8 weight.

    Attributes:
        weight: (out, in) float8_e4m3fn.
        scale: (out, 1) float32; a parameter, so that code that moves parameters moves it with the weight.
        bias: (out,) in the model's dtype, or None.
        fast: multiply in float8 arithmetic, with activations quantised too.
    """

    def __init__(self, in_features: int, out_features: int, bias: Tensor | None, device: torch.device | str) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        weight = torch.empty(out_features, in_features, dtype=FP8, device=device)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.scale = nn.Parameter(torch.empty(out_features, 1, device=device), requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        self.fast = False

    @classmethod
    def from_linear(cls, linear: nn.Linear) -> "Fp8Linear":
        """Quantises a linear layer. From a layer on the meta device, creates a layer without data."""
        layer = cls(linear.in_features, linear.out_features, linear.bias, "meta")
        if not linear.weight.is_meta:
            layer.set_weight(linear.weight.detach())
        return layer

    def set_weight(self, weight: Tensor) -> None:
        """Replaces the weight by another (out, in) of any dtype, which is quantised."""
        quantized, scale = quantize(weight)
        self.weight = nn.Parameter(quantized, requires_grad=False)
        self.scale = nn.Parameter(scale, requires_grad=False)

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """The weight (out, in), dequantised."""
        return dequantize(self.weight, self.scale, dtype)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) -> (..., out)."""
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return _Fp8Matmul.apply(x, self.weight, self.scale, bias, self.fast)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Fp8Linear":
        """Makes `model.to(dtype)` cast only the bias; `model.to(device)` moves all parameters."""

        def keep_dtype(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype or tensor.ndim == 1 else tensor.to(moved.device)

        return super()._apply(keep_dtype, recurse)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


def quantize_linears(model: nn.Module, wanted: Callable[[str], bool]) -> int:
    """Replaces the linear layers whose dotted name is wanted by quantised ones, in place; returns their number.

    On the meta device the new layers have no data, and a loader fills them later.
    """
    names = [name for name, module in model.named_modules() if type(module) is nn.Linear and wanted(name)]
    for name in names:
        owner, _, leaf = name.rpartition(".")
        parent = model.get_submodule(owner)
        setattr(parent, leaf, Fp8Linear.from_linear(getattr(parent, leaf)))
    return len(names)


def require_fp8_matmul(device: torch.device | str) -> None:
    """Raises a UserError if the device cannot multiply float8 matrices, which --fp8_fast needs."""
    if not has_fp8_matmul(device):
        raise UserError(f"--fp8_fast: {device} has no float8 matrix multiplication (it needs Ada, Hopper or newer)")


def use_fp8_matmul(model: nn.Module, device: torch.device | str) -> None:
    """Makes every quantised layer multiply in float8 arithmetic (--fp8_fast).

    Raises:
        UserError: the device cannot multiply float8 matrices.
    """
    require_fp8_matmul(device)
    for module in model.modules():
        if isinstance(module, Fp8Linear):
            module.fast = True
