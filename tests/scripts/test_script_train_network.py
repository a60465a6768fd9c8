"""Network options of hv_train_network.py: where a LoRA starts from, what it trains, how the frozen model is kept."""

import importlib.util

import pytest
import torch

from modules.blocks.compilation import compile_blocks
from modules.options import CompileOptions
from tests.training_world import assert_same, log_of, train
from utils.safetensors_utils import read_header


@pytest.fixture(scope="module")
def dit(tiny_models):
    return tiny_models.dit


@pytest.fixture(scope="module")
def plain(world, dit, tmp_path_factory):
    """A run without anything special: its folder and its LoRA."""
    output = tmp_path_factory.mktemp("plain")
    return output, train(world, dit, output)


def first_loss(output) -> float:
    return log_of(output)[0]["loss"]


@pytest.mark.parametrize(
    "words",
    [
        ["--gradient_checkpointing"],
        ["--gradient_checkpointing", "--gradient_checkpointing_cpu_offload"],
        ["--selective_checkpointing"],
        ["--blocks_to_swap", 2],
        pytest.param(["--compile", "--compile_backend", "eager"], marks=pytest.mark.slow),
        ["--img_in_txt_in_offloading"],
    ],
    ids=lambda words: words[-1] if isinstance(words[-1], str) else words[0],
)
def test_what_saves_memory_or_time_changes_nothing(world, dit, plain, tmp_path, words):
    assert_same(train(world, dit, tmp_path, *words), plain[1])


def test_compilation_that_fails_is_one_line_and_the_run_goes_on(world, dit, plain, tmp_path, capsys, monkeypatch):
    def broken(graph, inputs):
        raise RuntimeError("no compiler here")

    monkeypatch.setattr(torch, "compile", lambda forward, **_: torch._dynamo.optimize(broken)(forward))
    torch._dynamo.reset()
    assert_same(train(world, dit, tmp_path, "--compile"), plain[1])
    lines = [line for line in capsys.readouterr().err.splitlines() if "--compile failed" in line]
    assert len(lines) == 1 and "no compiler here" in lines[0]


@pytest.mark.parametrize(
    ("given", "used"), [("reduce-overhead", "default"), ("max-autotune", "max-autotune-no-cudagraphs")]
)
def test_blocks_are_compiled_without_cuda_graphs(capsys, monkeypatch, given, used):
    """Graphs share their memory: the output of a block would be gone while the next one reads it."""
    modes = []
    monkeypatch.setattr(torch, "compile", lambda forward, mode, **_: modes.append(mode) or forward)
    compile_blocks([torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)], CompileOptions(compile_mode=given))
    assert modes == [used] * 2
    assert f"note: --compile_mode {given}" in (note := capsys.readouterr().err) and note.count("\n") == 1


def test_training_goes_on_from_network_weights(world, dit, plain, tmp_path):
    output, lora = plain
    words = ["--network_weights", output / "lora.safetensors", "--max_train_steps", 1, "--learning_rate", 0]
    assert_same(train(world, dit, tmp_path / "same", *words), lora)
    assert_same(train(world, dit, tmp_path / "dim", *words, "--dim_from_weights"), lora)


def test_rank_and_alpha_come_from_the_weights(world, dit, tmp_path):
    train(world, dit, tmp_path / "a", "--network_dim", 2, "--network_alpha", 6, "--max_train_steps", 1)
    given = ["--network_weights", tmp_path / "a" / "lora.safetensors", "--dim_from_weights"]
    train(world, dit, tmp_path / "b", *given, "--max_train_steps", 1)
    _, metadata = read_header(tmp_path / "b" / "lora.safetensors")
    assert metadata["ss_network_dim"] == "2" and float(metadata["ss_network_alpha"]) == 6


def test_a_lokr_goes_on_with_the_options_that_made_it(world, dit, tmp_path):
    """The matrices that it stores whole have no rank (T6)."""
    words = ["--network_module", "networks.lokr", "--network_dim", 8, "--network_args", "factor=4"]
    first = train(world, dit, tmp_path / "a", *words, "--max_train_steps", 1)
    assert any(name.endswith("lokr_w2_a") for name in first) and any(name.endswith("lokr_w2") for name in first)
    weights = ["--network_weights", tmp_path / "a" / "lora.safetensors"]
    again = train(world, dit, tmp_path / "b", *words, *weights, "--max_train_steps", 1, "--learning_rate", 0)
    assert all(torch.equal(again[name], tensor) for name, tensor in first.items())


