"""hv_generate_video.py at its limits: wrong invocations, and processes that are killed in the middle."""

import importlib
import json
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.platforms import needs_posix

ROOT = Path(__file__).resolve().parents[2]

# Runs main for each argv of stdin in one process: [exit code, stderr, whether torch was imported].
MANY_MAINS = """
import contextlib, io, json, runpy, sys
sys.path.insert(0, sys.argv[1])
results = []
for argv in json.load(sys.stdin):
    sys.argv = ["hv_generate_video.py", *argv]
    stderr = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True)
    with contextlib.redirect_stderr(stderr), contextlib.redirect_stdout(io.TextIOWrapper(io.BytesIO())):
        try:
            runpy.run_module("hv_generate_video", run_name="__main__")
        except SystemExit as end:
            code = end.code
    results.append([code, stderr.buffer.getvalue().decode(), "torch" in sys.modules])
print(json.dumps(results))
"""


def invocations(tmp_path: Path, models: dict[str, str]) -> list[tuple[list[str], str]]:
    """Wrong command lines and what the answer must contain."""
    (tmp_path / "file").write_text("")
    (tmp_path / "bad.txt").write_text("A cat --size 5\n")
    (tmp_path / "cat.txt").write_text("A cat\n")
    (tmp_path / "size.txt").write_text("A cat --w 50\n")
    (tmp_path / "lora.safetensors").write_bytes(b"x")
    (tmp_path / "bad.toml").write_text('promt = "A cat"\n')
    folder = tmp_path / "folder"
    folder.with_suffix(".safetensors").mkdir()
    file, lora = str(tmp_path / "file"), str(tmp_path / "lora.safetensors")
    paths = [word for name, path in models.items() for word in (f"--{name}", str(path))]
    base = [*paths, "--save_path", str(tmp_path / "out")]
    cat, merge = [*base, "--prompt", "cat"], ["--save_merged_model", str(tmp_path / "out" / "merged.safetensors")]
    return [
        ([], "--save_path"),
        (base, "nothing to make"),
        (paths, "--save_path"),
        ([*cat, "--from_file", file], "--prompt and --from_file exclude each other"),
        ([*cat, "--interactive"], "--prompt and --interactive exclude"),
        ([*cat, "--video_length", "0"], "--video_length: 0 is too small"),
        ([*cat, "--video_length", "6", "--strict"], "frames 6 is not 4n + 1; the nearest is 5"),
        ([*cat, "--video_size", "540", "960", "--strict"], "height 540 is not a multiple of 16; the nearest is 544"),
        ([*cat, "--video_size", "540"], "--video_size"),
        ([*cat, "--infer_steps", "1.5"], "--infer_steps: '1.5' is not a whole number"),
        ([*cat, "--seed", "-1"], "--seed"),
        ([*cat, "--flow_shift", "0"], "--flow_shift"),
        ([*cat, "--strength", "0"], "--strength 0"),
        ([*cat, "--strength", "1.5"], "--strength: 1.5 is too large"),
        ([*cat, "--strength", "0.5"], "--strength needs a video to start from; give --video_path"),
        ([*base, "--from_file", str(tmp_path / "cat.txt"), "--strength", "0.5"], "no line of"),
        ([*cat, "--dit", "nowhere.pt"], "--dit: nowhere.pt: no such file"),
        ([*cat, "--video_path", "nowhere.mp4"], "nowhere.mp4: no such file"),
        ([*cat, "--lora_weight", "nowhere.safetensors"], "nowhere.safetensors: no such file"),
        ([*cat, "--lora_multiplier", "1"], "--lora_multiplier needs --lora_weight"),
        ([*cat, "--lora_weight", lora, lora, "--lora_multiplier", "1", "1", "1"], "3 values for 2 --lora_weight"),
        ([*cat, "--compare"], "--compare needs --lora_weight"),
        ([*cat, "--lora_weight", lora, "--compare", "--compile"], "--compare and --compile exclude"),
        ([*cat, "--output_type", "movie"], "'movie' is not one of video, images, latent, both"),
        ([*cat, "--attn_mode", "flash"], "flash_attn is not installed"),
        ([*cat, "--attn_mode", "sage"], "did you mean 'sageattn'"),
        ([*cat, "--fp8_fast"], "--fp8_fast needs --fp8"),
        ([*cat, "--step_cache", "nan"], "--step_cache"),
        ([*cat, "--compile_args", "inductor"], "--compile_args takes four values"),
        (
            [*cat, "--compile_args", "inductor", "fast", "False", "False"],
            "--compile_args: 'fast' is not one of default",
        ),
        ([*cat, "--promt", "cat"], "unknown option --promt (did you mean '--prompt'?)"),
        ([*cat, "--save_path", file], "is a file, a folder is expected"),
        ([*cat, "--save_path", f"{file}/out"], "is a file, a folder is expected"),
        (["--dit", lora, "--save_merged_model", f"{folder}.safetensors"], "is a folder, a file name is expected"),
        ([*cat, "--config_file", str(tmp_path / "bad.toml")], "unknown option 'promt' (did you mean 'prompt'?)"),
        ([*base, "--from_file", str(tmp_path / "bad.txt")], "bad.txt: line 1: unknown option --size"),
        ([*base, "--from_file", str(tmp_path / "size.txt"), "--strict"], "width 50 is not a multiple of 16"),
        ([*base, "--from_file", file], "a prompt file ends in .txt, .toml or .json"),
        ([*base, "--latent_path", lora, "--output_type", "latent"], "nothing to do"),
        (["--latent_path", lora, "--save_path", "x"], "required and not given: --vae"),
        ([*base, "--save_merged_model", "merged.pt"], "a name that ends in .safetensors is expected"),
        (["--save_merged_model", "merged.safetensors"], "required and not given: --dit"),
        (["--dit", lora, "--save_merged_model", lora], "lora.safetensors: is one of the inputs"),
        (["--dit", str(tmp_path), "--save_merged_model", lora], "lora.safetensors: is one of the inputs"),
        ([*paths, "--lora_weight", lora, "--save_merged_model", lora], "lora.safetensors: is one of the inputs"),
        ([*paths, *merge, "--lora_weight", lora, "--compare"], "--save_merged_model writes a model and stops"),
        ([*paths, *merge, "--vram_gb", "8"], "leave --vram_gb out"),
    ]


