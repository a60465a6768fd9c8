"""What the trainer makes of its options for the network, without a run."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
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
