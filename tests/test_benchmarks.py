"""The benchmarks themselves run by hand; here, that none is forgotten and that their one table reads well."""

from pathlib import Path

from benchmarks.__main__ import ON_A_CPU, ON_A_GPU
from benchmarks.comparison import Comparison, print_comparisons

FOLDER = Path(__file__).parents[1] / "benchmarks"


def test_every_benchmark_is_run() -> None:
    modules = {path.stem for path in FOLDER.glob("*.py") if "def main(argv" in path.read_text(encoding="utf-8")}
    assert modules == {*ON_A_CPU, *ON_A_GPU}


def test_the_table(capsys) -> None:
    rows = [
        Comparison("step: time", 1234.56, 1000.0, "ms", "diffusers", 1.1),
        Comparison("output: difference", 4e-6, 1e-5, "", "limit"),
        Comparison("products", 80.0, 100.0, "GFLOP/s", "measured rate", None),
    ]
    print_comparisons("title", rows)
    lines = [line.split("  ") for line in capsys.readouterr().out.splitlines()[3:]]
    cells = [[cell.strip() for cell in line if cell] for line in lines]
    assert cells[1:] == [
        ["step: time", "1,235 ms", "1,000 ms (diffusers)", "1.235", "1.10"],
        ["output: difference", "4e-06", "1e-05 (limit)", "0.400", "1.00"],
        ["products", "80 GFLOP/s", "100 GFLOP/s (measured rate)", "0.800"],
    ]
