"""One model in every published layout loads to identical parameters."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from examples.tiny_models import dit_shapes, random_weights, vae_shapes
from hunyuan_model import checkpoints
from hunyuan_model.checkpoints import (
    identify,
    is_quantized_in_dit,
    load_dit,
    load_text_encoder_1,
    load_text_encoder_2,
    load_vae,
)
from hunyuan_model.quantization import Fp8Linear, quantize
from tests.conftest import ROOT
from tests.hunyuan_model.model_layouts import (
    CLIP_LAYOUTS,
    DIT_LAYOUTS,
    FP8,
    FP8_LAYOUTS,
    LLM_LAYOUTS,
    VAE_LAYOUTS,
    Weights,
    prefixed,
    quantized,
    single_file,
)
from utils.errors import UserError
from utils.safetensors_utils import load_file, save_file


@pytest.fixture(scope="module")
def dit_weights() -> Weights:
    return random_weights(dit_shapes(depth_double=2, depth_single=2), seed=5)


@pytest.fixture(scope="module")
def vae_weights() -> Weights:
    return random_weights(vae_shapes(), seed=6)


def _assert_identical(found: Weights, expected: Weights) -> None:
    assert found.keys() == expected.keys()
    different = [name for name in expected if not torch.equal(found[name], expected[name])]
    assert not different, different


@pytest.mark.parametrize("layout", DIT_LAYOUTS)
def test_dit_of_every_layout_is_bit_identical(layout: str, dit_weights: Weights, tmp_path: Path, capsys) -> None:
    path = DIT_LAYOUTS[layout](tmp_path, dit_weights)
    model = load_dit(path, dtype=torch.float32)
    _assert_identical(model.state_dict(), dit_weights)
    assert not model.training and not any(parameter.requires_grad for parameter in model.parameters())
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 1 and printed[0].startswith("DiT: T2V, ") and str(path) in printed[0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dit_is_cast_once_to_the_wanted_dtype(dtype: torch.dtype, dit_weights: Weights, tmp_path: Path) -> None:
    path = DIT_LAYOUTS["diffusers folder, shards"](tmp_path, dit_weights)
    expected = {name: tensor.to(dtype) for name, tensor in dit_weights.items()}
    _assert_identical(load_dit(path, dtype=dtype).state_dict(), expected)


@pytest.mark.parametrize("layout", FP8_LAYOUTS)
def test_fp8_dit_is_the_identical_dequantized_model(layout: str, dit_weights: Weights, tmp_path: Path) -> None:
    stored, scales, meant = quantized(dit_weights, scaled=layout != "plain")
    path = FP8_LAYOUTS[layout](tmp_path, stored, scales)
    assert identify(path).fp8 == layout
    _assert_identical(load_dit(path, dtype=torch.float32).state_dict(), meant)

    kept = load_dit(path, dtype=torch.float32, fp8=True)
    layers = {name: layer for name, layer in kept.named_modules() if isinstance(layer, Fp8Linear)}
    assert {f"{name}.weight" for name in layers} == scales.keys()
    for name, layer in layers.items():
        assert torch.equal(layer.weight.view(torch.uint8), stored[f"{name}.weight"].view(torch.uint8))
        assert torch.equal(layer.dequantized(torch.float32), meant[f"{name}.weight"])
        assert layer.scale.shape == (layer.out_features, 1) and layer.scale.is_contiguous()


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("layout", ["official .pt, module", "diffusers folder, shards", *FP8_LAYOUTS])
def test_weights_are_changed_in_float32_and_rounded_once(layout, fp8, dit_weights: Weights, tmp_path: Path) -> None:
    """And the file stays as it is, which is mapped into memory."""
    if layout in DIT_LAYOUTS:
        path = DIT_LAYOUTS[layout](tmp_path, dit_weights)
    else:
        path = FP8_LAYOUTS[layout](tmp_path, *quantized(dit_weights, scaled=layout != "plain")[:2])
    stored = load_dit(path, dtype=torch.float32).state_dict()
    linear, embedder = "single_blocks.1.linear2.weight", "txt_in.input_embedder.weight"
    difference = {name: torch.randn_like(stored[name]) * 1e-3 for name in (linear, embedder)}
    changes = {name: lambda weight, name=name: weight.add_(difference[name]) for name in difference}
    for _ in range(2):
        model = load_dit(path, dtype=torch.bfloat16, fp8=fp8, changes=changes)
        untouched = load_dit(path, dtype=torch.bfloat16, fp8=fp8).state_dict()
        for name, tensor in model.state_dict().items():
            if name == embedder or (name == linear and not fp8):
                assert torch.equal(tensor, (stored[name] + difference[name]).bfloat16())
            elif name not in (linear, linear.replace("weight", "scale")):
                assert torch.equal(tensor.view(torch.uint8), untouched[name].view(torch.uint8)), name
        if fp8:
            weight, scale = quantize(stored[linear] + difference[linear])
            assert torch.equal(model.single_blocks[1].linear2.weight.float(), weight.float())
            assert torch.equal(model.single_blocks[1].linear2.scale, scale)


@pytest.mark.parametrize("fp8", [False, True])
def test_a_change_that_overflows_is_not_blamed_on_the_file(fp8, dit_weights: Weights, tmp_path: Path) -> None:
    path = DIT_LAYOUTS["safetensors"](tmp_path, dit_weights)
    changes = {"single_blocks.1.linear2.weight": lambda weight: weight.mul_(float("inf"))}
    with pytest.raises(UserError, match=r"single_blocks\.1\.linear2\..* come from the LoRAs merged into it"):
        load_dit(path, dtype=torch.float16, fp8=fp8, changes=changes)


def test_scales_under_comfyuis_newer_name(dit_weights: Weights, tmp_path: Path) -> None:
    stored, scales, meant = quantized(dit_weights)
    old = load_file(FP8_LAYOUTS["ComfyUI scaled"](tmp_path, stored, scales))
    del old["model.diffusion_model.scaled_fp8"]
    new = {name.replace(".scale_weight", ".weight_scale"): tensor for name, tensor in old.items()}
    new["model.diffusion_model.single_blocks.0.linear1.comfy_quant"] = torch.zeros(4, dtype=torch.uint8)
    save_file(new, tmp_path / "new.safetensors")
    _assert_identical(load_dit(tmp_path / "new.safetensors", dtype=torch.float32).state_dict(), meant)


def test_diffusers_fp8_parts_keep_their_own_scales(dit_weights: Weights, tmp_path: Path) -> None:
    """q, k and v are separate tensors in diffusers' layout, so one of our layers has three scales."""
    path = DIT_LAYOUTS["diffusers folder, shards"](tmp_path, dit_weights)
    whole = {name: tensor for file in path.glob("*.safetensors") for name, tensor in load_file(file).items()}
    expected = dit_weights["double_blocks.0.img_attn_qkv.weight"].clone().chunk(3)
    for index, letter in enumerate("qkv"):
        name, scale = f"transformer_blocks.0.attn.to_{letter}", torch.tensor(0.001 * (index + 1))
        whole[f"{name}.weight"] = (whole[f"{name}.weight"] / scale).to(FP8)
        whole[f"{name}.fp8_scale"] = scale
        expected[index].copy_(whole[f"{name}.weight"].float() * scale)
    save_file(whole, tmp_path / "dit.safetensors")
    model = load_dit(tmp_path / "dit.safetensors", dtype=torch.float32)
    assert torch.equal(model.double_blocks[0].img_attn_qkv.weight, torch.cat(expected))


