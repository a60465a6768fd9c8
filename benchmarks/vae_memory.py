"""Peak resident memory and time of the full-size VAE in float32 on a CPU, against diffusers with the same weights.

    python -m benchmarks.vae_memory                # 17 x 256 x 256, no tiling; about 20 minutes and 8 GB on 2 cores

Every run is a separate process. Its memory is VmHWM, the peak of the resident memory, minus VmRSS with the model
loaded. Our runs and those of diffusers alternate. The result is the largest memory and the median time. The limits are
for the default size. Linux only.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import AutoencoderKLHunyuanVideo
from torch import Tensor

from benchmarks.comparison import Comparison, print_comparisons
from benchmarks.loading_memory import resident
from hunyuan_model.vae import AutoencoderKLCausal3D, VaeConfig

LIMITS_GB = {"encode": 1.8, "decode": 2.6}
LIMIT_TIME = 1.1
LIMIT_DIFFERENCE = 1e-5
CONTENDERS = ("chunked", "plain", "diffusers")
GB = 1e9


def new_model(contender: str, chunk_size: int) -> torch.nn.Module:
    """Our VAE or that of diffusers, with the same random weights."""
    torch.manual_seed(0)
    ours = AutoencoderKLCausal3D(VaeConfig()).requires_grad_(False)
    if contender == "diffusers":
        with torch.device("meta"):
            model = AutoencoderKLHunyuanVideo()
        model.load_state_dict(ours.state_dict(), assign=True)
        model.use_framewise_encoding = model.use_framewise_decoding = False
        return model
    ours.configure_memory(chunk_size if contender == "chunked" else sys.maxsize)
    return ours


def run_once(model: torch.nn.Module, operation: str, frames: int, size: int) -> Tensor:
    """Encodes or decodes random input; returns the posterior's mean or the pixels."""
    generator = torch.Generator().manual_seed(1)
    if operation == "encode":
        posterior = model.encode(torch.rand(1, 3, frames, size, size, generator=generator) * 2 - 1)
        return getattr(posterior, "latent_dist", posterior).mean
    pixels = model.decode(torch.randn(1, 16, frames // 4 + 1, size // 8, size // 8, generator=generator))
    return getattr(pixels, "sample", pixels)


def measure(contender: str, operation: str, frames: int, size: int, chunk_size: int, result: Path) -> None:
    """Prints the peak in bytes without the loaded model, and the seconds; saves the output."""
    model = new_model(contender, chunk_size)
    with torch.no_grad():
        run_once(model, operation, frames=1, size=32)  # memory and time of the libraries' first use
        loaded, start = resident("VmRSS"), time.perf_counter()
        output = run_once(model, operation, frames, size)
        seconds = time.perf_counter() - start
    print(resident("VmHWM") - loaded, seconds)
    torch.save(output.clone(), result)


def measured_in_a_process(contender: str, operation: str, options: argparse.Namespace, result: Path) -> list[float]:
    settings = {"frames": options.frames, "size": options.size, "chunk_size": options.chunk_size, "result": result}
    words = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    command = [sys.executable, "-m", "benchmarks.vae_memory", "--measure", contender, operation, *words]
    output = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    return [float(word) for word in output.splitlines()[-1].split()]


def compare(operation: str, options: argparse.Namespace, folder: Path) -> list[Comparison]:
    results = {contender: folder / f"{operation}_{contender}.pt" for contender in CONTENDERS}
    runs = {contender: [] for contender in CONTENDERS}
    for _ in range(options.repeats):
        for contender in CONTENDERS:
            runs[contender].append(measured_in_a_process(contender, operation, options, results[contender]))
    memory = {contender: max(peak for peak, _ in runs[contender]) / GB for contender in CONTENDERS}
    seconds = {contender: statistics.median(time for _, time in runs[contender]) for contender in CONTENDERS}
    chunked, plain = (torch.load(results[contender], weights_only=True) for contender in ("chunked", "plain"))
    difference = ((chunked - plain).abs().max() / plain.abs().max()).item()
    work = f"VAE {operation}, {options.frames} x {options.size} x {options.size}, chunks of {options.chunk_size}"
    return [
        Comparison(f"{work}: memory", memory["chunked"], LIMITS_GB[operation], "GB", "limit"),
        Comparison(f"{work}: memory", memory["chunked"], memory["diffusers"], "GB", "diffusers"),
        Comparison(f"{work}: time", seconds["chunked"], seconds["diffusers"], "s", "diffusers", LIMIT_TIME),
        Comparison(f"{work}: relative difference from no chunks", difference, LIMIT_DIFFERENCE, "", "limit"),
    ]


def main(argv: Sequence[str] | None = None) -> list[Comparison]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=17)
    parser.add_argument("--size", type=int, default=256, help="height and width in pixels")
    parser.add_argument("--chunk_size", type=int, default=4, help="--vae_chunk_size of the chunked runs")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--measure", nargs=2, metavar=("WHO", "OPERATION"), help="one run (used in a separate process)")
    parser.add_argument("--result", type=Path, help="with --measure: where the output goes")
    options = parser.parse_args(argv)
    if options.measure:
        measure(*options.measure, options.frames, options.size, options.chunk_size, options.result)
        return []
    with tempfile.TemporaryDirectory() as folder:
        comparisons = [row for operation in LIMITS_GB for row in compare(operation, options, Path(folder))]
    print_comparisons("VAE, float32", comparisons)
    return comparisons


if __name__ == "__main__":
    main()
