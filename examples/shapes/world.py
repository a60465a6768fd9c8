"""A procedural world: short clips of one coloured shape that moves, grows or shrinks on a plain background.

    python -m examples.shapes.world FOLDER --clips 6 --images 2 --seed 0

writes H.264 clips, PNG and JPEG images, a caption file for each, and `dataset.toml` for the caching scripts.
"""

import argparse
import json
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import cv2
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from utils.cli import run_script
from utils.errors import UserError
from utils.files import atomic_path, write_text
from utils.video_io import save_video, to_uint8

COLOURS = {  # RGB
    "red": (220, 40, 40),
    "yellow": (235, 205, 40),
    "green": (40, 170, 70),
    "blue": (50, 80, 220),
    "purple": (150, 50, 190),
}
BACKGROUNDS = {"black": (16, 16, 16), "gray": (128, 128, 128), "white": (240, 240, 240)}
SHAPES = ("circle", "square", "triangle", "star")
# The concept that the example LoRA learns. No base model of this world has seen it or its name.
CONCEPT = "zorb"
CONCEPT_COLOURS = ((40, 200, 220), (245, 130, 30))  # a cyan disc with an orange core
CORE = 0.55  # the core's radius relative to the disc's
# Over a clip: the path of the centre to the right and down, in fractions of the frame, and the growth of the radius.
MOTIONS = {
    "moves to the left": (-0.3, 0.0, 1.0),
    "moves to the right": (0.3, 0.0, 1.0),
    "moves up": (0.0, -0.3, 1.0),
    "moves down": (0.0, 0.3, 1.0),
    "grows": (0.0, 0.0, 1.7),
    "shrinks": (0.0, 0.0, 0.6),
}
SOFTNESS = 1 / 64  # sigma of the blur in fractions of the frame: no camera shows an edge sharper than a pixel
FPS = 24
SUBPIXEL_BITS = 6  # cv2 draws polygons at 1/64 pixel, so that slow motion is smooth


@dataclass(frozen=True)
class Layer:
    """A shape in one colour; `size` is its radius relative to that of the whole."""

    shape: str
    colour: tuple[int, int, int]
    size: float = 1.0


@dataclass(frozen=True)
class Scene:
    """What a clip shows. `offset` moves the path away from the middle. Lengths are fractions of the frame.

    The colours of the concept are fixed; its `colour` is "".
    """

    shape: str
    colour: str
    motion: str
    background: str
    radius: float = 0.21
    offset: tuple[float, float] = (0.0, 0.0)

    @property
    def caption(self) -> str:
        thing = " ".join(filter(None, (self.colour, self.shape)))
        return f"A {thing} {self.motion} on a {self.background} background."

    @property
    def layers(self) -> list[Layer]:
        """What is drawn, from back to front."""
        if self.shape == CONCEPT:
            disc, core = CONCEPT_COLOURS
            return [Layer("circle", disc), Layer("circle", core, CORE)]
        return [Layer(self.shape, COLOURS[self.colour])]


def random_scene(generator: random.Random, concept: bool = False) -> Scene:
    """A random scene of the known world, or of the concept; every property is drawn uniformly."""
    return Scene(
        CONCEPT if concept else generator.choice(SHAPES),
        "" if concept else generator.choice(list(COLOURS)),
        generator.choice(list(MOTIONS)),
        generator.choice(list(BACKGROUNDS)),
        generator.uniform(0.26, 0.3) if concept else generator.uniform(0.19, 0.24),
        (generator.uniform(-0.06, 0.06), generator.uniform(-0.06, 0.06)),
    )


