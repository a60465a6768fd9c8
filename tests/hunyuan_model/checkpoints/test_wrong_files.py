"""Wrong model files: each ends in one line that names the file and the cause, exit code 2, and nothing is executed."""

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from examples.tiny_models import dit_shapes, random_weights, vae_shapes
from hunyuan_model.checkpoints.__main__ import main
from tests.conftest import ROOT
from tests.hunyuan_model.model_layouts import FP8_LAYOUTS, Weights, quantized
from utils.cli import run_script
from utils.safetensors_utils import load_file


def _dit() -> Weights:
    return random_weights(dit_shapes(depth_double=1, depth_single=1), seed=0)


def _vae() -> Weights:
    return random_weights(vae_shapes(), seed=0)


def _bytes(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def _saved(path: Path, weights: Weights) -> Path:
    save_file(weights, path)
    return path


def _pickled(path: Path, content: object) -> Path:
    torch.save(content, path)
    return path


def _cut(path: Path, part: float) -> Path:
    os.truncate(path, int(path.stat().st_size * part))
    return path


def _header(path: Path, header: object, data: bytes = bytes(64)) -> Path:
    text = json.dumps(header).encode()
    return _bytes(path, len(text).to_bytes(8, "little") + text + data)


def _tensor(dtype: str, shape: list, offsets: list) -> dict:
    return {"img_in.proj.weight": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}


def _named(path: Path, *names: str) -> Path:
    """A file of another model: its names with small tensors."""
    return _saved(path, {name: torch.zeros(4, 4) for name in names})


def _changed(path: Path, name: str, change: Callable[[torch.Tensor], torch.Tensor | None]) -> Path:
    weights = _dit()
    changed = change(weights.pop(name))
    return _saved(path, weights if changed is None else weights | {name: changed})


def _set(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(tensor: torch.Tensor) -> torch.Tensor:
        tensor.view(-1)[3] = value
        return tensor

    return change


class _Code:
    """Unpickling this writes a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple:
        return (os.system, (f'echo executed > "{self.target}"',))


def _fp8_without_map(folder: Path) -> Path:
    return _pickled(folder / "mp_rank_00_model_states_fp8.pt", {"module": quantized(_dit())[0]})


def _fp8_beside_a_lost_map(folder: Path) -> Path:
    torch.save({}, folder / "mp_rank_00_model_states_fp8_map.pt")
    return _saved(folder / "renamed.safetensors", quantized(_dit())[0])


def _fp8_with_a_gap(folder: Path) -> Path:
    stored, scales, _ = quantized(_dit())
    del scales[next(iter(scales))]
    extra = {f"{name.removesuffix('.weight')}.fp8_scale": torch.tensor(s) for name, s in scales.items()}
    return _saved(folder / "gap.safetensors", stored | extra)


def _fp8_with_block_scales(folder: Path) -> Path:
    stored, scales, _ = quantized(_dit())
    extra = {f"{name.removesuffix('.weight')}.fp8_scale": torch.ones(2, 2) for name in scales}
    return _saved(folder / "blocks.safetensors", stored | extra)


def _fp8_with_a_broken_map(folder: Path) -> Path:
    torch.save({"double_blocks.0.img_attn_qkv": {"no": "number"}}, folder / "x_fp8_map.pt")
    return _pickled(folder / "x_fp8.pt", quantized(_dit())[0])


def _fp8_nan(folder: Path) -> Path:
    stored, _, _ = quantized(_dit(), scaled=False)
    stored["single_blocks.0.linear1.weight"].view(torch.uint8)[0, 0] = 0x7F
    return _saved(folder / "nan.safetensors", stored)


def _nvfp4(folder: Path) -> Path:
    name = "double_blocks.0.img_attn.qkv.weight"
    tensors = {
        name: torch.zeros(8, 4, dtype=torch.uint8),
        f"{name}_scale": torch.ones(8, 1),
        f"{name}_scale_2": torch.ones(()),
    }
    return _saved(folder / "x.safetensors", tensors)


def _folder(folder: Path, **files: bytes) -> Path:
    (folder / "model").mkdir()
    for name, content in files.items():
        (folder / "model" / name.replace("__", ".")).write_bytes(content)
    return folder / "model"


def _folder_of_folders(folder: Path) -> Path:
    for name in ("transformer", "vae"):
        (folder / "pipeline" / name).mkdir(parents=True)
    return folder / "pipeline"


def _two_models(folder: Path) -> Path:
    (folder / "model").mkdir()
    for name in ("a", "b"):
        _saved(folder / "model" / f"{name}.safetensors", _dit())
    return folder / "model"


def _missing_shard(folder: Path) -> Path:
    index = {"weight_map": {"img_in.proj.weight": "diffusion_pytorch_model-00001-of-00001.safetensors"}}
    return _folder(folder, diffusion_pytorch_model__safetensors__index__json=json.dumps(index).encode())


def _broken_config(folder: Path) -> Path:
    (folder / "config.json").write_text("{'norm_num_groups': 4,}", encoding="utf-8")
    return _saved(folder / "vae.safetensors", _vae())


def _zip(path: Path) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("holiday.txt", "no model")
    return path


def _damaged_pickle(folder: Path) -> Path:
    """A reference to a storage whose type is a number."""
    reference = b"(X\x07\x00\x00\x00storageK\x01X\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x01tQ"
    with zipfile.ZipFile(folder / "x.pt", "w") as archive:
        archive.writestr("x/data.pkl", b"\x80\x02" + reference + b".")
        archive.writestr("x/version", b"3\n")
    return folder / "x.pt"


def _vae_without(folder: Path, piece: str) -> Path:
    (folder / "config.json").write_text('{"norm_num_groups": 4}', encoding="utf-8")
    return _saved(folder / "vae.safetensors", {name: w for name, w in _vae().items() if piece not in name})


QKV = "double_blocks.0.img_attn_qkv.weight"
CASES: dict[str, tuple[Callable[[Path], Path], str]] = {
    "missing file": (lambda f: f / "dit.safetensors", "No such file"),
    "empty safetensors": (lambda f: _bytes(f / "x.safetensors", b""), "the file is empty"),
    "empty .pt": (lambda f: _bytes(f / "x.pt", b""), "not a file of torch.save"),
    "text named .safetensors": (lambda f: _bytes(f / "x.safetensors", b"hello, I am a text"), "not a safetensors"),
    "text named .pt": (lambda f: _bytes(f / "x.pt", b"hello, I am a text"), "not a file of torch.save"),
    "web page": (lambda f: _bytes(f / "x.safetensors", b"<!DOCTYPE html><html></html>"), "a web page"),
    "Git LFS pointer": (lambda f: _bytes(f / "x.pt", b"version https://git-lfs.github.com/spec/v1\n"), "Git LFS"),
    "nvfp4": (_nvfp4, "model in nvfp4, which is not supported .use the bf16, fp16 or fp8 file"),
    "GGUF": (lambda f: _bytes(f / "x.gguf", b"GGUF\x03\x00\x00\x00"), "a GGUF file"),
    "zip without tensors": (lambda f: _zip(f / "x.pt"), "cannot be read"),
    "safetensors cut in its data": (lambda f: _cut(_saved(f / "x.safetensors", _dit()), 0.8), "cut off"),
    "safetensors cut in its header": (lambda f: _cut(_saved(f / "x.safetensors", _dit()), 0.001), "cut off"),
    ".pt cut": (lambda f: _cut(_pickled(f / "x.pt", {"module": _dit()}), 0.8), "cut off"),
    "header of 2^60 bytes": (
        lambda f: _bytes(f / "x.safetensors", (1 << 60).to_bytes(8, "little") + b"{" + bytes(40)),
        "header of 1,152,921,504,606,846,976 bytes claimed",
    ),
    "header is no JSON": (
        lambda f: _bytes(f / "x.safetensors", (20).to_bytes(8, "little") + b"{" + b"x" * 40),
        "header is not JSON",
    ),
    "header is a list": (lambda f: _header(f / "x.safetensors", [1, 2]), "not a safetensors file"),
    "bytes do not fit the shape": (
        lambda f: _header(f / "x.safetensors", _tensor("F32", [4, 4], [0, 8])),
        "do not fit its shape",
    ),
    "negative offsets": (
        lambda f: _header(f / "x.safetensors", _tensor("F32", [4], [-16, 0])),
        "do not fit its shape",
    ),
    "shape of words": (lambda f: _header(f / "x.safetensors", _tensor("F32", ["a"], [0, 4])), "not a safetensors"),
    "unknown dtype": (lambda f: _header(f / "x.safetensors", _tensor("F4", [4], [0, 4])), "F4"),
    "safetensors without tensors": (lambda f: _header(f / "x.safetensors", {}, b""), "holds no tensors"),
    ".pt without tensors": (lambda f: _pickled(f / "x.pt", {"module": {"step": 3}}), "holds no tensors"),
    ".pt that holds a list": (lambda f: _pickled(f / "x.pt", [torch.zeros(2)]), "holds a list"),
    "pickle with code": (lambda f: _pickled(f / "x.pt", {"module": _Code(f / "executed")}), "more than tensors"),
    "old pickle with code": (
        lambda f: _bytes(f / "x.pt", b"\x80\x02cposix\nsystem\nq\x00X\x05\x00\x00\x00falseq\x01\x85q\x02Rq\x03."),
        "not a file of torch.save",
    ),
    "damaged pickle": (_damaged_pickle, "cannot be read, cut off or broken"),
    "missing tensor": (lambda f: _changed(f / "x.safetensors", QKV, lambda _: None), f"missing, the first is {QKV}"),
    "extra tensor": (
        lambda f: _saved(f / "x.safetensors", _dit() | {"double_blocks.0.extra.weight": torch.ones(2)}),
        "1 tensors do not belong to this model, the first is double_blocks.0.extra.weight",
    ),
    "wrong shape": (
        lambda f: _changed(f / "x.safetensors", QKV, lambda tensor: tensor[:-1].clone()),
        rf"{QKV} has shape \(191, 64\), \(192, 64\) is expected",
    ),
    "shapes of no model": (
        lambda f: _changed(f / "x.safetensors", "img_in.proj.weight", lambda _: torch.ones(3)),
        "x.safetensors: .*sizes",
    ),
    "NaN": (lambda f: _changed(f / "x.safetensors", QKV, _set(float("nan"))), f"{QKV} holds NaN"),
    "infinity": (lambda f: _changed(f / "x.safetensors", QKV, _set(float("-inf"))), f"{QKV} holds NaN or inf"),
    "NaN in float8": (_fp8_nan, "single_blocks.0.linear1.weight holds NaN"),
    "official fp8 without its map": (_fp8_without_map, "mp_rank_00_model_states_fp8_map.pt beside it"),
    "fp8 beside a lost map": (_fp8_beside_a_lost_map, "scales are missing"),
    "fp8 with a missing scale": (_fp8_with_a_gap, "has no scale, unlike others"),
    "fp8 with scales per block": (_fp8_with_block_scales, r"has shape \(2, 2\); one or 192 numbers"),
    "weights of integers": (
        lambda f: _changed(f / "x.safetensors", QKV, lambda tensor: tensor.to(torch.int8)),
        f"{QKV} is int8; files quantised to integers are not read",
    ),
    "fp8 with a broken map": (_fp8_with_a_broken_map, "not a map"),
    "Wan VAE": (lambda f: _named(f / "x.safetensors", "decoder.middle.0.residual.0.gamma"), "Wan VAE"),
    "Wan DiT": (lambda f: _named(f / "x.safetensors", "blocks.0.self_attn.q.weight"), "Wan DiT"),
    "SDXL": (
        lambda f: _named(f / "x.safetensors", "model.diffusion_model.input_blocks.0.0.weight"),
        "SDXL or Stable Diffusion",
    ),
    "SD VAE": (lambda f: _named(f / "x.safetensors", "decoder.conv_in.weight"), "Stable Diffusion, SDXL or Flux VAE"),
    "Flux": (lambda f: _named(f / "x.safetensors", "double_blocks.0.img_attn.qkv.weight"), "Flux DiT"),
    "vision tower": (
        lambda f: _named(f / "x.safetensors", "vision_model.encoder.layers.0.mlp.fc1.weight"),
        "vision tower",
    ),
    "T5": (lambda f: _named(f / "x.safetensors", "encoder.block.0.layer.0.SelfAttention.q.weight"), "T5"),
    "HunyuanVideo 1.5": (
        lambda f: _named(
            f / "x.safetensors", "byt5_in.fc1.weight", "txt_in.individual_token_refiner.blocks.0.norm1.weight"
        ),
        "HunyuanVideo 1.5",
    ),
    "LoRA": (lambda f: _named(f / "x.safetensors", "lora_unet_single_blocks_0_linear1.lora_down.weight"), "LoRA"),
    "unknown model": (lambda f: _named(f / "x.safetensors", "encoder.weight"), "unknown model .*encoder.weight"),
    "folder without a model": (lambda f: _folder(f, config__json=b"{}"), "no .safetensors, .bin or .pt"),
    "folder of folders": (_folder_of_folders, "give one of the folders in it: transformer, vae"),
    "folder with two models": (_two_models, "2 model files"),
    "missing shard": (_missing_shard, "1 of 1 shards are missing"),
    "broken index": (
        lambda f: _folder(f, model__safetensors__index__json=b"{}"),
        "not an index of shards",
    ),
    "broken config.json": (_broken_config, "config is not JSON"),
    "small VAE without config": (lambda f: _saved(f / "vae.safetensors", _vae()), "norm groups"),
    "VAE of another compression": (lambda f: _vae_without(f, "up_blocks.0.upsamplers"), "4x8x8"),
}


def _run(path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> tuple[int, list[str]]:
    """The command's exit code and lines on stderr."""
    monkeypatch.setattr(sys, "argv", ["checkpoints", "--check", str(path)])
    with pytest.raises(SystemExit) as ended:
        run_script(main)
    return ended.value.code, capsys.readouterr().err.splitlines()


@pytest.mark.parametrize("case", CASES)
def test_wrong_file_is_one_line_and_exit_2(case: str, tmp_path: Path, monkeypatch, capsys) -> None:
    write, message = CASES[case]
    path = write(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    code, lines = _run(path, monkeypatch, capsys)
    assert code == 2
    assert len(lines) == 1, lines
    assert lines[0].startswith(f"error: {path.parent if path.is_file() else path}")
    assert re.search(message, lines[0]), lines[0]
    assert sorted(tmp_path.rglob("*")) == before, "something was executed or written"


@pytest.mark.parametrize("what", ["weights", "scales"])
def test_one_flipped_byte_of_a_pt_file_is_noticed(what: str, tmp_path: Path, monkeypatch, capsys) -> None:
    """torch.load does not compare checksums."""
    stored, scales, _ = quantized(_dit())
    last = list(scales)[-1]
    path = FP8_LAYOUTS["official"](tmp_path, stored, scales)
    monkeypatch.setattr(sys, "argv", ["checkpoints", "--check", str(path)])
    main()
    weights, scale = stored[last].view(torch.uint8).numpy(), torch.tensor(scales[last]).numpy()
    damaged, written = (path, weights) if what == "weights" else (path.with_stem(f"{path.stem}_map"), scale)
    content = bytearray(damaged.read_bytes())
    content[content.index(written.tobytes())] ^= 1
    damaged.write_bytes(content)
    code, lines = _run(path, monkeypatch, capsys)
    assert code == 2
    assert lines == [f"error: {damaged}: is damaged, its bytes do not match its checksums; download it again"]


def _llm_case(tiny_models, folder: Path, change: Callable[[Weights, dict], None]) -> Path:
    shutil.copytree(tiny_models.text_encoder1, folder / "llm")
    weights = load_file(folder / "llm" / "model.safetensors")
    config = json.loads((folder / "llm" / "config.json").read_text(encoding="utf-8"))
    change(weights, config)
    save_file(weights, folder / "llm" / "model.safetensors")
    (folder / "llm" / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder / "llm"


LLM_CASES: dict[str, tuple[Callable[[Weights, dict], None], str]] = {
    "missing layer": (lambda w, c: w.pop("model.layers.1.mlp.up_proj.weight"), "layers.1.mlp.up_proj.weight"),
    "config of another size": (lambda w, c: c.update(hidden_size=128), "has shape"),
    "config of nonsense": (lambda w, c: c.update(num_attention_heads="many"), "no model can be built from its sizes"),
    "NaN": (lambda w, c: w["model.embed_tokens.weight"].view(-1)[:1].fill_(float("nan")), "holds NaN"),
    "no embedding": (lambda w, c: w.pop("model.embed_tokens.weight"), "'model.embed_tokens.weight' is missing"),
}


@pytest.mark.parametrize("case", LLM_CASES)
def test_wrong_text_encoder_is_one_line_and_exit_2(case: str, tiny_models, tmp_path, monkeypatch, capsys) -> None:
    change, message = LLM_CASES[case]
    code, lines = _run(_llm_case(tiny_models, tmp_path, change), monkeypatch, capsys)
    assert code == 2 and len(lines) == 1, lines
    assert str(tmp_path) in lines[0] and message in lines[0]


def test_a_llama_3_tokenizer_with_a_replaced_pre_tokenizer_stops_loading(
    tiny_models, tmp_path: Path, monkeypatch, capsys
) -> None:
    """What transformers 5 saves: a Metaspace pre-tokenizer in place of the byte-level one; spaces vanish."""
    shutil.copytree(tiny_models.text_encoder1, tmp_path / "llm")
    file = tmp_path / "llm" / "tokenizer.json"
    tokenizer = json.loads(file.read_text(encoding="utf-8"))
    tokenizer["pre_tokenizer"] = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "never", "split": False}
    file.write_text(json.dumps(tokenizer), encoding="utf-8")
    code, lines = _run(tmp_path / "llm", monkeypatch, capsys)
    assert code == 2 and len(lines) == 1, lines
    assert "tokenizer.json: broken tokenizer" in lines[0]


def test_wrong_files_in_a_process_of_their_own(tmp_path: Path) -> None:
    """One real process for the worst of them: code in a pickle."""
    path = CASES["pickle with code"][0](tmp_path)
    command = [sys.executable, "-m", "hunyuan_model.checkpoints", str(path)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, encoding="utf-8", check=False)
    assert result.returncode == 2
    assert result.stderr.startswith(f"error: {path}: holds more than tensors") and result.stderr.count("\n") == 1
    assert not (tmp_path / "executed").exists()
