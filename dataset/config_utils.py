"""The dataset config: a TOML or JSON file becomes checked, frozen settings.

Every key is described in dataset_config.md. Nothing here looks at media files, so that a training machine that holds
only the caches can read the same config.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator

from utils.errors import UserError, did_you_mean
from utils.files import clean_path, read_text, read_toml, user_path

SIZE_STEP = 16  # 8 pixels per latent, 2 latents per token of the DiT
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
# Keys of the reference tool that its other models need; a shared config may carry them.
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
    """The largest 4k + 1 <= frames: the clip lengths that the VAE's 4x temporal compression takes."""
    return (frames - 1) // 4 * 4 + 1


def _path(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    if any(ord(character) < 32 for character in value):
        raise ValueError("the path holds a control character; write Windows paths with / or in 'single quotes'")
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
    """One [[datasets]] entry with the values of [general] filled in."""

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
        """The settings that apply to this dataset, as plain values in the order of the documentation."""
        hidden = () if self.is_video else CLIP_KEYS
        values = self.model_dump(mode="json", exclude_none=True)
        return {key: value for key, value in values.items() if key not in hidden}


@dataclass(frozen=True)
class DatasetConfig:
    """A checked config file."""

    path: Path
    datasets: tuple[DatasetSettings, ...]
    validation: tuple[DatasetSettings, ...]
    notes: tuple[str, ...]  # settings that have no effect, one sentence each

    @property
    def every_dataset(self) -> tuple[DatasetSettings, ...]:
        return self.datasets + self.validation

    def effective_text(self) -> str:
        """The settings as they apply, in the form of the TOML file."""
        blocks = []
        for heading, members in (("datasets", self.datasets), ("validation", self.validation)):
            for settings in members:
                lines = [
                    f"{key} = {json.dumps(value, ensure_ascii=False)}" for key, value in settings.effective().items()
                ]
                blocks.append("\n".join([f"[[{heading}]]", *lines]))
        return "\n\n".join(blocks)


@dataclass(frozen=True)
class _Place:
    """A section of the file, for messages with line numbers."""

    path: Path
    text: str
    section: str
    index: int | None = None

    def error(self, key: str | None, message: str) -> UserError:
        line = _line_of(self.text, self.path.suffix.lower() == ".json", self.section, self.index, key)
        heading = f"[{self.section}]" if self.index is None else f"[[{self.section}]] number {self.index + 1}"
        where = f"{self.path}, line {line}" if line else f"{self.path}"
        return UserError(f"{where}: {heading}: {message}")


def _line_of(text: str, is_json: bool, section: str, index: int | None, key: str | None) -> int | None:
    """The line on which `key` of a section stands (or the section itself), counted from 1; None if not found."""
    if is_json:
        starts = [match.start() for match in re.finditer(rf'"{section}"\s*:', text)]
        position = starts[0] if starts else 0
        for _ in range((index or 0) + 1 if index is not None else 0):
            position = max(text.find("{", position + 1), position)
        found = re.compile(rf'"{re.escape(key)}"\s*:').search(text, position) if key else None
        return text.count("\n", 0, found.start() if found else position) + 1
    number, inside, line_of_section = -1, False, None
    for line_number, line in enumerate(text.splitlines(), 1):
        heading = re.match(r"\s*\[+\s*([\w.]+)\s*\]+", line)
        if heading:
            number += heading[1] == section and index is not None
            inside = heading[1] == section and (index is None or number == index)
            line_of_section = line_number if inside else line_of_section
        elif inside and key and re.match(rf'\s*["\']?{re.escape(key)}["\']?\s*=', line):
            return line_number
    return line_of_section


def _parse(path: Path) -> tuple[dict[str, Any], str]:
    text = read_text(path, "dataset config")
    if path.suffix.lower() != ".json":
        return read_toml(path, "dataset config"), text
    try:
        return json.loads(text), text
    except json.JSONDecodeError as error:
        hint = "; write Windows paths with / or \\\\" if "\\" in text else ""
        raise UserError(f"{path}, line {error.lineno}: dataset config is not valid JSON: {error.msg}{hint}") from None


def _check_keys(place: _Place, values: Any, allowed: tuple[str, ...]) -> None:
    if not isinstance(values, dict):
        raise place.error(None, "a table of keys is expected")
    for key in values:
        if key in allowed or key in OTHER_MODELS_KEYS:
            continue
        if place.section == "general" and key in DatasetSettings.model_fields:
            raise place.error(key, f"'{key}' belongs into [[datasets]]; [general] takes {', '.join(allowed)}")
        hint = did_you_mean(key, list(allowed))
        raise place.error(key, f"unknown key '{key}'{hint}; allowed: {', '.join(allowed)}")


def _check_intent(place: _Place, own: dict[str, Any]) -> None:
    """Refuses a dataset that is both, neither, or an image dataset with settings for videos."""
    given = [key for key in own if key in (*IMAGE_KEYS, *VIDEO_KEYS)]
    if not given:
        raise place.error(None, f"one of {', '.join((*IMAGE_KEYS, *VIDEO_KEYS))} is required")
    if len(given) > 1:
        raise place.error(given[1], f"{' and '.join(given)} contradict each other; keep one, or make two datasets")
    clip_keys = [key for key in CLIP_KEYS if key in own]
    if given[0] in IMAGE_KEYS and clip_keys:
        video_key = given[0].replace("image", "video")
        raise place.error(
            clip_keys[0],
            f"{clip_keys[0]} makes this a video dataset, but {given[0]} makes it an image dataset; "
            f"write {video_key}, or remove {clip_keys[0]}",
        )
    if given[0].endswith("jsonl_file") and "cache_directory" not in own:
        raise place.error(given[0], f"cache_directory is required with {given[0]}")


def _explain(error: dict[str, Any], value: Any) -> str:
    """What was found and what was expected, from one pydantic error of a key with this value."""
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


def _check_size(place: _Place, settings: DatasetSettings) -> None:
    if settings.enable_bucket or not any(side % SIZE_STEP for side in settings.resolution):
        return
    nearest = [max(SIZE_STEP, round(side / SIZE_STEP) * SIZE_STEP) for side in settings.resolution]
    raise place.error(
        "resolution",
        f"resolution = {list(settings.resolution)}: multiples of {SIZE_STEP} are expected, "
        f"for example {nearest}; with enable_bucket = true any size will do",
    )


def _settings(place: _Place, general: dict[str, Any], own: dict[str, Any], notes: list[str]) -> DatasetSettings:
    _check_keys(place, own, tuple(DatasetSettings.model_fields))
    _check_intent(place, own)
    merged = {key: value for key, value in (general | own).items() if key not in OTHER_MODELS_KEYS}
    if "cache_directory" not in merged:
        merged["cache_directory"] = merged.get("image_directory") or merged.get("video_directory")

    def origin(key: str) -> _Place:
        return place if key in own else _Place(place.path, place.text, "general")

    try:
        settings = DatasetSettings(**merged)
    except ValidationError as error:
        first = error.errors()[0]
        key = str(first["loc"][0])
        raise origin(key).error(key, _explain(first, merged[key])) from None
    _check_size(origin("resolution"), settings)

    heading = f"[[{place.section}]] number {place.index + 1}"
    for key in own:
        if key in OTHER_MODELS_KEYS:
            notes.append(f"{heading}: {key} is for other models and has no effect")
        elif MODE_OF_KEY.get(key, settings.frame_extraction) != settings.frame_extraction:
            notes.append(f'{heading}: {key} has no effect without frame_extraction = "{MODE_OF_KEY[key]}"')
    if "target_frames" in own and settings.frame_extraction == "full":
        notes.append(f'{heading}: target_frames has no effect with frame_extraction = "full"')
    if settings.is_video and "target_frames" not in own and settings.frame_extraction != "full":
        notes.append(f"{heading}: target_frames is not set, so each clip is a single frame")
    if settings.bucket_no_upscale and not settings.enable_bucket:
        notes.append(f"{heading}: bucket_no_upscale has no effect without enable_bucket = true")
    return settings


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
        UserError: file, line, key, what was found and what is allowed.
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
    _check_keys(_Place(path, text, "general"), general, GENERAL_KEYS)
    notes: list[str] = []
    parsed: dict[str, tuple[DatasetSettings, ...]] = {}
    for section in ("datasets", "validation"):
        entries = raw.get(section, [])
        if not isinstance(entries, list):
            raise UserError(f"{path}: {section} must be a list: write [[{section}]] with two brackets")
        places = [_Place(path, text, section, index) for index in range(len(entries))]
        parsed[section] = tuple(
            _settings(place, general, own, notes) for place, own in zip(places, entries, strict=True)
        )
    if not parsed["datasets"]:
        raise UserError(f"{path}: no [[datasets]] entry; see dataset/dataset_config.md for an example")
    config = DatasetConfig(path, parsed["datasets"], parsed["validation"], tuple(notes))
    _check_cache_directories(path, config)
    return config
