"""Finds what a clip of the procedural world shows, without a network: shape, colour, motion, background.

    python -m examples.shapes.judge FILE_OR_FOLDER...

prints one line for each mp4. Generated clips have soft edges, weak noise and slightly wrong colours, which the judge
tolerates. A property that it cannot recognise is None. Lengths are fractions of the frame's shorter side.
"""

import argparse
import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from torch import Tensor

from examples.shapes.world import (
    BACKGROUNDS,
    COLOURS,
    CONCEPT,
    CONCEPT_COLOURS,
    MOTIONS,
    SHAPES,
    Scene,
    outline,
)
from utils.cli import print_table, run_script
from utils.errors import UserError
from utils.video_io import read_video

PROPERTIES = ("shape", "colour", "motion", "background")
SMOOTHING = 1 / 64  # sigma of the Gaussian against noise
GROUND_TOLERANCE = 0.1  # RGB distance; black and white are 0.2 off where a LoRA learned latents that are scaled twice
LEAST_CONTRAST = 0.15  # RGB distance from the background; the weakest pair, purple on gray, has 0.4
LEAST_AREA = 0.01  # fraction of the shorter side squared; the smallest shape of the world has 0.05
LEAST_CHROMA = 0.15  # distance from gray in CHROMA_PLANE; green, the palest colour, has 0.46
GRID = 48  # pixels of the square in which shapes are compared
LEAST_LIKENESS = 0.36  # 1 for a shape as it is drawn, 0 for a disc
LEAST_OVERLAP = 0.6  # intersection over union with the ideal shape
MOTION_TOLERANCE = 0.6  # 1 is the distance between a motion of the world and no motion
PALETTE = np.float32([*COLOURS.values(), *CONCEPT_COLOURS]) / 255
CHROMA_PLANE = np.float32([(1, 0), (-0.5, 0.75**0.5), (-0.5, -(0.75**0.5))])  # RGB -> a plane where hue is the angle
DISC_ROW, CORE_ROW = len(COLOURS), len(COLOURS) + 1  # rows of PALETTE
NO_COLOUR = len(PALETTE)


@dataclass(frozen=True)
class Verdict:
    """What a clip shows, in the words of `Scene`; None for what cannot be recognised. The concept's colour is ""."""

    shape: str | None = None
    colour: str | None = None
    motion: str | None = None
    background: str | None = None

    @property
    def is_concept(self) -> bool:
        return self.shape == CONCEPT

    def agreement(self, scene: Scene) -> dict[str, bool]:
        """For each of PROPERTIES, whether the clip shows what the scene says."""
        return {name: getattr(self, name) == getattr(scene, name) for name in PROPERTIES}

    def agrees(self, scene: Scene) -> bool:
        return all(self.agreement(scene).values())


def score(verdicts: Sequence[Verdict], scenes: Sequence[Scene]) -> dict[str, float]:
    """For each of PROPERTIES, the share (0..1) of verdicts that agree with their scenes."""
    agreements = [verdict.agreement(scene) for verdict, scene in zip(verdicts, scenes, strict=True)]
    return {name: sum(agreed[name] for agreed in agreements) / len(agreements) for name in PROPERTIES}


def judge(pixels: Tensor) -> Verdict:
    """What a clip (3, F, H, W) in 0..1 shows; nothing unless most frames show one shape on a plain background."""
    clip = np.nan_to_num(pixels.detach().float().cpu().permute(1, 2, 3, 0).numpy()).clip(0, 1)  # C F H W -> F H W C
    clip = np.stack([_smooth(frame) for frame in clip])
    ground = _ground(clip)
    if ground is None:
        return Verdict()
    masks = _masks(clip, ground)
    found = masks.any(axis=(1, 2))
    if found.mean() <= 0.5:
        return Verdict()
    masks, labels, times = masks[found], _labels(clip[found]), np.linspace(0, 1, len(clip))[found]
    is_concept = np.mean([_shows_concept(*frame) for frame in zip(labels, masks)]) > 0.5
    return Verdict(
        CONCEPT if is_concept else _shape(masks),
        "" if is_concept else _colour(labels[masks]),
        _motion(masks, times),
        _background(ground),
    )


