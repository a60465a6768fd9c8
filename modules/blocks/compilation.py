"""torch.compile, block by block: one small graph that serves every block instead of one large graph of the model."""

import sys
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch._dynamo.exc import TorchDynamoException
from torch._inductor.exc import InductorError

from modules.options import CompileOptions
from utils.errors import UserError, did_you_mean, one_line

# CUDA graphs share their memory: with one for each block, that of a block overwrites what the one before has given it.
WITHOUT_GRAPHS = {"reduce-overhead": "default", "max-autotune": "max-autotune-no-cudagraphs"}
DYNAMIC = {None: None, "auto": None, "true": True, "false": False}


def require_backend(name: str) -> None:
    """Refuses a --compile_backend that torch does not have."""
    known = torch._dynamo.list_backends(None)
    if name not in known:
        raise UserError(f"--compile_backend {name}: unknown{did_you_mean(name, known)}; torch has {', '.join(known)}")


def compile_blocks(blocks: Iterable[nn.Module], options: CompileOptions) -> None:
    """Compiles the forward of every block; what wraps it afterwards (block swap, step cache) stays outside.

    If that fails, which shows when a block first runs, a line says so and all blocks run as they are.
    """
    if options.compile_cache_size_limit is not None:
        torch._dynamo.config.cache_size_limit = options.compile_cache_size_limit
    mode = WITHOUT_GRAPHS.get(options.compile_mode, options.compile_mode)
    if mode != options.compile_mode:
        given = options.compile_mode
        print(f"note: --compile_mode {given}: compiled blocks take no CUDA graphs, {mode} is used", file=sys.stderr)
    failures: list[str] = []
    for block in blocks:
        compiled = torch.compile(
            block.forward,
            backend=options.compile_backend,
            mode=mode,
            dynamic=DYNAMIC[options.compile_dynamic],
            fullgraph=options.compile_fullgraph,
        )
        block.forward = _until_it_fails(compiled, block.forward, failures)


def _until_it_fails(compiled: Callable, plain: Callable, failures: list[str]) -> Callable:
    def forward(*arguments: Any) -> Any:
        if not failures:
            try:
                return compiled(*arguments)
            except (TorchDynamoException, InductorError) as error:
                failures.append(one_line(error))
                print(f"warning: --compile failed, the blocks run uncompiled: {failures[0][:300]}", file=sys.stderr)
        return plain(*arguments)

    return forward
