"""hv_generate_video.py: the memory plan, and the video that the settings it chose make."""

import re

import pytest
import torch

from modules.memory.meter import MemoryMeter, nbytes
from utils.errors import UserError
from utils.safetensors_utils import load_file


def latents_of(folder) -> torch.Tensor:
    (path,) = folder.glob("*_latent.safetensors")
    return load_file(path)["latent"]


def test_dry_run_prints_what_is_needed_and_loads_nothing(generate, capfd, monkeypatch):
    monkeypatch.setattr("hunyuan_model.checkpoints.load_dit", lambda *_, **__: pytest.fail("loaded"))
    folder = generate("--prompt", "a cat", "--dry_run")
    printed = capfd.readouterr().out
    assert "memory plan, latents 2x4x6" in printed
    assert "GPU memory of decoding" in printed
    assert not folder.exists()


def test_vram_gb_swaps_blocks_and_the_video_stays_the_same(generate, capfd, monkeypatch):
    monkeypatch.setattr("modules.memory.plan.DEVICE_OVERHEAD", 0)
    words = ["--prompt", "a cat", "--seed", 3, "--output_type", "latent", "--fp8"]
    plain = latents_of(generate(*words, folder="plain"))
    capfd.readouterr()
    generate(*words, "--dry_run")
    needed = float(re.search(r"needed in all +([\d.]+) MiB", capfd.readouterr().out)[1])
    planned = latents_of(generate(*words, "--vram_gb", (needed - 0.2) / 1024, folder="planned"))
    assert "--fp8 --blocks_to_swap" in capfd.readouterr().out
    assert torch.equal(planned, plain)


def test_the_plan_knows_how_guidance_is_computed_and_counts_a_step_cache(generate, capfd):
    def needed(*words):
        generate("--prompt=a cat", "--guidance_scale=2", "--dry_run", *words)
        return float(re.search(r"needed in all +([\d.]+) MiB", capfd.readouterr().out)[1])

    together, split = needed(), needed("--split_attn")
    assert split < together < needed("--step_cache=0.1")
    assert split < needed("--split_attn", "--step_cache=0.1")


def test_what_does_not_fit_ends_before_a_model_is_loaded(generate):
    with pytest.raises(UserError, match=r"nothing fits 102\.4 MiB of GPU memory: even with --fp8 --blocks_to_swap 4"):
        generate("--prompt", "a cat", "--vram_gb", 0.1)


def test_dry_run_of_saved_latents_plans_their_decoding(tiny_models, tmp_path, monkeypatch, capfd):
    import hv_generate_video
    from utils.safetensors_utils import save_file

    monkeypatch.setattr("hunyuan_model.checkpoints.load_vae", lambda *_: pytest.fail("loaded"))
    save_file({"latent": torch.zeros(16, 2, 4, 6)}, tmp_path / "a.safetensors")
    save_file({"latent": torch.zeros(4, 2, 4, 6)}, tmp_path / "b.safetensors")
    words = [f"--vae={tiny_models.vae}", f"--save_path={tmp_path / 'out'}", "--dry_run", "--device=cpu"]
    monkeypatch.setattr("sys.argv", ["x", *words, f"--latent_path={tmp_path / 'a.safetensors'}"])
    hv_generate_video.main()
    printed = capfd.readouterr().out
    assert "memory plan, latents 2x4x6" in printed
    assert "GPU memory of decoding" in printed
    assert "text encoder" not in printed
    monkeypatch.setattr("sys.argv", ["x", *words, f"--latent_path={tmp_path / 'b.safetensors'}"])
    with pytest.raises(UserError, match=r"b\.safetensors: latents with 4 channels, this VAE has 16"):
        hv_generate_video.main()