def test_base_weights_are_in_the_model_and_not_in_the_lora(world, dit, plain, tmp_path):
    """The first loss with a LoRA merged is the loss at which training that LoRA on would start."""
    output, _ = plain
    once = ["--max_train_steps", 1, "--learning_rate", 0]
    train(world, dit, tmp_path / "on", *once, "--network_weights", output / "lora.safetensors")
    merged = train(world, dit, tmp_path / "merged", *once, "--base_weights", output / "lora.safetensors")
    assert first_loss(tmp_path / "merged") == pytest.approx(first_loss(tmp_path / "on"), abs=1e-5)
    assert not any(tensor.any() for name, tensor in merged.items() if "lora_up" in name)
    half = ["--base_weights", output / "lora.safetensors", "--base_weights_multiplier", 0]
    train(world, dit, tmp_path / "none", *once, *half)
    assert first_loss(tmp_path / "none") == pytest.approx(first_loss(output), abs=1e-6)


def test_fp8_base_trains_near_the_full_weights(world, dit, plain, tmp_path):
    lora = train(world, dit, tmp_path, "--fp8_base")
    assert any(tensor.any() for name, tensor in lora.items() if "lora_up" in name)
    assert first_loss(tmp_path) == pytest.approx(first_loss(plain[0]), rel=0.05)
    assert first_loss(tmp_path) != first_loss(plain[0])


def test_scale_weight_norms_bounds_every_update_and_logs_the_norms(world, dit, plain, tmp_path):
    """The norms were thrown away (T11)."""

    def norms(lora):
        downs = {name.removesuffix(".lora_down.weight") for name in lora if "lora_down" in name}
        return [(lora[f"{n}.lora_up.weight"] @ lora[f"{n}.lora_down.weight"]).norm().item() for n in downs]

    assert max(norms(plain[1])) > 0.05
    saved = norms(train(world, dit, tmp_path, "--scale_weight_norms", 0.05))
    assert max(saved) <= 0.05 + 1e-6
    last = log_of(tmp_path)[-1]
    assert last["max_norm/max_key_norm"] == pytest.approx(max(saved), rel=1e-5)
    assert last["max_norm/average_key_norm"] == pytest.approx(sum(saved) / len(saved), rel=1e-5)
    assert 0 < last["max_norm/keys_scaled"] == sum(norm > 0.05 - 1e-6 for norm in saved)


def test_the_rate_that_prodigy_found_is_logged(world, dit, tmp_path, monkeypatch):
    """The log had only the rate of the schedule (T11)."""
    prodigyopt = pytest.importorskip("prodigyopt")
    steps, step = [], prodigyopt.Prodigy.step

    def watched(self, closure=None):
        step(self, closure)
        steps.append(self.param_groups[0]["d"] * self.param_groups[0]["lr"])

    monkeypatch.setattr(prodigyopt.Prodigy, "step", watched)
    train(world, dit, tmp_path, "--optimizer_type", "Prodigy", "--learning_rate", 0.5, "--max_train_steps", 10)
    lines = log_of(tmp_path)
    assert [line["d_times_lr/0"] for line in lines] == pytest.approx(steps[-10:], rel=1e-6)
    assert {line["lr"] for line in lines} == {0.5}
    assert 0.5e-6 <= lines[0]["d_times_lr/0"] < lines[-1]["d_times_lr/0"]  # it begins with d = 1e-6


def test_lora_plus_trains_the_second_factor_faster(world, dit, tmp_path):
    train(world, dit, tmp_path, "--max_train_steps", 1, "--network_args", "loraplus_lr_ratio=4")
    assert log_of(tmp_path)[0]["lr"] == [0.01, 0.04]


@pytest.mark.parametrize(
    ("module", "arguments"),
    [
        ("networks.lora", []),
        ("networks.loha", []),
        ("networks.lokr", []),
        ("lycoris.kohya", ["--network_args", "algo=lora", "preset=full"]),
    ],
)
def test_every_tensor_of_a_network_learns(world, dit, tmp_path, module, arguments):
    if importlib.util.find_spec(module.split(".")[0]) is None:
        pytest.skip(f"{module} is not installed")
    words = ["--network_module", module, *arguments]
    # Hardly anything, since LyCORIS hands out no parameters at a rate of zero.
    before = train(world, dit, tmp_path / "before", *words, "--learning_rate", 1e-12, "--max_train_steps", 1)
    after = train(world, dit, tmp_path / "after", *words)
    assert after.keys() == before.keys()
    idle = {name for name in after if torch.allclose(after[name], before[name], rtol=0, atol=1e-9)}
    assert idle == {name for name in after if name.endswith(".alpha")}
    assert read_header(tmp_path / "after" / "lora.safetensors")[1]["ss_network_module"] == module


@pytest.mark.parametrize(
    ("optimizer", "package"),
    [("Prodigy", "prodigyopt"), ("AdamWScheduleFree", "schedulefree"), ("Adafactor", "transformers")],
)
def test_other_optimizers_resume_exactly(world, dit, tmp_path, optimizer, package):
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    words = ["--optimizer_type", optimizer, "--save_every_n_steps", 2, "--save_state"]
    through = train(world, dit, tmp_path / "through", *words)
    again = train(
        world, dit, tmp_path / "again", *words, "--resume", tmp_path / "through" / "lora-step00000002-state"
    )  # fmt: skip
    assert_same(again, through)
