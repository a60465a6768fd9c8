"""hv_generate_video.py on the small models: its files, that it is deterministic, and what it does after an error."""

import inspect
import json
import re
import subprocess
import sys
from pathlib import Path

import av
import pytest
import torch

from tests.saved_files import frames, load, only, saved_latents

ROOT = Path(__file__).resolve().parents[2]


def test_the_command_of_the_readme_in_a_process_of_its_own(tiny_models, tmp_path):
    words = [
        *("--video_size", "64", "96", "--video_length", "9", "--infer_steps", "3", "--fp8", "--output_type", "both"),
        *("--prompt", "A cat walks on the grass, realistic style.", "--save_path", tmp_path, "--attn_mode", "sdpa"),
        *("--dit", tiny_models.dit, "--vae", tiny_models.vae, "--vae_chunk_size", "32"),
        *("--vae_spatial_tile_sample_min_size", "128", "--text_encoder1", tiny_models.text_encoder1),
        *("--text_encoder2", tiny_models.text_encoder2, "--seed", "1234", "--device", "cpu"),
    ]
    command = [sys.executable, ROOT / "hv_generate_video.py", *words]
    result = subprocess.run(list(map(str, command)), capture_output=True, text=True, encoding="utf-8", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "Traceback" not in result.stderr
    video = only(tmp_path, "*.mp4")
    assert re.fullmatch(r"\d{8}-\d{6}_0_1234\.mp4", video.name)
    with av.open(str(video)) as container:
        stream = container.streams.video[0]
        assert (stream.width, stream.height, stream.average_rate) == (96, 64, 24)
        assert sum(1 for _ in container.decode(stream)) == 9
    assert str(video) in result.stdout
    assert saved_latents(tmp_path).shape == (16, 3, 8, 12)


def test_latents_carry_the_metadata_of_the_reference_tool(generate):
    from utils.safetensors_utils import read_header

    out = generate("--prompt=cat", "--negative_prompt=dog", "--seed=7", "--output_type=latent")
    metadata = read_header(only(out, "*_7_latent.safetensors"))[1]
    settings = json.loads(metadata.pop("settings"))
    assert metadata == {
        "seeds": "7",
        "prompt": "cat",
        "height": "32",
        "width": "48",
        "video_length": "5",
        "infer_steps": "3",
        "guidance_scale": "1.0",
        "embedded_cfg_scale": "6.0",
        "negative_prompt": "dog",
    }
    assert settings["prompt"] == "cat"
    assert list(out.iterdir()) == [only(out, "*_latent.safetensors")]


def test_no_metadata(generate):
    from modules.generation.outputs import read_settings
    from utils.errors import UserError
    from utils.safetensors_utils import read_header

    out = generate("--prompt=cat", "--output_type=both", "--no_metadata")
    assert read_header(only(out, "*_latent.safetensors"))[1] == {}
    with pytest.raises(UserError, match="no_metadata"):
        read_settings(only(out, "*.mp4"))


def test_a_drawn_seed_is_in_the_name_and_the_metadata_and_the_file_repeats_itself(generate):
    from modules.generation.outputs import read_settings

    first = generate("--prompt=a --w cat", "--guidance_scale=2", "--fps=12", "--output_type=both")
    video = only(first, "*.mp4")
    seed = video.stem.split("_")[2]
    assert read_settings(video)["seed"] == int(seed)
    sources = [video, only(first, "*_latent.safetensors")]
    for name, source in zip(("mp4", "latent"), sources, strict=True):
        again = generate("--from_file", source, "--output_type=both", folder=name, size=["--device=cpu"])
        assert only(again, "*.mp4").stem.split("_")[2] == seed
        assert torch.equal(saved_latents(first), saved_latents(again))
        assert torch.equal(frames(video), frames(only(again, "*.mp4")))
    other = generate("--from_file", video, "--output_type=latent", "--seed=1", folder="other", size=["--device=cpu"])
    assert not torch.equal(saved_latents(first), saved_latents(other))


def test_latents_decode_to_the_frames_of_the_run_that_saved_them(generate, tmp_path):
    out = generate("--prompt=cat", "--seed=3", "--fps=10", "--output_type=both")
    video, latents = only(out, "*.mp4"), only(out, "*_latent.safetensors")
    torch.save(saved_latents(out), tmp_path / "seed.pt")
    decoded = generate("--latent_path", latents, folder="decoded")
    generate("--latent_path", tmp_path / "seed.pt", "--fps=10", folder="decoded")
    assert torch.equal(frames(only(decoded, "*_0_3_*.mp4")), frames(video))
    assert torch.equal(frames(only(decoded, "*_seed.mp4")), frames(video))
    with av.open(str(only(decoded, "*_0_3_*.mp4"))) as container:
        assert container.streams.video[0].average_rate == 10


def test_images_are_the_frames(generate):
    out = generate("--prompt=cat", "--seed=3", "--output_type=images")
    assert sorted(path.name for path in only(out, "*").iterdir()) == [f"{index:05d}.png" for index in range(5)]


def test_alone_in_a_batch_and_with_block_swap_the_latents_are_the_same(generate, tmp_path):
    alone = saved_latents(generate("--prompt=cat", "--seed=3", "--output_type=latent"))
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a longer prompt about a dog --d 1 --f 9\ncat --d 3\n")
    batch = generate("--from_file", prompts, "--output_type=latent", folder="batch")
    assert torch.equal(load(only(batch, "*_1_3_*_latent.safetensors")), alone)
    assert load(only(batch, "*_0_1_*_latent.safetensors")).shape[1] == 3
    offloaded = generate("--prompt=cat", "--seed=3", "--output_type=latent", "--img_in_txt_in_offloading", folder="off")
    assert torch.equal(saved_latents(offloaded), alone)
    swapped = generate("--prompt=cat", "--seed=3", "--output_type=latent", "--blocks_to_swap=3", folder="swapped")
    assert torch.equal(saved_latents(swapped), alone)


def test_what_fails_does_not_stop_the_rest_and_is_made_by_the_next_run(generate, tmp_path, monkeypatch, capfd):
    """In the first run, the LLM's output for one line is NaN; in the second it is sound."""
    from hunyuan_model.text_encoder import LlmTextEncoder
    from utils.errors import UserError

    prompts = tmp_path / "prompts.txt"
    prompts.write_text("cat --d 1\nbroken --d 2\n# a comment\ncat\ncat\n")
    encode = LlmTextEncoder.encode

    def broken(self, texts):
        states, mask = encode(self, texts)
        return (states * float("nan") if texts == ["broken"] else states), mask

    with monkeypatch.context() as patch:
        patch.setattr(LlmTextEncoder, "encode", broken)
        with pytest.raises(UserError, match=r"1 of 4 videos failed: text_states .*NaN"):
            generate("--from_file", prompts)
    first = {path.name for path in (tmp_path / "out").iterdir()}
    assert len(first) == 3
    assert "failed: " in capfd.readouterr().err
    generate("--from_file", prompts)
    assert "3 of 4 prompts are finished" in capfd.readouterr().out
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert first < names
    assert sorted(name.split("_")[1] for name in names) == ["0", "1", "2", "3"]
    assert len({name.split("_")[2] for name in names}) == 4  # every line without a seed drew its own
    generate("--from_file", prompts)
    assert {path.name for path in (tmp_path / "out").iterdir()} == names


def test_latents_of_an_earlier_run_are_never_deleted(generate, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("cat --d 1\n")
    out = generate("--from_file", prompts, "--output_type=latent")
    latents = only(out, "*")
    generate("--from_file", prompts, "--output_type=video")
    assert sorted(path.suffix for path in out.iterdir()) == [".mp4", ".safetensors"]
    assert latents.exists()
    generate("--latent_path", latents)
    assert latents.exists()


def test_a_changed_line_or_model_setting_is_made_again(generate, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("cat --d 1\ndog --d 1\n")
    out = generate("--from_file", prompts, "--output_type=latent")
    prompts.write_text("bird --d 1\ndog --d 1\ncat --d 1 --s 2\n")
    generate("--from_file", prompts, "--output_type=latent")
    assert len(list(out.iterdir())) == 4
    generate("--from_file", prompts, "--output_type=latent", "--blocks_to_swap=1", "--attn_mode=sdpa")
    assert len(list(out.iterdir())) == 4
    generate("--from_file", prompts, "--output_type=latent", "--exclude_single_blocks")
    assert len(list(out.iterdir())) == 7


def test_processes_share_the_prompts(generate, tmp_path, monkeypatch):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("".join(f"cat --d {seed}\n" for seed in range(3)))
    monkeypatch.setenv("WORLD_SIZE", "2")
    made = []
    for rank in "10":
        monkeypatch.setenv("RANK", rank)
        out = generate("--from_file", prompts, "--output_type=latent")
        made.append(len(list(out.iterdir())))
    assert made == [1, 3]


def test_interactive_loads_once_and_survives_a_wrong_line(generate, tmp_path, monkeypatch, capfd):
    lines = iter(["cat --d 1", "", "cat --wrong 1", "help", "a dog --d 2 --f 9", "exit"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    out = generate("--interactive", "--output_type=both")
    assert len(list(out.glob("*.mp4"))) == 2
    captured = capfd.readouterr()
    assert "unknown option --wrong" in captured.err
    assert "type a prompt, help or exit" in captured.out and "--fs flow shift" in captured.out
    assert captured.out.count("DiT: ") == captured.out.count("VAE: ") == captured.out.count("LLM: ") == 1
    alone = generate("--prompt=cat", "--seed=1", "--output_type=latent", folder="alone")
    assert torch.equal(load(only(out, "*_1_latent.safetensors")), saved_latents(alone))


def test_out_of_memory_takes_smaller_tiles(generate, monkeypatch, capfd):
    from hunyuan_model.vae import AutoencoderKLCausal3D

    decode = AutoencoderKLCausal3D.decode

    def limited(self, latents):
        if self.tile_size is None or self.tile_size > 128:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return decode(self, latents)

    monkeypatch.setattr(AutoencoderKLCausal3D, "decode", limited)
    out = generate("--prompt=cat", "--seed=1")
    assert [path.suffix for path in out.iterdir()] == [".mp4"]
    assert re.findall(r"trying tiles of (\d+)", capfd.readouterr().err) == ["256", "128"]


def test_a_failed_decode_keeps_the_latents_and_tells_the_command(generate, monkeypatch, tmp_path):
    from hunyuan_model.vae import AutoencoderKLCausal3D
    from utils.errors import UserError

    def always(self, latents):
        raise torch.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(AutoencoderKLCausal3D, "decode", always)
        with pytest.raises(
            UserError, match="out of memory; the latents are saved, decode them later: python hv_gen"
        ) as error:
            generate("--prompt=cat", "--seed=1", "--vae_chunk_size=8", "--vae_tiling", "--vae_dtype=float32")
    latents = only(tmp_path / "out", "*")
    assert str(error.value).count(str(latents)) == 1
    command = str(error.value).split("decode them later: python hv_generate_video.py ")[1].split()
    assert {"--vae_chunk_size", "8", "--vae_dtype", "--vae_spatial_tile_sample_min_size", "--device"} <= set(command)
    monkeypatch.setattr(sys, "argv", ["hv_generate_video.py", *command])
    import hv_generate_video

    hv_generate_video.main()
    assert frames(only(tmp_path / "out", "*.mp4")).shape == (3, 5, 32, 48)


def test_what_the_machine_lacks_is_one_line_for_each_video(generate, monkeypatch, tmp_path, capfd):
    """Out of memory for the source, NaN from its encoder, a full disk."""
    from hunyuan_model.vae import AutoencoderKLCausal3D
    from utils.errors import UserError
    from utils.video_io import save_video

    def failing(error):
        def fail(*_, **__):
            raise error

        return fail

    save_video(torch.rand(3, 5, 32, 48), tmp_path / "source.mp4", 24)
    source = ["--prompt=cat", "--video_path", tmp_path / "source.mp4"]
    full, encode = OSError(28, "No space left on device", "x.safetensors"), AutoencoderKLCausal3D.encode
    with monkeypatch.context() as patch:
        patch.setattr(AutoencoderKLCausal3D, "encode", failing(RuntimeError("CUDA error: out of memory")))
        with pytest.raises(UserError, match=r"out of GPU memory while the source is encoded: use --vae_chunk_size"):
            generate(*source)
    with monkeypatch.context() as patch:
        patch.setattr(AutoencoderKLCausal3D, "encode", lambda self, pixels: encode(self, pixels * float("nan")))
        with pytest.raises(UserError, match=r"NaN or infinity in the VAE's encoder"):
            generate(*source)
    for name, error, complaint in (
        ("save_latents", full, "out: No space left on device; stopped"),
        ("save_pixels", full, "out: No space left on device; stopped"),
        ("save_pixels", torch.OutOfMemoryError("CUDA out of memory"), "1 of 1 videos failed: .*out of memory; use"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(f"modules.generation.outputs.OutputFolder.{name}", failing(error))
            with pytest.raises(UserError, match=complaint):
                generate("--prompt=cat")
    assert "Traceback" not in capfd.readouterr().err


def test_attention_is_verified_before_a_model_is_loaded(generate, monkeypatch):
    from utils.errors import UserError

    def wrong(*_):
        raise UserError("wrong attention")

    monkeypatch.setattr("hunyuan_model.attention.verify_attention", wrong)
    monkeypatch.setattr("hunyuan_model.checkpoints.load_text_encoder_1", lambda *_: pytest.fail("loaded"))
    with pytest.raises(UserError, match="wrong attention"):
        generate("--prompt=cat")


def test_a_vae_that_overflows_is_run_in_float32(generate, monkeypatch, capfd):
    from hunyuan_model.vae import AutoencoderKLCausal3D

    decode = AutoencoderKLCausal3D.decode

    def overflowing(self, latents):
        return decode(self, latents) * (float("nan") if latents.dtype != torch.float32 else 1)

    monkeypatch.setattr(AutoencoderKLCausal3D, "decode", overflowing)
    generate("--prompt=cat", "--seed=1", "--vae_dtype=bfloat16")
    assert "decoding again in float32" in capfd.readouterr().err


def test_video_to_video_keeps_what_strength_leaves(generate, tmp_path):
    from utils.video_io import save_video

    source = torch.zeros(3, 9, 40, 48)
    source[0] = 0.8
    save_video(source, tmp_path / "red.mp4", 24)
    latents = {
        strength: saved_latents(
            generate(
                "--prompt=cat",
                "--seed=1",
                f"--strength={strength}",
                "--video_path",
                tmp_path / "red.mp4",
                "--output_type=latent",
                folder=f"s{strength}",
            )
        )
        for strength in (0.34, 0.67, 1.0)
    }
    plain = saved_latents(generate("--prompt=cat", "--seed=1", "--output_type=latent", folder="plain"))
    assert torch.equal(latents[1.0], plain)
    distances = [(latents[strength] - plain).norm().item() for strength in (0.34, 0.67, 1.0)]
    assert distances[0] > distances[1] > distances[2] == 0


def test_image_to_video_takes_an_image_and_only_where_the_model_does(generate, tiny_models, tmp_path):
    from PIL import Image

    from examples.tiny_models import dit_shapes, random_weights
    from utils.errors import UserError
    from utils.safetensors_utils import read_header, save_file

    skyreels = tmp_path / "skyreels.safetensors"
    save_file(random_weights(dit_shapes(in_channels=32), 0), skyreels)
    for name, colour in (("red", (220, 20, 20)), ("blue", (20, 20, 220))):
        Image.new("RGB", (60, 40), colour).save(tmp_path / f"{name}.png")
    words = ["--prompt=cat", "--seed=1", "--output_type=latent", "--dit", skyreels, "--dit_in_channels=32"]
    red = generate(*words, "--image_path", tmp_path / "red.png", "--guidance_scale=2", folder="red")
    blue = generate(*words, "--image_path", tmp_path / "blue.png", "--guidance_scale=2", folder="blue")
    assert (saved_latents(red) - saved_latents(blue)).norm() > 1e-3 * saved_latents(red).norm()
    assert read_header(only(red, "*"))[1]["prompt"] == "FPS-24, cat"
    with pytest.raises(UserError, match="give --image_path"):
        generate(*words)
    with pytest.raises(UserError, match="--image_path needs SkyReels"):
        generate("--prompt=cat", "--image_path", tmp_path / "red.png")
    with pytest.raises(UserError, match=r"--dit_in_channels 16: .* has 32"):
        generate(*words, "--dit_in_channels=16")


def test_step_cache_is_off_at_zero_and_counts_what_it_leaves_out(generate, capfd):
    words = ["--prompt=cat", "--seed=1", "--output_type=latent"]
    plain = saved_latents(generate(*words))
    assert torch.equal(saved_latents(generate(*words, "--step_cache=0", folder="zero")), plain)
    assert "step cache: 27 of 27 blocks" in capfd.readouterr().out
    cached = saved_latents(generate(*words, "--step_cache=100", folder="all"))
    assert "step cache: 19 of 27 blocks" in capfd.readouterr().out
    assert not torch.equal(cached, plain)


def test_a_training_preview_has_the_same_latents(generate, tiny_models, tmp_path):
    from types import SimpleNamespace

    from accelerate import Accelerator

    from hunyuan_model.checkpoints import load_dit, load_text_encoder_1, load_text_encoder_2
    from modules.generation.lazy_model import LazyModel
    from modules.generation.requests import Request, parse_line
    from modules.generation.text_encoding import encode_texts
    from modules.training.previews import Previewer

    cpu = torch.device("cpu")
    line = "cat --w 48 --h 32 --f 5 --s 3 --fs 7 --l 2 --n dog --d 11"
    request = parse_line(line, Request())
    encoders = [
        LazyModel(lambda load=load, path=path: load(path, "cpu", torch.float32), cpu)
        for load, path in (
            (load_text_encoder_1, tiny_models.text_encoder1),
            (load_text_encoder_2, tiny_models.text_encoder2),
        )
    ]
    encoded = encode_texts(["cat", "dog"], *encoders)
    seen = []

    def decode(latents):
        seen.append(latents)
        return torch.zeros(3, 5, 32, 48)

    files = SimpleNamespace(name="lora", previews=tmp_path)
    log = SimpleNamespace(record=lambda *_, **__: None, say=pytest.fail, progress=SimpleNamespace(step=1))
    dit = load_dit(tiny_models.dit, dtype=torch.float32)
    prompts = [(request, encoded["cat"], encoded["dog"])]
    decoder = SimpleNamespace(decode=decode, vae=SimpleNamespace(release=lambda: None, model=torch.nn.Identity()))
    Previewer(prompts, decoder, files, Accelerator(cpu=True), seed=0).run(dit, "e000001", log, lambda: False)
    (tmp_path / "prompts.txt").write_text(line)
    out = generate("--from_file", tmp_path / "prompts.txt", "--output_type=latent")
    assert torch.equal(seen[0][0], saved_latents(out))


def test_one_model_is_in_memory_at_a_time(generate, loras, monkeypatch, tmp_path):
    import weakref

    from hunyuan_model import checkpoints
    from utils.video_io import save_video

    loaded, alive = [], []

    def watched(name):
        load = getattr(checkpoints, name)

        def watching(*arguments, **named):
            alive.append([other for other, model in loaded if model() is not None])
            model = load(*arguments, **named)
            loaded.append((name, weakref.ref(model)))
            return model

        return watching

    for name in ("load_text_encoder_1", "load_text_encoder_2", "load_dit", "load_vae"):
        monkeypatch.setattr(checkpoints, name, watched(name))
    save_video(torch.rand(3, 5, 32, 48), tmp_path / "source.mp4", 24)
    words = ["--prompt=cat", "--video_path", tmp_path / "source.mp4", "--step_cache=0.5", "--blocks_to_swap=2"]
    generate(*words, "--lora_weight", loras[0], "--compare")
    order = ["load_text_encoder_1", "load_text_encoder_2", "load_vae", "load_dit", "load_vae"]
    assert [name for name, _ in loaded] == order
    assert alive == [[]] * 5


def test_four_calls_lead_from_the_script_to_the_euler_step(generate, monkeypatch):
    from modules.generation import sampler

    seen = []

    def watched(*arguments, step=sampler.euler_step):
        # torch's own frames do not count; its .venv may lie below ROOT.
        stack = [frame for frame in inspect.stack() if "site-packages" not in frame.filename]
        seen.append([frame.function for frame in stack[:5]])
        return step(*arguments)

    monkeypatch.setattr(sampler, "euler_step", watched)
    generate("--prompt=cat", "--output_type=latent")
    assert seen[0] == ["watched", "denoise", "sample_latents", "sample", "make_videos"]
