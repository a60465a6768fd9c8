"""The contract of wrapped forwards: positional arguments, the order of wrappers, removal, torch.compile, accelerate."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor, nn

from utils.wrap_forward import ForwardWrapper, WrapperKind, is_wrapped, wrap_forward, wrappers_of


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor, scale: float, shift: float = 1.0, mask: Tensor | None = None) -> Tensor:
        return self.linear(x) * scale + shift


class KeywordOnly(nn.Module):
    def forward(self, x: Tensor, *, scale: float) -> Tensor:
        return x * scale


def doubled(forward: Callable, *arguments: Any) -> Tensor:
    return 2 * forward(*arguments)


def one_more(forward: Callable, *arguments: Any) -> Tensor:
    return forward(*arguments) + 1


def passed_on(forward: Callable, *arguments: Any) -> Any:
    return forward(*arguments)


@pytest.mark.parametrize(
    "kinds", [(), (WrapperKind.OUTPUT_CHANGE,), (WrapperKind.OUTPUT_CHANGE, WrapperKind.COMPILATION)]
)
def test_a_wrapper_gets_all_arguments_by_position(kinds: tuple[WrapperKind, ...]) -> None:
    block, x, seen = Block(), torch.ones(1, 4), []
    for kind in kinds:
        wrap_forward(block, kind, passed_on)

    def note(forward: Callable, *arguments: Any) -> Any:
        seen.append(arguments[1:])
        return forward(*arguments)

    wrap_forward(block, WrapperKind.CHECKPOINTING, note)
    calls = [block(x, 2.0), block(x, scale=2.0), block(scale=2.0, x=x), block(x, 2.0, shift=3.0), block(x, 2.0, mask=x)]
    assert seen == [(2.0,), (2.0,), (2.0,), (2.0, 3.0), (2.0, 1.0, x)]
    plain = Block()
    plain.load_state_dict(block.state_dict())
    for output, shift in zip(calls, (1.0, 1.0, 1.0, 3.0, 1.0), strict=True):
        assert torch.equal(output, plain(x, 2.0, shift))


@pytest.mark.parametrize(
    ("module", "named", "message"),
    [
        (Block(), {"scale": 2.0, "other": 1}, r"Block\.forward: 'other' cannot be passed by position"),
        (Block(), {"x": 1, "scale": 2.0}, r"Block\.forward: 'x' cannot be passed by position, or was passed twice"),
        (Block(), {"shift": 2.0}, r"Block\.forward: argument 'scale' is missing"),
        (KeywordOnly(), {"scale": 2.0}, r"KeywordOnly\.forward: 'scale' cannot be passed by position"),
    ],
)
def test_arguments_without_a_position_are_named(module: nn.Module, named: dict[str, Any], message: str) -> None:
    wrapper = wrap_forward(module, WrapperKind.OUTPUT_CHANGE, passed_on)
    with pytest.raises(TypeError, match=message):
        module(torch.ones(1, 4), **named)
    wrapper.remove()


def test_wrappers_are_nested_in_the_order_of_their_kinds() -> None:
    module, x = nn.Identity(), torch.ones(2)
    wrap_forward(module, WrapperKind.OUTPUT_CHANGE, doubled)
    wrap_forward(module, WrapperKind.OUTPUT_CHANGE, doubled)
    wrap_forward(module, WrapperKind.WEIGHT_STREAMING, one_more)
    assert torch.equal(module(x), 4 * x + 1)
    assert [wrapper.kind.name for wrapper in wrappers_of(module)] == ["OUTPUT_CHANGE"] * 2 + ["WEIGHT_STREAMING"]
    assert is_wrapped(module, WrapperKind.WEIGHT_STREAMING) and not is_wrapped(module, WrapperKind.COMPILATION)


@pytest.mark.parametrize(
    ("inner", "outer"),
    [
        (inner, outer)
        for inner in WrapperKind
        for outer in WrapperKind
        if outer < inner or outer == inner != WrapperKind.OUTPUT_CHANGE
    ],
)
def test_the_wrong_order_is_refused_and_changes_nothing(inner: WrapperKind, outer: WrapperKind) -> None:
    module = nn.Identity()
    wrap_forward(module, inner, doubled)
    with pytest.raises(ValueError, match=f"{outer.name} cannot be put around {inner.name} around Identity"):
        wrap_forward(module, outer, one_more)
    assert torch.equal(module(torch.ones(1)), torch.full((1,), 2.0))


def test_removal_restores_the_forward_of_before() -> None:
    module, x = nn.Identity(), torch.ones(2)
    before = set(vars(module))
    module.forward = lambda x: x + 5  # by another library
    foreign = module.forward
    inner = wrap_forward(module, WrapperKind.OUTPUT_CHANGE, doubled)
    outer = wrap_forward(module, WrapperKind.CHECKPOINTING, one_more)
    with pytest.raises(ValueError, match="OUTPUT_CHANGE around Identity is not the outermost wrapper"):
        inner.remove()
    outer.remove()
    assert torch.equal(module(x), 2 * (x + 5))
    inner.remove()
    assert module.forward is foreign
    with pytest.raises(ValueError, match="is not the outermost"):
        inner.remove()
    del module.forward
    wrap_forward(module, WrapperKind.OUTPUT_CHANGE, doubled).remove()
    assert set(vars(module)) == before


def test_a_wrapper_below_a_foreign_one_is_not_removed() -> None:
    module = nn.Identity()
    wrapper = wrap_forward(module, WrapperKind.OUTPUT_CHANGE, doubled)
    module.forward = lambda x, forward=module.forward: forward(x) + 5
    with pytest.raises(ValueError, match="is not the outermost"):
        wrapper.remove()
    assert torch.equal(module(torch.ones(1)), torch.full((1,), 7.0))


def test_wrappers_do_not_show_in_the_state_dict_and_run_inside_of_hooks() -> None:
    block, order = Block(), []
    names = list(block.state_dict())
    wrap_forward(
        block, WrapperKind.OUTPUT_CHANGE, lambda forward, *given: (order.append("wrapper"), forward(*given))[1]
    )
    block.register_forward_pre_hook(lambda *_: order.append("pre-hook"))
    block.register_forward_hook(lambda *_: order.append("hook"))
    block(torch.ones(1, 4), 2.0)
    assert list(block.state_dict()) == names
    assert order == ["pre-hook", "wrapper", "hook"]


def test_compiled_blocks_share_a_graph_that_holds_the_wrappers_of_their_children() -> None:
    graphs = []

    def backend(graph: torch.fx.GraphModule, _: object) -> Callable:
        graphs.append(graph)
        return graph.forward

    blocks, x = [Block() for _ in range(3)], torch.randn(2, 4)
    for block in blocks:
        wrap_forward(block.linear, WrapperKind.OUTPUT_CHANGE, doubled)
    plain = [block(x, 2.0) for block in blocks]
    for block in blocks:
        compiled = torch.compile(block.forward, backend=backend, fullgraph=True)
        wrap_forward(block, WrapperKind.COMPILATION, lambda _, *given, compiled=compiled: compiled(*given))
        wrap_forward(block, WrapperKind.WEIGHT_STREAMING, one_more)
    for block, expected in zip(blocks, plain, strict=True):
        assert torch.equal(block(x, scale=2.0), expected + 1)
    assert len(graphs) == 1


@pytest.fixture
def accelerator() -> Iterator[Accelerator]:
    AcceleratorState._reset_state(True)
    yield Accelerator(mixed_precision="bf16", cpu=True)
    AcceleratorState._reset_state(True)


def test_accelerate_wraps_a_wrapped_module_and_unwraps_it_again(accelerator: Accelerator) -> None:
    block, x = Block(), torch.randn(2, 4)
    wrappers: list[ForwardWrapper] = [
        wrap_forward(block.linear, WrapperKind.OUTPUT_CHANGE, doubled),
        wrap_forward(block, WrapperKind.CHECKPOINTING, one_more),
    ]
    expected = block(x, 2.0)
    prepared = accelerator.prepare(block)
    wrap_forward(block.linear, WrapperKind.WEIGHT_STREAMING, passed_on).remove()
    torch.testing.assert_close(prepared(x, scale=2.0), expected, rtol=0.05, atol=0.05)
    assert not torch.equal(prepared(x, 2.0), expected), "bfloat16"
    with pytest.raises(ValueError, match=r"Block must be wrapped before accelerator\.prepare"):
        wrap_forward(block, WrapperKind.RESULT_CACHE, passed_on)
    unwrapped = accelerator.unwrap_model(prepared, keep_fp32_wrapper=False)
    assert torch.equal(unwrapped(x, scale=2.0), expected)
    for wrapper in reversed(wrappers):
        wrapper.remove()
    assert "forward" not in vars(block) and "forward" not in vars(block.linear)