def test_wrong_invocations_are_one_line_before_anything_is_loaded(tiny_models, tmp_path):
    cases = invocations(tmp_path, {name: str(path) for name, path in vars(tiny_models).items()})
    result = subprocess.run(
        [sys.executable, "-c", MANY_MAINS, str(ROOT)],
        input=json.dumps([argv for argv, _ in cases]),
        capture_output=True,
        encoding="utf-8",
        check=True,
    )
    answers = json.loads(result.stdout)
    assert len(answers) >= 25
    for (argv, complaint), (code, stderr, torch_imported) in zip(cases, answers, strict=True):
        assert (code, torch_imported) == (2, False), (argv, stderr)
        assert stderr.startswith("error: "), argv
        assert stderr.count("\n") == 1, stderr
        assert complaint in stderr, (argv, stderr)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("script", "words", "option"),
    [
        ("hv_generate_video", ["--dit={lora}"], "--save_merged_model"),
        ("convert_lora", ["--input={lora}", "--target=other"], "--output"),
        ("merge_lora", ["--dit={lora}", "--lora_weight={lora}"], "--save_merged_model"),
        ("lora_tool", ["merge", "{lora}", "{lora}"], "--output_file"),
        ("lora_tool", ["resize", "{lora}", "--rank=2"], "--output_file"),
        ("lora_tool", ["ema", "{lora}", "{lora}"], "--output_file"),
        ("lora_tool", ["extract", "--base={lora}", "--tuned={lora}", "--rank=2"], "--output_file"),
        ("lora_tool", ["info", "{lora}"], "--png"),
        ("cache_latents", ["--dataset_config={lora}", "--vae={lora}", "--debug_mode=html"], "--debug_output"),
    ],
)
@needs_posix
def test_an_output_that_cannot_be_written_is_found_before_an_input_is_read(
    tmp_path, monkeypatch, script, words, option
):
    """The input is no LoRA and no model, which would be the next complaint."""
    from utils.errors import UserError

    (tmp_path / "file").write_text("")
    (tmp_path / "x.safetensors").write_bytes(b"x")
    words = [word.format(lora=tmp_path / "x.safetensors") for word in words]
    for output, complaint in (
        ("/proc/out.safetensors", "/proc: cannot be written to"),
        (tmp_path / "file" / "below.safetensors", "is a file, a folder is expected"),
        (tmp_path, "a folder|ends in .safetensors"),
    ):
        monkeypatch.setattr(sys, "argv", [f"{script}.py", *words, f"{option}={output}"])
        with pytest.raises(UserError, match=f"^{option} .*{complaint}"):
            importlib.import_module(script).main()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "x.safetensors"]


