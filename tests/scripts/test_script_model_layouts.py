"""The scripts on model files of every layout: the same result, bit by bit; wrong files end in one line."""

import importlib.util
import shutil
import sys
from collections.abc import Callable
from itertools import cycle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import cache_latents
import cache_text_encoder_outputs
import hv_generate_video
import hv_train_network
from examples.tiny_models import dit_shapes, random_weights, vae_shapes
from hunyuan_model import checkpoints
from hunyuan_model.attention_modes import ATTENTION_MODES
from tests.hunyuan_model.model_layouts import (
    CLIP_LAYOUTS,
    DIT_LAYOUTS,
    FP8_LAYOUTS,
    LLM_LAYOUTS,
    VAE_LAYOUTS,
    quantized,
)
from tests.media_samples import write_caption, write_image
from utils.cli import run_script
from utils.errors import UserError
from utils.safetensors_utils import load_file
from utils.video_io import read_video

CLIP = ["--video_size", "32", "32", "--video_length", "5", "--infer_steps", "2", "--seed", "1", "--device", "cpu"]


def _run(main: Callable[[], None], monkeypatch: pytest.MonkeyPatch, *words: object) -> None:
    monkeypatch.setattr(sys, "argv", ["script", *map(str, words)])
    main()


def _only(folder: Path, pattern: str) -> Path:
    (path,) = folder.glob(pattern)
    return path


def _generated(out: Path) -> tuple[torch.Tensor, torch.Tensor]:
    return load_file(_only(out, "*_latent.safetensors"))["latent"], read_video(_only(out, "*.mp4"))[0]


def test_generation_gives_the_same_video_with_models_of_every_layout(tiny_models, tmp_path, monkeypatch, capsys):
    """Run i takes the i-th layout of DiT, VAE, LLM and CLIP each, so that eight runs cover all."""
    dit = random_weights(dit_shapes(depth_double=1, depth_single=1), seed=1)
    vae = random_weights(vae_shapes(), seed=2)
    llm = load_file(tiny_models.text_encoder1 / "model.safetensors")
    clip = load_file(tiny_models.text_encoder2 / "model.safetensors")
    results = []
    layouts = zip(DIT_LAYOUTS, cycle(VAE_LAYOUTS), cycle(LLM_LAYOUTS), cycle(CLIP_LAYOUTS), strict=False)
    for index, (dit_layout, vae_layout, llm_layout, clip_layout) in enumerate(layouts):
        folders = [tmp_path / f"{index}" / part for part in ("dit", "vae", "llm", "clip", "out")]
        for folder in folders:
            folder.mkdir(parents=True)
        models = {
            "--dit": DIT_LAYOUTS[dit_layout](folders[0], dit),
            "--vae": VAE_LAYOUTS[vae_layout](folders[1], vae),
            "--text_encoder1": LLM_LAYOUTS[llm_layout](folders[2], tiny_models.text_encoder1, llm),
            "--text_encoder2": CLIP_LAYOUTS[clip_layout](folders[3], tiny_models.text_encoder2, clip),
        }
        words = [word for pair in models.items() for word in pair]
        capsys.readouterr()
        _run(hv_generate_video.main, monkeypatch, *words, *CLIP, "--prompt=a cat", "--output_type=both",
             f"--save_path={folders[4]}")  # fmt: skip
        results.append(_generated(folders[4]))
        printed = capsys.readouterr().out.splitlines()
        for path in models.values():
            assert sum(f"({path})" in line for line in printed) == 1, "one line for each model file"
    for latents, video in results[1:]:
        assert torch.equal(latents, results[0][0]) and torch.equal(video, results[0][1])


@pytest.mark.parametrize(
    "layout", ["official", *(pytest.param(kind, marks=pytest.mark.slow) for kind in FP8_LAYOUTS if kind != "official")]
)
def test_generation_from_an_fp8_file_is_that_of_the_weights_it_stands_for(layout, tiny_models, tmp_path, monkeypatch):
    weights = random_weights(dit_shapes(depth_double=1, depth_single=1), seed=1)
    stored, scales, meant = quantized(weights, scaled=layout != "plain")
    paths = [FP8_LAYOUTS[layout](tmp_path, stored, scales), DIT_LAYOUTS["safetensors"](tmp_path, meant)]
    latents = []
    for index, path in enumerate(paths):
        words = [f"--{name}={file}" for name, file in vars(tiny_models).items() if name != "dit"]
        _run(hv_generate_video.main, monkeypatch, *words, f"--dit={path}", *CLIP, "--prompt=a cat",
             "--output_type=latent", f"--save_path={tmp_path / str(index)}")  # fmt: skip
        latents.append(load_file(_only(tmp_path / str(index), "*_latent.safetensors"))["latent"])
    assert torch.equal(*latents)


@pytest.fixture
def dataset(tmp_path) -> Path:
    (tmp_path / "images").mkdir()
    write_caption(write_image(tmp_path / "images" / "a.png", (40, 32)))
    config = tmp_path / "dataset.toml"
    root = tmp_path.as_posix()
    config.write_text(
        f"[[datasets]]\nresolution = [32, 32]\nimage_directory = '{root}/images'\ncache_directory = '{root}/cache'\n"
        "caption_extension = '.txt'\n",
        encoding="utf-8",
    )
    return config


