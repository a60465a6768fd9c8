"""The result of a benchmark: our number and a reference."""

import importlib
from collections.abc import Sequence
from dataclasses import dataclass

from utils.cli import print_table

HEADER = ("work", "ours", "reference", "ratio", "limit")


@dataclass(frozen=True)
class Comparison:
    """`ours` against `reference`, both in `unit`; medians where runs were repeated.

    Attributes:
        work: what was done and what was measured.
        against: what the reference is.
        limit: the largest acceptable ratio; None if there is no limit.
    """

    work: str
    ours: float
    reference: float
    unit: str
    against: str
    limit: float | None = 1.0

    @property
    def row(self) -> tuple[str, ...]:
        """The cells of the table, in the order of HEADER."""
        return (
            self.work,
            f"{self.ours:,.4g} {self.unit}".rstrip(),
            f"{self.reference:,.4g} {self.unit}".rstrip() + f" ({self.against})",
            f"{self.ours / self.reference:.3f}",
            "" if self.limit is None else f"{self.limit:.2f}",
        )


def print_comparisons(title: str, comparisons: Sequence[Comparison]) -> None:
    """Prints one line for each comparison."""
    print_table(title, [comparison.row for comparison in comparisons], HEADER)


def run(name: str) -> list[Comparison]:
    """Runs a benchmark with its default settings."""
    return importlib.import_module(f"benchmarks.{name}").main([])
