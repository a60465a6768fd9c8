"""lora_tool.py: info, merge, resize, extract, ema."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

import lora_tool
import merge_lora
from examples.tiny_models import dit_shapes, random_weights
from networks.lora_ops import ema_decays, gamma_from_sigma_rel
from tests.networks.files.lora_reference import random_file, updates
from utils.cli import run_script
from utils.safetensors_utils import load_file, read_header, save_file

ROOT = Path(__file__).parent.parent.parent


def run(monkeypatch, *words, main=lora_tool.main) -> int:
    monkeypatch.setattr(sys, "argv", ["script", *map(str, words)])
    with pytest.raises(SystemExit) as stopped:
        run_script(main)
    return stopped.value.code


def write(path: Path, seed: int, format_name: str = "default", **settings) -> dict[str, torch.Tensor]:
    """Writes a random LoRA; returns its dW."""
    tensors = random_file(format_name, seed, **settings)
    save_file(tensors, path, {"ss_network_dim": "32", "ss_training_comment": "a test"})
    return updates(tensors, format_name)


def close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float = 1e-6) -> bool:
    assert found.keys() == expected.keys()
    return all((found[name] - dw).norm() <= tolerance * dw.norm() for name, dw in expected.items())


def test_info_shows_rank_alpha_norm_and_metadata(tmp_path, monkeypatch, capsys):
    expected = write(tmp_path / "a.safetensors", 1, missing=0, ranks=(8,))
    assert run(monkeypatch, "info", tmp_path / "a.safetensors", "--png", tmp_path / "a.png") == 0
    printed = capsys.readouterr().out
    assert "ss_training_comment  a test" in printed
    rows = {line.split()[0] + " " + line.split()[1]: line for line in printed.splitlines() if line.startswith("  ")}
    total = sum(dw.norm() ** 2 for name, dw in expected.items() if name.startswith("double_blocks.7.")) ** 0.5
    assert f"{total.item():.4g}" in rows["double 7"] and " 10 " in rows["double 7"]
    assert "single 11" in rows
    picture = Image.open(tmp_path / "a.png")
    assert picture.format == "PNG" and len(picture.getcolors(maxcolors=10**6)) > 10


def test_keys_of_no_module_are_named_by_info_and_refused_by_other_commands(tmp_path, monkeypatch, capsys):
    strange = {"bundle_emb.x.string_to_param.*": torch.ones(4), "lora_te1_mlp_fc1.alpha": torch.ones(())}
    save_file(random_file("default", seed=1) | strange, tmp_path / "a.safetensors")
    assert run(monkeypatch, "info", tmp_path / "a.safetensors") == 0
    printed = capsys.readouterr()
    assert "a.safetensors: 2 keys belong to no module of HunyuanVideo's DiT, such as bundle_emb" in printed.err
    assert "double 7" in " ".join(printed.out.split())
    words = ("resize", tmp_path / "a.safetensors", "--rank", 2, "--output_file", tmp_path / "b.safetensors")
    assert run(monkeypatch, *words) == 2
    assert "convert_lora.py with --allow_partial" in capsys.readouterr().err


def test_merge_is_the_weighted_sum(tmp_path, monkeypatch):
    first = write(tmp_path / "a.safetensors", 1)
    second = write(tmp_path / "b.safetensors", 2, "diffusers")
    output = tmp_path / "sum.safetensors"
    words = ("merge", tmp_path / "a.safetensors", tmp_path / "b.safetensors", "--multiplier", 1, "-0.5")
    assert run(monkeypatch, *words, "--output_file", output) == 0
    zero = torch.zeros(())
    expected = {n: first.get(n, zero) - 0.5 * second.get(n, zero) for n in first.keys() | second.keys()}
    assert close(updates(load_file(output), "default"), expected)
    assert run(monkeypatch, *words, "--output_file", output, "--rank", 3) == 0
    for name, dw in updates(load_file(output), "default").items():
        left, values, right = torch.linalg.svd(expected[name], full_matrices=False)
        best = (left[:, :3] * values[:3]) @ right[:3]
        assert (dw - best).norm() <= 1e-4 * expected[name].norm()


def test_resize_with_all_energy_is_exact(tmp_path, monkeypatch, capsys):
    expected = write(tmp_path / "a.safetensors", 3)
    output = tmp_path / "b.safetensors"
    assert run(monkeypatch, "resize", tmp_path / "a.safetensors", "--energy", 1.0, "--output_file", output) == 0
    assert close(updates(load_file(output), "default"), expected)
    assert "ss_training_comment" in read_header(output)[1]


def test_resize_by_energy_keeps_as_little_as_it_may(tmp_path, monkeypatch):
    expected = write(tmp_path / "a.safetensors", 4, ranks=(16,), missing=0)
    output = tmp_path / "b.safetensors"
    assert run(monkeypatch, "resize", tmp_path / "a.safetensors", "--energy", 0.8, "--output_file", output) == 0
    tensors = load_file(output)
    assert read_header(output)[1]["ss_network_dim"] == "Dynamic"
    for name, dw in updates(tensors, "default").items():
        share = (dw.norm() / expected[name].norm()).item() ** 2
        rank = len(tensors[f"lora_unet_{name.replace('.', '_')}.lora_down.weight"])
        values = torch.linalg.svdvals(expected[name])
        assert share >= 0.8 - 1e-6
        assert values[: rank - 1].square().sum() / values.square().sum() < 0.8


def test_extract_finds_the_lora_that_was_merged(tmp_path, monkeypatch, capsys):
    generator = torch.Generator().manual_seed(0)
    save_file(random_weights(dit_shapes(), seed=1), tmp_path / "base.safetensors")
    tensors = {}
    for name, rows, columns in (
        ("double_blocks_1_img_attn_qkv", 192, 64),
        ("single_blocks_5_linear2", 64, 320),
        ("double_blocks_0_txt_mod_linear", 384, 64),
    ):
        tensors[f"lora_unet_{name}.lora_down.weight"] = torch.randn(4, columns, generator=generator) / columns**0.5
        tensors[f"lora_unet_{name}.lora_up.weight"] = torch.randn(rows, 4, generator=generator) / 4
    save_file(tensors, tmp_path / "lora.safetensors")
    words = ["--dit", tmp_path / "base.safetensors", "--lora_weight", tmp_path / "lora.safetensors"]
    merged = tmp_path / "merged.safetensors"
    assert run(monkeypatch, *words, "--save_merged_model", merged, "--device", "cpu", main=merge_lora.main) == 0
    output = tmp_path / "found.safetensors"
    words = [
        "extract",
        "--base",
        tmp_path / "base.safetensors",
        "--tuned",
        merged,
        "--rank",
        4,
        "--output_file",
        output,
    ]
    assert run(monkeypatch, *words) == 0
    found = load_file(output)
    assert {key.split(".")[0] for key in found} == {key.split(".")[0] for key in tensors}
    for name in {key.split(".")[0] for key in tensors}:
        expected = tensors[f"{name}.lora_up.weight"] @ tensors[f"{name}.lora_down.weight"]
        dw = found[f"{name}.lora_up.weight"] @ found[f"{name}.lora_down.weight"]
        assert found[f"{name}.alpha"] == len(found[f"{name}.lora_down.weight"]) == 4
        assert (dw - expected).norm() <= 1e-3 * expected.norm()


def test_ema_in_order_of_time(tmp_path, monkeypatch):
    files, tensors = [], []
    for step in range(3):
        tensors.append(random_file("default", seed=9, ranks=(4,)))
        tensors[-1] = {
            key: tensor if key.endswith("alpha") else tensor + step * torch.ones_like(tensor)
            for key, tensor in tensors[-1].items()
        }
        files.append(tmp_path / f"{'cab'[step]}.safetensors")
        save_file(tensors[-1], files[-1], {"ss_steps": str(step)})
        os.utime(files[-1], (1000 + step, 1000 + step))
    output = tmp_path / "ema.safetensors"
    words = ["ema", *sorted(files), "--output_file", output]
    assert run(monkeypatch, *words, "--beta", 0.5, "--beta2", 0.9) == 0
    written = load_file(output)
    for key, start in tensors[0].items():
        expected = (
            start if key.endswith("alpha") else 0.9 * (0.5 * start + 0.5 * tensors[1][key]) + 0.1 * tensors[2][key]
        )
        assert torch.allclose(written[key], expected, atol=1e-6)
    assert read_header(output)[1]["ss_steps"] == "2"


def test_patterns_are_expanded_if_the_shell_does_not(tmp_path, monkeypatch):
    for name in ("run-1.safetensors", "run-2.safetensors", "other.safetensors"):
        write(tmp_path / name, seed=1)
    output = tmp_path / "sum.safetensors"
    assert run(monkeypatch, "merge", tmp_path / "run-*.safetensors", "--output_file", output) == 0
    dw = updates(random_file("default", 1), "default")
    assert close(updates(load_file(output), "default"), {name: 2 * change for name, change in dw.items()}, 1e-5)
    assert run(monkeypatch, "info", tmp_path / "nothing-*.safetensors") == 2


@pytest.mark.parametrize("sigma_rel", [0.05, 0.1, 0.2])
def test_power_function_profile_has_the_width(sigma_rel):
    """sigma_rel is the standard deviation of the profile p(t) ~ t^gamma on 0..1 (arXiv:2312.02696)."""
    gamma = gamma_from_sigma_rel(sigma_rel)
    t = torch.linspace(0, 1, 200001, dtype=torch.float64)
    weight = t**gamma / (t**gamma).sum()
    mean = (weight * t).sum()
    assert ((weight * (t - mean) ** 2).sum() ** 0.5).item() == pytest.approx(sigma_rel, rel=1e-3)
    # The weight that a file has in the average is the integral of the profile between this file and the one before.
    keep = ema_decays(50, 0.0, None, sigma_rel)
    weights = [1.0]
    for beta in keep:
        weights = [w * beta for w in weights] + [1 - beta]
    mass = [((i + 1) / 50) ** (gamma + 1) - (i / 50) ** (gamma + 1) for i in range(50)]
    assert weights == pytest.approx(mass, abs=1e-9)


def test_the_command_itself(tmp_path):
    write(tmp_path / "a.safetensors", 1)
    done = subprocess.run(
        [sys.executable, ROOT / "lora_tool.py", "info", "a.safetensors"], cwd=tmp_path, capture_output=True
    )
    assert done.returncode == 0, done.stderr
    assert b"musubi native" in done.stdout


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("inf", "{a}"), "did you mean 'info'"),
        (("info",), "no LoRA file is given"),
        (("info", "{a}", "{b}"), "one LoRA file is expected"),
        (("merge", "{a}", "{b}", "--multiplier", "1", "2", "3", "--output_file", "{out}"), "3 values for 2"),
        (("merge", "{a}", "{other}", "--output_file", "{out}"), "different shapes"),
        (("merge", "{a}", "{loha}", "--output_file", "{out}"), "only plain LoRAs"),
        (("resize", "{a}", "--energy", "1.5", "--output_file", "{out}"), "too large"),
        (("resize", "{a}", "--rank", "2", "--output_file", "x.pt"), ".safetensors"),
        (("resize", "{a}", "--output_file", "{a}"), "a.safetensors: is one of the inputs"),
        (("merge", "{a}", "{b}", "--output_file", "{b}"), "b.safetensors: is one of the inputs"),
        (("extract", "--base", "{dit}", "--tuned", "{b}", "--output_file", "{b}"), "is one of the inputs"),
        (("info", "{a}", "--png", "{a}"), "--png"),
        (("info", "{a}", "--png", "{folder}"), "is a folder, a file name is expected"),
        (("ema", "{a}", "--output_file", "{out}"), "two files or more"),
        (("ema", "{a}", "{b}", "--output_file", "{out}"), "not checkpoints of one training"),
        (("extract", "--base", "{dit}", "--tuned", "{dit}", "--output_file", "{out}"), "no matrix differs"),
        (("extract", "--base", "{a}", "--tuned", "{dit}", "--output_file", "{out}"), "DiT of HunyuanVideo is expected"),
    ],
)
def test_refused(tmp_path, monkeypatch, capsys, words, message):
    name = "lora_unet_double_blocks_7_img_attn_proj"
    save_file(random_weights(dit_shapes(depth_double=1, depth_single=1), seed=1), tmp_path / "dit.safetensors")
    write(tmp_path / "a.safetensors", 1, missing=0)
    write(tmp_path / "b.safetensors", 2)
    save_file(
        {f"{name}.lora_down.weight": torch.ones(2, 8), f"{name}.lora_up.weight": torch.ones(8, 2)}, tmp_path / "o"
    )
    loha = {
        f"{name}.hada_w{i}_{side}": torch.ones((48, 2) if side == "a" else (2, 48)) for i in (1, 2) for side in "ab"
    }
    save_file(loha, tmp_path / "l")
    files = {"a": tmp_path / "a.safetensors", "b": tmp_path / "b.safetensors", "dit": tmp_path / "dit.safetensors"}
    files |= {"other": tmp_path / "o", "loha": tmp_path / "l", "out": tmp_path / "out.safetensors", "folder": tmp_path}
    before = set(tmp_path.iterdir())
    assert run(monkeypatch, *(word.format(**files) for word in words)) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and message in error
    assert set(tmp_path.iterdir()) == before


def test_info_of_a_damaged_file_and_of_a_strangers_texts(tmp_path, monkeypatch, capsys):
    name = "lora_unet_double_blocks_7_img_attn_proj"
    tensors = {f"{name}.lora_down.weight": torch.full((2, 8), 1e30), f"{name}.lora_up.weight": torch.full((8, 2), 1e30)}
    save_file(tensors, tmp_path / "a.safetensors", {"ss_training_comment": "\x1b[2J\x1b]0;owned\x07"})
    assert run(monkeypatch, "info", tmp_path / "a.safetensors") == 0
    printed = capsys.readouterr()
    assert "dW of 1 modules is not finite, such as double_blocks.7.img_attn_proj" in printed.err
    assert "\x1b" not in printed.out and r"\x1b[2J\x1b]0;owned\x07" in printed.out


def test_a_missing_file_is_named_without_an_option_that_nobody_gave(tmp_path, monkeypatch, capsys):
    assert run(monkeypatch, "info", tmp_path / "none.safetensors") == 2
    assert capsys.readouterr().err == f"error: {tmp_path / 'none.safetensors'}: no such file or folder\n"


def test_a_resized_loha_is_a_lora_in_its_metadata(tmp_path, monkeypatch):
    name = "lora_unet_double_blocks_7_img_attn_proj"
    tensors = {
        f"{name}.hada_w{i}_{side}": torch.randn((8, 2) if side == "a" else (2, 8)) for i in (1, 2) for side in "ab"
    }
    metadata = {"ss_network_module": "networks.loha", "ss_network_dim": "2", "ss_network_alpha": "1.0"}
    save_file(tensors, tmp_path / "a.safetensors", metadata)
    words = ("resize", tmp_path / "a.safetensors", "--rank", 3, "--output_file", tmp_path / "b.safetensors")
    assert run(monkeypatch, *words) == 0
    written = read_header(tmp_path / "b.safetensors")[1]
    found = {key: written[key] for key in metadata}
    assert found == {"ss_network_module": "networks.lora", "ss_network_dim": "3", "ss_network_alpha": "3"}
