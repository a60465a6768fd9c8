"""convert_lora.py says what a file does not hold, and what other programs make of it."""

import pytest
import torch
from safetensors.torch import save_file

from tests.platforms import needs_posix
from tests.scripts.test_script_convert_lora import OURS, pair, run
from utils.safetensors_utils import load_file


def convert(folder, monkeypatch, capsys, tensors, *words) -> str:
    """Converts these tensors into out.safetensors; returns what is printed."""
    save_file(tensors, folder / "in.safetensors")
    arguments = ("--input", folder / "in.safetensors", "--output", folder / "out.safetensors", *words)
    assert run(monkeypatch, *arguments) == 0, capsys.readouterr().err
    return capsys.readouterr().out


def test_what_float16_cannot_hold_is_said(tmp_path, monkeypatch, capsys):
    tensors = {f"{OURS}.lora_down.weight": torch.rand(2, 48) * 1e-6, f"{OURS}.lora_up.weight": torch.rand(48, 2) * 1e-6}
    printed = convert(tmp_path, monkeypatch, capsys, tensors, "--target", "other", "--dtype", "fp16")
    assert "float16 changes dW of 1 of 1 modules by more than 0.001 of its norm, at most" in printed
    assert "--dtype float32 keeps it" in printed
    for words in (("--dtype", "float32"), ("--dtype", "bf16")):
        assert "rounding" not in convert(tmp_path, monkeypatch, capsys, tensors, "--target", "other", *words)
    small = {f"{OURS}.lora_down.weight": torch.rand(2, 48), f"{OURS}.lora_up.weight": torch.rand(48, 2) * 1e-6}
    assert "rounding" not in convert(tmp_path, monkeypatch, capsys, small, "--target", "other", "--dtype", "fp16")


def test_tencents_loader_needs_no_alpha(tmp_path, monkeypatch, capsys):
    """It ignores alpha, so up @ down must be the whole update (X1)."""
    tensors = pair(OURS, alpha=torch.tensor(2.0))
    convert(tmp_path, monkeypatch, capsys, tensors, "--target", "hunyuan-i2v", "--verify")
    written = load_file(tmp_path / "out.safetensors")
    stem = OURS.replace("lora_unet_", "Hunyuan_video_I2V_lora_")
    assert written.keys() == {f"{stem}.lora_down.weight", f"{stem}.lora_up.weight"}
    up, down = tensors[f"{OURS}.lora_up.weight"], tensors[f"{OURS}.lora_down.weight"]
    expected = 2.0 / len(down) * up @ down
    found = written[f"{stem}.lora_up.weight"] @ written[f"{stem}.lora_down.weight"]
    assert (found - expected).abs().max() <= 1e-6 * expected.abs().max()
    assert refused_line(tmp_path, monkeypatch, capsys, pair(OURS, dora_scale=torch.ones(48, 1)), "hunyuan-i2v")


def refused_line(folder, monkeypatch, capsys, tensors, target) -> str:
    save_file(tensors, folder / "in.safetensors")
    words = ("--input", folder / "in.safetensors", "--output", folder / "out.safetensors", "--target", target)
    assert run(monkeypatch, *words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_other_kinds_are_counted_as_the_programs_treat_them(tmp_path, monkeypatch, capsys):
    dora = convert(tmp_path, monkeypatch, capsys, pair(OURS, dora_scale=torch.ones(48, 1)), "--target", "other")
    assert "1 of 1 modules will load, but DoRA acts differently there (divided by |W| instead of |W + dW|)" in dora
    loha = {
        f"{OURS}.hada_w{i}_{side}": torch.ones((48, 2) if side == "a" else (2, 48)) for i in (1, 2) for side in "ab"
    }
    printed = convert(tmp_path, monkeypatch, capsys, loha, "--target", "default")
    for program, count in {"ComfyUI": 1, "diffusers": 0, "musubi": 0, "OneTrainer": 1}.items():
        assert f"{program:<10}  {count} of 1 modules will load" in printed


def test_dora_of_a_format_without_it_names_the_way(tmp_path, monkeypatch, capsys):
    line = refused_line(tmp_path, monkeypatch, capsys, pair(OURS, dora_scale=torch.ones(48, 1)), "diffusion-pipe")
    assert "merge_lora.py" in line and "lora_tool.py extract" in line


def test_biases_are_converted_where_the_format_has_them_and_counted_elsewhere(tmp_path, monkeypatch, capsys):
    bias = torch.arange(48.0)
    tensors = pair(OURS) | {f"{OURS}.diff_b": bias}
    assert "left out" not in convert(tmp_path, monkeypatch, capsys, tensors, "--target", "other")
    name = OURS.removeprefix("lora_unet_")
    written = load_file(tmp_path / "out.safetensors")
    assert torch.equal(next(tensor for key, tensor in written.items() if key.endswith(".diff_b")), bias), name
    printed = convert(tmp_path, monkeypatch, capsys, tensors, "--target", "diffusers")
    assert "1 changes of biases and norms, such as" in printed
    whole = {f"{OURS}.diff": torch.randn(48, 48)}
    assert "--rank converts it" in refused_line(tmp_path, monkeypatch, capsys, whole, "diffusers")
    convert(tmp_path, monkeypatch, capsys, whole, "--target", "diffusers", "--rank", "48")


def test_a_lora_that_changes_nothing_is_named(tmp_path, monkeypatch, capsys):
    tensors = pair(OURS, alpha=torch.tensor(0.0))
    assert "none: alpha or the factors are 0 in every module" in convert(
        tmp_path, monkeypatch, capsys, tensors, "--target", "other"
    )


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "a Git LFS pointer"),
        (b"<!DOCTYPE html><html></html>", "a web page"),
    ],
)
def test_what_is_no_lora_is_named(tmp_path, monkeypatch, capsys, content, words):
    (tmp_path / "in.safetensors").write_bytes(content)
    arguments = ("--input", tmp_path / "in.safetensors", "--output", tmp_path / "o.safetensors", "--target", "other")
    assert run(monkeypatch, *arguments) == 2
    assert words in capsys.readouterr().err


@needs_posix
def test_an_output_that_cannot_be_written_is_one_line(tmp_path, monkeypatch, capsys):
    save_file(pair(OURS), tmp_path / "in.safetensors")
    words = ("--input", tmp_path / "in.safetensors", "--output", "/proc/x.safetensors", "--target", "other")
    assert run(monkeypatch, *words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: --output /proc: cannot be written to")
