"""What every training script does with the caches, beside what the scripts' own tests show."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tqdm import tqdm

from dataset import training_items
from modules.memory.meter import MemoryMeter
from modules.training import hunyuan_video
from tests.training_world import write_world


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


@pytest.mark.parametrize("rank", [0, 1])
def test_each_cache_is_looked_at_once_for_both_sets(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, rank: int) -> None:
    """And with a bar in the first process alone."""
    looked, hidden, check = [], [], training_items.check_latents

    def noting(path: Path, *arguments, **options) -> object:
        looked.append(path.name)
        return check(path, *arguments, **options)

    def bar(names, disable: bool, **options) -> tqdm:
        hidden.append(disable)
        return tqdm(names, disable=disable, **options)

    options = SimpleNamespace(
        dataset=SimpleNamespace(dataset_config=write_world(tmp_path).config),
        validation=SimpleNamespace(validation_split=0.4),
    )
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setattr(training_items, "check_latents", noting)
    monkeypatch.setattr(training_items, "tqdm", bar)
    train_set, validation_set = hunyuan_video.load_datasets(options, seed=0)
    assert (train_set.num_items, validation_set.num_items) == (3, 2)
    assert len(looked) == 5 and hidden == [rank > 0]


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
