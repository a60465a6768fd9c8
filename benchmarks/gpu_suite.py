"""The 13B model with random weights on a GPU: step time, rate, and peak memory against the planner's prediction.

    python -m benchmarks.gpu_suite --output benchmarks/results
    python -m benchmarks.gpu_suite --only "image.*fp8"      # some settings, by a regular expression

A step is that of the trainer with --mixed_precision bf16: autocast, clipping, AdamW of a LoRA. Writes a JSON file named
after the GPU and prints a table for the README. Every setting is saved as soon as it is measured, and saved settings
are not measured again, so a stopped run can be continued.
"""

import argparse
import json
import re
import sys
import traceback
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from benchmarks.comparison import Comparison
from benchmarks.throughput import copy_bandwidth, forward_operations, matrix_product_rate, timed
from hunyuan_model.block_swap import BlockSwap, enable_block_swap, swapped_blocks
from hunyuan_model.checkpoints import is_quantized_in_dit
from hunyuan_model.models import HunyuanVideoConfig, HYVideoDiffusionTransformer
from hunyuan_model.quantization import quantize_linears
from modules.memory.measure import measure_dit
from modules.memory.plan import GIB, Prediction, predict
from tests.small_dit import prepare
from utils.cli import print_table
from utils.device_utils import is_out_of_memory, release_memory
from utils.files import write_text

TEXT_TOKENS = 64
RANK = 32
ADAM_STATE_BYTES = 8  # of each trained weight, in float32
KINDS = ("none", "selective", "full", "offload")
SHAPES = {  # latents (B, C, f, h, w)
    "image 960x544": (1, 16, 1, 68, 120),
    "video 544x960x33": (1, 16, 9, 68, 120),
    "video 544x960x129": (1, 16, 33, 68, 120),
}
# The first step warms up. A longer step varies less.
STEPS = {"image 960x544": 4, "video 544x960x33": 3, "video 544x960x129": 2}


@dataclass(frozen=True)
class Case:
    """One setting of a training step."""

    shape: str
    fp8: bool
    checkpointing: str
    swap: int

    @property
    def weights(self) -> str:
        return "fp8" if self.fp8 else "bf16"

    def __str__(self) -> str:
        return f"{self.shape}, {self.weights}, checkpointing {self.checkpointing}, swap {self.swap}"


@dataclass(frozen=True)
class Result:
    """The measurements of a step and the prediction of the planner.

    Attributes:
        operations: floating-point operations of the blocks.
        streamed_bytes: what block swap copied to the GPU.
    """

    case: Case
    seconds: float
    operations: int
    streamed_bytes: int
    peak_bytes: int
    predicted_bytes: int


@dataclass(frozen=True)
class Machine:
    """The limits of the GPU: floating-point operations, and bytes copied from main memory, per second."""

    device: str
    torch: str
    matrix_product_rate: float
    copy_bandwidth: float


def cases() -> list[Case]:
    """Every shape without memory savings, and with the savings that users of this shape need."""
    stills = [Case("image 960x544", fp8, kind, 0) for fp8 in (False, True) for kind in KINDS]
    swaps = [Case(shape, fp8, "full", swap) for shape in SHAPES for fp8 in (False, True) for swap in (0, 20, 36)]
    return list(dict.fromkeys(stills + swaps))


def random_dit(
    config: HunyuanVideoConfig, device: torch.device, fp8: bool, dtype: torch.dtype, swapped: Collection[int] = ()
) -> HYVideoDiffusionTransformer:
    """A DiT with random weights, made on the device block by block; swapped blocks are moved to main memory at once."""
    with torch.device("meta"):
        dit = HYVideoDiffusionTransformer(config).to(dtype).requires_grad_(False)
    for module in [dit.img_in, dit.txt_in, dit.time_in, dit.vector_in, dit.guidance_in, dit.final_layer]:
        fill(module, device)
    for index, block in enumerate(dit.blocks):
        fill(block, device)
        if fp8:
            quantize_linears(block, lambda name: is_quantized_in_dit(f"double_blocks.0.{name}"))
        if index in swapped:
            block.to("cpu")
    return dit