@needs_posix
def test_a_folder_for_videos_that_cannot_be_made_is_found_first(generate):
    from utils.errors import UserError

    with pytest.raises(UserError, match=r"^--save_path /proc/out: cannot be written to"):
        generate("--prompt=cat", "--save_path=/proc/out")


def test_a_full_disk_stops_the_batch(generate, tmp_path, monkeypatch, capfd):
    """The second of three lines cannot be saved. The third is not sampled, and the next run makes both."""
    from modules.generation.outputs import OutputFolder
    from utils.errors import UserError

    prompts, save, saved = tmp_path / "prompts.txt", OutputFolder.save_latents, []
    prompts.write_text("cat --d 1\ncat --d 2\ncat --d 3\n")

    def filling(self, job, latents):
        saved.append(job.request.seed)
        if job.request.seed == 2:
            raise OSError(28, "No space left on device", "x.safetensors")
        save(self, job, latents)

    with monkeypatch.context() as patch:
        patch.setattr(OutputFolder, "save_latents", filling)
        with pytest.raises(UserError, match=r"out: No space left on device; stopped, .* run the same command again"):
            generate("--from_file", prompts, "--output_type=latent")
    assert saved == [1, 2]
    out = generate("--from_file", prompts, "--output_type=latent")
    assert sorted(path.name.split("_")[2] for path in out.iterdir()) == ["1", "2", "3"]
    assert "1 of 3 prompts are finished" in capfd.readouterr().out


def test_the_settings_of_a_strangers_file_say_what_to_make_and_nothing_else(tiny_models, tmp_path):
    import torch

    from modules.generation.settings import parse_generation_options
    from utils.errors import UserError
    from utils.safetensors_utils import save_file

    dit = str(tiny_models.dit)

    def parsed(settings: dict[str, object]):
        path = tmp_path / "strange.safetensors"
        save_file({"latent": torch.zeros(1)}, path, {"settings": json.dumps(settings)})
        models = [f"--{name}={each}" for name, each in vars(tiny_models).items()]
        return parse_generation_options("", [*models, "--from_file", str(path), f"--save_path={tmp_path / 'out'}"])

    written = {"prompt": "cat", "video_size": [32, 48], "lora_multiplier": [-0.5], "lora_weight": [dit]}
    harmful = {
        "save_merged_model": "x.safetensors",
        "config_file": "x",
        "device": "meta",
        "save_path": "x",
        "help": True,
    }
    assert parsed(written | harmful) == parsed(written)
    assert parsed(written).lora.lora_multiplier == [-0.5]
    with pytest.raises(UserError, match=r"strange\.safetensors: lora_weight = '--save_path=x'"):
        parsed({"prompt": "cat", "lora_weight": [dit, "--save_path=x"]})


