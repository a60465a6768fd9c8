"""LoRAs in hv_generate_video.py: merged, beside fp8 weights, saved as a model, compared on one page."""

import os
import re
import shutil

import pytest
import torch

from modules.generation.outputs import read_settings
from tests.platforms import needs_posix
from tests.saved_files import only, saved_latents


@pytest.fixture
def sampling_dit(tiny_models):
    """Options -> the DiT as the script samples with it."""
    from modules.generation.models import load_sampling_dit
    from modules.generation.settings import parse_generation_options

    def load(*words: object):
        models = [f"--{name}={path}" for name, path in vars(tiny_models).items()]
        options = parse_generation_options("", [*models, "--save_path=x", "--prompt=x", *map(str, words)])
        return load_sampling_dit(options, torch.device("cpu"))

    return load


@pytest.fixture
def dit_inputs(tiny_models):
    from hunyuan_model.checkpoints import read_dit_config

    config, generator = read_dit_config(tiny_models.dit), torch.Generator().manual_seed(0)
    x = torch.randn(1, 16, 2, 4, 6, generator=generator)
    text = torch.randn(1, 5, config.text_dim, generator=generator)
    pooled = torch.randn(1, config.text_dim_2, generator=generator)
    return x, torch.tensor([500.0]), text, torch.ones(1, 5), pooled, torch.tensor([6000.0])


def test_multiplier_zero_is_the_base_model(sampling_dit, dit_inputs, loras):
    base, zero = sampling_dit(), sampling_dit("--lora_weight", loras[0], "--lora_multiplier", 0)
    assert torch.equal(zero(*dit_inputs), base(*dit_inputs))


def test_two_loras_are_the_sum_of_their_deltas(sampling_dit, loras):
    name = "double_blocks.1.img_mlp.fc1"
    both = sampling_dit("--lora_weight", *loras, "--lora_multiplier", 0.7, -0.5)
    models = [sampling_dit(), *(sampling_dit("--lora_weight", lora) for lora in loras), both]
    base, first, second, both = (model.get_submodule(name).weight for model in models)
    assert (first - base).norm() > 0.1 * base.norm()
    torch.testing.assert_close(both, base + 0.7 * (first - base) - 0.5 * (second - base), rtol=1e-5, atol=1e-6)


def test_a_lora_that_fits_in_part_is_a_warning_with_numbers_and_one_that_does_not_an_error(
    sampling_dit, loras, tmp_path, capfd
):
    from utils.errors import UserError
    from utils.safetensors_utils import load_file, save_file

    tensors = load_file(loras[0])
    unknown = {name.replace("blocks_1_", "blocks_70_"): tensor for name, tensor in tensors.items()}
    unknown |= {f"{name}.lora_down.weight": torch.zeros(4, 8) for name in ("lora_unet_something", "lora_te1_mlp_fc1")}
    save_file(unknown, tmp_path / "partly.safetensors")
    sampling_dit("--lora_weight", tmp_path / "partly.safetensors")
    assert "warning: " in (said := capfd.readouterr().err)
    assert "26 of 36 modules merged, 2 keys belong to no module" in said
    far = {re.sub(r"blocks_(\d)_", r"blocks_7\1_", name): tensor for name, tensor in tensors.items()}
    save_file(far, tmp_path / "far.safetensors")
    with pytest.raises(UserError, match="none of its 36 modules is in this DiT"):
        sampling_dit("--lora_weight", tmp_path / "far.safetensors")


WRONG_LORAS = {
    "made for another model": lambda tensors: (tensors, {"ss_base_model_version": "flux1"}),
    "not finite": lambda tensors: ({name: tensor * float("nan") for name, tensor in tensors.items()}, {}),
    "has only": lambda tensors: ({name: t for name, t in tensors.items() if "lora_up" not in name}, {}),
    "none of its": lambda tensors: ({re.sub("blocks_", "blocks_7", name): t for name, t in tensors.items()}, {}),
    "img_attn_proj: .* 96 x 96, this DiT has 64 x 64": lambda tensors: (
        {
            "lora_unet_double_blocks_0_img_attn_proj.lora_down.weight": torch.ones(2, 96),
            "lora_unet_double_blocks_0_img_attn_proj.lora_up.weight": torch.ones(96, 2),
        },
        {},
    ),
}


@pytest.mark.parametrize("complaint", WRONG_LORAS)
def test_a_wrong_lora_is_found_before_a_model_is_loaded(generate, loras, tmp_path, monkeypatch, complaint):
    from safetensors.torch import save_file

    from utils.errors import UserError
    from utils.safetensors_utils import load_file

    tensors, metadata = WRONG_LORAS[complaint](load_file(loras[0]))
    save_file(tensors, tmp_path / "wrong.safetensors", metadata)
    monkeypatch.setattr("hunyuan_model.checkpoints.load_text_encoder_1", lambda *_: pytest.fail("loaded"))
    with pytest.raises(UserError, match=rf"wrong\.safetensors: .*{complaint}"):
        generate("--prompt=cat", "--lora_weight", loras[1], tmp_path / "wrong.safetensors")


