"""The video or the image that a generated video starts from."""

from collections.abc import Iterable
from itertools import islice
from operator import attrgetter
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from dataset.media import MediaError, load_image, resize_to_bucket
from modules.generation.requests import Request
from utils.errors import UserError
from utils.video_io import iterate_frames


def source_pixels(request: Request) -> tuple[Tensor | None, Tensor | None]:
    """Reads and resizes the video (3, F, H, W) and the image (3, 1, H, W) of a request, in 0..1; None without one.

    Raises:
        UserError: a file cannot be decoded, or the video is too short.
    """

    def fitted(frames: Iterable[np.ndarray]) -> Tensor:
        resized = np.stack([resize_to_bucket(frame, (request.width, request.height)) for frame in frames])
        return rearrange(torch.from_numpy(resized), "F H W C -> C F H W").float() / 255

    video = image = None
    if request.video_path is not None:
        # Each frame is resized before the next is decoded: at full size, 129 frames of 4K are 3 GB.
        video = fitted(frame for frame, _ in islice(iterate_frames(request.video_path), request.frames))
        _require_frames(request, video.shape[1])
    if request.image_path is not None:
        image = fitted([_image(request.image_path)])
    return video, image


def check_sources(requests: Iterable[Request]) -> None:
    """Decodes the video and the image of every request, so that a wrong file is found before a model is loaded.

    Raises:
        UserError: a file cannot be decoded, or a video is too short.
    """
    images, longest = set(), {}
    for request in requests:
        images.add(request.image_path)
        if request.video_path is not None:
            longest[request.video_path] = max(
                request, longest.get(request.video_path, request), key=attrgetter("frames")
            )
    for path in images - {None}:
        _image(path)
    for path, request in longest.items():
        _require_frames(request, sum(1 for _ in islice(iterate_frames(path), request.frames)))


def _require_frames(request: Request, found: int) -> None:
    if found < request.frames:
        raise UserError(
            f"{request.video_path}: {found} frames, --video_length {request.frames} needs more; "
            f"the longest is {(found - 1) // 4 * 4 + 1}"
        )


def _image(path: str) -> np.ndarray:
    try:
        return load_image(Path(path))
    except MediaError as error:
        raise UserError(f"{path}: {error}") from None
