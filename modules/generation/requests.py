"""Requests: the prompt, size, seed and other values of one video, and the prompt files that they are read from.

A line is a prompt followed by options: `A cat walks --w 960 --h 544 --f 49 --d 42`. A prompt file is a .txt with one
line per video (`#` starts a comment), a .toml with a table `[prompt]` and `[[prompt.subset]]` entries, or a .json list.
Training previews (`--sample_prompts`) and generation (`--from_file`, `--interactive`) use the same syntax.
"""

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from utils.errors import UserError, did_you_mean, one_line
from utils.files import parse_json, read_text, read_toml, user_path

SIZE_STEP = 16  # pixels: one latent is 8 pixels wide, one patch of the DiT 2 latents
FRAME_STEP = 4  # video frames per latent frame after the first
# The largest values, on the command line and in a line. What is above is a slip of the finger.
MAX_STEPS = 1000
MAX_SIDE = 8192  # pixels
MAX_FRAMES = 16385
MAX_FPS = 1000
MAX_FACTOR = 1e4  # guidance and shift; much larger values overflow
MIN_SHIFT = 1e-6


@dataclass(frozen=True, kw_only=True)
class Request:
    """One video to be made.

    Attributes:
        width, height: pixels.
        frames: 4n + 1.
        seed: None until one is drawn.
        guidance: embedded guidance.
        cfg_scale: classifier-free guidance; 1 is none.
        video_path, strength: a video to start from, and the share of the denoising steps that are run on it.
        image_path: the first frame, for image-to-video models.
    """

    prompt: str = ""
    negative_prompt: str = ""
    width: int = 256
    height: int = 256
    frames: int = 129
    seed: int | None = None
    steps: int = 50
    guidance: float = 6.0
    cfg_scale: float = 1.0
    flow_shift: float = 7.0
    fps: int = 24
    video_path: str | None = None
    strength: float = 0.8
    image_path: str | None = None

    @property
    def latent_frames(self) -> int:
        return (self.frames - 1) // FRAME_STEP + 1


# Defaults of the lines of --sample_prompts: those of the reference tool.
PREVIEW_DEFAULTS = Request(frames=1, steps=20, flow_shift=14.5)

# Short names of the reference tool's prompt lines, long names of its TOML and JSON prompts, and our options' names.
# As in the reference tool's prompt files, `guidance_scale` is embedded guidance here.
KEYS = {
    "prompt": "prompt",
    "n": "negative_prompt",
    "negative_prompt": "negative_prompt",
    "w": "width",
    "width": "width",
    "h": "height",
    "height": "height",
    "f": "frames",
    "frame_count": "frames",
    "video_length": "frames",
    "d": "seed",
    "seed": "seed",
    "s": "steps",
    "sample_steps": "steps",
    "infer_steps": "steps",
    "g": "guidance",
    "guidance_scale": "guidance",
    "embedded_cfg_scale": "guidance",
    "l": "cfg_scale",
    "cfg_scale": "cfg_scale",
    "fs": "flow_shift",
    "discrete_flow_shift": "flow_shift",
    "flow_shift": "flow_shift",
    "fps": "fps",
    "video_path": "video_path",
    "strength": "strength",
    "i": "image_path",
    "image_path": "image_path",
}
LINE_HELP = """A prompt, then any of these options; what is not given is taken from the command line:
  --w, --h pixels, multiples of 16     --f frames, 4n + 1             --fps frames per second
  --d seed                             --s denoising steps            --fs flow shift
  --g embedded guidance                --l classifier-free guidance   --n negative prompt
  --i first frame (image)              --video_path, --strength       a video to start from"""
OTHER_MODELS = {"ei": "end image", "cn": "control video", "ci": "control image", "of": "one-frame options"}
_TYPES = {field.name: field.type for field in dataclasses.fields(Request)}
_LIMITS = {
    "width": (1, MAX_SIDE),
    "height": (1, MAX_SIDE),
    "frames": (1, MAX_FRAMES),
    "seed": (0, 2**63 - 1),
    "steps": (1, MAX_STEPS),
    "guidance": (0, MAX_FACTOR),
    "cfg_scale": (0, MAX_FACTOR),
    "flow_shift": (MIN_SHIFT, MAX_FACTOR),
    "fps": (1, MAX_FPS),
}
_OPTION = re.compile(r"(?:^|\s)--(?=[A-Za-z])")
# What word processors make of two hyphens, before the name of an option.
_DASHED = re.compile(rf"(?:^|\s)([\u2012-\u2015\u2212]-?)({'|'.join(KEYS)})(?=\s|$)")


def parse_line(line: str, defaults: Request) -> Request:
    """The request of one line; values that the line does not give are taken from `defaults`.

    Raises:
        UserError: an unknown option, or a wrong value.
    """
    if dashed := _DASHED.search(line):
        raise UserError(f"{dashed[1]}{dashed[2]}: an option begins with two hyphens; write --{dashed[2]}")
    prompt, *options = _OPTION.split(line.strip())
    values = {} if not prompt.strip() else {"prompt": prompt.strip()}
    for text in options:
        name, _, value = re.sub(r"\s", " ", text, count=1).partition(" ")
        if _field(name, "--") in {_field(given) for given in values}:
            raise UserError(f"--{name} is given twice")
        values[name] = value.strip()
    return request_from(values, defaults, "--")


