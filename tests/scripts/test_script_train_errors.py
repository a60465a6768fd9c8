"""Wrong invocations of hv_train_network.py: one line, exit 2, before a model is loaded, and nothing is written."""

import shutil
import subprocess
import sys

import pytest
import torch

from examples.tiny_models import dit_shapes, random_weights
from tests.conftest import ROOT
from tests.platforms import needs_posix
from tests.training_world import command, run_training, train, write_world
from utils.errors import UserError
from utils.safetensors_utils import save_file


@pytest.fixture(scope="module")
def place(tiny_models, tmp_path_factory):
    """A folder with everything that the wrong invocations name."""
    folder = tmp_path_factory.mktemp("errors")
    world = write_world(folder / "world", items=2)
    train(world, tiny_models.dit, folder / "good", "--max_train_steps", 1, "--save_state_on_train_end")
    (folder / "good" / "lora.safetensors").rename(folder / "lora.safetensors")
    (folder / "empty").mkdir()
    write_world(folder / "one", items=1)
    save_file({"x": torch.zeros(1)}, folder / "no_lora.safetensors")
    for channels in (32, 33):
        save_file(random_weights(dit_shapes(in_channels=channels), 0), folder / f"dit{channels}.safetensors")
    texts = {
        "typo.toml": "learning_rte = 1e-4\n",
        "choice.toml": 'mixed_precision = "bf61"\n',
        "type.toml": 'learning_rate = "fast"\n',
        "broken.toml": "learning_rate = \n",
        "list.toml": "seed = [1, 2]\n",
        "prompts.txt": "a cat --q 3\n",
        "good_prompts.txt": "a cat\n",
        "prompts.md": "a cat\n",
        "image.txt": f"a cat --i {folder / 'typo.toml'}\n",
        "dataset_typo.toml": "[[datasets]]\nimage_directry = 'x'\n",
        "dataset_uncached.toml": "[[datasets]]\nresolution = [64, 48]\nimage_directory = 'x'\ncache_directory = 'y'\n",
    }
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    for name, pattern in {"no_latents": "item1_*_hv.safetensors", "no_text": "item1_hv_te.safetensors"}.items():
        partial = write_world(folder / name, items=2)
        next(partial.cache.glob(pattern)).unlink()
    shutil.copytree(folder / "good" / "lora-state", folder / "old-state")
    shutil.copytree(folder / "good" / "lora-state", folder / "damaged-state")
    (folder / "damaged-state" / "train_state.json").write_text('{"version": 1, "step": 2}', encoding="utf-8")
    (folder / "old-state" / "train_state.json").write_text('{"version": 0}', encoding="utf-8")
    return folder, world


