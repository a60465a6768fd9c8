"""What autograd keeps between the forward and the backward pass, decided from outside the model.

Four ways, from the fastest to the leanest; all give the gradients of plain autograd bit for bit, but for `full` and
`offload` where all blocks share an input that needs a gradient: they add up its parts in another order.

- `recompute_cheap`: keeps no copy that pointwise operations can make again from what is kept anyway;
- `selective`: keeps the results of large matrix products and of attention only (PyTorch's selective checkpointing);
- `full`: keeps the inputs of a block and runs it again (arXiv 1604.06174);
- `offload`: the same, with the inputs parked in main memory.
"""

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from hunyuan_model.models import HYVideoDiffusionTransformer
from modules.blocks.activation_offload import Parking

aten = torch.ops.aten
# A product over fewer channels than this is a LoRA's: its result is made again for less than its memory is worth.
SMALLEST_KEPT_INNER_SIZE = 256
# Position of the first factor of a matrix product among the arguments.
MATRIX_PRODUCTS = {aten.mm.default: 0, aten.addmm.default: 1, aten.bmm.default: 0}
POINTWISE = {
    aten._to_copy.default,
    aten.addcmul.default,
    aten.cat.default,
    aten.clone.default,
    aten.gelu.default,
    aten.mean.dim,
    aten.mul.Tensor,
    aten.native_layer_norm.default,
    aten.pow.Tensor_Scalar,
    aten.rsqrt.default,
    aten.silu.default,
    aten.stack.default,
    aten.sub.Tensor,
}


def apply_activation_checkpointing(
    dit: HYVideoDiffusionTransformer,
    checkpointing: str,
    device: torch.device,
    compiled: bool = False,
    swapped: bool = False,
) -> None:
    """Decides what the blocks of the DiT keep for the backward pass.

    Without checkpointing, autograd keeps no results of pointwise operations (`recompute_cheap`), with two exceptions:
    compiled blocks, where the compiler decides this, and a CPU, which has more memory than time.

    Args:
        checkpointing: a policy of `checkpoint_activations`, or "none".
        compiled: the blocks are compiled.
        swapped: block swap is enabled.
    """
    if checkpointing != "none":
        checkpoint_activations(dit.blocks, checkpointing, compiled)
    elif device.type != "cpu" and not compiled and not swapped:
        recompute_cheap(dit.blocks)


def checkpoint_activations(blocks: Iterable[nn.Module], policy: str = "full", compiled: bool = False) -> None:
    """Makes every block run again, or partly again, when gradients are needed.

    Sets `is_checkpointed` on the blocks: what wraps them further (block swap) need not keep anything for backward.

    Args:
        blocks: modules whose forward takes and returns tensors.
        policy: "full", "selective" or "offload".
        compiled: the blocks were compiled, so the compiler decides what the second run keeps.
    """
    parking = Parking() if policy == "offload" else None
    for block in blocks:
        block.is_checkpointed = True
        if policy == "selective":
            block.forward = functools.partial(
                checkpoint, block.forward, use_reentrant=False, context_fn=_selective_contexts
            )
        else:
            run = block.forward if compiled else functools.partial(_run_with_recipes, block.forward)
            block.forward = functools.partial(_run_again, run, parking)


def _selective_contexts() -> tuple[Any, Any]:
    return create_selective_checkpoint_contexts(_selective_policy)


