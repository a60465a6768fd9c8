"""Attention backends: the torch one against exact attention, the others through stand-ins of their packages."""

import importlib.metadata
import sys
import types

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from hunyuan_model import attention
from hunyuan_model.attention import attention_backend, exact_attention, verify_attention
from hunyuan_model.attention_modes import ATTENTION_MODES, require_attention
from hunyuan_model.models import HunyuanVideoConfig, HYVideoDiffusionTransformer
from utils.errors import UserError


def _math(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Heads (..., H, L, D) in, heads out."""
    return ((q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1) @ v).to(q.dtype)


def _dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """flash_attn_func and memory_efficient_attention: (B, L, H, D)."""
    return _math(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)


def _ragged(q: Tensor, k: Tensor, v: Tensor, ends: Tensor, _: Tensor, longest: int, __: int, **named: object) -> Tensor:
    """flash_attn_varlen_func and sageattn_varlen: sequences (N, H, D) end to end, their cumulative lengths int32."""
    assert ends.dtype == torch.int32 and int(ends.diff().max()) <= longest
    pieces = [x.split(ends.diff().tolist()) for x in (q, k, v)]
    return torch.cat([_math(*(x.transpose(0, 1) for x in each)).transpose(0, 1) for each in zip(*pieces, strict=True)])


def _sage(q: Tensor, k: Tensor, v: Tensor, tensor_layout: str, is_causal: bool) -> Tensor:
    assert tensor_layout == "HND" and not is_causal
    return _math(q, k, v)


class _BlockDiagonal:
    @staticmethod
    def from_seqlens(lengths: list[int]) -> Tensor:
        assert all(lengths), "xformers refuses empty sequences"
        return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def _efficient(q: Tensor, k: Tensor, v: Tensor, attn_bias: Tensor | None = None) -> Tensor:
    if attn_bias is None:
        return _dense(q, k, v)
    longest = int(attn_bias.diff().max())
    return _ragged(*(x[0] for x in (q, k, v)), attn_bias, attn_bias, longest, longest)[None]


@pytest.fixture
def packages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand-ins with the signatures of flash-attn 2 and 3, sageattention and xformers."""
    contents = {
        "flash_attn": {"flash_attn_func": _dense, "flash_attn_varlen_func": _ragged},
        "flash_attn_interface": {
            "flash_attn_func": lambda q, k, v: (_dense(q, k, v), None),  # some releases return the log-sum-exp too
            "flash_attn_varlen_func": lambda *arguments: (_ragged(*arguments), None),
        },
        "sageattention": {"sageattn": _sage, "sageattn_varlen": _ragged},
        "xformers": {},
        "xformers.ops": {
            "fmha": types.SimpleNamespace(memory_efficient_attention=_efficient, BlockDiagonalMask=_BlockDiagonal)
        },
    }
    for name, content in contents.items():
        module = types.ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)


def _heads(dtype: torch.dtype = torch.float32) -> tuple[tuple[Tensor, ...], Tensor]:
    torch.manual_seed(0)
    heads = tuple(torch.randn(3, 2, 20, 16).to(dtype) for _ in range(3))
    lengths = torch.tensor([20, 13, 7])
    return heads, (torch.arange(20) < lengths[:, None])[:, None, None, :]


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("name", ATTENTION_MODES)
def test_every_backend_is_exact_attention_and_ignores_padding(name: str, split: bool, packages: None) -> None:
    heads, key_mask = _heads()
    backend = attention_backend(name, split)
    torch.testing.assert_close(backend(*heads), exact_attention(*heads).float())
    valid = key_mask[:, 0, 0]
    found = backend(*heads, key_mask)
    torch.testing.assert_close(found[valid], exact_attention(*heads, key_mask)[valid].float())
    assert torch.isfinite(found).all() and found.shape == (3, 20, 32)
    heads = tuple(torch.where(valid[:, None, :, None], x, 1e4) for x in heads)
    torch.testing.assert_close(backend(*heads, key_mask)[valid], found[valid])


def test_exact_attention_is_pytorchs_own_float64_attention() -> None:
    heads, key_mask = _heads(torch.float64)
    expected = F.scaled_dot_product_attention(*heads, attn_mask=key_mask)
    torch.testing.assert_close(exact_attention(*heads, key_mask), rearrange(expected, "B H L D -> B L (H D)"))


