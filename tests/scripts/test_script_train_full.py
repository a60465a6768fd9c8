"""hv_train.py: full fine-tuning from the command line, against the plain model and an optimizer written by hand."""

import json
import os
import re
import subprocess
import sys

import pytest
import torch

from hunyuan_model.checkpoints import load_dit
from hunyuan_model.vae import SCALING_FACTOR
from modules.training.step_plan import draw_noise, step_generators
from modules.training.timesteps import TimestepOptions, sample_sigmas
from tests.conftest import ROOT
from tests.training_world import (
    assert_same,
    assert_same_course,
    full_command,
    log_of,
    run_training,
    train,
    tune,
    write_world,
)
from utils.errors import UserError
from utils.safetensors_utils import load_file, read_header, save_file


@pytest.fixture(scope="module")
def weights(dit):
    """The tensors that training starts from."""
    return torch.load(dit, weights_only=True)["module"]


def test_the_script_learns_and_what_it_writes_is_a_dit_for_the_other_scripts(world, dit, weights, tmp_path):
    secret = "hf_never_write_me"
    words = full_command(
        world, dit, tmp_path, "--max_train_steps", 12, "--max_train_epochs", 12, "--learning_rate", 3e-3
    )
    script = [sys.executable, str(ROOT / "hv_train.py"), *words, "--metadata_title", "T", "--huggingface_token", secret]
    subprocess.run(script, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL)
    epochs = [sum(line["loss"] for line in log_of(tmp_path)[at : at + 5]) / 5 for at in (0, 55)]
    assert epochs[1] < 0.8 * epochs[0]

    path = tmp_path / "full.safetensors"
    infos, metadata = read_header(path)
    assert {name: info.shape for name, info in infos.items()} == {name: t.shape for name, t in weights.items()}
    assert {info.dtype for info in infos.values()} == {torch.float32}
    assert metadata["modelspec.architecture"] == "hunyuan-video" and metadata["modelspec.title"] == "T"
    assert metadata["ss_steps"] == "60" and json.loads(metadata["ss_trainable_modules"]) == ["."]
    assert not [key for key in metadata if "network" in key] and secret not in json.dumps(metadata)
    assert secret not in (tmp_path / "full.settings.toml").read_text(encoding="utf-8")
    tuned = load_dit(path, dtype=torch.float32)
    assert all(not torch.equal(tensor, weights[name]) for name, tensor in tuned.named_parameters())
    assert train(world, path, tmp_path / "lora", "--max_train_steps", 1)


def test_only_the_named_modules_change(world, dit, weights, tmp_path):
    tuned = tune(world, dit, tmp_path, "--trainable_modules", "img_mod", "single_blocks.0.linear2")
    changed = {name for name in weights if not torch.equal(tuned[name], weights[name])}
    assert changed == {name for name in weights if "img_mod" in name or "single_blocks.0.linear2" in name}


@pytest.mark.parametrize("precision", [[], ["--full_bf16"]], ids=["float32", "full_bf16"])
def test_five_steps_and_five_resumed_are_ten(world, dit, tmp_path, precision):
    words = ["--max_train_steps", 10, "--lr_scheduler", "cosine", "--save_state", "--validation_split", 0.2, *precision]
    whole, rest = tmp_path / "whole", tmp_path / "rest"
    tuned = tune(world, dit, whole, *words, "--save_every_n_steps", 5)
    assert_same(tune(world, dit, rest, *words, "--resume", whole / "full-step00000005-state"), tuned)
    bases = [
        json.loads((folder / "full-state" / "train_state.json").read_text(encoding="utf-8"))["base_validation_loss"]
        for folder in (whole, rest)
    ]
    assert bases[0] == bases[1] and bases[0] is not None


def test_resume_auto_continues_a_run_that_was_stopped(world, dit, tmp_path):
    words = ["--max_train_steps", 3, "--save_state", "--save_every_n_steps", 2]
    tuned = tune(world, dit, tmp_path / "whole", *words)
    (tmp_path / "part").mkdir()
    (tmp_path / "whole" / "full-step00000002-state").rename(tmp_path / "part" / "full-step00000002-state")
    assert_same(tune(world, dit, tmp_path / "part", *words, "--resume", "auto"), tuned)