def test_caches_are_the_same_with_models_of_another_layout(dataset, tiny_models, tmp_path, monkeypatch):
    vae = random_weights(vae_shapes(), seed=2)
    llm = load_file(tiny_models.text_encoder1 / "model.safetensors")
    clip = load_file(tiny_models.text_encoder2 / "model.safetensors")
    caches = []
    for vae_layout, text_layout in (("official .pt", "folder"), ("ComfyUI", "single file")):
        folder = tmp_path / text_layout
        folder.mkdir()
        _run(cache_latents.main, monkeypatch, "--dataset_config", dataset, "--device", "cpu",
             "--vae", VAE_LAYOUTS[vae_layout](folder / "vae", vae))  # fmt: skip
        clip_layout = "clip_l.safetensors" if text_layout == "single file" else "folder"
        _run(cache_text_encoder_outputs.main, monkeypatch, "--dataset_config", dataset, "--device", "cpu",
             "--text_encoder1", LLM_LAYOUTS[text_layout](folder, tiny_models.text_encoder1, llm),
             "--text_encoder2", CLIP_LAYOUTS[clip_layout](folder, tiny_models.text_encoder2, clip))  # fmt: skip
        caches.append({path.name: load_file(path) for path in (tmp_path / "cache").glob("*.safetensors")})
        shutil.rmtree(tmp_path / "cache")
    first, second = caches
    assert first.keys() == second.keys() and len(first) == 2
    for name in first:
        assert first[name].keys() == second[name].keys()
        assert all(torch.equal(first[name][key], second[name][key]) for key in first[name])


def _wan_vae(folder: Path) -> Path:
    save_file({"decoder.middle.0.residual.0.gamma": torch.ones(4)}, folder / "wan.safetensors")
    return folder / "wan.safetensors"


def _text(folder: Path) -> Path:
    (folder / "note.safetensors").write_text("no model", encoding="utf-8")
    return folder / "note.safetensors"


def _nan_dit(folder: Path) -> Path:
    weights = random_weights(dit_shapes(depth_double=1, depth_single=1), seed=1)
    weights["img_in.proj.bias"][0] = float("nan")
    return DIT_LAYOUTS["safetensors"](folder, weights)


GENERATE = (hv_generate_video.main, ["dit", "vae", "text_encoder1", "text_encoder2"])
LATENTS = (cache_latents.main, ["vae"])
TEXTS = (cache_text_encoder_outputs.main, ["text_encoder1", "text_encoder2"])
WRONG = [
    (GENERATE, "dit", _wan_vae, "a DiT of HunyuanVideo is expected, this is a Wan VAE"),
    (GENERATE, "dit", _nan_dit, "img_in.proj.bias holds NaN"),
    (GENERATE, "dit", _text, "not a safetensors file"),
    (GENERATE, "vae", _wan_vae, "a VAE of HunyuanVideo is expected, this is a Wan VAE"),
    (GENERATE, "text_encoder1", _wan_vae, "an LLM of HunyuanVideo is expected, this is a Wan VAE"),
    (GENERATE, "text_encoder2", _text, "not a safetensors file"),
    (LATENTS, "vae", _wan_vae, "a VAE of HunyuanVideo is expected, this is a Wan VAE"),
    (LATENTS, "vae", _text, "not a safetensors file"),
    (TEXTS, "text_encoder1", _nan_dit, "an LLM of HunyuanVideo is expected, this is a DiT"),
    (TEXTS, "text_encoder2", _wan_vae, "a CLIP of HunyuanVideo is expected, this is a Wan VAE"),
]


@pytest.mark.parametrize(("script", "option", "write", "message"), WRONG)
def test_a_wrong_model_file_is_one_line_and_exit_2(
    script, option, write, message, dataset, tiny_models, tmp_path, monkeypatch, capsys
) -> None:
    main, options = script
    models = {name: path for name, path in vars(tiny_models).items() if name in options} | {option: write(tmp_path)}
    words = [f"--{name}={path}" for name, path in models.items()]
    extra = [*CLIP, "--prompt=a cat", f"--save_path={tmp_path / 'out'}"]
    words += extra if script is GENERATE else [f"--dataset_config={dataset}", "--device=cpu"]
    monkeypatch.setattr(sys, "argv", ["script", *words])
    with pytest.raises(SystemExit) as ended:
        run_script(main)
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert ended.value.code == 2
    assert len(errors) == 1 and str(models[option]) in errors[0] and message in errors[0], errors
    assert not list(tmp_path.glob("cache/*.safetensors")) and not list(tmp_path.glob("out/*"))


PACKAGES = {
    "flash": "flash_attn",
    "flash3": "flash_attn_interface",
    "sageattn": "sageattention",
    "xformers": "xformers",
}


@pytest.mark.parametrize("mode", ATTENTION_MODES)
def test_every_attention_mode_runs_or_names_its_package(mode, tiny_models, tmp_path, monkeypatch):
    words = [f"--{name}={path}" for name, path in vars(tiny_models).items()]
    words += [*CLIP, "--prompt=a cat", "--output_type=latent", f"--save_path={tmp_path / 'out'}", f"--attn_mode={mode}"]
    package = PACKAGES.get(mode)
    if package is None:
        _run(hv_generate_video.main, monkeypatch, *words)
        assert _only(tmp_path / "out", "*_latent.safetensors")
        return
    if importlib.util.find_spec(package):
        pytest.skip(f"{package} is installed")
    monkeypatch.setattr(checkpoints, "identify", None)  # no model file is even looked at
    with pytest.raises(UserError, match=f"'{mode}': the package {package} is not installed; pip install"):
        _run(hv_generate_video.main, monkeypatch, *words)


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--flash_attn", "the package flash_attn is not installed"),
        ("--flash3", "the package flash_attn_interface is not installed"),
        ("--xformers", "the package xformers is not installed"),
        ("--sage_attn", "SageAttention has no backward pass"),
    ],
)
def test_training_refuses_missing_and_gradient_free_attention(flag, message, tiny_models, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name in PACKAGES.values() else find(name))
    with pytest.raises(UserError, match=message):
        _run(hv_train_network.main, monkeypatch, f"--dit={tiny_models.dit}", flag)
