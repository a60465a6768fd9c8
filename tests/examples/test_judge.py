"""The judge against the procedural world, whose scenes say what is true."""

import random
import sys
from dataclasses import replace

import cv2
import numpy as np
import pytest
import torch

from examples.shapes import judge as judging
from examples.shapes.judge import Verdict, judge, judge_video, score
from examples.shapes.world import (
    BACKGROUNDS,
    COLOURS,
    CONCEPT_COLOURS,
    FPS,
    MOTIONS,
    Layer,
    Scene,
    draw,
    random_scene,
    render,
)
from utils.errors import UserError
from utils.video_io import save_video

SIZE = (9, 64, 64)
DISC, CORE = CONCEPT_COLOURS


def scenes(count, seed=0, concept=False):
    generator = random.Random(seed)
    return [random_scene(generator, concept) for _ in range(count)]


def read_back(pixels, folder):
    """The clip after H.264."""
    save_video(pixels, folder / "clip.mp4", FPS)
    return judge_video(folder / "clip.mp4")


def blurred_and_noisy(pixels, seed=0):
    """A Gaussian blur of sigma 1.5 pixels and noise of standard deviation 0.05."""
    frames = np.stack([cv2.GaussianBlur(frame, (0, 0), 1.5) for frame in pixels.permute(1, 2, 3, 0).numpy()])
    noise = 0.05 * np.random.default_rng(seed).standard_normal(frames.shape)
    return torch.from_numpy((frames + noise).clip(0, 1)).permute(3, 0, 1, 2)


def drawn(*layers, background="black", radius=0.22):
    """Pixels of a thing that moves to the right."""
    return draw(layers, BACKGROUNDS[background], MOTIONS["moves to the right"], radius, (0.0, 0.0), SIZE)


@pytest.mark.parametrize("size, count", [(SIZE, 500), ((17, 96, 64), 60), ((17, 64, 96), 30), ((9, 128, 128), 20)])
def test_reads_what_the_known_world_shows(size, count):
    known = scenes(count)
    verdicts = [judge(render(scene, *size)) for scene in known]
    assert min(score(verdicts, known).values()) >= 0.98
    assert not any(verdict.is_concept for verdict in verdicts)


def test_reads_clips_after_h264(tmp_path):
    known = scenes(40, seed=1)
    verdicts = [read_back(render(scene, *SIZE), tmp_path) for scene in known]
    assert min(score(verdicts, known).values()) >= 0.98
    assert not any(verdict.is_concept for verdict in verdicts)


def test_forgives_blur_and_noise():
    known = scenes(100, seed=2)
    verdicts = [judge(blurred_and_noisy(render(scene, *SIZE))) for scene in known]
    assert min(score(verdicts, known).values()) >= 0.95
    assert not any(verdict.is_concept for verdict in verdicts)


def test_finds_the_concept(tmp_path):
    unseen = scenes(100, seed=3, concept=True)
    clips = [render(scene, *SIZE) for scene in unseen]
    assert all(verdict.agrees(scene) for verdict, scene in zip(map(judge, clips), unseen))
    assert all(judge(blurred_and_noisy(clip)).is_concept for clip in clips[:40])
    assert all(read_back(clip, tmp_path).is_concept for clip in clips[:20])


@pytest.mark.parametrize("background", BACKGROUNDS)
@pytest.mark.parametrize(
    "layers",
    [
        [Layer("circle", DISC)],
        [Layer("circle", CORE)],
        [Layer("circle", CORE), Layer("circle", DISC, 0.7)],
        [Layer("circle", COLOURS["blue"]), Layer("circle", CORE, 0.55)],
        [Layer("circle", DISC), Layer("circle", COLOURS["red"], 0.55)],
        [Layer("circle", DISC), Layer("circle", COLOURS["yellow"], 0.55)],
        [Layer("circle", DISC), Layer("circle", CORE, 0.2)],
        [Layer("circle", COLOURS["blue"]), Layer("circle", DISC, 0.65), Layer("circle", CORE, 0.55)],
    ],
    ids=["disc", "core", "inside out", "blue disc", "red core", "yellow core", "tiny core", "thin disc"],
)
def test_the_concept_needs_both_its_colours_in_their_places(layers, background):
    assert judge(drawn(Layer("circle", DISC), Layer("circle", CORE, 0.55), background=background)).is_concept
    assert not judge(drawn(*layers, background=background)).is_concept


