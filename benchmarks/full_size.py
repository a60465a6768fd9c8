"""The scripts with models of full size on a CPU: time, and resident memory against what --dry_run predicts.

    python -m benchmarks.full_size            # 15 minutes and 21 GB of main memory on 2 cores

The model files have the official names and shapes. Their weights are zero and take no space on the disk. The output is
no picture, but memory is used as with the published weights. A LoRA is trained for one step on the DiT of 12.8 billion
parameters in fp8. Then two videos are made: one without block swap, and one with the number of swapped blocks that
--vram_gb 12 chooses. malloc returns memory as in `benchmarks.planner_memory`. Linux only.
"""

import argparse
import json
import math
import os
import re
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil
from PIL import Image
from transformers import CLIPTextConfig, LlamaConfig

from benchmarks.comparison import Comparison, print_comparisons
from benchmarks.loading_memory import MB
from benchmarks.planner_memory import LIMIT, MALLOC
from examples.tiny_models import clip_shapes, dit_shapes, llm_shapes, vae_shapes
from hunyuan_model.models import HunyuanVideoConfig
from hunyuan_model.vae import VaeConfig
from modules.memory.plan import DEVICE_OVERHEAD, FRAGMENTATION, GIB

ROOT = Path(__file__).resolve().parent.parent
TOKENIZERS = ROOT / "examples" / "shapes" / "models"
# Llama 3 8B with the tokens that LLaVA adds, and the text model of CLIP-L.
LLM = LlamaConfig(
    vocab_size=128_320, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_key_value_heads=8
)
CLIP = CLIPTextConfig(
    vocab_size=49_408, hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12
)
MODELS = {
    "dit": ("BF16", dit_shapes(HunyuanVideoConfig())),
    "vae": ("F16", vae_shapes(VaeConfig())),
    "text_encoder1": ("F16", llm_shapes(LLM)),
    "text_encoder2": ("F16", clip_shapes(CLIP)),
}
NEEDED = 21 * GIB
IN_BYTES = {"MiB": GIB / 1024, "GiB": GIB}


def write_zeros(path: Path, word: str, shapes: Mapping[str, Sequence[int]]) -> None:
    """Writes a safetensors file of 16-bit zeros as a sparse file."""
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": word, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)


def commands(folder: Path) -> dict[str, list[str]]:
    """The command of each stage, by name."""
    for name, (word, shapes) in MODELS.items():
        write_zeros(folder / f"{name}.safetensors", word, shapes)
    (folder / "images").mkdir()
    Image.effect_noise((64, 64), 60).convert("RGB").save(folder / "images" / "noise.png")
    (folder / "images" / "noise.txt").write_text("a cat walks on the grass", encoding="utf-8")
    dataset = folder / "dataset.toml"
    dataset.write_text(f"[[datasets]]\nresolution = 64\nimage_directory = '{folder / 'images'}'\n", encoding="utf-8")

    def models(*names: str) -> list[str]:
        return [word for name in names for word in (f"--{name}", str(folder / f"{name}.safetensors"))]

    texts = [*models("text_encoder1", "text_encoder2"), "--fp8_llm", "--text_encoder_dtype", "bfloat16"]
    texts += ["--tokenizer1", str(TOKENIZERS / "text_encoder"), "--tokenizer2", str(TOKENIZERS / "text_encoder_2")]
    caching, lora = ["--dataset_config", str(dataset)], folder / "lora.safetensors"
    training = "--sdpa --mixed_precision bf16 --dit_dtype bfloat16 --fp8_base --gradient_checkpointing"
    training += " --network_module networks.lora --network_dim 32 --network_alpha 32 --optimizer_type adamw"
    training += f" --max_train_steps 1 --output_name lora --output_dir {folder}"
    launch = "-m accelerate.commands.launch --num_processes 1 --num_machines 1 --dynamo_backend no --cpu"
    launch += " --num_cpu_threads_per_process 2 --mixed_precision bf16 hv_train_network.py"
    video = f"--prompt cat --video_size 64 64 --video_length 5 --infer_steps 1 --fp8 --save_path {folder}"
    generation = ["hv_generate_video.py", *models("dit", "vae"), *texts, "--dit_dtype", "bfloat16", *video.split()]
    return {
        "caching of latents": ["cache_latents.py", *caching, *models("vae")],
        "caching of text": ["cache_text_encoder_outputs.py", *caching, *texts],
        "training": [*launch.split(), *models("dit"), *caching, *training.split()],
        "generation": [*generation, "--lora_weight", str(lora), "--seed", "1"],
        "generation, --vram_gb 12": [*generation, "--vram_gb", "12", "--seed", "2"],
    }


def peak(command: Sequence[str]) -> tuple[int, str]:
    """The peak resident bytes of a script or a process that it started, and the text that it printed."""
    with tempfile.TemporaryFile() as printed:
        process = subprocess.Popen([sys.executable, *command], cwd=ROOT, env=os.environ | MALLOC, stdout=printed)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            raise subprocess.CalledProcessError(process.returncode, process.args)
        printed.seek(0)
        return usage.ru_maxrss * 1024, printed.read().decode()


def predicted(plan: str) -> float:
    """The bytes of tensors in a printed plan, on the device and in main memory."""
    rows = re.findall(r"(GPU memory|main memory for)\b.*? +([\d.]+) ([MG]iB)", plan)
    sizes = [(name, float(number) * IN_BYTES[unit]) for name, number, unit in rows]
    largest = max(size for name, size in sizes if name == "GPU memory")
    return (largest - DEVICE_OVERHEAD) / FRAGMENTATION + sum(size for name, size in sizes if name != "GPU memory")


def main(argv: Sequence[str] | None = None) -> list[Comparison]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args(argv)
    if psutil.virtual_memory().available < NEEDED:
        print(f"skipped: {NEEDED // GIB} GiB of main memory must be free")
        return []
    comparisons = []
    with tempfile.TemporaryDirectory() as folder:
        for stage, command in commands(Path(folder)).items():
            before, plan = peak([*command, "--dry_run"])  # the interpreter, its libraries, and the planning itself
            start = time.perf_counter()
            most, _ = peak(command)
            print(f"{stage}: {time.perf_counter() - start:.0f} s", flush=True)
            comparisons.append(
                Comparison(f"{stage}: memory", (most - before) / MB, predicted(plan) / MB, "MB", "planner", LIMIT)
            )
    print_comparisons("models of full size: resident memory against the planner", comparisons)
    return comparisons


if __name__ == "__main__":
    main()
