"""Peak resident memory of merge_lora.py on a DiT of the official width with a few random blocks, 4.9 GB in bfloat16.

The merge runs in a separate process. The result is VmHWM, the peak of the resident memory, minus the resident memory
of Python with torch. The merged weights are compared with W + alpha / rank * up @ down, computed tensor by tensor.
Linux only.

    python -m benchmarks.merge_memory            # 13 GB of free disk, 2 GB of memory
"""

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

import merge_lora
from benchmarks.comparison import Comparison, print_comparisons
from benchmarks.loading_memory import MB, resident
from examples.tiny_models import dit_shapes
from hunyuan_model.models import HunyuanVideoConfig
from utils.safetensors_utils import iterate_tensors, load_file, save_file, streamed_file

LIMIT = 1e9
RANK, ALPHA = 32, 16.0
TARGETS = ("attn_qkv", "attn_proj", "fc1", "fc2", "linear1", "linear2")


def write_inputs(folder: Path, double_blocks: int, single_blocks: int) -> tuple[Path, Path]:
    """A DiT in bfloat16, and a LoRA with native keys on all its default targets."""
    shapes = dit_shapes(HunyuanVideoConfig(depth_double=double_blocks, depth_single=single_blocks))
    lora = {}
    with streamed_file(folder / "dit.safetensors", {n: (torch.bfloat16, s) for n, s in shapes.items()}) as write:
        for name, shape in shapes.items():
            write(name, torch.randn(shape, dtype=torch.bfloat16) * 0.02)
            module = name.removesuffix(".weight")
            if name.startswith(("double_", "single_")) and module.endswith(TARGETS) and name != module:
                native = "lora_unet_" + module.replace(".", "_")
                lora[f"{native}.lora_down.weight"] = torch.randn(RANK, shape[1]) * 0.02
                lora[f"{native}.lora_up.weight"] = torch.randn(shape[0], RANK) * 0.02
                lora[f"{native}.alpha"] = torch.tensor(ALPHA)
    save_file(lora, folder / "lora.safetensors")
    return folder / "dit.safetensors", folder / "lora.safetensors"


def merge_and_measure(words: list[str]) -> None:
    """Runs merge_lora.py in this process and prints its peak above torch, in bytes."""
    before = resident("VmRSS")
    sys.argv = ["merge_lora.py", *words]
    merge_lora.main()
    print(resident("VmHWM") - before)


def share_equal(dit: Path, lora_path: Path, merged: Path) -> float:
    """The share of numbers that are bit for bit equal to those of a merge in memory."""
    lora, equal, count = load_file(lora_path), 0, 0
    for (name, before), (_, after) in zip(iterate_tensors(dit), iterate_tensors(merged), strict=True):
        native = "lora_unet_" + name.removesuffix(".weight").replace(".", "_")
        expected = before
        if f"{native}.alpha" in lora:
            update = (lora[f"{native}.lora_up.weight"] * (ALPHA / RANK)) @ lora[f"{native}.lora_down.weight"]
            expected = update.add_(before).bfloat16()
        equal, count = equal + int((expected == after).sum()), count + after.numel()
    return equal / count


def main(argv: Sequence[str] | None = None) -> list[Comparison]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--double_blocks", type=int, default=4)
    parser.add_argument("--single_blocks", type=int, default=5)
    options = parser.parse_args(argv)
    comparisons = []
    with tempfile.TemporaryDirectory() as folder:
        dit, lora = write_inputs(Path(folder), options.double_blocks, options.single_blocks)
        merged = Path(folder) / "merged.safetensors"
        for more in ([], ["--fp8"]):
            words = ["--dit", dit, "--lora_weight", lora, "--save_merged_model", merged, "--device", "cpu", *more]
            program = "import sys; from benchmarks.merge_memory import merge_and_measure as m; m(sys.argv[1:])"
            command = [sys.executable, "-c", program, *map(str, words)]
            output = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
            peak = int(output.splitlines()[-1])
            work = f"merging {dit.stat().st_size / MB:,.0f} MB to {'fp8' if more else 'bfloat16'}: memory"
            comparisons.append(Comparison(work, peak / MB, LIMIT / MB, "MB", "limit"))
            if not more:
                print(f"equal to merging in memory: {share_equal(dit, lora, merged):.6%} of all numbers")
    print_comparisons("peak resident memory of merging", comparisons)
    return comparisons


if __name__ == "__main__":
    main()
