"""Prompts are encoded once, alone, with one text encoder in memory at a time."""

import torch

from modules.generation.lazy_model import LazyModel
from modules.generation.text_encoding import encode_texts

CPU = torch.device("cpu")


class Encoder:
    """Stands for both text encoders and notes what it encodes."""

    def __init__(self, name: str, events: list[tuple[str, object]]) -> None:
        self.name, self.events = name, events
        events.append((name, "loaded"))

    def truncated(self, texts: list[str]) -> list[str]:
        return ["the end" if text == "too long" else "" for text in texts]

    def encode(self, texts: list[str]) -> object:
        self.events.append((self.name, texts))
        vector = torch.full((1, 4), float(len(texts[0])))
        return (vector[:, None], torch.ones(1, 1)) if self.name == "LLM" else vector


def lazy_encoders(events: list[tuple[str, object]]) -> list[LazyModel]:
    return [LazyModel(lambda name=name: Encoder(name, events), CPU) for name in ("LLM", "CLIP")]


def test_every_text_is_encoded_once_and_alone(capsys):
    events = []
    encoded = encode_texts(["a", "too long", "a"], *lazy_encoders(events))
    expected = [[(name, "loaded"), (name, ["a"]), (name, ["too long"])] for name in ("LLM", "CLIP")]
    assert events == expected[0] + expected[1]
    assert list(encoded) == ["a", "too long"]
    assert encoded["too long"].text_states.shape == (1, 1, 4)
    assert encoded["too long"].text_states_2[0, 0] == len("too long")
    assert "text encoder 1, its end is cut off: 'the end'" in capsys.readouterr().err


def test_without_texts_no_encoder_is_loaded():
    events = []
    assert encode_texts([], *lazy_encoders(events)) == {}
    assert events == []
