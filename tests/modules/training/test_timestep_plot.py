"""The shown distribution is the trained one."""

from pathlib import Path

import pytest

from modules.training.timestep_plot import IMAGE_NAME, show_timesteps, timestep_shares
from modules.training.timesteps import TimestepOptions
from utils.errors import UserError


def test_shares_of_a_known_distribution() -> None:
    assert timestep_shares(TimestepOptions(timestep_sampling="uniform"), 4) == [0.25] * 4
    half = TimestepOptions(timestep_sampling="uniform", min_timestep=500, max_timestep=1000)
    assert timestep_shares(half, 4) == [0, 0, 0.5, 0.5]


def test_console_shows_every_range(capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    options = TimestepOptions(weighting_scheme="cosmap", show_timesteps="console")
    show_timesteps(options, tmp_path)
    lines = capsys.readouterr().out.splitlines()
    rows = [line.split() for line in lines if "%" in line]
    assert len(rows) == 25
    assert rows[0][:2] == ["0-40", "3.90%"] and rows[-1][:2] == ["960-1000", "4.10%"]  # sigma is 1/1000 to 1
    assert rows[12][2] == "1.273"  # 2 / (pi / 2) at sigma 0.5
    assert list(tmp_path.iterdir()) == []


def test_without_matplotlib_one_line_says_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install matplotlib"):
        show_timesteps(TimestepOptions(show_timesteps="image"), tmp_path)


def test_image_goes_to_a_file_without_a_display(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setenv("MPLBACKEND", "agg")
    show_timesteps(TimestepOptions(show_timesteps="image"), tmp_path / "output")
    assert (tmp_path / "output" / IMAGE_NAME).read_bytes().startswith(b"\x89PNG")