@pytest.mark.parametrize("name", ["from_file", "video_path", "image_path"])
def test_a_strangers_file_never_names_what_is_read_into_a_video(tiny_models, tmp_path, name):
    """Before, the lines of a secret text stood in the settings of the new videos."""
    import torch

    from modules.generation.settings import parse_generation_options
    from utils.errors import UserError
    from utils.video_io import save_video

    secret, own = tmp_path / "secret.txt", tmp_path / "own.txt"
    secret.write_text("my secret\n")
    own.write_text("cat\n")
    video = tmp_path / "strange.mp4"
    settings = {"prompt": "cat", "seed": 3} if name != "from_file" else {"seed": 3}
    save_video(torch.zeros(3, 1, 16, 16), video, 24, settings | {name: str(secret)})
    models = [f"--{model}={path}" for model, path in vars(tiny_models).items()] + [f"--save_path={tmp_path / 'out'}"]
    words = [*models, "--from_file", str(video)]
    with pytest.raises(UserError, match=rf"strange\.mp4: was made from .*secret\.txt\..* give --{name}"):
        parse_generation_options("", words)
    if name != "from_file":
        options = parse_generation_options("", [*words, f"--{name}={own}"])
        assert (getattr(options.prompt, name), options.prompt.seed) == (own, 3)


def test_a_media_file_is_found_at_home_and_in_a_config_file(tiny_models, tmp_path, monkeypatch):
    """The command line wins over the config file, and that over the settings in the media file."""
    import torch

    from modules.generation.settings import parse_generation_options
    from utils.safetensors_utils import save_file

    settings = {"prompt": "cat", "seed": 1, "fps": 8, "infer_steps": 9, "strength": 0.5}
    save_file({"latent": torch.zeros(1)}, tmp_path / "v.safetensors", {"settings": json.dumps(settings)})
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    (tmp_path / "config.toml").write_text('from_file = "~/v.safetensors"\nfps = 10\nseed = 2\n')
    models = [f"--{name}={each}" for name, each in vars(tiny_models).items()] + [f"--save_path={tmp_path}"]
    for words in (["--from_file=~/v.safetensors"], ["--from_file", "~/v.safetensors"]):
        assert parse_generation_options("", [*models, *words]).prompt.request().prompt == "cat"
    options = parse_generation_options("", [*models, f"--config_file={tmp_path / 'config.toml'}", "--seed=3"])
    request = options.prompt.request()
    assert (request.prompt, request.seed, request.fps, request.steps) == ("cat", 3, 10, 9)
    assert options.prompt.from_file is None


@pytest.mark.parametrize("option", ["--dit", "--vae", "--text_encoder1", "--lora_weight"])
def test_a_file_of_the_wrong_kind_is_found_before_a_model_is_loaded(tiny_models, tmp_path, monkeypatch, option):
    import torch

    import hunyuan_model.checkpoints
    import hv_generate_video
    from utils.errors import UserError
    from utils.safetensors_utils import save_file

    save_file({"blocks.0.self_attn.q.weight": torch.zeros(1)}, tmp_path / "wan.safetensors")
    for loader in ("load_dit", "load_vae", "load_text_encoder_1", "load_text_encoder_2"):
        monkeypatch.setattr(hunyuan_model.checkpoints, loader, lambda *_: pytest.fail("a model was loaded"))
    models = [word for name, path in vars(tiny_models).items() for word in (f"--{name}", str(path))]
    words = [
        *models,
        "--prompt",
        "cat",
        "--save_path",
        str(tmp_path / "out"),
        option,
        str(tmp_path / "wan.safetensors"),
    ]
    monkeypatch.setattr(sys, "argv", ["hv_generate_video.py", *words])
    with pytest.raises(UserError, match=r"wan\.safetensors: .* HunyuanVideo"):
        hv_generate_video.main()