def test_fp8_of_a_bf16_file_quantises_the_blocks_and_nothing_else(dit_weights: Weights, tmp_path: Path) -> None:
    path = DIT_LAYOUTS["safetensors"](tmp_path, dit_weights)
    model = load_dit(path, dtype=torch.bfloat16, fp8=True)
    layers = {name for name, layer in model.named_modules() if isinstance(layer, Fp8Linear)}
    assert layers == {name.removesuffix(".weight") for name in quantized(dit_weights)[1]}
    dtypes = {p.dtype for n, p in model.named_parameters() if n.rpartition(".")[0] not in layers}
    assert dtypes == {torch.bfloat16}
    name = "single_blocks.1.linear2"
    error = model.get_submodule(name).dequantized(torch.float32) - dit_weights[f"{name}.weight"]
    assert error.norm() / dit_weights[f"{name}.weight"].norm() < 0.03


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_fp8_of_a_broken_file_is_refused(value: float, dit_weights: Weights, tmp_path: Path) -> None:
    weights = dit_weights | {"single_blocks.0.linear1.weight": dit_weights["single_blocks.0.linear1.weight"].clone()}
    weights["single_blocks.0.linear1.weight"][5, 7] = value
    with pytest.raises(UserError, match=r"single_blocks\.0\.linear1\.weight holds NaN"):
        load_dit(DIT_LAYOUTS["safetensors"](tmp_path, weights), fp8=True)


@pytest.mark.parametrize("byte", [0x7F, 0xFF])
def test_both_nans_of_float8_are_refused(byte: int, dit_weights: Weights, tmp_path: Path) -> None:
    stored, scales, _ = quantized(dit_weights)
    stored["single_blocks.0.linear1.weight"].view(torch.uint8)[5, 7] = byte
    with pytest.raises(UserError, match=r"single_blocks\.0\.linear1\.weight holds NaN"):
        load_dit(FP8_LAYOUTS["kijai"](tmp_path, stored, scales), fp8=True)


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("double_blocks.3.img_attn_qkv", True),
        ("double_blocks.3.txt_mlp.fc2", True),
        ("single_blocks.39.linear1", True),
        ("double_blocks.3.img_mod.linear", False),
        ("single_blocks.0.modulation.linear", False),
        ("txt_in.individual_token_refiner.blocks.0.mlp.fc1", False),
        ("final_layer.linear", False),
        ("time_in.mlp.0", False),
    ],
)
def test_which_layers_of_the_dit_are_quantised(name: str, wanted: bool) -> None:
    assert is_quantized_in_dit(name) == wanted