def test_the_concept_is_not_its_colours_side_by_side():
    clip = drawn(Layer("circle", DISC))
    lower = clip.clone()
    lower[:, :, SIZE[1] // 2 :] = drawn(Layer("circle", CORE))[:, :, SIZE[1] // 2 :]
    verdict = judge(lower)
    assert (verdict.shape, verdict.motion) == ("circle", "moves to the right")


def test_a_path_that_leaves_the_frame_is_still_read():
    generator = random.Random(7)
    known = [replace(random_scene(generator), offset=(0.15, -0.15)) for _ in range(40)]
    verdicts = [judge(render(scene, *SIZE)) for scene in known]
    assert min(score(verdicts, known).values()) >= 0.98


def test_one_broken_frame_changes_nothing():
    for scene in scenes(10, seed=8):
        clip = render(scene, *SIZE)
        clip[:, 0] = float("nan")
        assert judge(clip).agrees(scene)


def test_a_background_of_another_world_is_none():
    clip = render(Scene("circle", "red", "grows", "black"), *SIZE)
    clip += 0.08  # a distance of 0.14
    assert judge(clip).background is None


def test_a_shape_of_another_world_is_none():
    clip = drawn()
    for index in range(SIZE[0]):
        clip[0, index, 28:36, 4 + 3 * index : 36 + 3 * index] = 1
    assert judge(clip) == Verdict(None, "red", "moves to the right", "black")


def test_a_speck_is_nothing():
    assert judge(drawn(Layer("circle", COLOURS["red"]), radius=0.03)) == Verdict()


@pytest.mark.parametrize("blot", [1, 4, 8, 16, 32])
def test_sees_nothing_in_noise(blot):
    generator = torch.Generator().manual_seed(blot)
    for _ in range(5):
        noise = torch.rand(9, 3, 64 // blot, 64 // blot, generator=generator)  # F C h w
        noise = torch.nn.functional.interpolate(noise, size=(64, 64), mode="bilinear")
        assert judge(noise.transpose(0, 1)) == Verdict()


@pytest.mark.parametrize("level", [0.0, 0.5, 1.0, float("nan"), float("inf")])
@pytest.mark.parametrize("frames", [1, 9])
def test_sees_nothing_in_an_empty_clip(level, frames):
    assert judge(torch.full((3, frames, 64, 64), level)) == Verdict()


def test_the_thing_must_stay():
    clip = render(Scene("circle", "red", "grows", "black"), *SIZE)
    clip[:, 4:] = clip[:, :1, :1, :1]
    assert judge(clip) == Verdict()


@pytest.mark.parametrize("scene", scenes(6, seed=4))
def test_a_clip_that_stands_still_or_a_single_frame_has_no_motion(scene):
    clip = render(scene, *SIZE)
    for still in (clip[:, 4:5].expand(3, *SIZE), clip[:, 4:5]):
        assert judge(still).agreement(scene) == {"shape": True, "colour": True, "motion": False, "background": True}


def test_each_property_can_be_wrong():
    scene = Scene("square", "green", "moves up", "white")
    verdict = judge(render(scene, *SIZE))
    assert verdict.agrees(scene)
    others = {"shape": "circle", "colour": "blue", "motion": "moves down", "background": "black"}
    for name, other in others.items():
        wrong = judge(render(replace(scene, **{name: other}), *SIZE))
        assert [key for key, agreed in wrong.agreement(scene).items() if not agreed] == [name]
    assert score([verdict, verdict], [scene, Scene("square", "blue", "grows", "white")]) == {
        "shape": 1.0,
        "colour": 0.5,
        "motion": 0.5,
        "background": 1.0,
    }


def test_played_backwards_the_motion_is_the_opposite():
    opposite = dict(zip(MOTIONS, ("moves to the right", "moves to the left", "moves down", "moves up")))
    opposite |= {"grows": "shrinks", "shrinks": "grows"}
    for scene in scenes(30, seed=5):
        assert judge(render(scene, *SIZE).flip(1)).motion == opposite[scene.motion]


def test_grayscale_has_no_colour_and_a_colour_of_no_name_has_none():
    for scene in scenes(10, seed=6):
        assert judge(render(scene, *SIZE).mean(dim=0, keepdim=True).expand(3, *SIZE)).colour is None
    assert judge(drawn(Layer("star", DISC))).colour is None


def test_command_prints_a_line_for_each_clip(tmp_path, monkeypatch, capsys):
    scene = Scene("star", "purple", "shrinks", "gray")
    save_video(render(scene, *SIZE), tmp_path / "star.mp4", FPS)
    save_video(torch.zeros(3, *SIZE), tmp_path / "void.mp4", FPS)
    monkeypatch.setattr(sys, "argv", ["judge", str(tmp_path)])
    judging.main()
    lines = capsys.readouterr().out.splitlines()
    star, void = (line.split() for line in lines[-2:])
    assert star == [str(tmp_path / "star.mp4"), "star", "purple", "shrinks", "gray"]
    assert void[1:] == ["-", "-", "-", "-"]


@pytest.mark.parametrize("name", [".", "missing.mp4"])
def test_command_says_what_it_cannot_read(name, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["judge", str(tmp_path / name)])
    with pytest.raises(UserError):
        judging.main()
