"""First-block cache: skips all other blocks of a sampling step if the first block shows that little has changed.

The change that the first block makes to its input is compared with its change in the last full step, in which all
blocks ran. While the relative difference is below a threshold, the other blocks are not run; the change that they made
in the last full step is added instead. This is the idea of TeaCache (arXiv 2411.19108), with the first block as the
indicator, so that nothing must be fitted to a model. The first and the last step always run in full.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from utils.wrap_forward import WrapperKind, wrap_forward


@dataclass
class _FullStep:
    """The changes that blocks made in the last full step. With guidance, each of the two calls per step has its own."""

    first_change: Tensor | None = None  # B L D, added by the first block
    rest_change: Tensor | None = None  # B L D, added by all other blocks


@dataclass
class StepCache:
    """Decides in every call of the model whether its blocks run, and counts them.

    Attributes:
        threshold: the other blocks are skipped where the relative mean absolute difference is below this.
        evaluated: blocks that ran.
        total: blocks that would have run without the cache.
    """

    threshold: float
    evaluated: int = 0
    total: int = 0
    _full_steps: dict[int, _FullStep] = field(default_factory=dict)  # by the number of the call within its step
    _call: int = 0
    _must_compute: bool = True
    _skipping: bool = False
    _after_first: Tensor | None = None

    def begin_step(self, step: int, steps: int) -> None:
        """Called before every step of the sampling loop."""
        if step == 0:
            self.forget()
        self._must_compute = step in (0, steps - 1)
        self._call = 0

    def forget(self) -> None:
        """Frees the tensors of the last run."""
        self._full_steps.clear()

    def count_block(self, first: bool) -> bool:
        """Counts the next block and returns whether it runs."""
        runs = first or not self._skipping
        self.total += 1
        self.evaluated += runs
        return runs

    def compare_first_block(self, before: Tensor, after: Tensor) -> None:
        """Decides from the first block's input and output, both (B, L, D), whether this call skips the other blocks."""
        last = self._full_steps.setdefault(self._call, _FullStep())
        change = after - before
        self._skipping = (
            not self._must_compute
            and last.rest_change is not None
            and relative_difference(change, last.first_change) < self.threshold
        )
        if not self._skipping:
            last.first_change = change
        self._after_first = after

    def finish_call(self, output: Tensor) -> Tensor:
        """The last block's output (B, L, D), or its replacement if the blocks were skipped."""
        last = self._full_steps[self._call]
        if self._skipping:
            output = self._after_first + last.rest_change
        else:
            last.rest_change = output - self._after_first
        self._after_first = None
        self._call += 1
        return output


def relative_difference(new: Tensor, old: Tensor) -> float:
    """mean |new - old| / mean |old|."""
    return ((new - old).abs().mean() / old.abs().mean()).item()


def apply_step_cache(blocks: Sequence[nn.Module], streams: Sequence[int], cache: StepCache) -> None:
    """Puts a cache around the blocks of a model; the sampling loop calls `cache.begin_step` before each step.

    Args:
        blocks: at least two, in the order in which they run. The first arguments of a block are its token streams; it
            returns the same streams.
        streams: for each block, the number of its token streams (B, L, D): 2 if image and text are separate, 1 if they
            are joined. The last block has one.
    """
    for index, (block, count) in enumerate(zip(blocks, streams, strict=True)):
        around = _run_or_skip(cache, count, first=index == 0, last=index == len(blocks) - 1)
        wrap_forward(block, WrapperKind.RESULT_CACHE, around)


def _run_or_skip(cache: StepCache, count: int, *, first: bool, last: bool) -> Callable[..., Any]:
    def around(forward: Callable, *arguments: Any) -> Any:
        tokens = arguments[0] if count == 1 else arguments[:count]
        outputs = forward(*arguments) if cache.count_block(first) else tokens
        if first:
            cache.compare_first_block(_joined(tokens), _joined(outputs))
        return cache.finish_call(outputs) if last else outputs

    return around


def _joined(tokens: Tensor | tuple[Tensor, ...]) -> Tensor:
    """All token streams of a block as one, (B, L, D)."""
    return tokens if isinstance(tokens, Tensor) else torch.cat(tokens, dim=1)