@pytest.mark.parametrize("layout", VAE_LAYOUTS)
def test_vae_of_every_layout_is_bit_identical(layout: str, vae_weights: Weights, tmp_path: Path) -> None:
    path = VAE_LAYOUTS[layout](tmp_path, vae_weights)
    _assert_identical(load_vae(path).state_dict(), vae_weights)
    assert ("ComfyUI names" in identify(path).layout) == layout.startswith("ComfyUI")


@pytest.mark.parametrize("layout", LLM_LAYOUTS)
def test_llm_of_every_layout_is_bit_identical(layout: str, tiny_models, tmp_path: Path) -> None:
    source = tiny_models.text_encoder1
    weights = load_file(source / "model.safetensors")
    reference = load_text_encoder_1(source, dtype=torch.float32)
    for name, parameter in reference.model.named_parameters():
        assert torch.equal(parameter, weights[f"model.{name}"])
    found = load_text_encoder_1(LLM_LAYOUTS[layout](tmp_path, source, weights), dtype=torch.float32)
    _assert_identical(found.model.state_dict(), reference.model.state_dict())
    for states, expected in zip(found.encode(["a cat"]), reference.encode(["a cat"]), strict=True):
        assert torch.equal(states, expected)


def test_scaled_fp8_llm_is_the_identical_dequantized_model(tiny_models, tmp_path: Path) -> None:
    source = tiny_models.text_encoder1
    stored = load_file(source / "model.safetensors")
    meant, scale = {}, torch.tensor(0.0021)
    for name in [name for name in stored if name.endswith("proj.weight")]:
        stored[name] = (stored[name] / scale).to(FP8)
        stored[f"{name.removesuffix('weight')}scale_weight"] = scale.clone()
        meant[name] = stored[name].float() * scale
    stored["scaled_fp8"] = torch.empty(0, dtype=FP8)
    path = single_file(tmp_path, source, stored, "llava_llama3_fp8_scaled.safetensors")
    assert identify(path).fp8 == "ComfyUI scaled"
    wide, kept = (load_text_encoder_1(path, dtype=torch.float32, fp8=fp8) for fp8 in (False, True))
    layers = [(name, layer) for name, layer in kept.model.named_modules() if isinstance(layer, Fp8Linear)]
    assert len(layers) == 3 * 7, "the seven linear layers of the three layers that are run"
    for name, layer in layers:
        assert torch.equal(layer.dequantized(torch.float32), meant[f"model.{name}.weight"])
        assert torch.equal(wide.model.get_submodule(name).weight, meant[f"model.{name}.weight"])
    torch.testing.assert_close(kept.encode(["a cat"])[0], wide.encode(["a cat"])[0])
    assert kept.fingerprint != wide.fingerprint


@pytest.mark.parametrize("layout", CLIP_LAYOUTS)
def test_clip_of_every_layout_is_bit_identical(layout: str, tiny_models, tmp_path: Path) -> None:
    source = tiny_models.text_encoder2
    weights = load_file(source / "model.safetensors")
    found = load_text_encoder_2(CLIP_LAYOUTS[layout](tmp_path, source, weights), dtype=torch.float32)
    for name, parameter in found.model.named_parameters():
        assert torch.equal(parameter, weights[f"text_model.{name}"])
    reference = load_text_encoder_2(source, dtype=torch.float32)
    assert torch.equal(found.encode(["a cat"]), reference.encode(["a cat"]))


def test_a_full_checkpoint_serves_every_loader(dit_weights, vae_weights, tiny_models, tmp_path: Path) -> None:
    llm, clip = (
        load_file(path / "model.safetensors") for path in (tiny_models.text_encoder1, tiny_models.text_encoder2)
    )
    path = tmp_path / "all.safetensors"
    everything = prefixed(dit_weights, "model.model.") | prefixed(vae_weights, "vae.")
    everything |= prefixed(llm, "text_encoders.llama.transformer.")
    everything |= prefixed(clip, "text_encoders.clip_l.transformer.")
    save_file(everything, path, {"config": json.dumps({"norm_num_groups": 4})})
    assert identify(path).what == "DiT + VAE + LLM + CLIP"
    _assert_identical(load_dit(path, dtype=torch.float32).state_dict(), dit_weights)
    _assert_identical(load_vae(path).state_dict(), vae_weights)
    load_text_encoder_1(path, tokenizer=tiny_models.text_encoder1)
    load_text_encoder_2(path, tokenizer=tiny_models.text_encoder2 / "tokenizer.json")