def fill(module: nn.Module, device: torch.device) -> None:
    """Fills a module on the meta device with random weights."""
    module.to_empty(device=device)
    for parameter in module.parameters():
        parameter.normal_(std=0.02)


def batch(config: HunyuanVideoConfig, shape: tuple[int, ...], device: torch.device) -> dict[str, Tensor]:
    B = shape[0]
    return {
        "x": torch.randn(shape, device=device),
        "timestep": torch.full((B,), 500.0, device=device),
        "text_states": torch.randn(B, TEXT_TOKENS, config.text_dim, device=device),
        "text_mask": torch.ones(B, TEXT_TOKENS, device=device),
        "text_states_2": torch.randn(B, config.text_dim_2, device=device),
        "guidance": torch.full((B,), 6000.0, device=device),
    }


@dataclass(frozen=True)
class Training:
    """A training step of a LoRA with AdamW, the number of trained elements, and the bytes that block swap copies."""

    step: Callable[[], None]
    trained: int
    streamed_bytes: int


def start_training(
    case: Case,
    config: HunyuanVideoConfig,
    shape: tuple[int, ...],
    device: torch.device,
    dtype: torch.dtype = torch.bfloat16,
    autocast: bool = False,
) -> Training:
    """Builds the same objects as a training run with these settings."""
    swapped = swapped_blocks(case.swap, config.depth_double, config.depth_single)
    dit = random_dit(config, device, case.fp8, dtype, swapped)
    release_memory(device)
    swap = enable_block_swap(dit, case.swap, device)
    network = prepare(dit, case.checkpointing, RANK).to(device)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4)
    given = batch(config, shape, device)

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            velocity = dit(**given)
        velocity.float().square().mean().backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0).item()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    trained = sum(parameter.numel() for parameter in network.parameters())
    return Training(step, trained, streamed_bytes(swap) if swap else 0)


def streamed_bytes(swap: BlockSwap) -> int:
    """Bytes that are copied in a step: all swapped blocks in the forward pass and again in the backward pass, except
    for the blocks that are still in the ring from the pass before."""
    ring = len(swap.ring)
    return sum(block.nbytes for block in swap.blocks[ring:] + swap.blocks[:-ring])


def step_operations(case: Case, config: HunyuanVideoConfig, shape: tuple[int, ...]) -> int:
    """Floating-point operations of the blocks: forward (twice with checkpointing), and backward to the inputs."""
    linear, attention = forward_operations(config, shape[2] * shape[3] * shape[4] // 4 + TEXT_TOKENS)
    runs = 2 if case.checkpointing in ("full", "offload") else 1
    return shape[0] * (runs * (linear + attention) + linear + 2 * attention)


def measure(case: Case, config: HunyuanVideoConfig, device: torch.device) -> Result:
    """Runs a few training steps and returns the fastest."""
    shape = SHAPES[case.shape]
    training = start_training(case, config, shape, device, autocast=True)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    seconds = min(timed(training.step, device) for _ in range(STEPS[case.shape]))
    return Result(
        case,
        seconds,
        step_operations(case, config, shape),
        training.streamed_bytes,
        torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0,
        predicted(case, config, shape, training.trained).tensors,
    )


def predicted(
    case: Case,
    config: HunyuanVideoConfig,
    shape: tuple[int, ...],
    trained: int,
    dtype: torch.dtype = torch.bfloat16,
) -> Prediction:
    """What the planner predicts for such a run."""

    def apply(dit: HYVideoDiffusionTransformer) -> nn.Module:
        return prepare(dit, case.checkpointing, RANK)

    usage = measure_dit(config, shape, TEXT_TOKENS, dtype, case.fp8, True, apply)
    swapped = swapped_blocks(case.swap, config.depth_double, config.depth_single)
    return predict(
        usage, swapped, trained=trained, state_bytes=ADAM_STATE_BYTES, offload=case.checkpointing == "offload"
    )


def main(argv: Sequence[str] | None = None) -> list[Comparison]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--only", metavar="REGEX", default="", help="run only settings whose name contains a match")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--depth", type=int, nargs=2, default=(20, 40), help="double and single blocks")
    args = parser.parse_args(argv)
    device, (double, single) = torch.device(args.device), args.depth
    config = HunyuanVideoConfig(depth_double=double, depth_single=single)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    rate = matrix_product_rate(device, torch.bfloat16, tokens=8192)
    machine = Machine(name, torch.__version__, rate, copy_bandwidth(device))
    path = args.output / f"{name.replace(' ', '_')}_{torch.__version__}_{double}_{single}.json"
    results = read_results(path)
    failed = []
    chosen = [case for case in cases() if re.search(args.only, str(case))]
    for case in tqdm([case for case in chosen if case not in results], unit="setting"):
        try:
            results[case] = measure(case, config, device)
            write_results(path, machine, results.values())
        except Exception as error:  # an error of one setting must not stop the others
            if is_out_of_memory(error):
                tqdm.write(f"out of memory: {case}")
            else:
                traceback.print_exc()
                failed.append(str(case))
        release_memory(device)
    print_results(machine, results)
    if failed:
        sys.exit(f"failed: {'; '.join(failed)}")
    return comparisons_of(machine, results)


