"""torch.compile, block by block: one small graph that serves every block instead of one large graph of the model."""

from collections.abc import Iterable

import torch
from torch import nn

from utils.option_groups import CompileOptions

DYNAMIC = {None: None, "auto": None, "true": True, "false": False}


def compile_blocks(blocks: Iterable[nn.Module], options: CompileOptions) -> None:
    """Compiles the forward of every block; what wraps it afterwards (block swap, step cache) stays outside."""
    if options.compile_cache_size_limit is not None:
        torch._dynamo.config.cache_size_limit = options.compile_cache_size_limit
    for block in blocks:
        block.forward = torch.compile(
            block.forward,
            backend=options.compile_backend,
            mode=options.compile_mode,
            dynamic=DYNAMIC[options.compile_dynamic],
            fullgraph=options.compile_fullgraph,
        )