def _selective_policy(ctx: object, op: Callable, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    if op in MATRIX_PRODUCTS:
        keep = args[MATRIX_PRODUCTS[op]].shape[-1] >= SMALLEST_KEPT_INNER_SIZE
    else:
        keep = any(word in str(op) for word in ("attention", "attn", "flash"))
    return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE


class _RunAgain(torch.autograd.Function):
    """Runs a block without a graph and keeps its inputs; backward runs it again, with a graph, and goes through that.

    Unlike `torch.utils.checkpoint` it leaves saved-tensor hooks to the block, so that the second run keeps no more
    than `recompute_cheap` does: the peak of memory is in there.
    """

    @staticmethod
    def forward(ctx: Any, run: Callable, parking: Parking | None, always: Tensor, *inputs: Any) -> Any:
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
        # Only inputs in the path of gradients differ from block to block; the rest is shared and stays where it is.
        own = [value for value, needed in zip(inputs, ctx.needs_grad, strict=True) if needed]
        ctx.shared = [None if needed else value for value, needed in zip(inputs, ctx.needs_grad, strict=True)]
        ctx.own = parking.park(own, ctx.device).taken if parking else functools.partial(contextlib.nullcontext, own)
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
            # Where nothing in the block is trained, an output may depend on nothing that needs a gradient.
            pairs = [(output, gradient) for output, gradient in pairs if output.requires_grad]
            if pairs:
                torch.autograd.backward(*zip(*pairs, strict=True))
        # Used once, as saved tensors are: whoever still holds the output shall not hold what the blocks were given.
        ctx.own = ctx.shared = None
        return (
            None,
            None,
            None,
            *(value.grad if needed else None for value, needed in zip(inputs, ctx.needs_grad, strict=True)),
        )


def _run_again(run: Callable, parking: Parking | None, *inputs: Any) -> Any:
    if not torch.is_grad_enabled():
        return run(*inputs)
    # The inputs of the first block need no gradient, but the LoRA inside does: this one always asks for it.
    always = torch.empty(0, requires_grad=True)
    return _RunAgain.apply(run, parking, always, *inputs)


def _random_state(device: torch.device) -> tuple[Tensor, Tensor | None]:
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


@contextlib.contextmanager
def _with_random_state(state: tuple[Tensor, Tensor | None], device: torch.device) -> Iterator[None]:
    """Inside, dropout draws the masks of the first run again; outside, the random state is untouched."""
    cpu_state, cuda_state = state
    with torch.random.fork_rng(devices=[device] if cuda_state is not None else []):
        torch.set_rng_state(cpu_state)
        if cuda_state is not None:
            torch.cuda.set_rng_state(cuda_state, device)
        yield


def recompute_cheap(blocks: Iterable[nn.Module]) -> None:
    """Makes autograd keep, instead of results of pointwise operations, how to make them again.

    For training without checkpointing: costs a few pointwise operations, saves about two thirds of the memory.
    """
    for block in blocks:
        block.forward = functools.partial(_run_with_recipes, block.forward)


def _run_with_recipes(run: Callable, *inputs: Any) -> Any:
    if not torch.is_grad_enabled():
        return run(*inputs)
    recorder = _Recorder()
    with saved_tensors_hooks(recorder.pack, _unpack), recorder:
        return run(*inputs)


@dataclass(frozen=True)
class _Recipe:
    """A pointwise operation and its arguments: tensors, views of other recipes' results, plain values, lists of these.

    Those with a keyword are plain.
    """

    op: Callable
    args: tuple
    kwargs: dict
    output: int | None  # which one, for operations with several results

    def make(self) -> Tensor:
        result = self.op(*_each(_unpack, self.args), **self.kwargs)
        return result if self.output is None else result[self.output]


@dataclass(frozen=True)
class _View:
    """A view of a recipe's result."""

    recipe: _Recipe
    size: torch.Size
    stride: tuple[int, ...]
    offset: int

    def make(self) -> Tensor:
        return self.recipe.make().as_strided(self.size, self.stride, self.offset)


def _unpack(value: Any) -> Any:
    return value.make() if isinstance(value, _View) else value


def _each(change: Callable[[Any], Any], args: tuple) -> tuple:
    """Changes arguments, also those in lists; torch's `tree_map` takes longer than a small operation itself."""
    return tuple([change(value) for value in arg] if isinstance(arg, list) else change(arg) for arg in args)


class _Recorder(TorchDispatchMode):
    """Watches the operations of one block and remembers a recipe for every result that is cheap to make again."""

    def __init__(self) -> None:
        super().__init__()
        # The weak reference keeps the key from being used again for another storage.
        self.recipes: dict[int, tuple[StorageWeakRef, _Recipe]] = {}

    def __torch_dispatch__(self, op: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        results = op(*args, **kwargs)
        if op in POINTWISE or (op is aten.add.Tensor and self._is_sum_of_recipes(args)):
            args = _each(self.pack, args)
            outputs = enumerate(results) if isinstance(results, tuple) else [(None, results)]
            for index, result in outputs:
                storage = result.untyped_storage()
                self.recipes[storage._cdata] = (StorageWeakRef(storage), _Recipe(op, args, kwargs, index))
        return results

    def _is_sum_of_recipes(self, args: tuple) -> bool:
        """A residual sum is kept: its parts would need more memory than itself."""
        return all(isinstance(self.pack(value), _View) for value in args if isinstance(value, Tensor))

    def pack(self, value: Any) -> Any:
        """A tensor with a recipe becomes a view of it; everything else stays what it is."""
        if not isinstance(value, Tensor):
            return value
        found = self.recipes.get(value.untyped_storage()._cdata)
        if found is None:
            return value
        return _View(found[1], value.size(), value.stride(), value.storage_offset())
