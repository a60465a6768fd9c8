"""hv_generate_video.py with the small models on a GPU, in the dtypes that are the defaults there.

pytest tests/gpu -m gpu
"""

import sys

import pytest
import torch

from hunyuan_model.quantization import has_fp8_matmul
from utils.device_utils import release_memory
from utils.safetensors_utils import load_file

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA and -m gpu")]


@pytest.fixture
def generate(tiny_models, tmp_path, monkeypatch):
    """Options -> the latents that the script saved."""
    import hv_generate_video

    models = [f"--{name}={path}" for name, path in vars(tiny_models).items()]
    small = ["--prompt=cat", "--seed=3", "--video_size", "64", "96", "--video_length=9", "--infer_steps=4"]

    def run(*words: object) -> torch.Tensor:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        argv = ["hv_generate_video.py", *models, *small, f"--save_path={folder}", "--output_type=both"]
        monkeypatch.setattr(sys, "argv", [*argv, *map(str, words)])
        hv_generate_video.main()
        assert len(list(folder.glob("*.mp4"))) == 1
        (latents,) = folder.glob("*_latent.safetensors")
        return load_file(latents)["latent"]

    return run


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


def test_gpu_equals_cpu_in_float32_and_is_close_in_its_own_dtypes(generate):
    exact = ["--dit_dtype=float32", "--text_encoder_dtype=float32", "--vae_dtype=float32"]
    cpu = generate("--device=cpu")
    assert distance(generate(*exact), cpu) < 5e-3  # convolutions round to TF32
    assert distance(generate(), cpu) < 0.1


def test_block_swap_and_repetition_are_bit_identical(generate):
    plain = generate()
    assert torch.equal(generate(), plain)
    assert torch.equal(generate("--blocks_to_swap=3"), plain)
    assert torch.equal(generate("--blocks_to_swap=3", "--img_in_txt_in_offloading"), plain)


def test_fp8_and_compile_are_close(generate):
    plain = generate()
    assert distance(generate("--fp8"), plain) < 0.3
    assert distance(generate("--compile"), plain) < 0.1
    assert distance(generate("--compile", "--fp8", "--blocks_to_swap=2", "--step_cache=0.01"), plain) < 0.3


def test_fp8_fast_is_close(generate):
    if not has_fp8_matmul("cuda"):
        pytest.skip("this GPU has no float8 matmul")
    assert distance(generate("--fp8", "--fp8_fast"), generate()) < 0.3


def test_nothing_stays_on_the_gpu(generate):
    left = []
    for _ in range(2):  # libraries allocate lasting buffers at their first use
        generate("--step_cache=0.5", "--guidance_scale=2")
        release_memory(torch.device("cuda"))
        left.append(torch.cuda.memory_allocated())
    assert left[1] <= left[0] + 10_000  # the DiT alone has 2 MB
