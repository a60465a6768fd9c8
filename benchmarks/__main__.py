"""Runs the benchmarks that this machine can run, one after the other, each in a process of its own.

python -m benchmarks
"""

import pkgutil
import subprocess
import sys
from pathlib import Path

import torch

NEEDS_GPU = {"gpu_suite"}


def main() -> None:
    has_gpu = torch.cuda.is_available()
    names = sorted(module.name for module in pkgutil.iter_modules([str(Path(__file__).parent)]))
    failed = []
    for name in names:
        if name.startswith("_") or (name in NEEDS_GPU and not has_gpu):
            continue
        print(f"\n=== python -m benchmarks.{name}", flush=True)
        if subprocess.run([sys.executable, "-m", f"benchmarks.{name}"]).returncode:
            failed.append(name)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
