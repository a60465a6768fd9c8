"""What every training script does with the caches, beside what the scripts' own tests show."""

from types import SimpleNamespace

import pytest
import torch

from training import hunyuan_video
from utils.memory_meter import MemoryMeter


def test_only_the_first_process_says_what_is_worth_a_note(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config, train_set = SimpleNamespace(notes=["a"], validation=[]), SimpleNamespace(notes=["b"])
    options = SimpleNamespace(
        dataset=SimpleNamespace(dataset_config=None), validation=SimpleNamespace(validation_split=0.0)
    )
    monkeypatch.setattr(hunyuan_video, "load_dataset_config", lambda _: config)
    monkeypatch.setattr(hunyuan_video, "TrainingDataset", lambda *_, **__: train_set)
    for rank, said in (("0", "note: a\nnote: b\n"), ("1", "")):
        monkeypatch.setenv("RANK", rank)
        hunyuan_video.load_datasets(options, seed=0)
        assert capsys.readouterr().err == said


def test_pixels_of_a_preview_are_in_memory_once(monkeypatch: pytest.MonkeyPatch) -> None:
    vae = SimpleNamespace(
        to=lambda _: None, configure_memory=lambda *_: None, decode=lambda _: torch.full((1, 3, 8, 64, 64), 3.0)
    )
    monkeypatch.setattr(hunyuan_video.checkpoints, "load_vae", lambda *_: vae)
    options = SimpleNamespace(vae=SimpleNamespace(vae=None, vae_dtype=None, vae_chunk_size=None, tile_size=None))
    decode = hunyuan_video.load_decoder(options, SimpleNamespace(device=torch.device("cpu")))
    with MemoryMeter() as meter:
        pixels = decode(torch.zeros(1, 16, 2, 8, 8))
    assert pixels.shape == (3, 8, 64, 64) and bool((pixels == 1).all())
    assert meter.peak < 1.2 * pixels.nbytes
