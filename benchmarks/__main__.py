"""Runs the benchmarks that this machine can run, each in its own process, and prints one table of ratios.

python -m benchmarks                      # all: about an hour on 2 cores
python -m benchmarks saved_bytes dit_speed
"""

import argparse
import multiprocessing
import sys
import traceback
from concurrent.futures import ProcessPoolExecutor

import torch

from benchmarks.comparison import print_comparisons, run

ANYWHERE = ("saved_bytes", "dit_speed", "training_overhead")
ON_LINUX = ("vae_memory", "planner_memory", "full_size", "caching", "loading_memory", "merge_memory")
ON_A_GPU = ("gpu_suite",)


def runnable_benchmarks() -> tuple[str, ...]:
    on_linux = ON_LINUX if sys.platform == "linux" else ()
    return ANYWHERE + on_linux + (ON_A_GPU if torch.cuda.is_available() else ())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = ANYWHERE + ON_LINUX + ON_A_GPU
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(known))
    names = parser.parse_args().names
    if unknown := set(names).difference(known):
        parser.error(f"{', '.join(unknown)}: no such benchmark; there are {', '.join(known)}")
    comparisons, failed = [], []
    for name in names or runnable_benchmarks():
        print(f"\n=== python -m benchmarks.{name}", flush=True)
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
            try:
                comparisons += process.submit(run, name).result()
            except (Exception, SystemExit):
                traceback.print_exc()
                failed.append(name)
    if comparisons:
        print_comparisons("all benchmarks, medians", comparisons)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
