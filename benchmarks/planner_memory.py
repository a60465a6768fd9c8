"""The planner against resident memory: training steps on the CPU, each setting in a separate process.

    python -m benchmarks.planner_memory            # 10 minutes and 3 GB on 2 cores

A LoRA on a DiT of 2 double and 4 single blocks of hidden size 2048 takes two steps with AdamW. The result is VmHWM, the
peak of the resident memory, minus VmRSS before the model is made. Linux only.

malloc is set to return memory to the system as soon as a tensor is freed. By default it keeps freed memory, up to half
of the prediction. The planner does not know the workspace of matrix products. With fp8 weights, everything else is
float32, because torch makes hidden copies on a CPU, but not on a GPU, when it multiplies bfloat16 by float32.
"""

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.comparison import Comparison, print_comparisons
from benchmarks.gpu_suite import KINDS, Case, predicted, start_training
from benchmarks.loading_memory import MB, resident
from hunyuan_model.models import HunyuanVideoConfig

CPU = torch.device("cpu")
CONFIG = HunyuanVideoConfig(
    hidden_size=2048,
    heads=16,
    mlp_hidden=8192,
    depth_double=2,
    depth_single=4,
    depth_refiner=1,
    text_dim=1024,
    text_dim_2=768,
)
SHAPES = {"1 frame": (1, 16, 1, 60, 68), "9 frames": (1, 16, 3, 60, 68), "batch of 2": (2, 16, 1, 60, 68)}
CASES = (
    *(Case("1 frame", fp8, kind, 0) for fp8 in (False, True) for kind in KINDS),
    *(Case("1 frame", fp8, "full", 2) for fp8 in (False, True)),
    *(Case("9 frames", True, kind, 0) for kind in ("none", "full")),
    *(Case("batch of 2", False, kind, 0) for kind in ("none", "selective")),
)
LIMIT = 1.1
MALLOC = {"MALLOC_MMAP_THRESHOLD_": str(1 << 18)}


def measure(case: Case) -> None:
    """Prints the peak above the interpreter, and the prediction, both in bytes."""
    tiny = HunyuanVideoConfig(256, 2, 1024, 1, 1, text_dim=64, text_dim_2=64)
    start_training(Case("", case.fp8, case.checkpointing, 0), tiny, (1, 16, 1, 4, 4), CPU).step()  # loads libraries
    before = resident("VmRSS")
    dtype = torch.float32 if case.fp8 else torch.bfloat16
    training = start_training(case, CONFIG, SHAPES[case.shape], CPU, dtype)
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # resets VmHWM
    for _ in range(2):
        training.step()
    prediction = predicted(case, CONFIG, SHAPES[case.shape], training.trained, dtype)
    print(resident("VmHWM") - before, prediction.tensors + prediction.host)


def main(argv: Sequence[str] | None = None) -> list[Comparison]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", type=int, metavar="NUMBER", help="one case (used in a separate process)")
    number = parser.parse_args(argv).measure
    if number is not None:
        measure(CASES[number])
        return []
    comparisons, environment = [], os.environ | MALLOC
    for number, case in enumerate(CASES):
        command = [sys.executable, "-m", "benchmarks.planner_memory", "--measure", str(number)]
        output = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment).stdout
        peak, prediction = map(int, output.splitlines()[-1].split())
        comparisons.append(Comparison(f"{case}: memory", peak / MB, prediction / MB, "MB", "planner", LIMIT))
    print_comparisons("a training step: resident memory against the planner", comparisons)
    return comparisons


if __name__ == "__main__":
    main()
