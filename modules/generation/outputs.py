"""The files that generation writes and reads back: videos, images and latents, each with its settings inside.

All files of a video begin with its stem (modules/generation/jobs.py). A file gets its final name when it is complete.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from modules.generation.requests import Request
from utils.errors import UserError, one_line
from utils.files import parse_json
from utils.safetensors_utils import load_file, read_header, save_file
from utils.video_io import json_text, read_metadata, save_images, save_video

LATENT_SUFFIX = "_latent.safetensors"


@dataclass(frozen=True)
class Job:
    """One video to be made. Its seed is drawn and its files are named.

    Attributes:
        stem: the first part of the names of its files.
        settings: saved inside its files; None with --no_metadata.
        latents: saved latents (1, C, f, h, w) that are only to be decoded; None for a video that is sampled.
        loras: the LoRA files (path, multiplier) that compute beside the DiT's weights while this video is sampled, an
            empty list for none; None leaves the DiT as it was loaded.
    """

    request: Request
    stem: str
    settings: Mapping[str, object] | None = None
    latents: Tensor | None = None
    loras: Sequence[tuple[Path, float]] | None = None


@dataclass(frozen=True)
class OutputFolder:
    """The folder that videos are written to, and their form: `output_type` is video, images, latent or both."""

    folder: Path
    output_type: str

    @property
    def decodes(self) -> bool:
        return self.output_type != "latent"

    @property
    def keeps_latents(self) -> bool:
        return self.output_type in ("latent", "both")

    def latent_path(self, job: Job) -> Path:
        return self.folder / (job.stem + LATENT_SUFFIX)

    def result_path(self, job: Job) -> Path:
        """The path of a finished job's result: the video, the folder of images, or the latents."""
        if self.output_type == "latent":
            return self.latent_path(job)
        return self.folder / (job.stem + ("" if self.output_type == "images" else ".mp4"))

    def save_latents(self, job: Job, latents: Tensor) -> None:
        """Writes scaled latents (1, C, f, h, w) with our settings and the metadata of the reference tool."""
        save_file({"latent": latents[0].cpu()}, self.latent_path(job), _latent_metadata(job))

    def save_pixels(self, job: Job, pixels: Tensor) -> None:
        """Writes (3, F, H, W) in 0..1 as a video or as images."""
        if self.output_type == "images":
            save_images(pixels, self.result_path(job), job.settings)
        else:
            save_video(pixels, self.result_path(job), job.request.fps, job.settings)

    def by_key(self) -> defaultdict[str, list[Path]]:
        """The files and folders that exist for each line of a prompt file, by the key of the line.

        The folder is listed once for all lines, because a listing of a network disk takes long.
        """
        found = defaultdict(list)
        for path in sorted(self.folder.iterdir()) if self.folder.is_dir() else []:
            for part in set(re.findall(r"_([^_.]+)", path.name)):
                found[part].append(path)
        return found

    def is_finished(self, key: str, paths: Sequence[Path]) -> bool:
        """Whether `paths`, the files of one line, include everything that --output_type asks for."""
        names = [path.name for path in paths]
        wanted = {"video": [".mp4"], "images": [""], "latent": [LATENT_SUFFIX], "both": [".mp4", LATENT_SUFFIX]}
        return all(any(name.endswith(key + suffix) for name in names) for suffix in wanted[self.output_type])


def sampled_stem(key: str, paths: Iterable[Path]) -> str | None:
    """The stem of an unfinished line whose latents are already saved; None if they are not."""
    stems = [path.name.removesuffix(LATENT_SUFFIX) for path in paths if path.name.endswith(key + LATENT_SUFFIX)]
    return stems[0] if stems else None


def _latent_metadata(job: Job) -> dict[str, str]:
    if job.settings is None:
        return {}
    request = job.request
    fields = {
        "seeds": request.seed,
        "prompt": request.prompt,
        "height": request.height,
        "width": request.width,
        "video_length": request.frames,
        "infer_steps": request.steps,
        "guidance_scale": request.cfg_scale,
        "embedded_cfg_scale": request.guidance,
        "negative_prompt": request.negative_prompt,
        "settings": json_text(job.settings),
    }
    return {name: str(value) for name, value in fields.items()}


def load_latents(path: str | Path) -> tuple[Tensor, dict[str, object]]:
    """Saved latents (1, C, f, h, w) and the settings in their file: a .safetensors of ours or the reference tool's .pt.

    Raises:
        UserError: the file does not hold the latents of one video.
    """
    path = Path(path)
    settings: dict[str, object] = {}
    if path.suffix == ".pt":
        try:
            latents = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:
            raise UserError(f"{path}: cannot be read as saved latents: {one_line(error)}") from None
    else:
        metadata = read_header(path)[1]
        latents = load_file(path).get("latent")
        settings = _saved_settings(path, metadata)
    if not isinstance(latents, Tensor):
        raise UserError(f"{path}: holds no saved latents (a tensor with the key 'latent')")
    if not latents.is_floating_point():
        raise UserError(f"{path}: these latents are {latents.dtype}, floating-point numbers are expected")
    latents = latents.float() if latents.ndim == 5 else latents.float().unsqueeze(0)
    if latents.ndim != 5 or latents.shape[0] != 1:
        raise UserError(f"{path}: latents of one video (C, f, h, w) are expected, found {tuple(latents.shape)}")
    if not torch.isfinite(latents).all():
        raise UserError(f"{path}: these latents hold NaN or infinity; sample them again")
    return latents, settings


def read_settings(path: Path) -> dict[str, object]:
    """The settings inside a video, an image or a latent file that hv_generate_video.py made.

    Raises:
        UserError: the file has none.
    """
    if path.suffix.lower() == ".safetensors":
        settings = _json_object(read_header(path)[1].get("settings", ""))
    else:
        settings = read_metadata(path)
    if settings is None:
        raise UserError(f"{path}: holds no settings of hv_generate_video.py (was it made with --no_metadata?)")
    return settings


def _json_object(text: str) -> dict[str, object] | None:
    try:
        value = parse_json(text)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def _saved_settings(path: Path, metadata: Mapping[str, str]) -> dict[str, object]:
    settings = _json_object(metadata.get("settings", "{}"))
    if settings is None:
        raise UserError(f"{path}: its metadata 'settings' is no JSON object; decode a copy without metadata")
    return ({"seed": metadata["seeds"]} if "seeds" in metadata else {}) | settings