def test_merged_is_applied(sampling_dit, dit_inputs, loras):
    from networks.hooks import LoraHooks

    merged = sampling_dit("--lora_weight", *loras, "--lora_multiplier", 0.7, -0.5)
    model = sampling_dit()
    plain = model(*dit_inputs)
    hooks = LoraHooks(model)
    hooks.use([(loras[0], 0.7), (loras[1], -0.5)])
    applied = model(*dit_inputs)
    assert (applied - plain).norm() > 0.01 * plain.norm()
    assert (merged(*dit_inputs) - applied).norm() <= 1e-5 * applied.norm()
    hooks.use([])
    assert torch.equal(model(*dit_inputs), plain)


def test_hooks_of_another_width_change_nothing(sampling_dit, dit_inputs, loras, tmp_path):
    from networks.hooks import LoraHooks
    from utils.errors import UserError
    from utils.safetensors_utils import save_file

    wide = {"lora_down.weight": torch.ones(2, 96), "lora_up.weight": torch.ones(96, 2)}
    name = "lora_unet_double_blocks_0_img_attn_proj"
    save_file({f"{name}.{suffix}": tensor for suffix, tensor in wide.items()}, tmp_path / "wide.safetensors")
    model = sampling_dit()
    hooks = LoraHooks(model)
    hooks.use([(loras[0], 1.0)])
    before = model(*dit_inputs)
    with pytest.raises(UserError, match=r"double_blocks.0.img_attn_proj: .* 96 x 96, this DiT has 64 x 64"):
        hooks.use([(tmp_path / "wide.safetensors", 1.0)])
    assert torch.equal(model(*dit_inputs), before)


def test_loras_are_merged_before_the_weights_become_fp8(sampling_dit, loras):
    from hunyuan_model.quantization import Fp8Linear

    merged = sampling_dit("--lora_weight", loras[0])
    quantized = sampling_dit("--lora_weight", loras[0], "--fp8")
    layers = {name: module for name, module in quantized.named_modules() if isinstance(module, Fp8Linear)}
    assert len(layers) == 3 * 8 + 6 * 2
    for name, layer in layers.items():
        weight = merged.get_submodule(name).weight
        # e4m3 has 3 bits of mantissa: half a step is 1/16 of the value.
        assert ((layer.dequantized(torch.float32) - weight).abs() <= weight.abs() / 16 + 1e-3).all()


def test_a_lora_on_a_file_that_is_fp8_already_is_not_lost_in_rounding(
    sampling_dit, dit_inputs, loras, tiny_models, tmp_path
):
    from utils.safetensors_utils import save_file

    weights = torch.load(tiny_models.dit, weights_only=True)["module"]
    small = {name: w.to(torch.float8_e4m3fn) if "blocks" in name and w.ndim == 2 else w for name, w in weights.items()}
    save_file(small, tmp_path / "fp8.safetensors")
    options = ["--dit", tmp_path / "fp8.safetensors", "--fp8"]
    weak = ["--lora_weight", loras[0], "--lora_multiplier", 0.02]
    change = [
        sampling_dit(*words, *weak)(*dit_inputs) - sampling_dit(*words)(*dit_inputs)
        for words in (options, ["--dit", tmp_path / "fp8.safetensors"])
    ]
    assert (change[0] - change[1]).norm() <= 0.02 * change[1].norm()


def test_merged_model_is_a_model_that_samples_like_the_lora(generate, loras, tmp_path):
    with_lora = generate("--prompt=cat", "--seed=3", "--output_type=latent", "--lora_weight", loras[0])
    generate("--lora_weight", loras[0], "--save_merged_model", tmp_path / "merged.safetensors")
    merged = generate(
        "--prompt=cat", "--seed=3", "--output_type=latent", "--dit", tmp_path / "merged.safetensors", folder="m"
    )
    assert torch.equal(saved_latents(with_lora), saved_latents(merged))
    plain = generate("--prompt=cat", "--seed=3", "--output_type=latent", folder="plain")
    assert not torch.equal(saved_latents(with_lora), saved_latents(plain))


@needs_posix
def test_a_lora_whose_name_is_not_utf8_stands_in_every_file_and_makes_the_video_again(generate, loras, tmp_path):
    name = os.fsdecode(os.fsencode(tmp_path) + b"/l\xff.safetensors")
    shutil.copy(loras[0], name)
    out = generate("--prompt=cat", "--seed=3", "--output_type=both", "--lora_weight", name)
    images = generate("--prompt=cat", "--seed=3", "--output_type=images", "--lora_weight", name, folder="images")
    files = [only(out, "*.mp4"), only(out, "*_latent.safetensors"), only(images, "*") / "00000.png"]
    assert [read_settings(path)["lora_weight"] for path in files] == [[name]] * 3
    generate("--prompt=cat", "--seed=3", "--compare", "--lora_weight", name, folder="page")
