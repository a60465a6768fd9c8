"""What every training script does with the caches, beside what the scripts' own tests show."""

from types import SimpleNamespace

import pytest

from training import hunyuan_video


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