def gradients_by_hand(model, batch, step, seed=7):
    """The gradients of mean((v - (noise - x0))^2) of the plain model, without trainer, checkpointing or recipes."""
    (generator,) = step_generators(seed, step, [0])
    sigma = sample_sigmas(TimestepOptions(timestep_sampling="uniform"), [generator], [step], seed)
    x0 = batch.latents * SCALING_FACTOR
    noise = draw_noise(x0, [generator])
    x_t = (1 - sigma) * x0 + sigma * noise
    captions = (batch.text_states, batch.text_mask, batch.text_states_2)
    v = model(x_t, 1000 * sigma, *captions, guidance=torch.tensor([6000.0]))
    loss = (v - (noise - x0)).square().mean()
    return dict(zip(dict(model.named_parameters()), torch.autograd.grad(loss, list(model.parameters())), strict=True))


def test_two_steps_are_adamw_written_by_hand_on_the_plain_model(dit, tmp_path, monkeypatch):
    from modules.training.denoiser import Denoiser

    batches = []
    original = Denoiser.velocity
    monkeypatch.setattr(Denoiser, "velocity", lambda *given: (batches.append(given[3]), original(*given))[1])
    words = ["--max_train_steps", 2, "--timestep_sampling", "uniform", "--guidance_scale", 6, "--max_grad_norm", 0]
    settings = ["--optimizer_args", "eps=1e-3", "weight_decay=0.1", "betas=0.8,0.9"]
    tuned = tune(write_world(tmp_path, items=2), dit, tmp_path / "out", *words, *settings)

    model = load_dit(dit, dtype=torch.float32).requires_grad_()
    mean, square = ({name: torch.zeros_like(p) for name, p in model.named_parameters()} for _ in range(2))
    for step, batch in enumerate(batches[1:], start=1):  # the first batch tries the memory
        gradients = gradients_by_hand(model, batch, step - 1)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                mean[name] = 0.8 * mean[name] + 0.2 * gradients[name]
                square[name] = 0.9 * square[name] + 0.1 * gradients[name] ** 2
                away = (mean[name] / (1 - 0.8**step)) / ((square[name] / (1 - 0.9**step)).sqrt() + 1e-3)
                parameter.copy_(parameter * (1 - 1e-3 * 0.1) - 1e-3 * away)
    assert len(batches) == 3
    torch.testing.assert_close(tuned, {name: p.detach() for name, p in model.named_parameters()}, rtol=0, atol=2e-6)


def test_accumulated_batches_count_as_one_batch(dit, tmp_path):
    together, apart = (write_world(tmp_path / str(size), items=2, batch_size=size) for size in (2, 1))
    words = ["--max_train_steps", 4, "--learning_rate", 1e-4]
    first = tune(together, dit, tmp_path / "a", *words)
    second = tune(apart, dit, tmp_path / "b", *words, "--gradient_accumulation_steps", 2)
    torch.testing.assert_close(first, second, rtol=0, atol=1e-5)
    assert_same_course(tmp_path / "a", tmp_path / "b")


@pytest.mark.slow
def test_two_processes_are_one_with_batches_of_two(dit, tmp_path):
    one, two = (write_world(tmp_path / str(size), items=2, batch_size=size) for size in (1, 2))
    words = ["--max_train_steps", 4, "--learning_rate", 1e-4]
    together = tune(two, dit, tmp_path / "together", *words)
    launch = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0"]
    script = [sys.executable, *launch, str(ROOT / "hv_train.py"), *full_command(one, dit, tmp_path / "shared", *words)]
    subprocess.run(script, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=1200)
    torch.testing.assert_close(load_file(tmp_path / "shared" / "full.safetensors"), together, rtol=0, atol=1e-5)
    assert_same_course(tmp_path / "shared", tmp_path / "together")


@pytest.mark.parametrize("flag", ["--gradient_checkpointing", "--selective_checkpointing"])
def test_checkpointing_trains_every_weight_alike(world, dit, weights, tmp_path, flag):
    words = ["--mixed_precision", "bf16", "--max_train_steps", 2, "--optimizer_type", "sgd"]
    plain, saving = tune(world, dit, tmp_path / "a", *words), tune(world, dit, tmp_path / "b", *words, flag)
    for name, before in weights.items():
        way = plain[name] - before
        assert way.norm() > 0 and (saving[name] - plain[name]).norm() < 0.01 * way.norm(), name


