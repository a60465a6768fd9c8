"""The 13B model with random weights on a GPU: step time, rate, peak memory, and the planner's word beside each.

    python -m benchmarks.gpu_suite --output benchmarks/results

Writes a JSON file named after the GPU and prints a table for the README.
"""

import argparse
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from benchmarks.comparison import Comparison
from hunyuan_model.block_swap import enable_block_swap, swapped_blocks
from hunyuan_model.checkpoints import is_quantized_in_dit
from hunyuan_model.memory import measure_dit
from hunyuan_model.models import HunyuanVideoConfig, HYVideoDiffusionTransformer
from modules.memory_plan import GIB, MOMENTS, Prediction, predict
from tests.small_dit import prepare
from utils.cli import print_table
from utils.device_utils import is_out_of_memory, release_memory
from utils.files import write_text
from utils.fp8 import Fp8Linear, quantize_linears

TEXT_TOKENS = 64
RANK = 32
WARMUP, MEASURED = 1, 3
KINDS = ("none", "selective", "full", "offload")
SHAPES = {  # latents (B, C, f, h, w)
    "image 960x544": (1, 16, 1, 68, 120),
    "video 544x960x33": (1, 16, 9, 68, 120),
    "video 544x960x129": (1, 16, 33, 68, 120),
}


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
    """What was measured, and what the planner had said."""

    case: Case
    seconds: float
    rate: float
    peak_bytes: int
    predicted_bytes: int


def cases() -> list[Case]:
    """Every shape plain and as lean as its users need it."""
    stills = [Case("image 960x544", fp8, kind, 0) for fp8 in (False, True) for kind in KINDS]
    swaps = [Case(shape, fp8, "full", swap) for shape in SHAPES for fp8 in (False, True) for swap in (0, 20, 36)]
    return list(dict.fromkeys(stills + swaps))


def random_dit(
    config: HunyuanVideoConfig, device: torch.device, fp8: bool, dtype: torch.dtype
) -> HYVideoDiffusionTransformer:
    """Random weights, the blocks' quantised if `fp8`, made on the device."""
    with torch.device("meta"):
        dit = HYVideoDiffusionTransformer(config).to(dtype).requires_grad_(False)
    for block in [dit.img_in, dit.txt_in, dit.time_in, dit.vector_in, dit.guidance_in, dit.final_layer, *dit.blocks]:
        block.to_empty(device=device)
        for parameter in block.parameters():
            parameter.normal_(std=0.02)
    if fp8:
        quantize_linears(dit, is_quantized_in_dit)
    return dit


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


def linear_operations(dit: HYVideoDiffusionTransformer, tokens: int) -> float:
    """Floating-point operations of the blocks' Linear layers in a forward pass, attention left out."""
    linears = [
        module for block in dit.blocks for module in block.modules() if isinstance(module, (nn.Linear, Fp8Linear))
    ]
    return 2.0 * tokens * sum(module.in_features * module.out_features for module in linears)


def matrix_product_rate(device: torch.device) -> float:
    """Floating-point operations per second of a large bfloat16 product: what the GPU can really do."""
    a = torch.randn(8192, 8192, dtype=torch.bfloat16, device=device)
    seconds = min(timed(lambda: a @ a, device) for _ in range(10))
    return 2 * 8192**3 / seconds


def copy_bandwidth(device: torch.device) -> float:
    """Bytes per second from pinned main memory."""
    host = torch.empty(1 << 30, dtype=torch.uint8, pin_memory=device.type == "cuda")
    target = torch.empty_like(host, device=device, pin_memory=False)
    return host.numel() / min(timed(lambda: target.copy_(host, non_blocking=True), device) for _ in range(5))