MODELS = ["--sample_at_first", "--vae", "{vae}", "--text_encoder1", "{te}", "--text_encoder2", "{te2}"]
WRONG = {
    "no dit": (["--dit"], "--dit: expected one argument"),
    "missing dit": (["--dit", "{}/absent.pt"], "absent.pt: no such file"),
    "dit is a lora": (["--dit", "{}/lora.safetensors"], "lora.safetensors: a DiT of HunyuanVideo is expected"),
    "dit is a vae": (["--dit", "{vae}"], "a DiT of HunyuanVideo is expected, this is a VAE"),
    "channels": (["--dit_in_channels", "32"], "--dit_in_channels 32: .* has 16"),
    "an image beside a mask": (["--dit", "{}/dit33.safetensors"], "dit33.safetensors: 33 input channels; only 16"),
    "previews of an image model": (
        ["--dit", "{}/dit32.safetensors", "--sample_prompts", "{}/good_prompts.txt", *MODELS],
        "--sample_prompts: .*dit32.safetensors makes videos of an image",
    ),
    "unknown option": (["--learning_rte", "1"], "unknown option --learning_rte .*did you mean '--learning_rate'"),
    "config with a typo": (["--config_file", "{}/typo.toml"], "typo.toml: unknown option 'learning_rte' .*learning_r"),
    "config with a wrong choice": (["--config_file", "{}/choice.toml"], "choice.toml: .*'bf61' is not one of"),
    "config with a wrong type": (["--config_file", "{}/type.toml"], "type.toml: .*'fast': a number is expected"),
    "config that is broken": (["--config_file", "{}/broken.toml"], "broken.toml: config file is not valid TOML"),
    "config with a list": (["--config_file", "{}/list.toml"], "list.toml: seed .* one value is expected"),
    "config that is missing": (["--config_file", "{}/absent.toml"], "absent.toml: config file not found"),
    "missing dataset": (["--dataset_config", "{}/absent.toml"], "absent.toml: no such file"),
    "dataset with a typo": (["--dataset_config", "{}/dataset_typo.toml"], "dataset_typo.toml.*image_directry"),
    "dataset without caches": (["--dataset_config", "{}/dataset_uncached.toml"], "run cache_latents.py"),
    "an item without latents": (["--dataset_config", "{}/no_latents/dataset.toml"], "item1.*run cache_latents.py"),
    "an item without text": (["--dataset_config", "{}/no_text/dataset.toml"], "item1.*run cache_text_encoder"),
    "network_args without =": (["--network_args", "rank_dropout"], "--network_args rank_dropout: expected key=value"),
    "unknown network_args": (["--network_args", "rank_dropuot=0.1"], "unknown key 'rank_dropuot'.*'rank_dropout'"),
    "bad network_args": (["--network_args", "rank_dropout=much"], "network_args: rank_dropout=much"),
    "no target": (["--network_args", "exclude_patterns=['.*']"], "exclude_patterns leave no module"),
    "unknown module": (["--network_module", "networks.lroa"], "networks.lroa: cannot be imported.*'networks.lora'"),
    "an empty module": (["--network_module="], "--network_module '': a dotted path such as networks.lora"),
    "a relative module": (["--network_module", ".lora"], "--network_module '.lora': a dotted path"),
    "dropout as argument": (["--network_args", "neuron_dropout=0.1"], "neuron_dropout is set by --network_dropout"),
    "an argument of ours": (["--network_args", "vae=1"], "--network_args vae=...: vae is set by the trainer"),
    "no network module": (["--network_module", "json"], "--network_module json: has no create_arch_network"),
    "missing state": (["--resume", "{}/absent-state"], "absent-state: no such folder"),
    "a LoRA as state": (["--resume", "{}/lora.safetensors"], "a state folder is expected.*--network_weights"),
    "an empty state": (["--resume", "{}/empty"], "empty: no train_state.json in it"),
    "an old state": (["--resume", "{}/old-state"], "old-state: state version 0"),
    "another seed": (["--resume", "{}/good/lora-state", "--seed", "8"], "--seed 8: the run in .* has seed 7"),
    "another optimizer": (["--resume", "{}/good/lora-state", "--optimizer_type", "sgd"], "with torch.optim.AdamW"),
    "another schedule": (["--resume", "{}/good/lora-state", "--lr_scheduler", "cosine"], "with constant; give that"),
    "dim without weights": (["--dim_from_weights"], "--dim_from_weights needs --network_weights"),
    "dim from weights and arguments": (
        ["--dim_from_weights", "--network_weights", "{}/lora.safetensors", "--network_args", "rank_dropout=0.1"],
        "--dim_from_weights: takes no --network_args",
    ),
    "dim from weights and dropout": (
        ["--dim_from_weights", "--network_weights", "{}/lora.safetensors", "--network_dropout", "0.1"],
        "--dim_from_weights: takes no --network_dropout",
    ),
    "multipliers": (["--base_weights_multiplier", "1", "2"], "2 values for 0 --base_weights"),
    "no lora to merge": (["--base_weights", "{}/no_lora.safetensors"], "no_lora.safetensors: no HunyuanVideo LoRA"),
    "another rank": (["--network_weights", "{}/lora.safetensors", "--network_dim", "8"], "has rank 4"),
    "a seed that torch has not": (["--seed", str(2**63)], "--seed: 9223372036854775808 is too large"),
    "unknown backend": (["--compile", "--compile_backend", "inducter"], "--compile_backend inducter: .*'inductor'"),
    "wandb is absent": (["--log_with", "wandb"], "the package wandb is not installed; pip install wandb"),
    "unknown optimizer": (["--optimizer_type", "AdamX"], "--optimizer_type AdamX: unknown"),
    "bad optimizer_args": (["--optimizer_args", "weight_deacy=0.1"], "--optimizer_args.*weight_deacy"),
    "unknown schedule": (["--lr_scheduler", "cosin"], "'cosin' is not one of .*did you mean 'cosine'"),
    "sage": (["--sage_attn"], "SageAttention has no backward pass"),
    "two backends": (["--sdpa", "--xformers"], "choose one attention backend"),
    "a backend that is absent": (["--flash_attn"], "flash_attn is not installed; pip install flash-attn"),
    "previews without prompts": (["--sample_at_first"], "need --sample_prompts"),
    "prompts without models": (
        ["--sample_at_first", "--sample_prompts", "{}/good_prompts.txt"], "not given: --text_encoder1",
    ),
    "prompts without a time": (["--sample_prompts", "{}/good_prompts.txt"], "--sample_prompts: needs one of --sample_"),
    "bad prompts": (
        ["--sample_prompts", "{}/prompts.txt", *MODELS], "prompts.txt: line 1: unknown option --q",
    ),
    "a preview from an image": (
        ["--sample_prompts", "{}/image.txt", *MODELS], "image.txt: prompt 1: previews cannot start from an image",
    ),
    "a kind that a format has not": (
        ["--network_module", "networks.lokr", "--save_format", "diffusers"], "diffusers: .* is a LoKr, which",
    ),
    "tensorboard nowhere": (["--log_with", "tensorboard"], "--log_with tensorboard needs --logging_dir"),
    "no steps": (["--max_train_steps", "0"], "0 is too small: the minimum is 1"),
    "a name with folders": (["--output_name", "a/b"], "--output_name 'a/b': names a folder"),
    "a file as folder": (["--output_dir", "{}/typo.toml"], "typo.toml is a file, a folder is expected"),
    "a folder in a file": (["--output_dir", "{}/typo.toml/x"], "typo.toml is a file, a folder is expected"),
    "state of another rank": (["--resume", "{}/good/lora-state", "--network_dim", "8"], "saved from another network"),
    "a damaged state": (["--resume", "{}/damaged-state"], "damaged-state/train_state.json: is damaged"),
    "unknown format": (["--save_format", "diffuser"], "--save_format diffuser: unknown .*did you mean 'diffusers'"),
    "too many blocks": (["--blocks_to_swap", "36"], "--blocks_to_swap 36: the maximum for this model"),
    "float16 on a CPU": (["--mixed_precision", "fp16"], "--mixed_precision fp16: a CPU"),
    "too much held out": (["--validation_split", "1"], "1 is too large: the maximum is 0.9"),
    "nothing to hold out": (
        ["--dataset_config", "{}/one/dataset.toml", "--validation_split", "0.5"], "nothing is held out for validation",
    ),
    "timesteps": (["--min_timestep", "900", "--max_timestep", "100"], "--min_timestep 900 is not below"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_wrong_invocation(place, tiny_models, monkeypatch, name):
    folder, world = place
    paths = {"vae": tiny_models.vae, "te": tiny_models.text_encoder1, "te2": tiny_models.text_encoder2}
    words, message = WRONG[name]
    words = [word.format(folder, **paths) for word in words]

    def loads_a_model(*_: object, **__: object) -> None:
        raise AssertionError("a model was loaded")

    for loader in ("load_dit", "load_vae", "load_text_encoder_1", "load_text_encoder_2"):
        monkeypatch.setattr(f"hunyuan_model.checkpoints.{loader}", loads_a_model)
    with pytest.raises(UserError, match=message) as error:
        run_training(command(world, tiny_models.dit, folder / "untouched", *words))
    assert "\n" not in str(error.value)
    assert not (folder / "untouched").exists()


@pytest.mark.parametrize("words", [[], ["--learning_rate", "fast"], ["--dit", "absent.pt"]])
def test_the_script_itself_ends_with_2_and_one_line(words):
    script = [sys.executable, str(ROOT / "hv_train_network.py"), *words]
    done = subprocess.run(script, capture_output=True, text=True, encoding="utf-8")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--log_tracker_config", "{}/tracker.toml", "--logging_dir", "{}/logs"],
            "cannot start: .*colour",
        ),
        (["--log_tracker_config", "{}/wrong.toml", "--logging_dir", "{}/logs"], r"only the tables \[tensorboard\] are"),
        pytest.param(["--output_dir", "/proc/{}"], "--output_dir /proc/.*: cannot be written to", marks=needs_posix),
    ],
)
def test_what_cannot_be_written_to_is_known_before_a_model_is_loaded(place, tiny_models, monkeypatch, words, message):
    folder, world = place
    (folder / "tracker.toml").write_text("[tensorboard]\ncolour = 3\n", encoding="utf-8")
    (folder / "wrong.toml").write_text("[tensorbord]\nx = 3\n", encoding="utf-8")
    monkeypatch.setattr("hunyuan_model.checkpoints.load_dit", lambda *_: pytest.fail("a model was loaded"))
    with pytest.raises(UserError, match=message):
        run_training(command(world, tiny_models.dit, folder / "outputs", *[word.format(folder) for word in words]))