def request_from(values: Mapping[str, object], defaults: Request, dashes: str = "") -> Request:
    """A request from {name: value} with names as in `KEYS`; `dashes` are put before names in error messages."""
    fields = {_field(name, dashes): _converted(name, value, dashes) for name, value in values.items()}
    request = dataclasses.replace(defaults, **fields)
    if not request.prompt:
        raise UserError("there is no prompt")
    if "strength" in fields and request.video_path is None:
        raise UserError(f"{dashes}strength needs a video to start from; give {dashes}video_path")
    return request


def _field(name: str, dashes: str = "") -> str:
    if name in OTHER_MODELS:
        raise UserError(f"{dashes}{name} ({OTHER_MODELS[name]}) belongs to another model than HunyuanVideo")
    if name not in KEYS:
        raise UserError(f"unknown option {dashes}{name}{did_you_mean(name, list(KEYS))}")
    return KEYS[name]


def _converted(name: str, value: object, dashes: str) -> object:
    """The value of one option, converted to the type of its field."""
    field, shown = KEYS[name], f"{dashes}{name} {value}".strip()
    if isinstance(value, (bool, list, dict)) or value is None or value == "":
        raise UserError(f"{shown}: a value is expected" if value in (None, "") else f"{shown}: one value is expected")
    if field in ("video_path", "image_path"):
        path = user_path(str(value))
        if not path.is_file():
            raise UserError(f"{shown}: no such file")
        return str(path)
    if _TYPES[field] in (int, int | None):
        kind, expected = int, "a whole number"
    elif _TYPES[field] is float:
        kind, expected = float, "a number"
    else:
        return str(value)
    try:
        number = kind(str(value))
    except ValueError:
        raise UserError(f"{shown}: {expected} is expected") from None
    return _in_range(field, number, shown)


def _in_range(field: str, number: float, shown: str) -> float:
    if field == "strength" and not 0 < number <= 1:
        raise UserError(f"{shown}: a number above 0 and up to 1 is expected")
    if field == "seed" and number >= 2**63:
        raise UserError(f"{shown}: seeds are below 2^63")
    least, most = _LIMITS.get(field, (0, 1))
    if not least <= number <= most:
        raise UserError(f"{shown}: out of range, {least:g} to {most:g} is possible")
    return number


def read_prompt_file(path: str | Path, defaults: Request) -> list[Request]:
    """The requests of a prompt file, in the order of the file.

    Raises:
        UserError: something is wrong; names the file and the line or entry.
    """
    path = Path(path)
    readers = {".txt": _text_entries, ".toml": _toml_entries, ".json": _json_entries}
    if path.suffix.lower() not in readers:
        raise UserError(f"{path}: a prompt file ends in .txt, .toml or .json")
    requests = []
    for place, entry in readers[path.suffix.lower()](path):
        try:
            requests.append(parse_line(entry, defaults) if isinstance(entry, str) else request_from(entry, defaults))
        except UserError as error:
            raise UserError(f"{path}: {place}: {error}") from None
    if not requests:
        raise UserError(f"{path}: there is no prompt in this file")
    return requests


Entries = list[tuple[str, str | Mapping[str, object]]]


def _text_entries(path: Path) -> Entries:
    # `splitlines` would also split at separators that word processors put inside a paragraph.
    lines = enumerate(read_text(path, "prompt file").split("\n"), start=1)
    return [(f"line {number}", line) for number, line in lines if line.strip() and not line.lstrip().startswith("#")]


def _toml_entries(path: Path) -> Entries:
    table = read_toml(path, "prompt file")
    common = table.get("prompt")
    if set(table) != {"prompt"} or not isinstance(common, dict) or not isinstance(common.get("subset", []), list):
        raise UserError(f"{path}: a table [prompt] with [[prompt.subset]] entries is expected, and nothing else")
    subsets = common.pop("subset", [{}])
    return _merged_entries(path, common, subsets)


def _json_entries(path: Path) -> Entries:
    try:
        entries = parse_json(read_text(path, "prompt file"))
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON: {one_line(error)}") from None
    if not isinstance(entries, list):
        raise UserError(f"{path}: a list of prompts is expected")
    return _merged_entries(path, {}, entries)


def _merged_entries(path: Path, common: Mapping[str, object], entries: list) -> Entries:
    for index, entry in enumerate(entries, start=1):
        if not isinstance(entry, (dict, str)):
            raise UserError(f"{path}: prompt {index} is neither a table nor a line of text")
    return [
        (f"prompt {index}", {**common, **entry} if isinstance(entry, dict) else entry)
        for index, entry in enumerate(entries, start=1)
    ]


def with_valid_size(request: Request, strict: bool = False) -> tuple[Request, list[str]]:
    """The request with width, height and frames rounded to what the model supports, and a warning for each.

    Raises:
        UserError: with `strict`, if anything would be rounded.
    """
    nearest = {
        "width": max(SIZE_STEP, _nearest(request.width, SIZE_STEP)),
        "height": max(SIZE_STEP, _nearest(request.height, SIZE_STEP)),
        "frames": _nearest(request.frames - 1, FRAME_STEP) + 1,
    }
    rules = {"width": f"a multiple of {SIZE_STEP}", "height": f"a multiple of {SIZE_STEP}", "frames": "4n + 1"}
    rounded = [name for name, value in nearest.items() if value != getattr(request, name)]
    complaints = [f"{name} {getattr(request, name)} is not {rules[name]}" for name in rounded]
    if strict and rounded:
        raise UserError(f"{complaints[0]}; the nearest is {nearest[rounded[0]]}")
    warnings = [f"{text}: {nearest[name]} is used" for name, text in zip(rounded, complaints, strict=True)]
    return dataclasses.replace(request, **nearest), warnings


def _nearest(value: int, step: int) -> int:
    return (value + step // 2) // step * step
