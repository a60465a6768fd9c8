"""Prompt lines and prompt files: one syntax for training previews and generation."""

import json

import pytest

from modules.generation.options import PromptOptions
from modules.generation.requests import PREVIEW_DEFAULTS, Request, parse_line, read_prompt_file, with_valid_size
from utils.cli import parse_options
from utils.errors import UserError


def test_every_short_option_of_the_reference_tool():
    line = "A cat -- really, a cat --w 960 --h 544 --f 49 --d 42 --s 30 --g 4.5 --fs 7 --l 1.5 --n blurry, dark"
    assert parse_line(line, PREVIEW_DEFAULTS) == Request(
        prompt="A cat -- really, a cat",
        negative_prompt="blurry, dark",
        width=960,
        height=544,
        frames=49,
        seed=42,
        steps=30,
        guidance=4.5,
        cfg_scale=1.5,
        flow_shift=7.0,
    )


@pytest.mark.parametrize(
    ("name", "value", "option"),
    [
        ("s", "1001", ["--infer_steps"]),
        ("s", "0", ["--infer_steps"]),
        ("w", "8193", ["--video_size", "16"]),
        ("f", "16386", ["--video_length"]),
        ("g", "10001", ["--embedded_cfg_scale"]),
        ("l", "10001", ["--guidance_scale"]),
        ("fs", "10001", ["--flow_shift"]),
        ("fs", "1e-7", ["--flow_shift"]),
        ("fps", "1001", ["--fps"]),
        ("d", str(2**63), ["--seed"]),
    ],
)
def test_a_line_and_the_command_line_have_the_same_limits(name, value, option):
    for call in (
        lambda: parse_line(f"cat --{name} {value}", Request()),
        lambda: parse_options("", PromptOptions, argv=[*option, value]),
    ):
        with pytest.raises(UserError):
            call()


def test_dashes_in_a_prompt_are_text():
    text = "A cat \u2014 well fed \u2014 sits, a man\u2014d 3 and \u2014 w"
    assert parse_line(text, Request()).prompt == text


def test_a_tab_separates_like_a_space():
    assert parse_line("A cat\t--w\t960\t--n\tbad \t hat", Request()) == Request(
        prompt="A cat", width=960, negative_prompt="bad \t hat"
    )


def test_a_silent_line_means_the_reference_defaults():
    request = parse_line("A cat", PREVIEW_DEFAULTS)
    assert (request.width, request.height, request.frames, request.steps) == (256, 256, 1, 20)
    assert (request.guidance, request.flow_shift, request.cfg_scale, request.seed) == (6.0, 14.5, 1.0, None)


def test_a_line_of_options_takes_the_prompt_of_the_defaults():
    assert parse_line("--d 7", Request(prompt="A cat")) == Request(prompt="A cat", seed=7)


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("cat --width2 5", "unknown option --width2 .did you mean 'width'"),
        ("cat --w wide", "--w wide: a whole number"),
        ("cat --w 1.5", "--w 1.5: a whole number"),
        ("cat --w", "--w: a value is expected"),
        ("cat --f 0", "--f 0: out of range"),
        ("cat --s 0", "--s 0: out of range, 1 to 1000"),
        ("cat --s 1000000000", "out of range, 1 to 1000"),
        ("cat --w 1000000000", "out of range, 1 to 8192"),
        ("cat --f 1000000000", "out of range"),
        ("cat --g 1e40", "out of range"),
        ("cat --l -1", "out of range"),
        ("cat --fs 1e-9", "out of range"),
        ("cat --fps 1000000000", "out of range"),
        ("cat \u2014w 960", "\u2014w: an option begins with two hyphens; write --w"),
        ("cat \u2013-seed 3", "write --seed"),
        ("cat --g nan", "--g nan: out of range"),
        ("cat --fs 0", "--fs 0: out of range"),
        ("cat --d -1", "--d -1: out of range"),
        ("cat --d 9223372036854775808", "2.63"),
        ("cat --d 1 --seed 2", "--seed is given twice"),
        ("cat --strength 1.5", "up to 1"),
        ("cat --strength 0.5", "--strength needs a video to start from; give --video_path"),
        ("cat --video_path nowhere.mp4", "no such file"),
        ("cat --ei end.png", "another model"),
        ("--w 32", "no prompt"),
    ],
)
def test_mistakes_name_the_option(line, complaint):
    with pytest.raises(UserError, match=complaint):
        parse_line(line, PREVIEW_DEFAULTS)


