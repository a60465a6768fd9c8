"""What a process learns from the variables that accelerate and torchrun set."""

import pytest
import torch

from utils.device_utils import own_device
from utils.errors import UserError
from utils.processes import process_share


def test_alone_it_is_the_first_of_one(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert process_share() == (0, 1)


def test_its_number_and_its_gpu_come_from_the_launcher(monkeypatch):
    monkeypatch.setenv("RANK", "5")
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert process_share() == (5, 8)
    assert own_device("cpu") == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert own_device(None) == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("utils.device_utils.resolve_device", torch.device)
    assert own_device(None) == torch.device("cuda:1")


def test_an_unknown_device_is_refused():
    with pytest.raises(UserError, match="--device gpu"):
        own_device("gpu")
