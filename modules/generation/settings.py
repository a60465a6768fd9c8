"""The settings inside generated files: written from options, and read back into options by --from_file."""

import dataclasses
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from modules.generation.options import GenerationOptions
from modules.generation.requests import Request
from utils.cli import parse_options
from utils.errors import UserError

MEDIA_SUFFIXES = (".mp4", ".png", ".safetensors")
# Options about where to run and what to write, which do not describe the video.
_WHERE = ("device", "save_path", "output_type", "latent_path", "no_metadata", "save_merged_model", "interactive")
# Options about the memory plan. The options that --vram_gb chooses are stored instead.
_PLAN = ("vram_gb", "dry_run")
# Options that say which videos to make. The settings of one video have its request instead.
_SOURCES = ("prompt", "from_file", "compare")
# Options whose files can be seen in the video or in its settings. A stranger's file could name a private one.
_READ_INTO_THE_VIDEO = ("from_file", "video_path", "image_path")


def page_settings(options: GenerationOptions, seed: int) -> dict[str, object]:
    """The options that make a page of --compare again."""
    return {name: value for name, value in options.settings().items() if name not in _WHERE + _PLAN} | {"seed": seed}


def video_settings(options: GenerationOptions, request: Request) -> dict[str, object]:
    """The options that make this video again: the options of the run, and the values of the request."""
    settings = {name: value for name, value in options.settings().items() if name not in _WHERE + _PLAN + _SOURCES}
    own = {
        "prompt": request.prompt,
        "negative_prompt": request.negative_prompt,
        "video_size": [request.height, request.width],
        "video_length": request.frames,
        "seed": request.seed,
        "infer_steps": request.steps,
        "embedded_cfg_scale": request.guidance,
        "guidance_scale": request.cfg_scale,
        "flow_shift": request.flow_shift,
        "fps": request.fps,
        "video_path": request.video_path,
        "strength": request.strength,
        "image_path": request.image_path,
    }
    settings |= {name: value for name, value in own.items() if value not in (None, "")}
    if request.video_path is None:
        settings.pop("strength")
    return settings


def parse_generation_options(description: str, argv: Sequence[str] | None = None) -> GenerationOptions:
    """The command line. `--from_file` with a video, image or latent file stands for the settings inside it."""
    groups = [field.type for field in dataclasses.fields(GenerationOptions)]
    names = {field.name for group in groups for field in dataclasses.fields(group)}.difference(_WHERE, _PLAN)

    def settings_of_media(given: dict[str, object]) -> tuple[Path, dict[str, object]] | None:
        path = given.get("from_file")
        if path is None or path.suffix.lower() not in MEDIA_SUFFIXES:
            return None
        del given["from_file"]
        from modules.generation.outputs import read_settings

        settings = {name: value for name, value in read_settings(path).items() if name in names}
        if "video_path" not in settings:
            settings.pop("strength", None)  # an earlier version wrote it without a video
        for name in _READ_INTO_THE_VIDEO:
            if name in settings and name not in given:
                raise UserError(
                    f"{path}: was made from {settings[name]}. A file's settings cannot name what is read into a video: "
                    f"give --{name}" + (" and the other options instead of this file" if name == "from_file" else "")
                )
        return path, settings

    return GenerationOptions(*parse_options(description, *groups, argv=argv, expand=settings_of_media))


def decode_command(options: GenerationOptions, latents: Path) -> str:
    """The command line that decodes saved latents with the VAE options and the output type of this run."""
    vae, output = options.vae, options.output
    given = {
        "vae": vae.vae,
        "vae_dtype": vae.vae_dtype,
        "vae_chunk_size": vae.vae_chunk_size,
        "vae_spatial_tile_sample_min_size": vae.tile_size,
        "device": options.device.device,
        "output_type": "images" if output.output_type == "images" else None,
        "latent_path": latents,
        "save_path": output.save_path,
    }
    words = [word for name, value in given.items() if value is not None for word in (f"--{name}", str(value))]
    join = subprocess.list2cmdline if sys.platform == "win32" else shlex.join
    return join(["python", "hv_generate_video.py", *words])
