"""merge_lora.py writes what merging in memory gives, for every layout and every kind of fp8."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import merge_lora
from examples.tiny_models import dit_shapes, random_weights
from hunyuan_model.checkpoints import load_dit, open_dit, read_dit_config
from networks.merging import weight_changes
from tests.hunyuan_model.model_layouts import DIT_LAYOUTS, FP8_LAYOUTS, quantized
from utils.cli import run_script
from utils.safetensors_utils import load_file, read_header, save_file

ROOT = Path(__file__).parent.parent.parent
HIDDEN, MLP = 64, 256
TARGETS = {
    "double_blocks_1_img_attn_qkv": (3 * HIDDEN, HIDDEN),
    "double_blocks_0_txt_mlp_fc2": (HIDDEN, MLP),
    "single_blocks_3_linear1": (3 * HIDDEN + MLP, HIDDEN),
    "single_blocks_0_modulation_linear": (3 * HIDDEN, HIDDEN),
}


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    return random_weights(dit_shapes(), seed=1)


@pytest.fixture
def lora(tmp_path) -> Path:
    return write_lora(tmp_path / "lora.safetensors", seed=0)


def write_lora(path: Path, seed: int, dora: bool = False) -> Path:
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, (rows, columns) in TARGETS.items():
        tensors[f"lora_unet_{name}.lora_down.weight"] = torch.randn(4, columns, generator=generator) / columns**0.5
        tensors[f"lora_unet_{name}.lora_up.weight"] = torch.randn(rows, 4, generator=generator) / 4
        tensors[f"lora_unet_{name}.alpha"] = torch.tensor(2.0)
        if dora:
            tensors[f"lora_unet_{name}.dora_scale"] = torch.rand(rows, 1, generator=generator)
    save_file(tensors, path)
    return path


def updates(path: Path) -> dict[str, torch.Tensor]:
    """dW by the DiT's names, computed by hand."""
    official = {
        "double_blocks_1_img_attn_qkv": "double_blocks.1.img_attn_qkv.weight",
        "double_blocks_0_txt_mlp_fc2": "double_blocks.0.txt_mlp.fc2.weight",
        "single_blocks_3_linear1": "single_blocks.3.linear1.weight",
        "single_blocks_0_modulation_linear": "single_blocks.0.modulation.linear.weight",
    }
    tensors = load_file(path)
    return {
        official[name]: 0.5
        * tensors[f"lora_unet_{name}.lora_up.weight"]
        @ tensors[f"lora_unet_{name}.lora_down.weight"]
        for name in TARGETS
    }


def run(monkeypatch, *words) -> int:
    monkeypatch.setattr(sys, "argv", ["merge_lora.py", *map(str, words)])
    with pytest.raises(SystemExit) as stopped:
        run_script(merge_lora.main)
    return stopped.value.code


@pytest.mark.parametrize("layout", DIT_LAYOUTS)
@pytest.mark.parametrize("dora", [False, True])
def test_equals_merging_in_memory(tmp_path, monkeypatch, weights, layout, dora):
    path = DIT_LAYOUTS[layout](tmp_path, weights)
    lora = write_lora(tmp_path / "lora.safetensors", 0, dora)
    merged = tmp_path / "merged.safetensors"
    words = ("--dit", path, "--lora_weight", lora, "--lora_multiplier", 0.7, "--save_merged_model", merged)
    assert run(monkeypatch, *words, "--device", "cpu", "--dit_in_channels", 16) == 0
    in_memory = load_dit(path, dtype=torch.float32, changes=weight_changes(open_dit(path).shapes, [(lora, 0.7)]))
    written = load_file(merged)
    expected = in_memory.state_dict()
    assert written.keys() == expected.keys()
    assert all(torch.equal(written[name], tensor) for name, tensor in expected.items())
    for name, dw in {} if dora else updates(lora).items():
        assert torch.allclose(written[name], weights[name] + 0.7 * dw, atol=1e-6)


