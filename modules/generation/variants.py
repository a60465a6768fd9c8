"""Text-to-video and image-to-video DiTs, and what each requires of a request."""

import dataclasses
import functools
from pathlib import Path

from hunyuan_model.checkpoints import read_dit_config
from modules.generation.requests import Request
from modules.options import DitOptions
from utils.errors import UserError

TEXT_TO_VIDEO_CHANNELS, SKYREELS_I2V_CHANNELS = 16, 32
SKYREELS_TRIGGER = "FPS-24, "  # all captions in the training data of SkyReels-V1 begin with it


def request_for_dit(request: Request, dit: DitOptions) -> Request:
    """The request for this DiT. A SkyReels-V1-I2V model requires an image, and its trigger is added to the prompt.

    Raises:
        UserError: the DiT needs an image that the request does not have, or the other way round.
    """
    channels = dit_input_channels(dit.dit)
    if dit.dit_in_channels not in (None, channels):
        raise UserError(f"--dit_in_channels {dit.dit_in_channels}: {dit.dit} has {channels} input channels")
    if channels == SKYREELS_I2V_CHANNELS:
        if request.image_path is None:
            raise UserError(f"{dit.dit}: SkyReels-V1-I2V makes videos from an image; give --image_path")
        prompt = request.prompt.removeprefix(SKYREELS_TRIGGER)
        return dataclasses.replace(request, prompt=SKYREELS_TRIGGER + prompt)
    if channels != TEXT_TO_VIDEO_CHANNELS:
        raise UserError(f"{dit.dit}: {channels} input channels; only 16 (T2V) and 32 (SkyReels-V1-I2V) are supported")
    if request.image_path is not None:
        raise UserError(f"--image_path needs SkyReels-V1-I2V (32 input channels), {dit.dit} has {channels}")
    return request


@functools.cache
def dit_input_channels(path: Path) -> int:
    """The number of input channels, from the header of the file."""
    return read_dit_config(path).in_channels