def test_text_toml_and_json_say_the_same(tmp_path):
    (tmp_path / "p.txt").write_text(
        "\ufeff# pets\n\nA cat --w 64 --d 3\n  # dogs\nA dog --w 64 --g 5\n", encoding="utf-8"
    )
    (tmp_path / "p.toml").write_text(
        '[prompt]\nwidth = 64\n[[prompt.subset]]\nprompt = "A cat"\nseed = 3\n'
        '[[prompt.subset]]\nprompt = "A dog"\nguidance_scale = 5.0\n'
    )
    (tmp_path / "p.json").write_text(json.dumps([{"prompt": "A cat", "width": 64, "seed": 3}, "A dog --w 64 --g 5"]))
    cat, dog = Request(prompt="A cat", width=64, seed=3), Request(prompt="A dog", width=64, guidance=5.0)
    for name in ("p.txt", "p.toml", "p.json"):
        assert read_prompt_file(tmp_path / name, Request()) == [cat, dog]


def test_only_line_ends_end_a_prompt(tmp_path):
    (tmp_path / "p.txt").write_bytes("A cat\u2028sits,\u0085it\x0bpurrs --d 3\r\nA dog\r\n".encode())
    cat, dog = read_prompt_file(tmp_path / "p.txt", Request())
    assert (cat.prompt, cat.seed, dog.prompt) == ("A cat\u2028sits,\u0085it\x0bpurrs", 3, "A dog")


@pytest.mark.parametrize(
    ("name", "text", "complaint"),
    [
        ("p.txt", "A cat\nA dog --x 1\n", "p.txt: line 2: unknown option --x"),
        ("p.txt", "# nothing\n", "no prompt in this file"),
        ("p.toml", "[prompt\n", "not valid TOML"),
        ("p.toml", '[general]\na = 1\n[prompt]\nprompt = "x"\n', "table .prompt."),
        ("p.toml", '[prompt]\nprompt = "x"\nwidht = 5\n', "prompt 1: unknown option widht .did you mean 'width'"),
        ("p.toml", '[prompt]\nprompt = "x"\nwidth = true\n', "one value is expected"),
        ("p.json", "{}", "a list of prompts"),
        ("p.json", "[1]", "prompt 1 is neither"),
        ("p.json", "[", "not valid JSON"),
        ("p.csv", "A cat", "ends in .txt, .toml or .json"),
    ],
)
def test_mistakes_in_files_name_the_place(tmp_path, name, text, complaint):
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=complaint):
        read_prompt_file(tmp_path / name, Request())


@pytest.mark.parametrize(("frames", "valid"), [(1, 1), (2, 1), (3, 5), (4, 5), (5, 5), (6, 5), (128, 129), (130, 129)])
def test_lengths_move_to_the_nearest_4n_plus_1(frames, valid):
    request, warnings = with_valid_size(Request(frames=frames))
    assert request.frames == valid
    assert len(warnings) == (frames != valid)


@pytest.mark.parametrize(("size", "valid"), [(1, 16), (16, 16), (23, 16), (24, 32), (540, 544), (720, 720)])
def test_sizes_move_to_the_nearest_multiple_of_16_or_are_refused(size, valid):
    request, warnings = with_valid_size(Request(height=size, width=32))
    assert (request.height, request.width) == (valid, 32)
    assert warnings == ([] if size == valid else [f"height {size} is not a multiple of 16: {valid} is used"])
    if warnings:
        with pytest.raises(UserError, match=f"height {size} .* nearest is {valid}"):
            with_valid_size(Request(height=size, width=32), strict=True)