def test_two_loras_are_rounded_once(tmp_path, monkeypatch, weights, lora):
    """Runs the command itself."""
    second = write_lora(tmp_path / "second.safetensors", seed=1)
    stored = {name: tensor.bfloat16() for name, tensor in weights.items()}
    save_file(stored, tmp_path / "dit.safetensors")
    merged = tmp_path / "merged.safetensors"
    words = ["--dit", "dit.safetensors", "--lora_weight", lora.name, second.name, "--lora_multiplier", "1", "-0.5"]
    script = ROOT / "merge_lora.py"
    done = subprocess.run(
        [sys.executable, script, *words, "--save_merged_model", merged.name],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "4 of 4 modules merged" in done.stdout
    written, first, other = load_file(merged), updates(lora), updates(second)
    for name, tensor in stored.items():
        expected = tensor if name not in first else (tensor.float() + first[name] - 0.5 * other[name]).bfloat16()
        difference = (written[name].float() - expected.float()).abs()
        # A sum in another order may be rounded to the neighbouring value now and then.
        assert (difference > 0).float().mean() < 1e-3 and (name in first or not difference.any())


@pytest.mark.parametrize("beside", [False, True])
def test_config_and_metadata_are_kept(tmp_path, monkeypatch, weights, lora, beside):
    """RoPE dims cannot be read from shapes, so they must be in the metadata."""
    config = json.dumps({"rope_dims": [8, 12, 12]})
    metadata = {"modelspec.title": "ours", "modelspec.hash_sha256": "of the old tensors"}
    dit, merged = tmp_path / "dit.safetensors", tmp_path / "merged" / "dit.safetensors"
    if beside:
        dit = tmp_path / "dit.pt"
        torch.save({"module": weights}, dit)
        (tmp_path / "config.json").write_text(config)
    else:
        save_file(weights, dit, metadata | {"config": config})
    assert run(monkeypatch, "--dit", dit, "--lora_weight", lora, "--save_merged_model", merged) == 0
    assert read_dit_config(merged) == read_dit_config(dit)
    assert read_dit_config(merged).rope_dims == (8, 12, 12)
    kept = {"modelspec.merged_from": "lora.safetensors x 1", "config": config}
    assert read_header(merged)[1] == (kept if beside else kept | {"modelspec.title": "ours"})


@pytest.mark.parametrize("kind", FP8_LAYOUTS)
def test_fp8_stays_fp8(tmp_path, monkeypatch, capsys, weights, lora, kind):
    stored, scales, meant = quantized(weights, scaled=kind != "plain")
    path = FP8_LAYOUTS[kind](tmp_path, stored, scales)
    merged = tmp_path / "merged.safetensors"
    assert run(monkeypatch, "--dit", path, "--lora_weight", lora, "--save_merged_model", merged) == 0
    assert "is fp8 and stays fp8" in capsys.readouterr().err
    before, after = load_dit(path, dtype=torch.float32).state_dict(), load_dit(merged, dtype=torch.float32).state_dict()
    written, changed = load_file(merged), updates(lora)
    for name, tensor in before.items():
        if name not in changed and (kind == "plain" or tensor.dim() != 2 or name in scales):
            assert torch.equal(after[name], tensor), name
        elif name not in changed:
            assert relative(after[name], tensor) < 0.03, name
        else:
            expected = meant[name] + changed[name]
            # e4m3 has 3 bits of mantissa; below its normal range the steps are those of the smallest exponent.
            step = 2**-4 if written[name].dtype == torch.float8_e4m3fn else 1e-6
            assert (
                (after[name] - expected).abs() <= step * expected.abs() + expected.abs().max() * 2**-16 + 2**-10
            ).all()
    assert {written[name].dtype for name in scales} == {torch.float8_e4m3fn}


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("source", ["float32", "official", "kijai"])
def test_older_comfyui_reads_every_linear_of_an_fp8_file(tmp_path, monkeypatch, weights, source):
    """With the marker, it casts every Linear weight to fp8 and multiplies it by its scale, or by 1 (X2)."""
    # So small that fp8 without a scale holds almost nothing of them, as weights of modulation are.
    small = {name: tensor * (1e-2 if "mod" in name else 1) for name, tensor in weights.items()}
    if source == "float32":
        save_file(small, tmp_path / "dit.safetensors")
        meant, words = small, ["--dit", tmp_path / "dit.safetensors", "--fp8"]
    else:
        stored, scales, meant = quantized(small, scaled=True)
        words = ["--dit", FP8_LAYOUTS[source](tmp_path, stored, scales)]
    merged = tmp_path / "merged.safetensors"
    assert run(monkeypatch, *words, "--save_merged_model", merged) == 0
    tensors = load_file(merged)
    assert "scaled_fp8" in tensors
    linear = [name for name, tensor in weights.items() if tensor.dim() == 2]
    assert len(linear) > 50
    ours = load_dit(merged, dtype=torch.float32).state_dict()
    for name in linear:
        scale = tensors.get(name.removesuffix("weight") + "scale_weight", torch.ones(()))
        read = tensors[name].to(torch.float8_e4m3fn).float() * scale
        assert relative(read, meant[name]) < 0.03, name
        assert torch.equal(ours[name], read), name


def test_fp8_out_and_in_again(tmp_path, monkeypatch, weights, lora):
    save_file(weights, tmp_path / "dit.safetensors")
    small, wide = tmp_path / "fp8.safetensors", tmp_path / "wide.safetensors"
    words = ("--dit", tmp_path / "dit.safetensors", "--lora_weight", lora, "--save_merged_model", small)
    assert run(monkeypatch, *words, "--fp8", "--dtype", "bf16") == 0
    written = load_file(small)
    quantised = {name for name, tensor in written.items() if tensor.dtype == torch.float8_e4m3fn and tensor.numel()}
    layers = load_dit(tmp_path / "dit.safetensors").named_modules()
    assert quantised == {f"{name}.weight" for name, layer in layers if isinstance(layer, torch.nn.Linear)}
    assert all(written[name.replace(".weight", ".scale_weight")].shape == () for name in quantised)
    assert "scaled_fp8" in written
    # Without a LoRA, --dtype converts the file.
    assert run(monkeypatch, "--dit", small, "--save_merged_model", wide, "--dtype", "float32") == 0
    changed = updates(lora)
    for name, tensor in load_file(wide).items():
        expected = weights[name] + changed.get(name, 0)
        assert tensor.dtype == torch.float32
        assert (tensor - expected).abs().max() <= 2**-4 * expected.abs().max()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--lora_multiplier", "1", "2"), "2 values for 1"),
        (("--save_merged_model", "x.pt"), ".safetensors"),
        (("--dit_in_channels", "32"), "16"),
        (("--lora_weight", "{foreign}"), "none of its keys is known"),
        (("--lora_weight", "{deep}"), "none of its 1 modules"),
        (("--lora_weight", "{wide}"), "64 x 64"),
        (("--lora_weight", "{single}", "--exclude_single_blocks"), "none of its 0 modules"),
        (("--dit", "{lora}"), "DiT of HunyuanVideo is expected"),
    ],
)
def test_refused(tmp_path, monkeypatch, capsys, weights, lora, words, message):
    def pair(name: str, rows: int, columns: int) -> Path:
        path = tmp_path / f"{name}.safetensors"
        save_file(
            {f"{name}.lora_down.weight": torch.ones(2, columns), f"{name}.lora_up.weight": torch.ones(rows, 2)}, path
        )
        return path

    files = {
        "foreign": pair("lora_unet_input_blocks_1", 8, 8),
        "deep": pair("lora_unet_double_blocks_19_img_attn_proj", HIDDEN, HIDDEN),
        "wide": pair("lora_unet_double_blocks_0_img_attn_proj", 96, 96),
        "single": pair("lora_unet_single_blocks_0_linear1", 3 * HIDDEN + MLP, HIDDEN),
        "lora": lora,
    }
    save_file(weights, tmp_path / "dit.safetensors")
    options = {"--dit": [tmp_path / "dit.safetensors"], "--lora_weight": [lora]}
    options["--save_merged_model"] = [tmp_path / "merged.safetensors"]
    name = None
    for word in words:
        if word.startswith("--"):
            name, options[word] = word, []
        else:
            options[name].append(word.format(**files))
    before = set(tmp_path.iterdir())
    assert run(monkeypatch, *(word for name, values in options.items() for word in (name, *values))) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and message in error
    assert set(tmp_path.iterdir()) == before