def test_what_vram_gb_chooses_is_said_once_and_finished_lines_stay_finished(generate, tmp_path, capfd, monkeypatch):
    from modules.generation.outputs import read_settings

    monkeypatch.setattr("modules.memory.plan.DEVICE_OVERHEAD", 0)
    (tmp_path / "prompts.txt").write_text("cat --w 50 --d 1\n")
    words = ["--from_file", tmp_path / "prompts.txt", "--output_type=latent", "--blocks_to_swap=0"]
    generate(*words, "--dry_run")
    needed = float(re.search(r"needed in all +([\d.]+) MiB", capfd.readouterr().out)[1])
    out = generate(*words, "--vram_gb", (needed - 0.2) / 1024)
    said = capfd.readouterr()
    assert re.search(r"settings +--fp8", said.out)
    assert said.err.count("width 50") == 1
    (path,) = out.iterdir()
    assert read_settings(path)["fp8"] is True
    assert not {"vram_gb", "dry_run"} & set(read_settings(path))
    generate(*words)
    assert "1 of 1 prompts are finished" in capfd.readouterr().out


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("captions", [1, 16])
def test_text_encoder_1_is_planned_as_it_works(tiny_models, fp8, captions):
    from hunyuan_model.checkpoints import load_text_encoder_1
    from modules.memory.measure import measure_text_encoder_1

    llm = load_text_encoder_1(tiny_models.text_encoder1, "cpu", torch.float32, fp8)
    with MemoryMeter() as meter:
        llm.encode(["a cat walks"] * captions)
    needed = meter.peak + sum(map(nbytes, llm.model.parameters()))
    planned = measure_text_encoder_1(tiny_models.text_encoder1, torch.float32, fp8, captions)
    assert planned == pytest.approx(needed, rel=0.1)


def test_vram_gb_takes_fp8_for_text_encoder_1_where_it_does_not_fit_otherwise(generate, monkeypatch, capfd):
    monkeypatch.setattr("modules.memory.plan.DEVICE_OVERHEAD", 0)
    monkeypatch.setattr(
        "modules.memory.text_encoder.measure_text_encoder_1", lambda _, dtype, fp8, n: (15 - 8 * fp8) << 30
    )
    chosen = []
    for limit in (24, 12, 6):
        generate("--prompt=cat", "--dry_run", "--vram_gb", limit)
        printed = capfd.readouterr()
        chosen += re.findall(r"text encoder 1 +(.*)", printed.out)
        warned = "text encoder 1 needs 7.35 GiB, 6.00 GiB are available" in printed.err
        assert warned == (limit == 6)
    assert chosen == ["no option", "15.75 GiB", *["--fp8_llm", "7.35 GiB"] * 2]


def test_only_swapped_blocks_pass_through_main_memory(tiny_models, monkeypatch):
    """The meta device takes the place of a GPU; nothing can be computed on it."""
    from hunyuan_model import checkpoints
    from hunyuan_model.block_swap import swapped_blocks
    from hunyuan_model.checkpoints.stored_tensors import StoredTensors
    from modules.generation.models import load_merged_dit
    from modules.generation.settings import parse_generation_options

    monkeypatch.setattr(StoredTensors, "_require_finite", lambda self, name, tensor: tensor)
    monkeypatch.setattr(checkpoints, "load_dit", lambda *words, load=checkpoints.load_dit, **_: load(*words))
    models = [f"--{name}={path}" for name, path in vars(tiny_models).items()]
    words = [*models, "--prompt=a cat", "--save_path=out", "--blocks_to_swap=4", "--fp8"]
    options = parse_generation_options("", words)
    dit = load_merged_dit(options, torch.device("meta"))
    swapped = swapped_blocks(4, len(dit.double_blocks), len(dit.single_blocks))
    for index, block in enumerate(dit.blocks):
        assert {weight.device.type for weight in block.parameters()} == {"cpu" if index in swapped else "meta"}
    assert dit.device.type == "meta"


def test_a_merge_before_fp8_never_holds_the_wide_weights(tiny_models, loras, tmp_path):
    from modules.generation.models import load_merged_dit
    from modules.generation.settings import parse_generation_options
    from utils.safetensors_utils import save_file

    save_file(torch.load(tiny_models.dit, weights_only=True)["module"], tmp_path / "dit.safetensors")  # .pt is mapped
    models = [f"--{name}={path}" for name, path in (vars(tiny_models) | {"dit": tmp_path / "dit.safetensors"}).items()]
    words = [*models, "--prompt=a cat", "--save_path=out", "--fp8", f"--lora_weight={loras[0]}"]
    with MemoryMeter() as meter:
        dit = load_merged_dit(parse_generation_options("", words), torch.device("cpu"))
    weights = list(dit.parameters())
    held, wide = sum(map(nbytes, weights)) + loras[0].stat().st_size, sum(weight.numel() for weight in weights) * 4
    assert held < 0.7 * wide
    assert meter.peak < held + 0.1 * wide