def timed(run: Callable[[], object], device: torch.device) -> float:
    """Seconds until the device has done it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


@dataclass(frozen=True)
class Training:
    """A DiT with a LoRA, and a step that trains it with AdamW."""

    dit: HYVideoDiffusionTransformer
    trained: int
    step: Callable[[], None]


def start_training(
    case: Case,
    config: HunyuanVideoConfig,
    shape: tuple[int, ...],
    device: torch.device,
    dtype: torch.dtype = torch.bfloat16,
) -> Training:
    """Builds what a training run with these settings builds."""
    dit = random_dit(config, device, case.fp8, dtype)
    if case.swap:
        dit.to("cpu")
        release_memory(device)
        enable_block_swap(dit, case.swap, device)
    network = prepare(dit, case.checkpointing, RANK).to(device)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4)
    given = batch(config, shape, device)

    def step() -> None:
        dit(**given).float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return Training(dit, sum(parameter.numel() for parameter in network.parameters()), step)


def measure(case: Case, config: HunyuanVideoConfig, device: torch.device) -> Result:
    """Trains a few steps and takes the fastest."""
    shape = SHAPES[case.shape]
    training = start_training(case, config, shape, device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    seconds = [timed(training.step, device) for _ in range(WARMUP + MEASURED)][WARMUP:]
    tokens = shape[0] * (shape[2] * shape[3] * shape[4] // 4 + TEXT_TOKENS)
    passes = 3 if case.checkpointing in ("full", "offload") else 2  # forward, (again,) and backward to the inputs
    return Result(
        case,
        min(seconds),
        passes * linear_operations(training.dit, tokens) / min(seconds),
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
    """What the planner says of such a run."""

    def apply(dit: HYVideoDiffusionTransformer) -> nn.Module:
        return prepare(dit, case.checkpointing, RANK)

    usage = measure_dit(config, shape, TEXT_TOKENS, dtype, case.fp8, True, apply)
    swapped = swapped_blocks(case.swap, config.depth_double, config.depth_single)
    return predict(usage, swapped, trained=trained, moments=MOMENTS, offload=case.checkpointing == "offload")


def main(argv: Sequence[str] | None = None) -> list[Comparison]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--depth", type=int, nargs=2, default=(20, 40), help="double and single blocks")
    args = parser.parse_args(argv)
    device = torch.device(args.device)
    config = HunyuanVideoConfig(depth_double=args.depth[0], depth_single=args.depth[1])
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    rate, bandwidth = matrix_product_rate(device), copy_bandwidth(device)
    results, failed = [], []
    for case in tqdm(cases(), unit="setting"):
        try:
            results.append(measure(case, config, device))
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            failed.append(case)
        release_memory(device)
    plain = {result.case: result.seconds for result in results if not result.case.swap}
    rows = []
    for result in results:
        case = result.case
        without = plain.get(replace(case, swap=0))
        cost = f"{result.seconds / without - 1:+.0%}" if case.swap and without else ""
        memory = f"{result.peak_bytes / GIB:.1f}", f"{result.predicted_bytes / GIB:.1f}"
        speed = f"{result.seconds:.2f}", f"{result.rate / rate:.2f}"
        rows.append((case.shape, case.weights, case.checkpointing, case.swap, *speed, cost, *memory))
    header = ("shape", "weights", "checkpointing", "swap", "s/step", "of rate", "swap costs", "peak GiB", "predicted")
    print_table(f"{name}: {rate / 1e12:.0f} TFLOP/s in products, {bandwidth / 1e9:.0f} GB/s from host", rows, header)
    for case in failed:
        print(f"out of memory: {case}")
    record = {"device": name, "torch": torch.__version__, "matrix_product_rate": rate, "copy_bandwidth": bandwidth}
    record["results"] = [asdict(result) for result in results]
    write_text(args.output / f"{name.replace(' ', '_')}.json", json.dumps(record, indent=1) + "\n")
    return comparisons_of(results, plain)


def comparisons_of(results: Sequence[Result], plain: Mapping[Case, float]) -> list[Comparison]:
    """Memory against the planner, and swapping against the same settings without; `plain`: seconds of the latter."""
    comparisons = []
    for result in results:
        measured, planned = result.peak_bytes / GIB, result.predicted_bytes / GIB
        comparisons.append(Comparison(f"{result.case}: memory", measured, planned, "GiB", "planner", 1.1))
        without = plain.get(replace(result.case, swap=0))
        if result.case.swap and without:
            comparisons.append(Comparison(f"{result.case}: time", result.seconds, without, "s", "without swap", 1.1))
    return comparisons


if __name__ == "__main__":
    main()