def test_biases_norms_and_whole_differences_are_merged_and_counted(tmp_path, monkeypatch, capsys, weights):
    """A full LoRA of ComfyUI's extraction (T18)."""
    save_file(weights, tmp_path / "dit.safetensors")
    generator = torch.Generator().manual_seed(0)
    changes = {
        "double_blocks.0.img_attn.proj.diff": "double_blocks.0.img_attn_proj.weight",
        "double_blocks.0.img_attn.proj.diff_b": "double_blocks.0.img_attn_proj.bias",
        "double_blocks.0.img_mod.lin.diff": "double_blocks.0.img_mod.linear.weight",
        "double_blocks.0.img_mod.lin.diff_b": "double_blocks.0.img_mod.linear.bias",
        "time_in.in_layer.diff": "time_in.mlp.0.weight",
        "double_blocks.0.img_attn.norm.query_norm.diff": "double_blocks.0.img_attn_q_norm.weight",
    }
    tensors = {key: torch.randn(weights[name].shape, generator=generator) for key, name in changes.items()}
    save_file({f"diffusion_model.{key}": tensor for key, tensor in tensors.items()}, tmp_path / "lora.safetensors")
    merged = tmp_path / "merged.safetensors"
    words = ("--dit", tmp_path / "dit.safetensors", "--lora_weight", tmp_path / "lora.safetensors")
    assert run(monkeypatch, *words, "--lora_multiplier", 0.5, "--save_merged_model", merged) == 0
    assert "3 of 3 modules merged, 3 of 3 biases and norms merged" in capsys.readouterr().out
    written = load_file(merged)
    for name, before in weights.items():
        key = next((key for key, changed in changes.items() if changed == name), None)
        expected = before if key is None else before + 0.5 * tensors[key]
        assert torch.allclose(written[name], expected, atol=1e-6), name