def varied_scenes(generator: random.Random, count: int) -> list[Scene]:
    """Random scenes of the concept. Motions and backgrounds take turns, so that a dozen scenes show all of them."""
    motions, backgrounds = list(MOTIONS), list(BACKGROUNDS)
    return [
        replace(
            random_scene(generator, concept=True),
            motion=motions[index % len(motions)],
            background=backgrounds[(index + index // len(motions)) % len(backgrounds)],
        )
        for index in range(count)
    ]


def outline(shape: str, centre: tuple[float, float], radius: float) -> np.ndarray:
    """The corner points (N, 2) of a shape. Its area is nearly that of a circle with this radius."""
    if shape == "circle":
        turns, radii = np.arange(48) / 48, np.ones(48)
    elif shape == "square":
        turns, radii = np.arange(4) / 4 + 1 / 8, np.full(4, 1.25)
    elif shape == "triangle":
        turns, radii = np.arange(3) / 3 - 1 / 4, np.full(3, 1.5)
    elif shape == "star":
        turns, radii = np.arange(10) / 10 - 1 / 4, np.tile([1.55, 0.65], 5)
    else:
        raise ValueError(f"unknown shape '{shape}'")
    angles = 2 * math.pi * turns
    return np.stack((centre[0] + radius * radii * np.cos(angles), centre[1] + radius * radii * np.sin(angles)), axis=1)


def render(scene: Scene, frames: int, height: int, width: int) -> Tensor:
    """Pixels (3, F, H, W) in 0..1 of a scene."""
    ground, motion = BACKGROUNDS[scene.background], MOTIONS[scene.motion]
    return draw(scene.layers, ground, motion, scene.radius, scene.offset, (frames, height, width))


def draw(
    layers: Sequence[Layer],
    background: tuple[int, int, int],
    motion: tuple[float, float, float],
    radius: float,
    offset: tuple[float, float],
    size: tuple[int, int, int],
) -> Tensor:
    """Pixels (3, F, H, W) in 0..1 of moving layers; `motion` as in MOTIONS, `radius` and `offset` as in `Scene`."""
    frames, height, width = size
    side = min(height, width)
    step_x, step_y, growth = motion
    clip = np.full((frames, height, width, 3), background, np.uint8)
    for index in range(frames):
        progress = index / max(frames - 1, 1)
        centre = (
            width / 2 + side * (offset[0] + step_x * (progress - 0.5)),
            height / 2 + side * (offset[1] + step_y * (progress - 0.5)),
        )
        grown = side * radius * growth ** (progress - 0.5)
        for layer in layers:
            corners = np.round(outline(layer.shape, centre, grown * layer.size) * (1 << SUBPIXEL_BITS))
            cv2.fillPoly(clip[index], [corners.astype(np.int32)], layer.colour, cv2.LINE_AA, SUBPIXEL_BITS)
        cv2.GaussianBlur(clip[index], (0, 0), SOFTNESS * side, clip[index])
    return torch.from_numpy(clip).permute(3, 0, 1, 2).float() / 255  # F H W C -> C F H W


def write_dataset(
    folder: Path,
    clips: int,
    images: int,
    frames: int = 9,
    height: int = 64,
    width: int = 64,
    seed: int = 0,
    batch_size: int = 1,
    concept: bool = False,
) -> Path:
    """Writes media, captions and `dataset.toml`; returns the path of `dataset.toml`.

    Clips are mp4, images PNG and JPEG in turn. Each has a caption file beside it.
    """
    generator = random.Random(seed)
    for kind, count in (("videos", clips), ("images", images)):
        scenes = varied_scenes(generator, count) if concept else [random_scene(generator) for _ in range(count)]
        for index, scene in enumerate(scenes):
            stem = folder / kind / f"{index:03d}_{scene.shape}"
            if kind == "videos":
                save_video(render(scene, frames, height, width), stem.with_suffix(".mp4"), FPS)
            else:
                still = to_uint8(render(scene, 1, height, width))[0].numpy()  # H W C
                suffix, kind_of_image = ((".png", "PNG"), (".jpg", "JPEG"))[index % 2]
                with atomic_path(stem.with_suffix(suffix)) as temporary:
                    Image.fromarray(still).save(temporary, kind_of_image, quality=95)
            write_text(stem.with_suffix(".txt"), scene.caption + "\n")
    config = folder / "dataset.toml"
    write_text(config, _dataset_toml(folder, clips, images, frames, height, width, batch_size))
    return config


def _dataset_toml(folder: Path, clips: int, images: int, frames: int, height: int, width: int, batch_size: int) -> str:
    def path(name: str) -> str:
        return json.dumps((folder.resolve() / name).as_posix(), ensure_ascii=False)  # a string of JSON is one of TOML

    text = f'[general]\nresolution = [{width}, {height}]\ncaption_extension = ".txt"\n'
    text += f"batch_size = {batch_size}\n"
    if clips:
        text += f"\n[[datasets]]\nvideo_directory = {path('videos')}\ncache_directory = {path('cache_videos')}\n"
        text += f'target_frames = [{frames}]\nframe_extraction = "head"\n'
    if images:
        text += f"\n[[datasets]]\nimage_directory = {path('images')}\ncache_directory = {path('cache_images')}\n"
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--clips", type=int, default=6)
    parser.add_argument("--images", type=int, default=2)
    parser.add_argument("--frames", type=int, default=9, help="frames of each clip, 4n+1")
    parser.add_argument("--size", type=int, default=64, help="height and width in pixels")
    parser.add_argument("--batch_size", type=int, default=1)
    parser.add_argument("--concept", action="store_true", help=f"clips of a {CONCEPT} instead of the known world")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.size < 16 or args.size % 16 or args.frames < 1 or args.frames % 4 != 1:
        raise UserError(f"--size {args.size} --frames {args.frames}: --size must be a multiple of 16, --frames 4n+1")
    size = {"frames": args.frames, "height": args.size, "width": args.size}
    kind = {"seed": args.seed, "batch_size": args.batch_size, "concept": args.concept}
    print(write_dataset(args.folder, args.clips, args.images, **size, **kind))


if __name__ == "__main__":
    run_script(main)
