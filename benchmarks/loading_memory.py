"""Peak resident memory of loading a DiT on the CPU, against the size of the loaded model.

Writes a DiT of the official width (hidden 3072) with a few random blocks, about 3 GB in bfloat16, as safetensors and
as .pt, and loads each in a separate process, to bfloat16 and to fp8. The result is VmHWM, the peak of the resident
memory including mapped file pages, minus the resident memory before loading (Python, torch).
Linux only.

    python -m benchmarks.loading_memory            # 6 GB of free disk, 4 GB of memory
"""

import argparse
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.comparison import Comparison, print_comparisons
from examples.tiny_models import dit_shapes
from hunyuan_model.checkpoints import load_dit
from hunyuan_model.models import HunyuanVideoConfig
from utils.safetensors_utils import save_file

LIMIT = 1.1
MB = 1e6


def resident(field: str) -> int:
    """VmRSS (now) or VmHWM (peak) of this process, in bytes."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(re.search(rf"{field}:\s+(\d+) kB", status)[1]) * 1024


def load_and_measure(path: Path, fp8: bool) -> None:
    """Prints the peak above the start and the size of the loaded model, in bytes."""
    before = resident("VmRSS")
    model = load_dit(path, dtype=torch.bfloat16, fp8=fp8)
    size = sum(parameter.nbytes for parameter in model.parameters())
    print(resident("VmHWM") - before, size)


def write_dit(folder: Path, double_blocks: int, single_blocks: int) -> tuple[list[Path], int]:
    """The same weights as safetensors and as .pt, and the bytes of the largest tensor."""
    config = HunyuanVideoConfig(depth_double=double_blocks, depth_single=single_blocks)
    weights = {name: torch.randn(shape, dtype=torch.bfloat16) * 0.02 for name, shape in dit_shapes(config).items()}
    save_file(weights, folder / "dit.safetensors")
    torch.save({"module": weights}, folder / "dit.pt")
    return [folder / "dit.safetensors", folder / "dit.pt"], max(tensor.nbytes for tensor in weights.values())


def main(argv: Sequence[str] | None = None) -> list[Comparison]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--double_blocks", type=int, default=2)
    parser.add_argument("--single_blocks", type=int, default=3)
    parser.add_argument(
        "--load", type=Path, help="only load this file and print peak and size (used in a separate process)"
    )
    parser.add_argument("--fp8", action="store_true", help="with --load: as fp8")
    options = parser.parse_args(argv)
    if options.load:
        load_and_measure(options.load, options.fp8)
        return []
    comparisons = []
    with tempfile.TemporaryDirectory() as folder:
        paths, largest = write_dit(Path(folder), options.double_blocks, options.single_blocks)
        for path in paths:
            for fp8 in (False, True):
                command = [sys.executable, "-m", "benchmarks.loading_memory", "--load", str(path), *["--fp8"] * fp8]
                output = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
                peak, size = map(int, output.splitlines()[-1].split())
                allowed = LIMIT * size + (largest if fp8 else 0)
                work = f"loading {path.name} to {'fp8' if fp8 else 'bfloat16'}, {size / MB:,.0f} MB: memory"
                comparisons.append(Comparison(work, peak / MB, allowed / MB, "MB", "limit"))
    print_comparisons("peak resident memory of loading", comparisons)
    return comparisons


if __name__ == "__main__":
    main()
