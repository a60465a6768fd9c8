"""The dataset config: every mistake named with file, line, key and what is allowed."""

import json
from pathlib import Path

import pytest

from dataset.config_utils import load_dataset_config
from utils.errors import UserError

TOML = """\
# a comment with resolution = 1
[general]
resolution = [960, 544]
caption_extension = ".txt"
batch_size = 1
enable_bucket = true

[[datasets]]
image_directory = "/data/images"
cache_directory = "/data/cache"
num_repeats = 2

[[datasets]]
video_directory = '/data/videos'
batch_size = 3
target_frames = [1, 25, 46]
frame_extraction = "chunk"
"""


def load(tmp_path: Path, text: str, name: str = "data.toml"):
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return load_dataset_config(path)


def test_general_fills_in_what_a_dataset_leaves_out(tmp_path: Path) -> None:
    images, videos = load(tmp_path, TOML).datasets
    assert (images.resolution, images.batch_size, images.num_repeats, images.is_video) == ((960, 544), 1, 2, False)
    assert (videos.batch_size, videos.num_repeats, videos.is_video) == (3, 1, True)
    assert videos.target_frames == (1, 25, 45)
    assert videos.cache_directory == Path("/data/videos")
    assert images.enable_bucket and videos.enable_bucket


def test_json_says_the_same_as_toml(tmp_path: Path) -> None:
    config = {
        "general": {"resolution": [960, 544], "caption_extension": ".txt", "batch_size": 1, "enable_bucket": True},
        "datasets": [
            {"image_directory": "/data/images", "cache_directory": "/data/cache", "num_repeats": 2},
            {
                "video_directory": "/data/videos",
                "batch_size": 3,
                "target_frames": [1, 25, 46],
                "frame_extraction": "chunk",
            },
        ],
    }
    from_json = load(tmp_path, json.dumps(config, indent=1), "data.json")
    assert from_json.datasets == load(tmp_path, TOML).datasets


def test_the_effective_config_is_a_config(tmp_path: Path) -> None:
    config = load(tmp_path, TOML)
    assert load(tmp_path, config.effective_text(), "again.toml").datasets == config.datasets


def test_defaults_are_those_of_the_reference_tool(tmp_path: Path) -> None:
    (settings,) = load(tmp_path, '[[datasets]]\nvideo_directory = "v"\ntarget_frames = [1]').datasets
    assert settings.resolution == (960, 544)
    assert (settings.batch_size, settings.num_repeats) == (1, 1)
    assert (settings.enable_bucket, settings.bucket_no_upscale) == (False, False)
    assert (settings.frame_extraction, settings.frame_stride, settings.frame_sample) == ("head", 1, 1)
    assert (settings.max_frames, settings.source_fps, settings.target_fps) == (129, None, 24)


def test_one_number_is_a_square_and_invisible_characters_vanish(tmp_path: Path) -> None:
    text = '\ufeff[[datasets]]\nimage_directory = "\u202a/data/images\u200b "\nresolution = 512'
    (settings,) = load(tmp_path, text).datasets
    assert settings.resolution == (512, 512)
    assert settings.image_directory == Path("/data/images")