def test_items_one_by_one_train_alike_with_selective_checkpointing(dit, tmp_path):
    pair = write_world(tmp_path, items=2, batch_size=2)
    words = ["--mixed_precision", "bf16", "--max_train_steps", 2, "--split_attn"]
    plain = tune(pair, dit, tmp_path / "a", *words)
    assert_same(tune(pair, dit, tmp_path / "b", *words, "--selective_checkpointing"), plain)


def test_full_bf16_keeps_trains_and_writes_bfloat16(world, dit, tmp_path):
    words = ["--full_bf16", "--save_state", "--optimizer_type", "adafactor", "--lr_scheduler", "constant"]
    tune(world, dit, tmp_path, *words, "--optimizer_args", "relative_step=False", "scale_parameter=False")
    files = [tmp_path / "full.safetensors", tmp_path / "full-state" / "trained.safetensors"]
    assert {info.dtype for file in files for info in read_header(file)[0].values()} == {torch.bfloat16}
    assert read_header(files[0])[1]["ss_full_bf16"] == "True"


def test_frozen_weights_may_be_bfloat16_beside_trained_float32(world, dit, weights, tmp_path, monkeypatch):
    loaded = []
    keep = lambda *given, **named: loaded.append(load_dit(*given, **named)) or loaded[0]  # noqa: E731
    monkeypatch.setattr("hunyuan_model.checkpoints.load_dit", keep)
    words = ["--trainable_modules", "single_blocks", "--dit_dtype", "bf16", "--mixed_precision", "bf16", "--save_state"]
    tuned = tune(world, dit, tmp_path, *words)
    trained = load_file(tmp_path / "full-state" / "trained.safetensors")
    assert {tensor.dtype for tensor in tuned.values()} == {torch.bfloat16}
    assert {tensor.dtype for tensor in trained.values()} == {torch.float32}
    assert {p.dtype for name, p in loaded[0].named_parameters() if name not in trained} == {torch.bfloat16}
    for name, tensor in tuned.items():
        assert torch.equal(tensor, (trained if name in trained else weights)[name].bfloat16()), name


def test_frozen_embedders_may_wait_on_the_cpu(world, dit, tmp_path):
    words = ["--trainable_modules", "double_blocks", "time_in"]
    apart = tune(world, dit, tmp_path / "a", *words, "--img_in_txt_in_offloading")
    assert_same(apart, tune(world, dit, tmp_path / "b", *words))


