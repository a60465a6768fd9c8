"""First-block cache: leaves out the blocks of a step whose first block says that little has changed.

The change that the first block makes to its input is compared with that of the last step that was computed in full.
While the relative difference stays below a threshold, the remaining blocks are replaced by what they added then
(the idea of TeaCache, arXiv 2411.19108, with the first block itself as the indicator, so that nothing is fitted to
one model). The first and the last step are always computed. Applied to a model from outside.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from modules.memory.meter import ModelUsage


@dataclass
class _Stream:
    """What one sequence of calls (one half of classifier-free guidance) remembers of its last full step."""

    first_change: Tensor | None = None  # B L D, what the first block added
    rest_change: Tensor | None = None  # B L D, what all other blocks added


@dataclass
class StepCache:
    """The decision per call, and how often it was which.

    Attributes:
        threshold: relative mean absolute difference below which a step is left out.
        evaluated: blocks that ran; total: blocks that would have run without the cache.
    """

    threshold: float
    evaluated: int = 0
    total: int = 0
    _streams: dict[int, _Stream] = field(default_factory=dict)
    _call: int = 0
    _must_compute: bool = True
    _skipping: bool = False
    _after_first: Tensor | None = None

    def begin_step(self, step: int, steps: int) -> None:
        """Called before every step of the loop."""
        if step == 0:
            self.forget()
        self._must_compute = step in (0, steps - 1)
        self._call = 0

    def forget(self) -> None:
        """Frees what the last run left behind."""
        self._streams.clear()

    def runs(self, first: bool) -> bool:
        """Whether the next block is evaluated; counts it."""
        evaluated = first or not self._skipping
        self.total += 1
        self.evaluated += evaluated
        return evaluated

    def decide(self, before: Tensor, after: Tensor) -> None:
        """Looks at the first block's input and output, both (B, L, D), and chooses for the rest of this call."""
        stream = self._streams.setdefault(self._call, _Stream())
        change = after - before
        self._skipping = (
            not self._must_compute
            and stream.rest_change is not None
            and relative_difference(change, stream.first_change) < self.threshold
        )
        if not self._skipping:
            stream.first_change = change
        self._after_first = after

    def finish(self, output: Tensor) -> Tensor:
        """The last block's output (B, L, D), or what stands for it where the blocks were left out."""
        stream = self._streams[self._call]
        if self._skipping:
            output = self._after_first + stream.rest_change
        else:
            stream.rest_change = output - self._after_first
        self._after_first = None
        self._call += 1
        return output


def relative_difference(new: Tensor, old: Tensor) -> float:
    """mean |new - old| / mean |old|."""
    return ((new - old).abs().mean() / old.abs().mean()).item()


def _joined(outputs: Tensor | tuple[Tensor, ...]) -> Tensor:
    """Separate streams of tokens as one, (B, L, D)."""
    return outputs if isinstance(outputs, Tensor) else torch.cat(outputs, dim=1)


def with_step_cache(usage: ModelUsage, calls: int) -> ModelUsage:
    """What a model needs with a cache around its blocks: two changes for each of the `calls` of the model in a step,
    and the first block's output, all as large as the last block's tokens (B, L, D)."""
    return replace(usage, streams=usage.streams + (2 * calls + 1) * sum(usage.blocks[-1].streams))


def add_step_cache(blocks: Sequence[nn.Module], streams: Sequence[int], cache: StepCache) -> None:
    """Puts a cache around the blocks of a model; the sampling loop calls `cache.begin_step` before each step.

    Args:
        blocks: at least two, in the order in which they run; each takes and returns its token streams first.
        streams: for each block, how many token streams (B, L, D) those are; the last block has one.
    """
    for index, (block, count) in enumerate(zip(blocks, streams, strict=True)):
        block.forward = _cached(cache, block.forward, count, first=index == 0, last=index == len(blocks) - 1)


def _cached(cache: StepCache, forward: Callable, count: int, *, first: bool, last: bool) -> Callable:
    def run(*arguments):
        tokens = arguments[0] if count == 1 else arguments[:count]
        outputs = forward(*arguments) if cache.runs(first) else tokens
        if first:
            cache.decide(_joined(tokens), _joined(outputs))
        return cache.finish(outputs) if last else outputs

    return run
