"""The sheet of the shapes world: every frame of every clip, or a line that says why not."""

import pytest
import torch
from PIL import Image

from examples.shapes.sheet import FPS, SCALE, read_clips, write_sheet
from modules.generation.compare import LABEL_HEIGHT, MARGIN, Page
from tests.saved_files import frames
from utils.errors import UserError
from utils.video_io import save_video


def clip(count: int) -> torch.Tensor:
    """Pixels (3, F, 64, 64) in 0..1 that grow brighter."""
    return torch.linspace(0, 1, count)[None, :, None, None].expand(3, count, 64, 64)


def test_a_sheet_shows_every_frame_and_is_written_once(tmp_path, monkeypatch):
    written, save_frame = [], Page.save_frame
    monkeypatch.setattr(Page, "save_frame", lambda page, path, at: written.append(path) or save_frame(page, path, at))
    video, sheet = write_sheet(tmp_path / "page", {"first": clip(5), "second": clip(5).flip(1)})
    assert written == [sheet] == [tmp_path / "page.png"]
    assert Image.open(sheet).width == MARGIN + 5 * (64 * SCALE + MARGIN)
    assert Image.open(sheet).height == LABEL_HEIGHT + 2 * (LABEL_HEIGHT + 64 * SCALE + MARGIN)
    assert frames(video).shape[1] == 5


def test_clips_of_different_length_are_refused(tmp_path):
    with pytest.raises(UserError, match="same number of frames: long 5, short 3"):
        write_sheet(tmp_path / "page", {"long": clip(5), "short": clip(3)})
    assert list(tmp_path.iterdir()) == []


def test_a_label_given_twice_is_refused(tmp_path):
    save_video(clip(3), tmp_path / "clip.mp4", FPS)
    words = [f"{label}={tmp_path / 'clip.mp4'}" for label in ("one", "two")]
    assert list(read_clips(words)) == ["one", "two"]
    with pytest.raises(UserError, match="another clip has the label 'one'"):
        read_clips([*words, words[0]])
