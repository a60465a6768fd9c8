"""Benchmarks are run by hand. These tests check that all are listed, and that their counts and reports are right."""

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import gpu_suite
from benchmarks.__main__ import ANYWHERE, ON_A_GPU, ON_LINUX
from benchmarks.comparison import Comparison, print_comparisons
from benchmarks.gpu_suite import Case, Result, random_dit, start_training, streamed_bytes
from benchmarks.throughput import forward_operations
from hunyuan_model.block_swap import BlockSwap, enable_block_swap
from hunyuan_model.models import MMDoubleStreamBlock, MMSingleStreamBlock
from hunyuan_model.quantization import FP8
from tests.small_dit import small_config

FOLDER = Path(__file__).parents[1] / "benchmarks"


def test_every_benchmark_is_run() -> None:
    modules = {path.stem for path in FOLDER.glob("*.py") if "def main(argv" in path.read_text(encoding="utf-8")}
    assert modules == {*ANYWHERE, *ON_LINUX, *ON_A_GPU}


@pytest.mark.parametrize("name", [*ANYWHERE, *ON_A_GPU, *(ON_LINUX if sys.platform == "linux" else ())])
def test_a_benchmark_can_be_imported(name: str) -> None:
    assert callable(importlib.import_module(f"benchmarks.{name}").main)


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


LATENTS = (1, 16, 1, 32, 32)  # 256 tokens of 2 x 2


def operations_of(depth_double: int, depth_single: int) -> tuple[int, int]:
    """Operations that PyTorch counts in the forward and in the backward pass of a small DiT without a LoRA."""
    config = small_config(hidden_size=64, mlp_hidden=256, rope_dims=(8, 12, 12), depth_double=depth_double,
                          depth_single=depth_single)  # fmt: skip
    dit = random_dit(config, torch.device("cpu"), False, torch.float32)
    given = gpu_suite.batch(config, LATENTS, torch.device("cpu"))
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as forward:
        output = dit(**given | {"x": given["x"].requires_grad_()})
    with FlopCounterMode(display=False) as backward:
        output.sum().backward()
    return forward.get_total_flops(), backward.get_total_flops()


def test_operations_are_those_that_pytorch_counts() -> None:
    """The difference between two models is two double and four single blocks."""
    counted = [more - less for more, less in zip(operations_of(3, 5), operations_of(1, 1), strict=True)]
    config = small_config(hidden_size=64, mlp_hidden=256, depth_double=2, depth_single=4)
    linear, attention = forward_operations(config, 256 + gpu_suite.TEXT_TOKENS)
    assert [linear + attention, linear + 2 * attention] == pytest.approx(counted, rel=0.02)


@pytest.mark.parametrize("checkpointing", ["none", "full"])
def test_streamed_bytes_are_those_that_are_copied(checkpointing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    copied, copy = [], BlockSwap._copy
    monkeypatch.setattr(BlockSwap, "_copy", lambda swap, i, keep: (copied.append(i), copy(swap, i, keep)))
    config, device = small_config(), torch.device("cpu")
    training = start_training(Case("", False, checkpointing, 4), config, (1, 16, 1, 8, 8), device, autocast=True)
    training.step()
    copied.clear()
    training.step()
    swap = enable_block_swap(random_dit(config, device, False, torch.bfloat16), 4, device)
    assert training.streamed_bytes == sum(swap.blocks[index].nbytes for index in copied) > 0
    assert training.streamed_bytes == streamed_bytes(swap)


def test_swapped_blocks_leave_the_gpu_quantised_before_the_next_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    made, left, fill = [], [], gpu_suite.fill

    def note_leaving(block: nn.Module, device: str) -> None:
        left.append((made.index(block), len(made), device, {weight.dtype for weight in block.parameters()}))

    monkeypatch.setattr(gpu_suite, "fill", lambda module, device: (made.append(module), fill(module, device)))
    for kind in (MMDoubleStreamBlock, MMSingleStreamBlock):
        monkeypatch.setattr(kind, "to", note_leaving)
    random_dit(small_config(), torch.device("cpu"), True, torch.bfloat16, swapped=[1, 5])
    dtypes = {torch.bfloat16, torch.float32, FP8}
    assert left == [(6 + index, 6 + index + 1, "cpu", dtypes) for index in (1, 5)]  # 6 modules are no blocks


def test_the_suite_keeps_what_it_has_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    done, bugs = [], ["a bug"]

    def measure(case: Case, *_: object) -> Result:
        done.append(case)
        if case.checkpointing == "none" and not case.fp8:
            raise torch.OutOfMemoryError("CUDA out of memory")
        if case.checkpointing == "offload" and bugs:
            raise RuntimeError(bugs[0])
        return Result(case, 2.0 + case.swap, 10**12, 10**9 * case.swap, 2**30, 2**30)

    monkeypatch.setattr(gpu_suite, "measure", measure)
    monkeypatch.setattr(gpu_suite, "matrix_product_rate", lambda *_, **__: 1e12)
    monkeypatch.setattr(gpu_suite, "copy_bandwidth", lambda *_: 1e10)
    monkeypatch.setattr(gpu_suite, "release_memory", lambda *_: None)  # it collects pytest's garbage, which is slow
    words = ["--device", "cpu", "--output", str(tmp_path), "--only"]
    with pytest.raises(SystemExit, match=r"^failed: image 960x544, bf16, checkpointing offload"):
        gpu_suite.main([*words, "image.*bf16"])
    assert len(done) == 6 and {case.fp8 for case in done} == {False}
    printed = capsys.readouterr()
    assert "out of memory: image 960x544, bf16, checkpointing none" in printed.out
    assert "a bug" in printed.err
    (path,) = tmp_path.glob("*.json")
    assert len(json.loads(path.read_text(encoding="utf-8"))["results"]) == 4

    done.clear()
    bugs.clear()
    comparisons = {row.work: row.ours / row.reference for row in gpu_suite.main([*words, "image"])}
    assert len(done) == 8  # the other six, and the two that failed
    swapped = Case("image 960x544", False, "full", 20)
    assert comparisons[f"{swapped}: copies at full speed"] == pytest.approx(2 / 22)
    assert comparisons[f"{swapped}: time"] == pytest.approx(11)