def read_results(path: Path) -> dict[Case, Result]:
    """The results of earlier runs."""
    entries = json.loads(path.read_text(encoding="utf-8"))["results"] if path.exists() else []
    results = [Result(**entry | {"case": Case(**entry["case"])}) for entry in entries]
    return {result.case: result for result in results}


def write_results(path: Path, machine: Machine, results: Collection[Result]) -> None:
    """Writes all results so far as JSON."""
    record = asdict(machine) | {"results": [asdict(result) for result in results]}
    write_text(path, json.dumps(record, indent=1) + "\n")


def print_results(machine: Machine, results: dict[Case, Result]) -> None:
    """Prints a line for each setting."""
    rows = []
    for case, result in results.items():
        speed = f"{result.seconds:.2f}", f"{result.operations / result.seconds / machine.matrix_product_rate:.2f}"
        copies = result.streamed_bytes / machine.copy_bandwidth / result.seconds
        plain = results.get(replace(case, swap=0))
        cost = f"{result.seconds / plain.seconds - 1:+.0%}" if plain else ""
        swap = (f"{copies:.2f}", cost) if case.swap else ("", "")
        memory = f"{result.peak_bytes / GIB:.1f}", f"{result.predicted_bytes / GIB:.1f}"
        rows.append((case.shape, case.weights, case.checkpointing, case.swap, *speed, *swap, *memory))
    columns = ("shape", "weights", "checkpointing", "swap", "s/step", "of rate", "copies/step", "swap costs")
    speeds = f"{machine.matrix_product_rate / 1e12:.0f} TFLOP/s in products"
    title = f"{machine.device}: {speeds}, {machine.copy_bandwidth / 1e9:.0f} GB/s from host"
    print_table(title, rows, (*columns, "peak GiB", "predicted"))


def comparisons_of(machine: Machine, results: dict[Case, Result]) -> list[Comparison]:
    """Memory against the prediction; time with block swap against time without; time of the copies against the step."""
    comparisons = []
    for case, result in results.items():
        measured, planned = result.peak_bytes / GIB, result.predicted_bytes / GIB
        comparisons.append(Comparison(f"{case}: memory", measured, planned, "GiB", "planner", 1.1))
        if not case.swap:
            continue
        copying = result.streamed_bytes / machine.copy_bandwidth
        comparisons.append(Comparison(f"{case}: copies at full speed", copying, result.seconds, "s", "step", None))
        if plain := results.get(replace(case, swap=0)):
            comparisons.append(Comparison(f"{case}: time", result.seconds, plain.seconds, "s", "without swap", 1.1))
    return comparisons


if __name__ == "__main__":
    main()