MISTAKES = {
    "chunks": ('"chunk"', '"chunks"', 17, ["frame_extraction", "chunk, slide", "did you mean 'chunk'"]),
    "misspelt key": ("target_frames", "target_frame", 16, ["target_frame", "did you mean 'target_frames'"]),
    "text for a number": ("batch_size = 3", 'batch_size = "3"', 15, ["batch_size", "'3'", "whole number"]),
    "zero": ("batch_size = 3", "batch_size = 0", 15, ["batch_size", "at least 1"]),
    "quoted bool": ("= true", '= "True"', 6, ["[general]", "enable_bucket", "true or false", "quotes"]),
    "one side": ("[960, 544]", "[960]", 3, ["resolution", "[960]", "[width, height]"]),
    "tiny": ("[960, 544]", "8", 3, ["resolution", "at least 16"]),
    "no frames": ("[1, 25, 46]", "[]", 16, ["target_frames", "at least one"]),
    "half a frame": ("[1, 25, 46]", "[1.5]", 16, ["target_frames", "whole number"]),
    "fps": ('"chunk"', '"chunk"\nsource_fps = "fast"', 18, ["source_fps", '"auto"']),
    "image with clips": (
        "video_directory",
        "image_directory",
        16,
        ["target_frames", "image_directory", "video_directory"],
    ),
    "both": ("batch_size = 3", 'image_directory = "x"', 15, ["video_directory and image_directory", "contradict"]),
    "neither": ("image_directory", "#", 8, ["image_directory", "video_directory", "required"]),
    "no cache for jsonl": ("video_directory", "video_jsonl_file", 14, ["cache_directory is required"]),
    "key of a dataset": ("[general]", "[general]\ntarget_frames = [1]", 3, ["target_frames", "[[datasets]]"]),
    "no extension": ('".txt"', '""', 4, ["caption_extension", 'such as ".txt"']),
    "control character": ("'/data/videos'", '"C:\\temp\\new"', 14, ["video_directory", "single quotes"]),
    "odd size": ("true", "false\n#", 3, ["resolution"]),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_name_line_and_key(tmp_path: Path, name: str) -> None:
    before, after, line, words = MISTAKES[name]
    text = TOML.replace(before, after) if name != "odd size" else TOML.replace("true", "false").replace("544", "540")
    with pytest.raises(UserError) as caught:
        load(tmp_path, text)
    message = str(caught.value)
    assert f"data.toml, line {line}:" in message
    assert all(word in message for word in words), message
    assert "\n" not in message


def test_json_mistakes_name_their_line_too(tmp_path: Path) -> None:
    text = '{\n "datasets": [\n  {"image_directory": "a"},\n  {"video_directory": "b",\n   "frame_strid": 3}\n ]\n}'
    with pytest.raises(UserError, match=r"data\.json, line 5: .*number 2.*did you mean 'frame_stride'"):
        load(tmp_path, text, "data.json")
    with pytest.raises(UserError, match=r"line 2: dataset config is not valid JSON.*Windows"):
        load(tmp_path, '{\n "datasets": [{"image_directory": "C:\\data"}]}', "data.json")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("resolution = 512", "below [general]"),
        ("[dataset]\nimage_directory = 'x'", "did you mean 'datasets'"),
        ("[datasets]\nimage_directory = 'x'", "two brackets"),
        ("[general]\nbatch_size = 1", "no [[datasets]]"),
        ('[[datasets]]\nimage_directory = "C:\\Users"', "single quotes"),
        # Refused everywhere: on another file system, X and x may be one directory.
        ("[[datasets]]\nimage_directory = 'x'\n[[datasets]]\nimage_directory = 'y'\ncache_directory='X'", "share"),
    ],
)
def test_files_of_the_wrong_shape(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(UserError) as caught:
        load(tmp_path, text)
    assert words in str(caught.value)


def test_datasets_do_not_share_a_cache_directory(tmp_path: Path) -> None:
    text = "[[datasets]]\nimage_directory = 'x'\n[[datasets]]\nvideo_directory = 'x'\ntarget_frames = [1]"
    with pytest.raises(UserError, match="number 1 and 2 share the cache directory"):
        load(tmp_path, text)


def test_settings_without_effect_are_noted(tmp_path: Path) -> None:
    text = (
        "[[datasets]]\nvideo_directory = 'x'\nframe_stride = 3\ncontrol_directory = 'y'\n"
        "[[datasets]]\nimage_directory = 'z'\nbucket_no_upscale = true"
    )
    notes = " ".join(load(tmp_path, text).notes)
    for word in ("frame_stride", "control_directory", "target_frames is not set", "bucket_no_upscale"):
        assert word in notes


def test_every_key_is_documented() -> None:
    from dataset import config_utils

    text = (Path(config_utils.__file__).parent / "dataset_config.md").read_text(encoding="utf-8")
    for key in (*config_utils.DatasetSettings.model_fields, *config_utils.OTHER_MODELS_KEYS):
        assert f"`{key}`" in text, key


def test_the_examples_of_the_documentation_are_valid(tmp_path: Path) -> None:
    from dataset import config_utils

    text = (Path(config_utils.__file__).parent / "dataset_config.md").read_text(encoding="utf-8")
    examples = [part.split("```")[0] for part in text.split("```toml\n")[1:]]
    assert len(examples) >= 5
    for example in examples:
        load(tmp_path, example)
