"""Names and contents of what generation writes, and which of it is already there.

A video's files share a stem, `{time}_{i}_{seed}`; lines of a prompt file add `_{key}`, by which a later run of the
same file finds what is finished. Every file appears under its name only when it is complete.
"""

import hashlib
import json
import re
import shutil
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from modules.generation.requests import Request
from utils.errors import UserError, one_line
from utils.files import TEMPORARY_SUFFIX
from utils.safetensors_utils import load_file, read_header, save_file
from utils.video_io import read_metadata, save_images, save_video

LATENT_SUFFIX = "_latent.safetensors"
KEY_LENGTH = 10


@dataclass(frozen=True)
class Job:
    """One video on its way: the seed is drawn, the files are named."""

    request: Request
    stem: str
    settings: Mapping[str, object] | None = None  # what its files carry; None for --no_metadata


@dataclass(frozen=True)
class OutputFolder:
    """Where videos go and in which form: `output_type` is video, images, latent or both."""

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
        """What a finished job leaves: the video, the folder of images, or the latents."""
        if self.output_type == "latent":
            return self.latent_path(job)
        return self.folder / (job.stem + ("" if self.output_type == "images" else ".mp4"))

    def save_latents(self, job: Job, latents: Tensor) -> None:
        """Writes scaled latents (1, C, f, h, w) with the metadata of the reference tool and ours."""
        save_file({"latent": latents[0].cpu()}, self.latent_path(job), _latent_metadata(job))

    def save_pixels(self, job: Job, pixels: Tensor) -> None:
        """Writes (3, F, H, W) in 0..1 as video or images; latents that were not asked for have done their duty."""
        if self.output_type == "images":
            save_images(pixels, self.result_path(job), job.settings)
        else:
            save_video(pixels, self.result_path(job), job.request.fps, job.settings)
        if not self.keeps_latents:
            self.latent_path(job).unlink(missing_ok=True)

    def by_key(self) -> defaultdict[str, list[Path]]:
        """What is there of each line of a prompt file, from one listing: on a network disk that takes long."""
        found = defaultdict(list)
        for path in sorted(self.folder.iterdir()) if self.folder.is_dir() else []:
            for part in set(re.findall(r"_([^_.]+)", path.name)):
                found[part].append(path)
        return found

    def is_finished(self, key: str, paths: Sequence[Path]) -> bool:
        """Whether of a line everything that --output_type asks for is among its paths."""
        names = [path.name for path in paths]
        wanted = {"video": [".mp4"], "images": [""], "latent": [LATENT_SUFFIX], "both": [".mp4", LATENT_SUFFIX]}
        return all(any(name.endswith(key + suffix) for name in names) for suffix in wanted[self.output_type])


def remove_leftovers(paths: Iterable[Path]) -> None:
    """Deletes what a killed process had begun to write."""
    for path in paths:
        if path.name.endswith(TEMPORARY_SUFFIX):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def sampled_stem(key: str, paths: Iterable[Path]) -> str | None:
    """The stem of a line whose latents are among its paths although the line is not finished."""
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
        "settings": json.dumps(dict(job.settings), ensure_ascii=False),
    }
    return {name: str(value) for name, value in fields.items()}


def time_stamp() -> str:
    return time.strftime("%Y%m%d-%H%M%S")


def stem(stamp: str, index: int, seed: int | None, key: str | None = None) -> str:
    """`{time}_{i}_{seed}` and, for a line of a prompt file, its key."""
    return "_".join(str(part) for part in (stamp, index, seed, key) if part is not None)


def run_keys(requests: Sequence[Request], surroundings: object) -> list[str]:
    """A name for each line of a prompt file that is the same in every run.

    Lines that say the same are told apart by their order; a line keeps its key when others are added or removed.

    Args:
        surroundings: whatever else decides how the videos look, such as model files; anything with a stable repr.
    """
    keys, seen = [], {}
    for request in requests:
        seen[request] = seen.get(request, 0) + 1
        identity = repr((request, seen[request], surroundings))
        keys.append(hashlib.sha256(identity.encode()).hexdigest()[:KEY_LENGTH])
    return keys


def load_latents(path: str | Path) -> tuple[Tensor, dict[str, object]]:
    """Saved latents (1, C, f, h, w) and the settings that came with them; reads our files and the seed tool's .pt.

    Raises:
        UserError: the file holds no latents of one video.
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
    latents = latents.float() if latents.ndim == 5 else latents.float().unsqueeze(0)
    if latents.ndim != 5 or latents.shape[0] != 1:
        raise UserError(f"{path}: latents of one video (C, f, h, w) are expected, found {tuple(latents.shape)}")
    if not torch.isfinite(latents).all():
        raise UserError(f"{path}: these latents hold NaN or infinity; sample them again")
    return latents, settings


def read_settings(path: Path) -> dict[str, object]:
    """The settings inside a video, an image or latents that generation wrote.

    Raises:
        UserError: the file carries none.
    """
    if path.suffix.lower() == ".safetensors":
        settings = _json_object(read_header(path)[1].get("settings", ""))
    else:
        settings = read_metadata(path)
    if settings is None:
        raise UserError(f"{path}: carries no settings of hv_generate_video.py (was it made with --no_metadata?)")
    return settings


def _json_object(text: str) -> dict[str, object] | None:
    try:
        value = json.loads(text)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def _saved_settings(path: Path, metadata: Mapping[str, str]) -> dict[str, object]:
    settings = _json_object(metadata.get("settings", "{}"))
    if settings is None:
        raise UserError(f"{path}: its metadata 'settings' is no JSON object; decode a copy without metadata")
    return ({"seed": metadata["seeds"]} if "seeds" in metadata else {}) | settings


def decoding_job(path: Path, settings: Mapping[str, object], index: int, fps: int | None, metadata: bool) -> Job:
    """The job that makes a video of saved latents.

    Args:
        settings: what the latents carry.
        index: of the file among all.
        fps: of the video; None for what the settings say.
        metadata: whether the video carries the settings.

    Raises:
        UserError: the settings' frames per second are no whole number.
    """
    saved, seed = str(settings.get("fps", Request.fps)), str(settings.get("seed"))
    if fps is None and (not saved.isdecimal() or int(saved) == 0):
        raise UserError(f"{path}: its settings say fps {saved}, a whole number is expected; give --fps")
    name = f"{stem(time_stamp(), index, int(seed) if seed.isdecimal() else None)}_{path.stem.removesuffix('_latent')}"
    return Job(Request(fps=fps or int(saved)), name, settings if metadata and settings else None)
