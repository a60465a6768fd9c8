"""JSON and TOML that are nested too deeply, or hold a number of 5,000 digits: one line, wherever they are read."""

from pathlib import Path

import pytest
import torch

from dataset.config_utils import load_dataset_config
from modules.generation.outputs import load_latents, read_settings
from modules.generation.requests import Request, read_prompt_file
from utils.errors import UserError
from utils.files import parse_json, read_toml
from utils.safetensors_utils import read_header, save_file
from utils.video_io import METADATA_KEY, read_metadata, write_image

DEEP, LONG = "[" * 100_000, "[" + "9" * 5000 + "]"


@pytest.mark.parametrize("text", [DEEP, LONG, '{"a":' * 100_000, "[", "\ud800"])
def test_json_that_cannot_be_read_is_a_value_error(text):
    with pytest.raises(ValueError):
        parse_json(text)


@pytest.mark.parametrize("value", [DEEP, LONG, "{a=" * 100_000])
def test_toml_that_cannot_be_read_is_one_line(tmp_path, value):
    (tmp_path / "a.toml").write_text(f"x = {value}")
    with pytest.raises(UserError, match=r"a\.toml: the file is not valid TOML: ") as error:
        read_toml(tmp_path / "a.toml", "the file")
    assert "\n" not in str(error.value)


def write_metadata(folder: Path, text: str) -> Path:
    save_file({"latent": torch.zeros(16, 1, 2, 2)}, folder / "a.safetensors", {"settings": text})
    return folder / "a.safetensors"


READERS = {
    "prompts.json": lambda path: read_prompt_file(path, Request()),
    "prompts.toml": lambda path: read_prompt_file(path, Request()),
    "dataset.json": load_dataset_config,
    "dataset.toml": load_dataset_config,
}


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("text", [DEEP, LONG])
def test_files_of_users_name_the_place(tmp_path, name, text):
    path = tmp_path / name
    path.write_text(f"x = {text}" if path.suffix == ".toml" else text)
    with pytest.raises(UserError, match=f"{name}: "):
        READERS[name](path)


@pytest.mark.parametrize("text", [DEEP, LONG])
def test_metadata_of_strangers_are_none_or_one_line(tmp_path, text, monkeypatch):
    latents = write_metadata(tmp_path, text)
    for read in (load_latents, read_settings):
        with pytest.raises(UserError, match=r"a\.safetensors: "):
            read(latents)
    monkeypatch.setattr("utils.video_io.json_text", lambda values: text)
    write_image(torch.zeros(4, 4, 3, dtype=torch.uint8).numpy(), tmp_path / "a.png", {METADATA_KEY: 1})
    assert read_metadata(tmp_path / "a.png") is None


def test_a_header_that_is_nested_too_deeply_is_no_safetensors_file(tmp_path):
    (tmp_path / "a.safetensors").write_bytes(len(DEEP).to_bytes(8, "little") + DEEP.encode())
    with pytest.raises(UserError, match=r"a\.safetensors: not a safetensors file"):
        read_header(tmp_path / "a.safetensors")
