"""Reads the dataset config, a TOML or JSON file, and checks it.

dataset_config.md describes every key. No media file is looked at, so the same config works on a training machine that
has only the caches.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator

from utils.errors import UserError, did_you_mean, one_line
from utils.files import clean_path, parse_json, read_text, read_toml, user_path

SIZE_STEP = 16  # pixels: the VAE shrinks sides by 8, and a token of the DiT covers 2x2 latents
SECTIONS = ("general", "datasets", "validation")
IMAGE_KEYS = ("image_directory", "image_jsonl_file")
VIDEO_KEYS = ("video_directory", "video_jsonl_file")
CLIP_KEYS = (
    "target_frames",
    "frame_extraction",
    "frame_stride",
    "frame_sample",
    "max_frames",
    "source_fps",
    "target_fps",
)
GENERAL_KEYS = (
    "resolution",
    "caption_extension",
    "batch_size",
    "num_repeats",
    "enable_bucket",
    "bucket_no_upscale",
)
# Keys that the reference tool has for its other models; they are accepted, so that one config serves both tools.
OTHER_MODELS_KEYS = (
    "control_directory",
    "multiple_target",
    "no_resize_control",
    "control_resolution",
    "fp_latent_window_size",
    "fp_1f_clean_indices",
    "fp_1f_target_index",
    "fp_1f_no_post",
    "flux_kontext_no_resize_control",
    "qwen_image_edit_no_resize_control",
    "qwen_image_edit_control_resolution",
)
MODE_OF_KEY = {"frame_stride": "slide", "frame_sample": "uniform", "max_frames": "full"}


def valid_frames(frames: int) -> int:
    """The largest number 4k + 1 that is at most `frames`; the VAE, which shrinks time by 4, takes such lengths only."""
    return (frames - 1) // 4 * 4 + 1


def _path(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    if any(ord(character) < 32 for character in value):
        raise ValueError("the path contains a control character; write Windows paths with / or in 'single quotes'")
    if not clean_path(value):
        raise ValueError("the path is empty")
    return user_path(value)


def _resolution(value: Any) -> Any:
    if isinstance(value, int) and not isinstance(value, bool):
        return value, value
    return tuple(value) if isinstance(value, list) else value


PathSetting = Annotated[Path, BeforeValidator(_path)]
Count = Annotated[int, Field(ge=1)]
Side = Annotated[int, Field(ge=SIZE_STEP)]


class DatasetSettings(BaseModel):
    """One entry of [[datasets]] or [[validation]], completed with the values of [general]."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    resolution: Annotated[tuple[Side, Side], BeforeValidator(_resolution)] = (960, 544)  # width, height
    caption_extension: str = ".txt"
    batch_size: Count = 1
    num_repeats: Count = 1
    enable_bucket: bool = False
    bucket_no_upscale: bool = False

    image_directory: PathSetting | None = None
    image_jsonl_file: PathSetting | None = None
    video_directory: PathSetting | None = None
    video_jsonl_file: PathSetting | None = None
    cache_directory: PathSetting

    target_frames: tuple[Count, ...] = (1,)
    frame_extraction: Literal["head", "chunk", "slide", "uniform", "full"] = "head"
    frame_stride: Count = 1
    frame_sample: Count = 1
    max_frames: Count = 129
    source_fps: Annotated[float, Field(gt=0, le=1000)] | Literal["auto"] | None = None
    target_fps: Annotated[float, Field(gt=0, le=1000)] = 24.0

    @field_validator("target_frames", mode="before")
    @classmethod
    def _frames_as_list(cls, value: Any) -> Any:
        value = [value] if isinstance(value, int) and not isinstance(value, bool) else value
        if value == []:
            raise ValueError("at least one number of frames is expected")
        return tuple(value) if isinstance(value, list) else value

    @field_validator("target_frames")
    @classmethod
    def _round_frames(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(sorted({valid_frames(frames) for frames in value}))

    @field_validator("max_frames")
    @classmethod
    def _round_max_frames(cls, value: int) -> int:
        return valid_frames(value)

    @field_validator("caption_extension")
    @classmethod
    def _with_dot(cls, value: str) -> str:
        value = clean_path(value)
        if not value.strip(".") or "/" in value or "\\" in value:
            raise ValueError('the end of a file name is expected, such as ".txt"')
        return value if value.startswith(".") else f".{value}"

    @property
    def is_video(self) -> bool:
        return self.video_directory is not None or self.video_jsonl_file is not None

    @property
    def location(self) -> Path:
        """The folder or JSONL file that lists the media."""
        return self.image_directory or self.image_jsonl_file or self.video_directory or self.video_jsonl_file

    def effective(self) -> dict[str, Any]:
        """The settings that apply to this dataset, as JSON values in the order of dataset_config.md."""
        hidden = () if self.is_video else CLIP_KEYS
        values = self.model_dump(mode="json", exclude_none=True)
        return {key: value for key, value in values.items() if key not in hidden}


@dataclass(frozen=True)
class DatasetConfig:
    """A checked config file."""

    path: Path
    datasets: tuple[DatasetSettings, ...]
    validation: tuple[DatasetSettings, ...]
    notes: tuple[str, ...]  # one sentence for each setting without effect

    @property
    def every_dataset(self) -> tuple[DatasetSettings, ...]:
        return self.datasets + self.validation

    def effective_text(self) -> str:
        """The settings that apply to each dataset, written like the TOML file."""
        blocks = []
        for heading, members in (("datasets", self.datasets), ("validation", self.validation)):
            for settings in members:
                lines = [
                    f"{key} = {json.dumps(value, ensure_ascii=False)}" for key, value in settings.effective().items()
                ]
                blocks.append("\n".join([f"[[{heading}]]", *lines]))
        return "\n\n".join(blocks)


@dataclass(frozen=True)
class _Section:
    """A section of the file, for error messages with line numbers.

    Attributes:
        text: of the whole file.
        index: number of the section among those of the same name, from 0; None for [general].
    """

    path: Path
    text: str
    name: str
    index: int | None = None

    @property
    def heading(self) -> str:
        return f"[{self.name}]" if self.index is None else f"[[{self.name}]] number {self.index + 1}"

    def error(self, key: str | None, message: str) -> UserError:
        """An error about a key of this section, or about the section itself."""
        line = self._line_in_json(key) if self.path.suffix.lower() == ".json" else self._line_in_toml(key)
        where = f"{self.path}, line {line}" if line else f"{self.path}"
        return UserError(f"{where}: {self.heading}: {message}")

    def _line_in_toml(self, key: str | None) -> int | None:
        """The line of `key`, or of the section's heading, counted from 1; None if not found."""
        number, inside, line_of_section = -1, False, None
        for line_number, line in enumerate(self.text.splitlines(), 1):
            heading = re.match(r"\s*\[+\s*([\w.]+)\s*\]+", line)
            if heading:
                number += heading[1] == self.name and self.index is not None
                inside = heading[1] == self.name and (self.index is None or number == self.index)
                line_of_section = line_number if inside else line_of_section
            elif inside and key and re.match(rf'\s*["\']?{re.escape(key)}["\']?\s*=', line):
                return line_number
        return line_of_section

    def _line_in_json(self, key: str | None) -> int:
        """The line of `key`, or of the section's opening brace, counted from 1."""
        starts = [match.start() for match in re.finditer(rf'"{self.name}"\s*:', self.text)]
        position = starts[0] if starts else 0
        for _ in range(0 if self.index is None else self.index + 1):
            position = max(self.text.find("{", position + 1), position)
        found = re.compile(rf'"{re.escape(key)}"\s*:').search(self.text, position) if key else None
        return self.text.count("\n", 0, found.start() if found else position) + 1


def _parse(path: Path) -> tuple[dict[str, Any], str]:
    text = read_text(path, "dataset config")
    if path.suffix.lower() != ".json":
        return read_toml(path, "dataset config"), text
    try:
        return parse_json(text), text
    except json.JSONDecodeError as error:
        hint = "; write Windows paths with / or \\\\" if "\\" in text else ""
        raise UserError(f"{path}, line {error.lineno}: dataset config is not valid JSON: {error.msg}{hint}") from None
    except ValueError as error:
        raise UserError(f"{path}: dataset config is not valid JSON: {one_line(error)}") from None


def _check_keys(section: _Section, values: Any, allowed: tuple[str, ...]) -> None:
    if not isinstance(values, dict):
        raise section.error(None, "a table of keys is expected")
    for key in values:
        if key in allowed or key in OTHER_MODELS_KEYS:
            continue
        if section.name == "general" and key in DatasetSettings.model_fields:
            raise section.error(key, f"'{key}' belongs in [[datasets]]; [general] takes {', '.join(allowed)}")
        hint = did_you_mean(key, list(allowed))
        raise section.error(key, f"unknown key '{key}'{hint}; allowed: {', '.join(allowed)}")


def _check_media_keys(section: _Section, own: dict[str, Any]) -> None:
    """Refuses a dataset with no media key, with several, or with images and keys for videos."""
    given = [key for key in own if key in (*IMAGE_KEYS, *VIDEO_KEYS)]
    if not given:
        raise section.error(None, f"one of {', '.join((*IMAGE_KEYS, *VIDEO_KEYS))} is required")
    if len(given) > 1:
        raise section.error(given[1], f"{' and '.join(given)} contradict each other; keep one, or make two datasets")
    clip_keys = [key for key in CLIP_KEYS if key in own]
    if given[0] in IMAGE_KEYS and clip_keys:
        video_key = given[0].replace("image", "video")
        raise section.error(
            clip_keys[0],
            f"{clip_keys[0]} makes this a video dataset, but {given[0]} makes it an image dataset; "
            f"write {video_key}, or remove {clip_keys[0]}",
        )
    if given[0].endswith("jsonl_file") and "cache_directory" not in own:
        raise section.error(given[0], f"cache_directory is required with {given[0]}")


def _explain(error: dict[str, Any], value: Any) -> str:
    """A message from a pydantic error: the key with its value, and what was expected."""
    context = error.get("ctx", {})
    expected = {
        "int_type": "a whole number is expected",
        "bool_type": "true or false is expected, without quotes",
        "string_type": "a text in quotes is expected",
        "is_instance_of": "a path in quotes is expected",
    }.get(error["type"], error["msg"])
    key = error["loc"][0]
    if key == "source_fps":
        expected = 'a number above 0, or "auto", is expected'
    elif key == "resolution":
        expected = f"one number or [width, height] is expected, each at least {SIZE_STEP}"
    elif error["type"] == "value_error":
        expected = str(context["error"])
    elif error["type"] == "literal_error":
        allowed = re.findall(r"'([^']+)'", context["expected"])
        expected = f"allowed: {', '.join(allowed)}{did_you_mean(str(value), allowed)}"
    elif error["type"] == "greater_than_equal":
        expected = f"at least {context['ge']} is expected"
    return f"{key} = {value!r}: {expected}"


def _check_size(section: _Section, settings: DatasetSettings) -> None:
    if settings.enable_bucket or not any(side % SIZE_STEP for side in settings.resolution):
        return
    nearest = [max(SIZE_STEP, round(side / SIZE_STEP) * SIZE_STEP) for side in settings.resolution]
    raise section.error(
        "resolution",
        f"resolution = {list(settings.resolution)}: multiples of {SIZE_STEP} are expected, for example {nearest}; "
        "with enable_bucket = true any size is allowed",
    )


def _settings(section: _Section, general: dict[str, Any], own: dict[str, Any], notes: list[str]) -> DatasetSettings:
    _check_keys(section, own, tuple(DatasetSettings.model_fields))
    _check_media_keys(section, own)
    merged = {key: value for key, value in (general | own).items() if key not in OTHER_MODELS_KEYS}
    if "cache_directory" not in merged:
        merged["cache_directory"] = merged.get("image_directory") or merged.get("video_directory")

    def origin(key: str) -> _Section:
        return section if key in own else _Section(section.path, section.text, "general")

    try:
        settings = DatasetSettings(**merged)
    except ValidationError as error:
        first = error.errors()[0]
        key = str(first["loc"][0])
        raise origin(key).error(key, _explain(first, merged[key])) from None
    _check_size(origin("resolution"), settings)

    notes += _settings_without_effect(section.heading, own, settings)
    return settings


def _settings_without_effect(heading: str, own: dict[str, Any], settings: DatasetSettings) -> Iterator[str]:
    for key in own:
        if key in OTHER_MODELS_KEYS:
            yield f"{heading}: {key} is a key for other models and has no effect"
        elif MODE_OF_KEY.get(key, settings.frame_extraction) != settings.frame_extraction:
            yield f'{heading}: {key} has no effect without frame_extraction = "{MODE_OF_KEY[key]}"'
    if "target_frames" in own and settings.frame_extraction == "full":
        yield f'{heading}: target_frames has no effect with frame_extraction = "full"'
    if settings.is_video and "target_frames" not in own and settings.frame_extraction != "full":
        yield f"{heading}: target_frames is not set, so each clip is a single frame"
    if settings.bucket_no_upscale and not settings.enable_bucket:
        yield f"{heading}: bucket_no_upscale has no effect without enable_bucket = true"


def _check_cache_directories(path: Path, config: DatasetConfig) -> None:
    seen: dict[str, int] = {}
    for number, settings in enumerate(config.every_dataset, 1):
        directory = str(settings.cache_directory.resolve()).casefold()
        if directory in seen:
            raise UserError(
                f"{path}: datasets number {seen[directory]} and {number} share the cache directory "
                f"{settings.cache_directory}; give each its own cache_directory"
            )
        seen[directory] = number


def load_dataset_config(path: str | Path) -> DatasetConfig:
    """Reads and checks a dataset config.

    Raises:
        UserError: names the file, the line and the key, what was found and what is allowed.
    """
    path = Path(path)
    raw, text = _parse(path)
    if not isinstance(raw, dict):
        raise UserError(f"{path}: a table with [general] and [[datasets]] is expected")
    for key in raw:
        if key not in SECTIONS:
            hint = " (write it below [general])" if key in GENERAL_KEYS else did_you_mean(key, list(SECTIONS))
            raise UserError(
                f"{path}: unknown section or key '{key}'{hint}; allowed: [general], [[datasets]], [[validation]]"
            )
    general = raw.get("general", {})
    _check_keys(_Section(path, text, "general"), general, GENERAL_KEYS)
    notes: list[str] = []
    parsed: dict[str, tuple[DatasetSettings, ...]] = {}
    for name in ("datasets", "validation"):
        entries = raw.get(name, [])
        if not isinstance(entries, list):
            raise UserError(f"{path}: {name} must be a list: write [[{name}]] with two brackets")
        sections = [_Section(path, text, name, index) for index in range(len(entries))]
        parsed[name] = tuple(
            _settings(section, general, own, notes) for section, own in zip(sections, entries, strict=True)
        )
    if not parsed["datasets"]:
        raise UserError(f"{path}: no [[datasets]] entry; see dataset/dataset_config.md for an example")
    config = DatasetConfig(path, parsed["datasets"], parsed["validation"], tuple(notes))
    _check_cache_directories(path, config)
    return config
