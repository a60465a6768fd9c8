"""Runs the benchmarks that this machine can run, each in a process of its own, and prints one table of ratios.

python -m benchmarks                      # all: about an hour on 2 cores
python -m benchmarks saved_bytes dit_speed
"""

import argparse
import multiprocessing
import sys
import traceback
from concurrent.futures import ProcessPoolExecutor

from benchmarks.comparison import print_comparisons, run

ON_A_CPU = (
    "saved_bytes",
    "dit_speed",
    "vae_memory",
    "planner_memory",
    "training_overhead",
    "caching",
    "loading_memory",
    "merge_memory",
)
ON_A_GPU = ("gpu_suite",)


def all_that_run_here() -> tuple[str, ...]:
    import torch

    return ON_A_CPU + ON_A_GPU if torch.cuda.is_available() else ON_A_CPU


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(ON_A_CPU + ON_A_GPU))
    names = parser.parse_args().names or all_that_run_here()
    comparisons, failed = [], []
    for name in names:
        print(f"\n=== python -m benchmarks.{name}", flush=True)
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as alone:
            try:
                comparisons += alone.submit(run, name).result()
            except Exception:
                traceback.print_exc()
                failed.append(name)
    if comparisons:
        print_comparisons("all benchmarks, medians", comparisons)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
