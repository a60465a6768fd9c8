"""What autograd keeps between the forward and the backward pass, decided from outside the model.

Four ways, from the fastest to the one that needs the least GPU memory:

- `rematerialize_pointwise` keeps no result of pointwise operations that can be computed from kept tensors;
- `selective` keeps only the results of large matrix products and of attention (PyTorch's selective checkpointing);
- `full` keeps the inputs of a block and runs it again in the backward pass (arXiv 1604.06174);
- `offload` does the same, with the inputs in main memory.

All give the gradients of plain autograd bit for bit, with one exception: where all blocks share an input that needs a
gradient, `full` and `offload` sum the parts of that gradient in another order.
"""

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from hunyuan_model.models import HYVideoDiffusionTransformer
from modules.blocks.activation_offload import ActivationOffload
from modules.blocks.rematerialization import rematerialize_pointwise
from utils.wrap_forward import WrapperKind, wrap_forward

aten = torch.ops.aten
# A product over fewer channels than this belongs to a LoRA: it is cheap to compute again.
SMALLEST_KEPT_INNER_SIZE = 256
# Position of the first factor of a matrix product among the arguments.
MATRIX_PRODUCTS = {aten.mm.default: 0, aten.addmm.default: 1, aten.bmm.default: 0}


def apply_activation_checkpointing(
    dit: HYVideoDiffusionTransformer,
    checkpointing: str,
    device: torch.device,
    compiled: bool = False,
    swapped: bool = False,
) -> None:
    """Decides what the blocks of the DiT keep for the backward pass.

    Without checkpointing, autograd keeps no results of pointwise operations (`rematerialize_pointwise`), with three
    exceptions: compiled blocks, where the compiler decides this; block swap, which needs the saved-tensor hooks
    itself; and a CPU, which has more memory than time.

    Args:
        checkpointing: a policy of `checkpoint_activations`, or "none".
        compiled: the blocks are compiled.
        swapped: block swap is enabled.
    """
    if checkpointing != "none":
        checkpoint_activations(dit.blocks, checkpointing, compiled)
    elif device.type != "cpu" and not compiled and not swapped:
        rematerialize_pointwise(dit.blocks)


def checkpoint_activations(blocks: Iterable[nn.Module], policy: str = "full", compiled: bool = False) -> None:
    """Makes every block run again, completely or partly, in the backward pass.

    Args:
        blocks: modules whose forward takes and returns tensors.
        policy: "full", "selective" or "offload".
        compiled: the blocks were compiled, so the compiler decides what the second run keeps.
    """
    blocks = list(blocks)
    if policy == "selective":
        around = _run_selectively
    else:
        around = functools.partial(_run_checkpointed, ActivationOffload() if policy == "offload" else None)
        if not compiled:
            rematerialize_pointwise(blocks)  # for the second run
    for block in blocks:
        wrap_forward(block, WrapperKind.CHECKPOINTING, around)


def _run_selectively(forward: Callable, *inputs: Any) -> Any:
    return checkpoint(forward, *inputs, use_reentrant=False, context_fn=_selective_contexts)


def _selective_contexts() -> tuple[Any, Any]:
    return create_selective_checkpoint_contexts(_selective_policy)


def _selective_policy(ctx: object, op: Callable, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    if op in MATRIX_PRODUCTS:
        keep = args[MATRIX_PRODUCTS[op]].shape[-1] >= SMALLEST_KEPT_INNER_SIZE
    else:
        keep = any(word in str(op) for word in ("attention", "attn", "flash"))
    return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE


class _CheckpointedRun(torch.autograd.Function):
    """Runs a block without a graph and keeps its inputs; backward runs it again with a graph, and then through that.

    Unlike `torch.utils.checkpoint`, this lets the block use its own saved-tensor hooks in the second run, where memory
    peaks. So the second run keeps no more than `rematerialize_pointwise` does.
    """

    @staticmethod
    def forward(
        ctx: Any, run: Callable, offload: ActivationOffload | None, always_needs_grad: Tensor, *inputs: Any
    ) -> Any:
        ctx.run = run
        ctx.device = next(value.device for value in inputs if isinstance(value, Tensor))
        ctx.random_state = _random_state(ctx.device)
        kind = ctx.device.type
        ctx.autocast = {
            "device_type": kind,
            "dtype": torch.get_autocast_dtype(kind),
            "enabled": torch.is_autocast_enabled(kind),
        }
        ctx.needs_grad = ctx.needs_input_grad[3:]
        # Inputs that need a gradient differ from block to block; the others are shared by all and stay on the device.
        own = [value for value, needed in zip(inputs, ctx.needs_grad, strict=True) if needed]
        ctx.shared = [None if needed else value for value, needed in zip(inputs, ctx.needs_grad, strict=True)]
        if offload:
            ctx.own = offload.offload(own, ctx.device).restored
        else:
            ctx.own = functools.partial(contextlib.nullcontext, own)
        return run(*inputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple:
        with ctx.own() as own:
            remaining = iter(own)
            inputs = [
                next(remaining).detach().requires_grad_() if needed else value
                for value, needed in zip(ctx.shared, ctx.needs_grad, strict=True)
            ]
            with torch.enable_grad(), torch.autocast(**ctx.autocast), _with_random_state(ctx.random_state, ctx.device):
                outputs = ctx.run(*inputs)
            pairs = zip(outputs if isinstance(outputs, tuple) else (outputs,), gradients, strict=True)
            # In a block without trained weights, an output may depend on nothing that needs a gradient.
            pairs = [(output, gradient) for output, gradient in pairs if output.requires_grad]
            if pairs:
                torch.autograd.backward(*zip(*pairs, strict=True))
        # The output may be referenced after the backward pass, and with it this graph: it must not keep the inputs.
        ctx.own = ctx.shared = None
        return (
            None,
            None,
            None,
            *(value.grad if needed else None for value, needed in zip(inputs, ctx.needs_grad, strict=True)),
        )


def _run_checkpointed(offload: ActivationOffload | None, forward: Callable, *inputs: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*inputs)
    # The inputs of the first block need no gradient, but its trained weights do. So one input always asks for it.
    always_needs_grad = torch.empty(0, requires_grad=True)
    return _CheckpointedRun.apply(forward, offload, always_needs_grad, *inputs)


def _random_state(device: torch.device) -> tuple[Tensor, Tensor | None]:
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


@contextlib.contextmanager
def _with_random_state(state: tuple[Tensor, Tensor | None], device: torch.device) -> Iterator[None]:
    """Inside, dropout draws the same masks as in the first run; the random state outside does not change."""
    cpu_state, cuda_state = state
    with torch.random.fork_rng(devices=[device] if cuda_state is not None else []):
        torch.set_rng_state(cpu_state)
        if cuda_state is not None:
            torch.cuda.set_rng_state(cuda_state, device)
        yield