def judge_video(path: str | Path) -> Verdict:
    """What a video file shows; raises UserError if it cannot be read."""
    return judge(read_video(path)[0])


def _smooth(frame: np.ndarray) -> np.ndarray:
    """(H, W) or (H, W, C) float32, blurred."""
    return cv2.GaussianBlur(frame, (0, 0), SMOOTHING * min(frame.shape[:2]))


def _ground(clip: np.ndarray) -> np.ndarray | None:
    """The RGB of the background of (F, H, W, 3), taken from the frame's border; None if that is not of one colour."""
    width = max(1, min(clip.shape[1:3]) // 16)
    strips = clip[:, :width], clip[:, -width:], clip[:, :, :width], clip[:, :, -width:]
    border = np.concatenate([strip.reshape(-1, 3) for strip in strips])
    ground = np.median(border, axis=0)
    return ground if np.mean(np.linalg.norm(border - ground, axis=1) < LEAST_CONTRAST) > 0.6 else None


def _background(ground: np.ndarray) -> str | None:
    distances = {name: np.linalg.norm(ground - np.divide(rgb, 255)) for name, rgb in BACKGROUNDS.items()}
    name = min(distances, key=distances.get)
    return name if distances[name] < GROUND_TOLERANCE else None


def _masks(clip: np.ndarray, ground: np.ndarray) -> np.ndarray:
    """The mask (F, H, W) bool of the shape in each frame of (F, H, W, 3); all False in a frame without one."""
    contrast = np.linalg.norm(clip - ground, axis=-1)
    strong = contrast[contrast > LEAST_CONTRAST]
    # At half of the shape's contrast lies its edge before it was blurred.
    threshold = max(LEAST_CONTRAST, np.median(strong) / 2) if strong.size else math.inf
    return np.stack([_largest_piece(frame > threshold) for frame in contrast])


def _largest_piece(mask: np.ndarray) -> np.ndarray:
    """(H, W) bool: the largest connected piece with its holes filled; empty if it is tiny or less than half of all."""
    pieces, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    filled = np.zeros(mask.shape, np.uint8)
    if pieces:
        cv2.drawContours(filled, [max(pieces, key=cv2.contourArea)], -1, 1, cv2.FILLED)
    piece = filled.astype(bool)
    is_thing = piece.sum() > LEAST_AREA * min(mask.shape) ** 2 and (piece & mask).sum() > 0.5 * mask.sum()
    return piece & is_thing


def _labels(clip: np.ndarray) -> np.ndarray:
    """For each pixel (..., 3) the row (...) of PALETTE with the nearest hue, or NO_COLOUR if it is nearly gray."""
    chroma, known = clip @ CHROMA_PLANE, PALETTE @ CHROMA_PLANE
    nearest = (chroma @ (known / np.linalg.norm(known, axis=1, keepdims=True)).T).argmax(axis=-1)
    return np.where(np.linalg.norm(chroma, axis=-1) > LEAST_CHROMA, nearest, NO_COLOUR)


def _colour(labels: np.ndarray) -> str | None:
    """The name of the colour that most pixels (N,) of the shape have."""
    counts = np.bincount(labels, minlength=NO_COLOUR + 1)
    best = counts[: len(COLOURS)].argmax()
    return list(COLOURS)[best] if counts[best] > 0.5 * len(labels) else None


def _shows_concept(labels: np.ndarray, mask: np.ndarray) -> bool:
    """Whether the shape in a frame has the concept's two colours, with the core inside the disc; both are (H, W)."""
    disc, core = mask & (labels == DISC_ROW), mask & (labels == CORE_ROW)
    if disc.sum() < 0.3 * mask.sum() or core.sum() < 0.1 * mask.sum():
        return False
    points = np.indices(mask.shape)
    distance = np.linalg.norm(points - points[:, mask].mean(axis=1)[:, None, None], axis=0)
    return distance[core].mean() < 0.75 * distance[disc].mean()


def _shape(masks: np.ndarray) -> str | None:
    """The shape that the masks (F, H, W) show.

    The mean of the masks minus a disc is projected on each shape minus a disc. The shape with the largest projection
    is chosen, or the disc if all are small. The mean cancels ragged edges, which differ from frame to frame. The
    projection tolerates blur, which makes the difference from a disc smaller but keeps its direction.
    """
    mean, disc = np.mean([_canonical(mask) for mask in masks], axis=0), _ideal("circle")
    corners = {shape: _ideal(shape) - disc for shape in SHAPES if shape != "circle"}
    likeness = {shape: np.sum((mean - disc) * ideal) / np.sum(ideal**2) for shape, ideal in corners.items()}
    best = max(likeness, key=likeness.get)
    shape = best if likeness[best] > LEAST_LIKENESS else "circle"
    overlap = np.minimum(mean, _ideal(shape)).sum() / np.maximum(mean, _ideal(shape)).sum()
    return shape if overlap > LEAST_OVERLAP else None


def _canonical(mask: np.ndarray) -> np.ndarray:
    """(H, W) bool -> (GRID, GRID) float32 in 0..1, centred and with the area of a disc of radius GRID / 4."""
    x, y = np.argwhere(mask).mean(axis=0)[::-1] + 0.5
    scale = GRID / 4 / math.sqrt(mask.sum() / math.pi)
    matrix = np.float32([[scale, 0, GRID / 2 - scale * x], [0, scale, GRID / 2 - scale * y]])
    return cv2.warpAffine(mask.astype(np.float32), matrix, (GRID, GRID), flags=cv2.INTER_LINEAR)


@functools.cache
def _ideal(shape: str) -> np.ndarray:
    """A shape of the world as `_canonical` shows it."""
    large = np.zeros((256, 256), np.uint8)
    cv2.fillPoly(large, [np.round(outline(shape, (128, 128), 60)).astype(np.int32)], 1)
    return _canonical(cv2.resize(large, (64, 64), interpolation=cv2.INTER_AREA).astype(bool))


def _motion(masks: np.ndarray, times: np.ndarray) -> str | None:
    """The motion of the world that is nearest to that of the masks (F, H, W); `times` (F,) are 0..1 in the clip."""
    if len(masks) < 2:
        return None
    side = min(masks.shape[1:])
    centres = [np.argwhere(mask).mean(axis=0)[::-1] / side for mask in masks]
    sizes = np.log2(masks.sum(axis=(1, 2))) / 2
    speed = _median_slope(times, np.column_stack((centres, sizes)))
    known = np.array([(x, y, math.log2(growth)) for x, y, growth in MOTIONS.values()])
    distances = np.linalg.norm((known - speed) / np.abs(known).max(axis=0), axis=1)
    best = distances.argmin()
    return list(MOTIONS)[best] if distances[best] < MOTION_TOLERANCE else None


def _median_slope(times: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Slopes (K,) of values (F, K) over times (F,), robust to a few frames that the border cuts (Theil-Sen)."""
    first, second = np.triu_indices(len(times), 1)
    return np.median((values[second] - values[first]) / (times[second] - times[first])[:, None], axis=0)


def videos_in(path: Path) -> list[Path]:
    """The file itself, or the mp4s of a folder."""
    videos = sorted(path.glob("*.mp4")) if path.is_dir() else [path]
    if not videos:
        raise UserError(f"{path}: holds no .mp4")
    return videos


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", type=Path, nargs="+", metavar="FILE_OR_FOLDER")
    videos = [video for path in parser.parse_args().paths for video in videos_in(path)]
    verdicts = [(video, judge_video(video)) for video in videos]
    rows = [(video, *(getattr(verdict, name) or "-" for name in PROPERTIES)) for video, verdict in verdicts]
    print_table("What the clips show", rows, ("clip", *PROPERTIES))


if __name__ == "__main__":
    run_script(main)