def test_running_out_of_memory_says_what_to_try(world, dit, tmp_path, monkeypatch):
    def out_of_memory(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("modules.training.denoiser.Denoiser.velocity", out_of_memory)
    with pytest.raises(UserError, match=r"out of GPU memory on the largest batch, .*: give --gradient_checkpointing"):
        tune(world, dit, tmp_path)


def test_the_saved_settings_make_the_same_model(world, dit, tmp_path):
    tuned = tune(world, dit, tmp_path / "a", "--timestep_sampling", "shift", "--trainable_modules", "double_blocks")
    run_training(["--config_file", tmp_path / "a" / "full.settings.toml", "--output_dir", tmp_path / "b"], "hv_train")
    assert_same(load_file(tmp_path / "b" / "full.safetensors"), tuned)


def test_the_config_of_the_source_goes_into_the_checkpoint(world, weights, tmp_path):
    source = tmp_path / "dit.safetensors"
    save_file(weights, source, {"config": '{"rope_dims": [8, 12, 12]}'})
    tune(world, source, tmp_path / "out", "--max_train_steps", 1)
    assert load_dit(tmp_path / "out" / "full.safetensors").config.rope_dims == (8, 12, 12)


def test_previews_on_the_way_and_videos_of_the_result(world, tiny_models, tmp_path, generate):
    (tmp_path / "prompts.txt").write_text("a red ball --w 32 --h 32 --s 2\n", encoding="utf-8")
    models = [f"--{name}={path}" for name, path in vars(tiny_models).items() if name != "dit"]
    words = [*models, "--sample_prompts", tmp_path / "prompts.txt", "--sample_every_n_steps", 2]
    tune(world, tiny_models.dit, tmp_path / "out", *words, "--max_train_steps", 2)
    assert [path.suffix for path in (tmp_path / "out" / "sample").iterdir()] == [".png"]
    tuned = tmp_path / "out" / "full.safetensors"
    folder = generate("--dit", tuned, "--prompt", "a red ball", "--seed", 1, "--output_type", "latent", folder="video")
    (latents,) = folder.glob("*.safetensors")
    assert all(tensor.isfinite().all() for tensor in load_file(latents).values())


def test_dry_run_says_what_the_weights_need_and_writes_nothing(world, dit, tmp_path, capsys):
    tune(world, dit, tmp_path / "absent", "--dry_run", "--full_bf16")
    printed = capsys.readouterr().out
    assert 'trainable_modules = ["."]' in printed
    assert re.search("trained weights +0.8 MiB\n.*gradients +0.8 MiB\n.*optimizer's states +1.6 MiB", printed)
    assert not (tmp_path / "absent").exists()


NOT_HERE = [
    "flash3", "compile", "compile_backend", "cuda_allow_tf32", "cuda_cudnn_benchmark", "fp8_base", "save_precision",
    "gradient_checkpointing_cpu_offload", "use_pinned_memory_for_block_swap", "block_swap_h2d_only", "save_format",
    "block_swap_ring_size", "preserve_distribution_shape", "num_timestep_buckets", "show_timesteps", "no_metadata",
    "network_weights", "network_module", "network_dim", "training_comment", "base_weights", "metadata_reso",
    "metadata_arch", "vram_gb",
]  # fmt: skip
WRONG = {name: ([f"--{name}"], f"unknown option --{name}") for name in NOT_HERE} | {
    "a module that is not there": (["--trainable_modules", "attention"], "--trainable_modules attention: no parameter"),
    "no module": (["--trainable_modules"], "--trainable_modules: parts of names are expected"),
    "swapping": (["--blocks_to_swap", "4"], "--blocks_to_swap 4: only frozen blocks.*--gradient_checkpointing"),
    "both": (["--full_fp16", "--full_bf16"], "--full_fp16 and --full_bf16 exclude each other"),
    "full_fp16 without scaling": (["--full_fp16"], "--full_fp16 needs --mixed_precision fp16"),
    "float16 on a CPU": (["--full_fp16", "--mixed_precision", "fp16"], "--mixed_precision fp16: a CPU"),
    "two dtypes without autocast": (
        ["--trainable_modules", "img_in", "--dit_dtype", "bf16"], "--dit_dtype bf16: the trained weights are float32",
    ),
    "embedders that are trained": (["--img_in_txt_in_offloading"], "--img_in_txt_in_offloading: --trainable_modules"),
    "a sampler of LoRA training": (["--timestep_sampling", "logsnr"], "'logsnr' is not one of sigma, uniform"),
    "sage": (["--sage_attn"], "SageAttention has no backward pass"),
    "other modules than the state's": (
        ["--resume", "{}/full-state", "--trainable_modules", "img_in"], "is \\(.*\\) in the state and absent here",
    ),
    "validation from a state without it": (
        ["--resume", "{}/full-state", "--validation_split", "0.2"], "full-state has no validation loss from before",
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def state_folder(world, dit, tmp_path_factory):
    folder = tmp_path_factory.mktemp("state")
    tune(world, dit, folder, "--max_train_steps", 1, "--save_state")
    return folder


@pytest.mark.parametrize("name", WRONG)
def test_wrong_invocations_end_before_a_model_is_loaded(world, dit, state_folder, tmp_path, monkeypatch, name):
    words, message = WRONG[name]
    monkeypatch.setattr("hunyuan_model.checkpoints.load_dit", lambda *_, **__: pytest.fail("a model was loaded"))
    with pytest.raises(UserError, match=message) as error:
        tune(world, dit, tmp_path / "out", *[word.format(state_folder) for word in words])
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


@pytest.mark.parametrize("words", [[], ["--learning_rate", "fast"], ["--blocks_to_swap", "4"]], ids=str)
def test_the_script_itself_ends_with_2_and_one_line_without_torch(words):
    guard = "import sys; sys.modules['torch'] = None; import hv_train; from utils.cli import run_script; "
    code = f"{guard}run_script(lambda: hv_train.main({words!r}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, encoding="utf-8")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