@pytest.mark.parametrize("split", [False, True])
def test_gradients_flow_through_every_backend_that_trains(split: bool, packages: None) -> None:
    heads, key_mask = _heads()
    valid = key_mask[:, 0, 0]
    weight = torch.randn(3, 20, 32)[valid]
    gradients = {}
    for name in ("torch", "flash", "flash3", "xformers"):
        leaves = [x.clone().requires_grad_() for x in heads]
        (attention_backend(name, split)(*leaves, key_mask)[valid] * weight).sum().backward()
        gradients[name] = torch.stack([leaf.grad * valid[:, None, :, None] for leaf in leaves])
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, gradients["torch"], msg=name)


@pytest.mark.parametrize("name", [name for name, mode in ATTENTION_MODES.items() if mode.module != "torch"])
def test_a_backend_that_is_not_installed_names_its_package(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=f"'{name}': the package {ATTENTION_MODES[name].module} .*pip install"):
        require_attention(name)


def test_an_unknown_backend_gets_a_suggestion() -> None:
    with pytest.raises(UserError, match=r"'flahs' is not one of .*did you mean 'flash'"):
        attention_backend("flahs")


def test_a_broken_package_is_a_line_not_a_traceback(packages: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(sys.modules["flash_attn"], "flash_attn_func")
    with pytest.raises(UserError, match="'flash': its package cannot be imported"):
        attention_backend("flash")


@pytest.mark.parametrize(("version", "right"), [("2.5.0", False), ("2.5.1+cu124", True), ("2.10.0", True)])
def test_old_torch_whose_attention_is_wrong_is_refused(
    version: str, right: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version)
    if right:
        require_attention("sdpa")
    else:
        with pytest.raises(UserError, match=r"torch 2\.5\.0 .*black videos"):
            require_attention("sdpa")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_self_check_passes_pytorchs_attention(dtype: torch.dtype) -> None:
    assert 0 < verify_attention("torch", "cpu", dtype) <= attention.TOLERANCE[dtype] / 4


def _no_mask(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None = None) -> Tensor:
    return attention.torch_attention(q, k, v)


def _no_scale(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None = None) -> Tensor:
    return attention.torch_attention(q * 2, k, v, key_mask)


def _black(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None = None) -> Tensor:
    return attention.torch_attention(q, k, v, key_mask) * float("nan")


def _coarse(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None = None) -> Tensor:
    return attention.torch_attention(q, k, v.to(torch.float8_e4m3fn).to(v.dtype), key_mask)


@pytest.mark.parametrize("wrong", [_no_mask, _no_scale, _black, _coarse])
def test_self_check_refuses_a_wrong_backend(wrong: attention.Attention, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(attention._BACKENDS, "torch", lambda: wrong)
    with pytest.raises(UserError, match=r"'torch' computes wrong results here .*use"):
        verify_attention("torch", "cpu", torch.bfloat16)


def test_self_check_reports_a_kernel_that_does_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def gpu_only(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None = None) -> Tensor:
        raise RuntimeError("FlashAttention only supports\nAmpere GPUs or newer.")

    monkeypatch.setitem(attention._BACKENDS, "torch", lambda: gpu_only)
    with pytest.raises(UserError, match="does not run on cpu with float32: FlashAttention only supports Ampere"):
        verify_attention("torch", "cpu", torch.float32)


def test_a_model_gives_the_same_velocity_with_split_attention() -> None:
    torch.manual_seed(0)
    config = HunyuanVideoConfig(
        hidden_size=32, heads=2, mlp_hidden=64, depth_double=1, depth_single=1, text_dim=16, text_dim_2=8,
        rope_dims=(2, 6, 8),
    )  # fmt: skip
    model = HYVideoDiffusionTransformer(config).eval()
    mask = torch.tensor([[1] * 9, [1] * 4 + [0] * 5])
    inputs = (torch.randn(2, 16, 2, 4, 4), torch.tensor([900.0, 100.0]), torch.randn(2, 9, 16), mask, torch.randn(2, 8))
    with torch.no_grad():
        together = model(*inputs, guidance=torch.full((2,), 6000.0))
        model.set_attention("torch", split=True)
        torch.testing.assert_close(model(*inputs, guidance=torch.full((2,), 6000.0)), together)
