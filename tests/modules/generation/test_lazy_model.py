"""Models that are loaded when they are needed: how often they are loaded, and where they are after `release`."""

import pytest
import torch
from torch import nn

from modules.generation.lazy_model import LazyModel
from utils.errors import UserError

CPU = torch.device("cpu")


class Recorder(nn.Module):
    """Notes where it is moved to."""

    def __init__(self, moves: list[str]) -> None:
        super().__init__()
        self.moves = moves

    def to(self, device: object) -> "Recorder":
        self.moves.append(str(device))
        return self


@pytest.mark.parametrize(
    ("when_released", "loads", "moves"),
    [("free", 2, []), ("keep", 1, []), ("offload", 1, ["cuda", "cpu", "cuda", "cpu"])],
)
def test_what_release_does(when_released, loads, moves, monkeypatch):
    monkeypatch.setattr("modules.generation.lazy_model.release_memory", lambda device: None)
    loaded, moved = [], []

    def load():
        loaded.append(True)
        return Recorder(moved)

    lazy = LazyModel(load, torch.device("cuda"), when_released)
    lazy.release()
    assert not loaded
    for _ in range(2):
        lazy.load()
        assert isinstance(lazy.model, Recorder)
        lazy.release()
    assert (len(loaded), moved) == (loads, moves)


def test_no_memory_for_a_model_is_one_line_with_its_advice():
    def load():
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(UserError, match="out of GPU memory while a model is loaded: use --fp8_llm"):
        LazyModel(load, CPU, advice="use --fp8_llm").load()
