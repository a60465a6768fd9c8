"""Reading back what generation wrote."""

from pathlib import Path

import torch

from utils.safetensors_utils import load_file
from utils.video_io import read_video


def only(folder: Path, pattern: str) -> Path:
    """The one file that fits the pattern."""
    (path,) = folder.glob(pattern)
    return path


def load(path: Path) -> torch.Tensor:
    """Saved latents, C f h w."""
    return load_file(path)["latent"]


def saved_latents(folder: Path) -> torch.Tensor:
    return load(only(folder, "*_latent.safetensors"))


def frames(path: Path) -> torch.Tensor:
    return read_video(path)[0]
