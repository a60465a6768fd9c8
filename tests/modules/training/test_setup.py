"""What every training script does with the caches, beside what the scripts' own tests show."""

from pathlib import Path
from types import SimpleNamespace

import pytest
from tqdm import tqdm

from dataset import training_items
from modules.training import setup
from tests.training_world import write_world


def test_only_the_first_process_says_what_is_worth_a_note(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config, train_set = SimpleNamespace(notes=["a"], validation=[]), SimpleNamespace(notes=["b"])
    options = SimpleNamespace(
        dataset=SimpleNamespace(dataset_config=None), validation=SimpleNamespace(validation_split=0.0)
    )
    monkeypatch.setattr(setup, "load_dataset_config", lambda _: config)
    monkeypatch.setattr(setup, "TrainingDataset", lambda *_, **__: train_set)
    for rank, said in (("0", "note: a\nnote: b\n"), ("1", "")):
        monkeypatch.setenv("RANK", rank)
        setup.load_datasets(options, seed=0)
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
    train_set, validation_set = setup.load_datasets(options, seed=0)
    assert (train_set.num_items, validation_set.num_items) == (3, 2)
    assert len(looked) == 5 and hidden == [rank > 0]
