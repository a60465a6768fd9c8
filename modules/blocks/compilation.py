"""torch.compile for each block: all blocks of a kind share one small graph, instead of one large graph of the model."""

import functools
import sys
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch._dynamo.exc import TorchDynamoException
from torch._inductor.exc import InductorError

from modules.options import CompileOptions
from utils.errors import UserError, did_you_mean, one_line
from utils.wrap_forward import WrapperKind, wrap_forward

# CUDA graphs share their memory: the graph of one block would overwrite the output of the block before it.
WITHOUT_GRAPHS = {"reduce-overhead": "default", "max-autotune": "max-autotune-no-cudagraphs"}
DYNAMIC = {None: None, "auto": None, "true": True, "false": False}


def require_backend(name: str) -> None:
    """Checks that PyTorch has this --compile_backend.

    Raises:
        UserError: it does not.
    """
    known = torch._dynamo.list_backends(None)
    if name not in known:
        raise UserError(f"--compile_backend {name}: unknown{did_you_mean(name, known)}; torch has {', '.join(known)}")


def compile_blocks(blocks: Iterable[nn.Module], options: CompileOptions) -> None:
    """Compiles the forward of every block; later wrappers (block swap, checkpointing, step cache) are not compiled.

    A block is compiled when it first runs. If that fails, a warning is printed and all blocks run uncompiled.
    """
    if options.compile_cache_size_limit is not None:
        torch._dynamo.config.cache_size_limit = options.compile_cache_size_limit
    mode = WITHOUT_GRAPHS.get(options.compile_mode, options.compile_mode)
    if mode != options.compile_mode:
        given = options.compile_mode
        print(f"note: --compile_mode {given}: compiled blocks cannot use CUDA graphs, {mode} is used", file=sys.stderr)
    failures: list[str] = []
    for block in blocks:
        compiled = torch.compile(
            block.forward,
            backend=options.compile_backend,
            mode=mode,
            dynamic=DYNAMIC[options.compile_dynamic],
            fullgraph=options.compile_fullgraph,
        )
        wrap_forward(block, WrapperKind.COMPILATION, functools.partial(_run_compiled, compiled, failures))


def _run_compiled(compiled: Callable, failures: list[str], forward: Callable, *inputs: Any) -> Any:
    """Runs the compiled block; after the first failure of any block, the uncompiled one."""
    if not failures:
        try:
            return compiled(*inputs)
        except (TorchDynamoException, InductorError) as error:
            failures.append(one_line(error))
            print(f"warning: --compile failed, the blocks run uncompiled: {failures[0][:300]}", file=sys.stderr)
    return forward(*inputs)