def test_tokenizer_of_a_single_file_is_the_given_one_or_a_clear_line(tiny_models, tmp_path: Path) -> None:
    weights = load_file(tiny_models.text_encoder1 / "model.safetensors")
    save_file(weights, tmp_path / "llava_llama3_fp16.safetensors")
    path = tmp_path / "llava_llama3_fp16.safetensors"
    with pytest.raises(UserError, match=r"llava_llama3_fp16\.safetensors: no tokenizer\.json .*--tokenizer1"):
        load_text_encoder_1(path)
    given = load_text_encoder_1(path, tokenizer=tiny_models.text_encoder1)
    shutil.copy(tiny_models.text_encoder1 / "tokenizer.json", tmp_path)
    assert load_text_encoder_1(path).fingerprint == given.fingerprint


def test_fingerprints_tell_content_apart_but_not_places(tiny_models, tmp_path: Path) -> None:
    source = tiny_models.text_encoder1
    here = load_text_encoder_1(source).fingerprint
    shutil.copytree(source, tmp_path / "copy")
    assert load_text_encoder_1(tmp_path / "copy").fingerprint == here
    weights = load_file(source / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"][0, 0] += 1
    save_file(weights, tmp_path / "copy" / "model.safetensors")
    assert load_text_encoder_1(tmp_path / "copy").fingerprint != here


def test_pt_file_is_mapped_anew_while_it_is_read(dit_weights, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("hunyuan_model.checkpoints.tensors.REMAP_BYTES", 100_000)
    path = DIT_LAYOUTS["official .pt, module"](tmp_path, dit_weights)
    model = load_dit(path, dtype=torch.float32)
    _assert_identical(model.state_dict(), dit_weights)
    held = [name for name, parameter in model.named_parameters() if not parameter.untyped_storage().resizable()]
    assert not held, "views of the file keep its pages in memory"


def test_transformers_is_imported_with_the_first_text_encoder_only() -> None:
    code = "\n".join(
        [
            "import sys",
            "from hunyuan_model import checkpoints",
            "assert 'transformers' not in sys.modules",
            "for name in checkpoints.__all__: getattr(checkpoints, name)",
            "assert 'transformers' in sys.modules and not hasattr(checkpoints, 'load_text_encoder_3')",
        ]
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_command_checks_files_of_every_layout(dit_weights, vae_weights, tiny_models, tmp_path: Path) -> None:
    """The same through the command, in a process of its own: 8 DiT layouts, 4 fp8 kinds, 7 of the VAE, 2 encoders."""
    paths = [write(tmp_path / f"dit{i}", dit_weights) for i, write in enumerate(DIT_LAYOUTS.values())]
    for i, write in enumerate(FP8_LAYOUTS.values()):
        stored, scales, _ = quantized(dit_weights)
        paths.append(write(tmp_path / f"fp8{i}", stored, scales))
    paths += [write(tmp_path / f"vae{i}", vae_weights) for i, write in enumerate(VAE_LAYOUTS.values())]
    paths += [tiny_models.text_encoder1, tiny_models.text_encoder2]
    command = [sys.executable, "-m", "hunyuan_model.checkpoints", "--check", *map(str, paths)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, encoding="utf-8", check=False)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    for path, what in zip(paths, ["DiT"] * 12 + ["VAE"] * 7 + ["LLM", "CLIP"], strict=True):
        assert any(line.startswith(what) and f"({path})" in line for line in result.stdout.splitlines()), path


def test_identify_reads_the_13b_model_from_its_header_alone(tmp_path: Path, monkeypatch) -> None:
    """A sparse file of 26 GB: only a header can be read of it in no time."""
    lines = (ROOT / "tests" / "data" / "hunyuanvideo_dit_keys.tsv").read_text(encoding="utf-8").splitlines()
    header, offset = {}, 0
    for name, shape in (line.split("\t") for line in lines):
        sizes = [int(size) for size in shape.split("x")]
        end = offset + 2 * torch.Size(sizes).numel()
        header[name] = {"dtype": "BF16", "shape": sizes, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    with open(tmp_path / "dit.safetensors", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + offset)
    monkeypatch.setattr("hunyuan_model.checkpoints.tensors.read_tensor", None)
    found = identify(tmp_path / "dit.safetensors")
    assert (found.what, found.variant, found.dtype, found.fp8) == ("DiT", "T2V", "bfloat16", "none")
    assert found.parameters == offset // 2 and round(found.parameters / 1e9, 2) == 12.82
    assert found.depths == {"double blocks": 20, "single blocks": 40}
    assert checkpoints.read_dit_config(tmp_path / "dit.safetensors").hidden_size == 3072
