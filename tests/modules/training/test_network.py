"""What the trainer makes of its options for the network, without a run."""

import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from modules.training.network import TrainedNetwork, create_network
from modules.training.options import NetworkOptions
from networks import lora
from tests.small_dit import random_dit, small_config


def trained(**options) -> TrainedNetwork:
    """A network for a small DiT, as a run makes it."""
    given = SimpleNamespace(network=NetworkOptions(network_module="networks.lora", **options))
    dit = random_dit(small_config(depth_double=1, depth_single=1))
    return TrainedNetwork(create_network(lora, dit, given.network), dit, torch.device("cpu"), given)


def test_rank_alpha_and_dropout_reach_every_adapter() -> None:
    words = ["rank_dropout=0.2", "module_dropout=0.3"]
    network = trained(network_dim=3, network_alpha=1.5, network_dropout=0.25, network_args=words).network
    found = {(a.rank, a.alpha.item(), a.dropout, a.rank_dropout, a.module_dropout, a.scale) for a in network.adapters}
    assert found == {(3, 1.5, 0.25, 0.2, 0.3, 0.5)}


def test_dropout_is_off_only_in_evaluation() -> None:
    run = trained()
    run.start_epoch()
    assert run.network.training and all(adapter.training for adapter in run.network.adapters)
    with pytest.raises(KeyError), run.evaluation():
        assert not any(adapter.training for adapter in run.network.adapters)
        raise KeyError
    assert all(adapter.training for adapter in run.network.adapters)


def test_switched_off_is_a_multiplier_of_zero_for_a_while() -> None:
    run = trained()
    with run.switched_off():
        assert {adapter.multiplier for adapter in run.network.adapters} == {0.0}
    assert {adapter.multiplier for adapter in run.network.adapters} == {1.0}


def test_a_checkpoint_has_the_asked_precision(tmp_path: Path) -> None:
    run = trained()
    for precision, dtype in ((None, torch.float32), ("bf16", torch.bfloat16)):
        run.options.save = SimpleNamespace(save_precision=precision, save_format=["default"])
        run.save(tmp_path / "lora.safetensors", {})
        assert {tensor.dtype for tensor in load_file(tmp_path / "lora.safetensors").values()} == {dtype}


@pytest.mark.parametrize("size", [1e-6, 1.0])
def test_what_float16_cannot_hold_is_said_of_every_format(tmp_path: Path, capsys, size: float) -> None:
    """The same line as that of convert_lora.py (T1); with alpha = rank, no format has anything to fold."""
    run = trained(network_dim=4, network_alpha=4)
    generator = torch.Generator().manual_seed(0)
    for adapter in run.network.adapters:
        for factor in (adapter.lora_down, adapter.lora_up):
            factor.weight.data = torch.randn(factor.weight.shape, generator=generator) * size
    lost = []
    for adapter in run.network.adapters:
        up, down = (factor.weight.data.double() for factor in (adapter.lora_up, adapter.lora_down))
        exact, rounded = up @ down, up.half().double() @ down.half().double()
        lost.append(((rounded - exact).norm() / exact.norm()).item())
    path, formats = tmp_path / "lora.safetensors", ["default", "other", "comfyui"]
    for precision in ("fp32", "bf16", "fp16"):
        assert not capsys.readouterr().err
        run.options.save = SimpleNamespace(save_precision=precision, save_format=formats)
        run.save(path, {})
    said = capsys.readouterr().err.splitlines()
    if size == 1:
        assert max(lost) < 1e-3 and not said
        return
    assert min(lost) > 1e-3
    files = [path, *(tmp_path / f"lora.{name}.safetensors" for name in formats[1:])]
    text = f"float16 changes dW of {len(lost)} of {len(lost)} modules by more than 0.001 of its norm, at most"
    for line, file in zip(said, files, strict=True):
        assert line.startswith(f"warning: {file}: {text} {max(lost):.1e} (")
        assert line.endswith("; --save_precision fp32 keeps it")


def test_a_network_of_another_project_replaces_a_checkpoint_only_with_a_whole_one(tmp_path: Path) -> None:
    run, path = trained(), tmp_path / "lora.safetensors"
    run.options.save = SimpleNamespace(save_precision=None, save_format=["default"])
    path.write_bytes(b"before")

    def save_weights(file: str, dtype: torch.dtype, metadata: dict) -> None:
        assert file.endswith(".safetensors"), "kohya's networks choose the format by it"
        assert [each.name for each in tmp_path.glob("*.partial")] == [f"lora.safetensors.{os.getpid()}.partial"]
        Path(file).write_bytes(b"half")
        if metadata["fails"]:
            raise SafetensorError("No space left on device")  # no OSError

    run.network.save_weights = save_weights
    with pytest.raises(OSError, match="No space"):
        run.save(path, {"fails": "yes"})
    assert path.read_bytes() == b"before"
    run.save(path, {"fails": ""})
    assert path.read_bytes() == b"half" and list(tmp_path.iterdir()) == [path]


def test_a_norm_of_zero_switches_the_limit_off() -> None:
    """As in musubi-tuner; it once set the whole LoRA to zero (T2)."""
    for max_norm, largest in ((0, None), (None, None), (0.5, 0.5)):
        run = trained(scale_weight_norms=max_norm)
        for adapter in run.network.adapters:
            torch.nn.init.ones_(adapter.lora_up.weight)
        before = [adapter.factors().norm() for adapter in run.network.adapters]
        with torch.no_grad():
            run.after_update()
        after = [adapter.factors().norm() for adapter in run.network.adapters]
        assert after == before if largest is None else max(after) <= largest + 1e-6 < max(before)


def test_the_metadata_of_mixed_ranks_are_dynamic() -> None:
    """As network weights with --dim_from_weights make them; the rank of the first module was written for all (T14)."""
    run = trained(network_dim=3, network_alpha=1.5)
    assert (run.facts["network_dim"], run.facts["network_alpha"]) == (3, 1.5)
    run.network.adapters[1].rank = 5
    run.network.adapters[1].alpha.fill_(2)
    assert (run.facts["network_dim"], run.facts["network_alpha"]) == ("Dynamic", "Dynamic")


def test_alpha_is_saved_exactly_in_every_dtype(tmp_path: Path) -> None:
    """0.3 became 0.30078 in bfloat16 (T14)."""
    run = trained(network_dim=2, network_alpha=0.3)
    run.network.save_weights(tmp_path / "a.safetensors", torch.bfloat16, {})
    tensors = load_file(tmp_path / "a.safetensors")
    alphas = {tensor.item() for name, tensor in tensors.items() if name.endswith(".alpha")}
    assert alphas == {torch.tensor(0.3).item()}
    assert {tensor.dtype for name, tensor in tensors.items() if "lora_" in name and "alpha" not in name} == {
        torch.bfloat16
    }


def test_what_has_no_effect_is_said(capsys: pytest.CaptureFixture) -> None:
    """musubi-tuner's conv_dim adapts convolutions, of which the blocks have none (T9)."""
    trained(network_args=["conv_dim=4", "conv_alpha=1"])
    assert "without effect, as no convolution of the DiT is adapted: conv_dim, conv_alpha" in capsys.readouterr().out