def write_sources(folder: Path) -> None:
    import torch

    from utils.video_io import save_video

    (folder / "no.mp4").write_bytes(b"no video")
    (folder / "no.png").write_bytes(b"no picture")
    save_video(torch.rand(3, 4, 32, 48), folder / "short.mp4", 24)
    (folder / "lines.txt").write_text(f"cat\ncat --video_path {folder / 'no.mp4'}\n")


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--prompt=cat", "--video_path={}/no.mp4"], r"no\.mp4: cannot be read as a video"),
        (["--prompt=cat", "--video_path={}/short.mp4"], r"short\.mp4: 4 frames, .* the longest is 1"),
        (["--prompt=cat", "--image_path={}/no.png"], r"no\.png: "),
        (["--from_file={}/lines.txt"], r"no\.mp4: cannot be read as a video"),
        (["--prompt=cat", "--compile", "--compile_backend=inducktor"], "backend inducktor: unknown .*'inductor'"),
        (
            ["--prompt=cat", "--compile", "--compile_args", "inducktor", "default", "auto", "false"],
            "inducktor: unknown",
        ),
        (["--prompt=cat", "--fp8", "--fp8_fast"], "--fp8_fast: cpu has no float8"),
    ],
)
def test_what_would_fail_later_is_found_before_a_model_is_loaded(generate, tmp_path, monkeypatch, words, complaint):
    import hunyuan_model.checkpoints
    from utils.errors import UserError

    write_sources(tmp_path)
    monkeypatch.setattr("hunyuan_model.quantization.has_fp8_matmul", lambda device: False)
    for loader in ("load_dit", "load_vae", "load_text_encoder_1", "load_text_encoder_2"):
        monkeypatch.setattr(hunyuan_model.checkpoints, loader, lambda *_: pytest.fail("a model was loaded"))
    with pytest.raises(UserError, match=complaint):
        generate(*(word.format(tmp_path) for word in words))


def test_interactive_asks_again_when_the_video_is_none(generate, tmp_path, monkeypatch, capfd):
    write_sources(tmp_path)
    lines = iter([f"cat --video_path {tmp_path / 'no.mp4'}", "exit"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    generate("--interactive")
    assert "no.mp4: cannot be read as a video" in capfd.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_killed_at_ten_moments_every_second_run_finishes_what_is_missing(tiny_models, tmp_path, monkeypatch):
    """Killed when so many of the twelve files are there, and a random moment later."""
    import hv_generate_video
    from utils.video_io import read_video

    prompts = tmp_path / "prompts.txt"
    prompts.write_text("".join(f"cat {index}\n" for index in range(6)))
    models = [f"--{name}={path}" for name, path in vars(tiny_models).items()]
    small = ["--video_size", "32", "48", "--video_length=9", "--infer_steps=4", "--device=cpu", "--output_type=both"]

    def finished_files(out: Path) -> dict[str, int]:
        names = [path for path in out.iterdir() if not path.name.endswith(".partial")] if out.is_dir() else []
        return {path.name: path.stat().st_mtime_ns for path in names}

    rng = random.Random(0)
    for moment, files in enumerate(rng.sample(range(12), 10)):
        out = tmp_path / f"killed{moment}"
        argv = [str(ROOT / "hv_generate_video.py"), *models, *small, f"--from_file={prompts}", f"--save_path={out}"]
        process = subprocess.Popen([sys.executable, *argv], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while len(finished_files(out)) < files or not out.is_dir():
            assert process.poll() is None or len(finished_files(out)) >= files
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.05))
        process.kill()
        process.wait()
        before = finished_files(out)
        for path in out.glob("*.mp4"):
            assert read_video(path)[0].shape == (3, 9, 32, 48)
        monkeypatch.setattr(sys, "argv", argv)
        hv_generate_video.main()
        after = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
        assert before.items() <= after.items()
        assert sorted(name.split("_")[1] for name in after if name.endswith(".mp4")) == list("012345")
        assert len(after) == 12
