"""The page of --compare: every video in its place, with its label."""

from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from modules.generation import compare
from modules.generation.compare import (
    LABEL_HEIGHT,
    LARGEST_PAGE,
    MISSING,
    KeptFrames,
    Page,
    Row,
    _font,
    _names,
    _shortened,
)
from modules.generation.outputs import Job
from modules.generation.requests import Request


def plain(colour: tuple[int, int, int], frames: int = 3, height: int = 32, width: int = 48) -> torch.Tensor:
    return torch.tensor(colour, dtype=torch.uint8).expand(frames, height, width, 3).contiguous()


def test_every_video_stands_in_its_cell_and_shorter_ones_hold_their_last_frame():
    long = torch.cat((plain((0, 0, 0), 4), plain((9, 9, 9), 1)))
    page = Page(["a", "b"], [Row("first", [plain((255, 0, 0)), None]), Row("second", [long, plain((0, 0, 255), 1)])])
    assert page.frames == 5
    height, width = page.cell_size()
    assert (height, width) == (32, 48)
    frame = page.frame(page.background(), 4)
    colours = []
    for row in range(2):
        for column in range(2):
            left, top = page.place(row, column)
            cell = frame[top : top + height, left : left + width]
            assert (cell == cell[0, 0]).all()
            colours.append(tuple(cell[0, 0].tolist()))
    assert colours == [(255, 0, 0), MISSING, (9, 9, 9), (0, 0, 255)]
    assert frame.shape[0] % 2 == frame.shape[1] % 2 == 0


def test_every_label_is_written_above_its_cell():
    blank = np.asarray(Page(["", ""], [Row("", [plain((0, 0, 0))] * 2)]).background())
    page = Page(["left", "right"], [Row("title", [plain((0, 0, 0))] * 2)])
    written = (np.asarray(page.background()) != blank).any(-1)
    for column in range(2):
        left, top = page.place(0, column)
        assert written[: LABEL_HEIGHT - 4, left : left + 48].any()
    assert written[LABEL_HEIGHT:top, :].any()
    assert not written[top:].any()


def test_column_labels_are_whole_above_small_videos():
    """A column of 48 pixels is widened to its label. A label of 'multiplier 0.25' takes more than 60."""
    page = Page(["without LoRA", "multiplier 0.25"], [Row("", [plain((0, 0, 0))] * 2)])
    assert page.column_width > 60
    draw = ImageDraw.Draw(Image.new("RGB", (10, 10)))
    for label in page.columns:
        assert _shortened(draw, label, page.column_width, page.font) == label
    assert page.place(0, 1)[0] - page.place(0, 0)[0] == page.column_width + 8
    assert page.cell_size() == (32, 48)


def test_a_large_page_is_shrunk_to_what_players_decode():
    videos = [plain((0, 0, 0), 1, 544, 960)] * 6
    page = Page(["x"] * 6, [Row("", videos)] * 9).background()
    assert LARGEST_PAGE * 0.9 < max(page.size) <= LARGEST_PAGE + 2 * LABEL_HEIGHT


def test_long_labels_end_in_an_ellipsis():
    draw = ImageDraw.Draw(Image.new("RGB", (10, 10)))
    assert _shortened(draw, "short", 200, _font("")) == "short"
    text = _shortened(draw, "a very long label " * 10, 200, _font(""))
    assert text.endswith("...")
    assert text.startswith("a very long")


@pytest.fixture
def one_system_font(monkeypatch):
    """DejaVu Sans, which has the characters of Europe, is all that the system has."""
    font = Path(matplotlib.get_data_path(), "fonts/ttf/DejaVuSans.ttf")
    monkeypatch.setattr(compare, "SYSTEM_FONTS", ("no-such-font.ttf", str(font)))
    _font.cache_clear()
    yield
    _font.cache_clear()


def test_labels_are_written_in_a_font_that_has_their_characters(one_system_font, capsys):
    names = [_font(text).getname()[0] for text in ("zorb", "Ünïcode Ж\u3000ok", "зорб 猫")]
    assert names[0] != names[1] == names[2] == "DejaVu Sans"
    assert capsys.readouterr().err == "warning: no font was found for these characters of the labels: 猫\n"


def test_a_page_warns_once_of_characters_that_no_font_has(one_system_font, capsys):
    Page(["猫", "犬"], [Row("ねこ", [plain((0, 0, 0))] * 2)]).background()
    assert capsys.readouterr().err.splitlines() == [
        "warning: no font was found for these characters of the labels: こね犬猫"
    ]


def test_loras_of_one_name_are_told_apart_on_the_page(tmp_path):
    assert _names([tmp_path / "a/x.safetensors", tmp_path / "a/y.safetensors"]) == ["x", "y"]
    paths = [tmp_path / folder / "lora.safetensors" for folder in "ab"]
    assert _names(paths) == [str(tmp_path / "a/lora"), str(tmp_path / "b/lora")]


def test_frames_for_the_page_are_kept_in_files(tmp_path):
    kept, pixels = KeptFrames(tmp_path), torch.rand(3, 3, 4, 6)
    kept.keep(Job(Request(), "t_0"), pixels)
    assert isinstance(kept["t_0"], np.memmap)
    assert np.array_equal(kept["t_0"], (pixels * 255).round().byte().permute(1, 2, 3, 0).numpy())
