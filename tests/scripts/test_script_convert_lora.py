"""convert_lora.py as a user runs it: what it writes and prints, and how it refuses other files."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import convert_lora
from networks.files.lora_files import model_hashes
from tests.networks.files.lora_reference import random_file, updates
from utils.cli import run_script
from utils.safetensors_utils import load_file, read_header

ROOT = Path(__file__).parent.parent.parent


def run(monkeypatch, *words) -> int:
    monkeypatch.setattr(sys, "argv", ["convert_lora.py", *map(str, words)])
    with pytest.raises(SystemExit) as stopped:
        run_script(convert_lora.main)
    return stopped.value.code


def full_size_names(rank: int = 1) -> dict[str, torch.Tensor]:
    """A native file with the 240 modules of the 13B model, hidden width 12."""
    hidden, mlp = 12, 48
    shapes = {}
    for i in range(20):
        for stream in ("img", "txt"):
            for name, shape in {
                "attn_qkv": (3 * hidden, hidden),
                "attn_proj": (hidden, hidden),
                "mlp_fc1": (mlp, hidden),
                "mlp_fc2": (hidden, mlp),
            }.items():
                shapes[f"lora_unet_double_blocks_{i}_{stream}_{name}"] = shape
    for i in range(40):
        shapes[f"lora_unet_single_blocks_{i}_linear1"] = (3 * hidden + mlp, hidden)
        shapes[f"lora_unet_single_blocks_{i}_linear2"] = (hidden, hidden + mlp)
    tensors = {}
    for name, (rows, columns) in shapes.items():
        tensors[f"{name}.lora_down.weight"] = torch.randn(rank, columns)
        tensors[f"{name}.lora_up.weight"] = torch.randn(rows, rank)
        tensors[f"{name}.alpha"] = torch.tensor(0.3)
    return tensors


# Target -> modules of 240 that load in ComfyUI, diffusers, musubi and OneTrainer: docs/formats.md 2.8.
@pytest.mark.parametrize(
    ("target", "expected"),
    [
        ("default", (160, 0, 240, 240)),
        ("other", (240, 240, 0, 240)),
        ("diffusion-pipe", (240, 240, 0, 240)),
        ("diffusers", (0, 240, 0, 240)),
        ("onetrainer-comfy", (240, 0, 0, 240)),
        ("onetrainer-legacy", (0, 0, 0, 240)),
        ("comfyui-flat", (240, 0, 160, 0)),
        ("hunyuan-i2v", (0, 0, 0, 0)),
    ],
)
def test_counts_what_each_program_loads(tmp_path, monkeypatch, capsys, target, expected):
    save_file(full_size_names(), tmp_path / "native.safetensors")
    output = tmp_path / "out.safetensors"
    words = ("--input", tmp_path / "native.safetensors", "--output", output, "--target", target)
    assert run(monkeypatch, *words, "--verify") == 0
    printed = capsys.readouterr().out
    for program, count in zip(("ComfyUI", "diffusers", "musubi", "OneTrainer"), expected, strict=True):
        assert f"{program:<10}  {count} of 240 modules will load" in printed
    assert "dW of all 240 modules is equal" in printed


def test_blocks_beyond_the_depth_of_the_model_are_converted_but_load_nowhere(tmp_path, monkeypatch, capsys):
    tensors = full_size_names()
    for module, beyond in (
        ("double_blocks_0_img_mlp_fc1", "double_blocks_20"),
        ("single_blocks_0_linear2", "single_blocks_40"),
    ):
        tensors |= {
            key.replace(module[:15], beyond): tensor.clone() for key, tensor in tensors.items() if module in key
        }
    save_file(tensors, tmp_path / "in.safetensors")
    output = tmp_path / "out.safetensors"
    assert run(monkeypatch, "--input", tmp_path / "in.safetensors", "--output", output, "--target", "other") == 0
    assert "ComfyUI     240 of 242 modules will load" in capsys.readouterr().out
    assert "diffusion_model.double_blocks.20.img_mlp.fc1.lora_A.weight" in load_file(output)


def test_counts_modules_outside_the_blocks(tmp_path, monkeypatch, capsys):
    """ComfyUI has no keys for time_in and vector_in; diffusers loses two modules; musubi-tuner has only blocks."""
    save_file(random_file("default", seed=8, missing=0), tmp_path / "in.safetensors")
    for target, counts in (("other", (17, 17, 0)), ("diffusers", (0, 19, 0)), ("default", (9, 0, 13))):
        words = ("--input", tmp_path / "in.safetensors", "--output", tmp_path / "out.safetensors", "--target", target)
        assert run(monkeypatch, *words) == 0
        printed = capsys.readouterr().out
        for program, count in zip(("ComfyUI", "diffusers", "musubi"), counts):
            assert f"{program:<10}  {count} of 19 modules will load" in printed


def test_other_and_back_as_a_user_does_it(tmp_path, monkeypatch):
    """Runs the command itself; --target other and then default give the same dW (issue 2)."""
    original = random_file("default", seed=1, missing=0)
    metadata = {"ss_network_dim": "8", "ss_base_model_version": "hunyuan_video", "sshs_model_hash": "stale"}
    save_file(original, tmp_path / "a.safetensors", metadata)
    words = ["--input", "a.safetensors", "--output", "b.safetensors", "--target", "other"]
    script = ROOT / "convert_lora.py"
    done = subprocess.run([sys.executable, script, *words], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    words = ("--input", tmp_path / "b.safetensors", "--output", tmp_path / "c.safetensors", "--target", "default")
    assert run(monkeypatch, *words) == 0
    expected = updates(original, "default")
    for name, dw in updates(load_file(tmp_path / "c.safetensors"), "default").items():
        assert (dw - expected[name]).norm() <= 1e-6 * expected[name].norm()
    # alpha is folded into lora_B only; lora_A does not change.
    other = load_file(tmp_path / "b.safetensors")
    key = "double_blocks.7.img_mlp.fc2"
    assert torch.equal(
        other[f"diffusion_model.{key}.lora_A.weight"], original[f"lora_unet_{key.replace('.', '_')}.lora_down.weight"]
    )
    _, written = read_header(tmp_path / "c.safetensors")
    assert written["ss_network_dim"] == "Dynamic", "the ranks differ"
    assert (
        written["sshs_model_hash"] == model_hashes(load_file(tmp_path / "c.safetensors"), metadata)["sshs_model_hash"]
    )


def test_prefix_dtype_and_partial(tmp_path, monkeypatch, capsys):
    tensors = random_file("default", seed=2)
    tensors["lora_unet_double_blocks_0_img_norm.diff"] = torch.zeros(4)
    tensors |= pair("lora_te1_text_model_encoder_layers_0_mlp_fc1")
    save_file(tensors, tmp_path / "in.safetensors")
    output = tmp_path / "out.safetensors"
    words = ["--input", tmp_path / "in.safetensors", "--output", output, "--target", "other"]
    assert run(monkeypatch, *words) == 2
    error = capsys.readouterr().err
    assert "lora_te1_text_model_encoder_layers_0_mlp_fc1" in error and "with --allow_partial makes a file" in error
    more = ["--allow_partial", "--diffusers_prefix", "transformer", "--dtype", "bf16", "--verify"]
    assert run(monkeypatch, *words, *more) == 0
    written = load_file(output)
    assert {tensor.dtype for tensor in written.values()} == {torch.bfloat16}
    assert all(key.startswith("transformer.") for key in written)
    assert "3 keys" in capsys.readouterr().out


def test_verify_finds_a_wrong_conversion(tmp_path, monkeypatch, capsys):
    """A wrong conversion: sqrt(alpha / rank) in one factor instead of in both."""

    def wrong(factors, dtype, fold_alpha):
        return dataclasses.replace(factors, alpha=None, up=factors.up * factors.scale**0.5)

    save_file(random_file("default", seed=1), tmp_path / "in.safetensors")
    monkeypatch.setattr("networks.files.formats.rounded", wrong)
    (tmp_path / "out.safetensors").write_bytes(b"of an earlier run")
    before = set(tmp_path.iterdir())
    words = ("--input", tmp_path / "in.safetensors", "--output", tmp_path / "out.safetensors", "--target", "other")
    assert run(monkeypatch, *words, "--verify") == 2
    assert "out.safetensors: dW of " in capsys.readouterr().err
    assert set(tmp_path.iterdir()) == before
    assert (tmp_path / "out.safetensors").read_bytes() == b"of an earlier run"


@pytest.mark.parametrize(("given", "prefix"), [("", ""), ("foo", "foo."), ("foo.", "foo.")])
def test_any_prefix_is_verified(tmp_path, monkeypatch, given, prefix):
    save_file(random_file("default", seed=1, missing=0), tmp_path / "in.safetensors")
    output = tmp_path / "out.safetensors"
    words = ("--input", tmp_path / "in.safetensors", "--output", output, "--target", "other")
    assert run(monkeypatch, *words, "--diffusers_prefix", given, "--verify") == 0
    assert f"{prefix}double_blocks.7.img_mlp.fc2.lora_A.weight" in load_file(output)


def test_rank_by_svd(tmp_path, monkeypatch):
    save_file(random_file("diffusers", seed=4, ranks=(4,)), tmp_path / "in.safetensors")
    output = tmp_path / "out.safetensors"
    words = ("--input", tmp_path / "in.safetensors", "--output", output, "--target", "default", "--rank", 4)
    assert run(monkeypatch, *words) == 0
    ranks = {tensor.shape[0] for key, tensor in load_file(output).items() if key.endswith("lora_down.weight")}
    assert ranks == {4}


def test_adapter_metadata_of_newer_diffusers_holds_the_alpha(tmp_path, monkeypatch):
    tensors = random_file("diffusers", seed=6, ranks=(4,), missing=0)
    values = {"transformer.r": 4, "transformer.lora_alpha": 8, "transformer.alpha_pattern": {"^proj_out": 2}}
    save_file(tensors, tmp_path / "in.safetensors", {"lora_adapter_metadata": json.dumps(values)})
    output = tmp_path / "out.safetensors"
    assert run(monkeypatch, "--input", tmp_path / "in.safetensors", "--output", output, "--target", "default") == 0
    expected = updates(tensors, "diffusers")
    for name, dw in updates(load_file(output), "default").items():
        scale = 0.5 if name == "final_layer.linear" else 2.0
        assert (dw - scale * expected[name]).norm() <= 1e-6 * dw.norm()
    assert "lora_adapter_metadata" not in read_header(output)[1]


def pair(name: str, rows: int = 48, columns: int = 48, rank: int = 4, **more) -> dict[str, torch.Tensor]:
    named = {"lora_down.weight": torch.randn(rank, columns), "lora_up.weight": torch.randn(rows, rank), **more}
    return {f"{name}.{suffix}": tensor for suffix, tensor in named.items()}


OURS = "lora_unet_double_blocks_0_img_attn_proj"
QKV = "lora_unet_double_blocks_0_img_attn_qkv"
WRONG_FILES = {
    "sdxl": (pair("lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q"), {}),
    "wan": (pair("lora_unet_blocks_0_self_attn_q"), {}),
    "wan, dotted": ({"diffusion_model.blocks.0.self_attn.q.lora_A.weight": torch.ones(4, 48)}, {}),
    "flux by its metadata": (pair(QKV, 144), {"ss_base_model_version": "flux1"}),
    "flux by modelspec": (pair(OURS), {"modelspec.architecture": "flux-1-dev/lora"}),
    "hunyuan 1.5": (pair(OURS), {"ss_base_model_version": "hunyuan_video_1_5"}),
    "text encoder": (pair(OURS) | pair("lora_te1_text_model_encoder_layers_0_mlp_fc1"), {}),
    "text encoder alone": (pair("lora_te1_text_model_encoder_layers_0_mlp_fc1"), {}),
    "a dit": ({"double_blocks.0.img_attn_qkv.weight": torch.ones(144, 48)}, {}),
    "no tensors": ({}, {}),
    "down without up": ({f"{OURS}.lora_down.weight": torch.ones(4, 48)}, {}),
    "alpha alone": ({f"{OURS}.alpha": torch.tensor(1.0)}, {}),
    "ranks differ": ({f"{OURS}.lora_down.weight": torch.ones(4, 48), f"{OURS}.lora_up.weight": torch.ones(48, 8)}, {}),
    "transposed": ({f"{QKV}.lora_down.weight": torch.ones(48, 4), f"{QKV}.lora_up.weight": torch.ones(4, 144)}, {}),
    "one dimension": ({f"{OURS}.lora_down.weight": torch.ones(48), f"{OURS}.lora_up.weight": torch.ones(48, 8)}, {}),
    "integers": (pair(OURS) | {f"{OURS}.lora_up.weight": torch.ones(48, 4, dtype=torch.int64)}, {}),
    "not finite": (pair(OURS) | {f"{OURS}.lora_up.weight": torch.full((48, 4), float("nan"))}, {}),
    "alpha not finite": (pair(OURS, alpha=torch.tensor(float("inf"))), {}),
    "alpha with two values": (pair(OURS, alpha=torch.ones(2)), {}),
    "two widths": (pair(OURS) | pair("lora_unet_double_blocks_1_img_attn_proj", 64, 64), {}),
    "qkv of two parts": (pair(QKV, 96), {}),
    "proj_mlp without its other half": (
        {"transformer.single_transformer_blocks.0.proj_mlp.lora_A.weight": torch.ones(4, 48)},
        {},
    ),
    "adapter metadata of another kind": (
        {f"transformer.transformer_blocks.0.attn.to_q.lora_{x}.weight": torch.ones(48, 48) for x in "AB"},
        {"lora_adapter_metadata": '{"transformer.alpha_pattern": {"(": 1}}'},
    ),
    "unknown block": (pair(OURS) | pair("lora_unet_triple_blocks_0_img_attn_proj"), {}),
    "loha of two shapes": (
        {
            f"{OURS}.hada_w1_a": torch.ones(48, 4),
            f"{OURS}.hada_w1_b": torch.ones(4, 48),
            f"{OURS}.hada_w2_a": torch.ones(24, 4),
            f"{OURS}.hada_w2_b": torch.ones(4, 48),
        },
        {},
    ),
    "lokr with half a product": (
        {f"{OURS}.lokr_w1": torch.ones(2, 2), f"{OURS}.lokr_w2_a": torch.ones(24, 4)},
        {},
    ),
}


@pytest.mark.parametrize("kind", WRONG_FILES)
def test_wrong_files_are_refused(tmp_path, monkeypatch, capsys, kind):
    tensors, metadata = WRONG_FILES[kind]
    save_file(tensors, tmp_path / "in.safetensors", metadata)
    refused(tmp_path, monkeypatch, capsys, "in.safetensors")


@pytest.mark.parametrize("content", [b"", b"<html>404</html>", b"\x50\x00\x00\x00\x00\x00\x00\x00{"])
def test_no_safetensors(tmp_path, monkeypatch, capsys, content):
    (tmp_path / "in.safetensors").write_bytes(content)
    refused(tmp_path, monkeypatch, capsys, "in.safetensors")


def test_cut_off(tmp_path, monkeypatch, capsys):
    save_file(pair(OURS), tmp_path / "whole.safetensors")
    (tmp_path / "in.safetensors").write_bytes((tmp_path / "whole.safetensors").read_bytes()[:-100])
    refused(tmp_path, monkeypatch, capsys, "in.safetensors")


def test_missing(tmp_path, monkeypatch, capsys):
    refused(tmp_path, monkeypatch, capsys, "nowhere.safetensors")


@pytest.mark.parametrize(
    "words",
    [
        ("--target", "diffuser"),
        ("--target", "default", "--diffusers_prefix", "transformer"),
        ("--target", "default", "--rank", "0"),
        ("--target", "default", "--dtype", "int8"),
        ("--target", "diffusion-pipe"),
    ],
)
def test_wrong_options(tmp_path, monkeypatch, capsys, words):
    """The last target has no DoRA."""
    save_file(pair(OURS, dora_scale=torch.ones(48, 1)), tmp_path / "in.safetensors")
    refused(tmp_path, monkeypatch, capsys, "in.safetensors", *words)


def test_output_is_input(tmp_path, monkeypatch, capsys):
    save_file(pair(OURS), tmp_path / "in.safetensors")
    path = tmp_path / "in.safetensors"
    assert run(monkeypatch, "--input", path, "--output", path, "--target", "other") == 2
    assert "is one of the inputs" in capsys.readouterr().err


def refused(folder, monkeypatch, capsys, name, *words):
    """One line that names the file, exit 2, nothing written."""
    before = set(folder.iterdir())
    words = words or ("--target", "default")
    assert run(monkeypatch, "--input", folder / name, "--output", folder / "out.safetensors", *words) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1
    assert set(folder.iterdir()) == before