@pytest.mark.parametrize("change", ["alpha", "lora_up"])
def test_a_lora_that_changes_nothing_says_so(tmp_path, monkeypatch, capsys, weights, lora, change):
    save_file(weights, tmp_path / "dit.safetensors")
    tensors = {name: tensor * (change not in name) for name, tensor in load_file(lora).items()}
    save_file(tensors, lora)
    words = ("--dit", tmp_path / "dit.safetensors", "--lora_weight", lora)
    assert run(monkeypatch, *words, "--save_merged_model", tmp_path / "m.safetensors") == 0
    assert "4 of 4 modules merged, it changes nothing: alpha, the factors or the multiplier" in capsys.readouterr().err


def test_nothing_infinite_is_written(tmp_path, monkeypatch, capsys, weights, lora):
    """Finite factors whose product overflows, as flipped bits make them (R2), and a multiplier without sense (R9)."""
    save_file(weights, tmp_path / "dit.safetensors")
    words = ("--dit", tmp_path / "dit.safetensors", "--lora_weight", lora)
    output = ("--save_merged_model", tmp_path / "m.safetensors")
    assert run(monkeypatch, *words, "--lora_multiplier", 1e300, *output) == 2
    assert "1e+300 is too large: the maximum is 1000000.0" in capsys.readouterr().err
    save_file(
        {name: tensor * 1e30 if "alpha" not in name else tensor for name, tensor in load_file(lora).items()}, lora
    )
    assert run(monkeypatch, *words, *output) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("error: ") and "with the LoRA, values are not finite" in said
    save_file({name: tensor * 1e-28 if "lora_up" in name else tensor for name, tensor in load_file(lora).items()}, lora)
    assert run(monkeypatch, *words, *output, "--dtype", "fp16") == 2
    assert "not written" in capsys.readouterr().err
    assert not list(tmp_path.glob("m*"))


def test_what_a_killed_run_left_is_removed(tmp_path, monkeypatch, weights, lora):
    """24 GB for a real model (R1)."""
    save_file(weights, tmp_path / "dit.safetensors")
    leftover = tmp_path / "out" / "another name.safetensors.4194305.partial"
    leftover.parent.mkdir()
    leftover.write_bytes(b"half a model")
    words = ("--dit", tmp_path / "dit.safetensors", "--lora_weight", lora)
    assert run(monkeypatch, *words, "--save_merged_model", tmp_path / "out" / "m.safetensors") == 0
    assert not leftover.exists()
