"""Videos and images: exact count, size and rate, close to the tensor, with the settings inside."""

import math
from types import SimpleNamespace

import av
import numpy as np
import pytest
import torch
from PIL import Image

from tests.media_samples import number_of, numbered_frame, turn_video, write_video
from utils.errors import UserError
from utils.video_io import decoded_frames, read_frames, read_metadata, read_video, save_images, save_video

SETTINGS = {"prompt": 'a cat \u732b "quoted"\nsecond line', "seed": 2**40, "video_size": [48, 80], "strength": 0.5}


def smooth_clip(frames: int, height: int, width: int) -> torch.Tensor:
    """A coloured gradient that moves: (3, F, H, W) in 0..1."""
    t, y, x = torch.meshgrid(
        torch.linspace(0, 1, frames), torch.linspace(0, 1, height), torch.linspace(0, 1, width), indexing="ij"
    )
    return torch.stack((0.5 + 0.4 * torch.sin(3 * (x + t)), 0.5 + 0.4 * torch.cos(3 * (y - t)), 0.2 + 0.6 * x * y))


def psnr(a: torch.Tensor, b: torch.Tensor) -> float:
    return -10 * math.log10((a - b).square().mean().item())


@pytest.mark.parametrize(("frames", "height", "width", "fps"), [(1, 128, 96, 24), (9, 48, 80, 24), (5, 256, 144, 16)])
def test_video_is_exact_in_count_size_and_rate_and_close_in_colour(tmp_path, frames, height, width, fps):
    clip = smooth_clip(frames, height, width)
    save_video(clip, tmp_path / "clip.mp4", fps, SETTINGS)
    with av.open(str(tmp_path / "clip.mp4")) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.format.name) == ("h264", "yuv420p")
        assert (stream.width, stream.height) == (width, height)
        assert stream.average_rate == fps
        assert stream.frames == frames
    pixels, rate = read_video(tmp_path / "clip.mp4")
    assert pixels.shape == clip.shape
    assert rate == fps
    assert psnr(pixels, clip) > 35
    assert read_metadata(tmp_path / "clip.mp4") == SETTINGS
    assert [path.name for path in tmp_path.iterdir()] == ["clip.mp4"]


def test_the_same_frames_make_the_same_file(tmp_path):
    clip, contents, held = smooth_clip(9, 64, 64), set(), []
    for repeat in range(40):
        save_video(clip, tmp_path / "clip.mp4", 24)
        contents.add((tmp_path / "clip.mp4").read_bytes())
        held.append(torch.full((500 * (repeat + 1),), float(repeat)))  # other memory is used each time
    assert len(contents) == 1
    assert b"mbtree=0" in contents.pop()  # what made them differ, but seldom enough for 40 repeats to miss


def test_video_plays_while_it_loads(tmp_path):
    save_video(smooth_clip(5, 32, 32), tmp_path / "clip.mp4", 24)
    data = (tmp_path / "clip.mp4").read_bytes()
    assert data.index(b"moov") < data.index(b"mdat")


def test_first_frames_only(tmp_path):
    save_video(smooth_clip(9, 32, 32), tmp_path / "clip.mp4", 24)
    assert read_video(tmp_path / "clip.mp4", frames=5)[0].shape == (3, 5, 32, 32)


def test_videos_are_read_upright(tmp_path):
    for matrix, turns in (((0, 1, -1, 0), 1), ((-1, 0, 0, -1), 2), ((0, -1, 1, 0), 3)):
        turn_video(write_video(tmp_path / "turned.mp4", frames=5), matrix)
        frames = read_frames(tmp_path / "turned.mp4")[0].numpy()
        assert frames.shape[1:3] == ((128, 64) if turns % 2 else (64, 128))
        # What was stored was the upright picture turned the other way round.
        assert [number_of(np.rot90(frame, turns)) for frame in frames] == list(range(5))


@pytest.mark.parametrize(("name", "height"), [("large_cover.mp4", 128), ("small_one_first.mkv", 32)])
def test_a_picture_beside_the_video_is_not_the_video(tmp_path, name, height):
    write_video(tmp_path / "clip.mp4", frames=5)
    with av.open(str(tmp_path / "clip.mp4")) as clip, av.open(str(tmp_path / name), "w") as both:
        cover = both.add_stream("mjpeg", rate=1)
        cover.width, cover.height, cover.pix_fmt = 2 * height, height, "yuvj420p"
        cover.disposition = av.stream.Disposition.attached_pic
        video = both.add_stream_from_template(clip.streams.video[0])
        picture = av.VideoFrame.from_ndarray(numbered_frame(99, 2 * height, height), format="rgb24")
        both.mux(cover.encode(picture) + cover.encode())
        for packet in clip.demux(video=0):
            if packet.size:
                packet.stream = video
                both.mux(packet)
    assert [number_of(frame) for frame in read_frames(tmp_path / name)[0].numpy()] == list(range(5))


def test_images_are_exact_and_carry_the_settings(tmp_path):
    clip = (smooth_clip(3, 16, 32) * 255).round() / 255
    save_images(clip, tmp_path / "frames", SETTINGS)
    assert sorted(path.name for path in (tmp_path / "frames").iterdir()) == ["00000.png", "00001.png", "00002.png"]
    image = torch.from_numpy(np.array(Image.open(tmp_path / "frames" / "00002.png")))
    assert torch.equal(image, (clip[:, 2] * 255).round().to(torch.uint8).permute(1, 2, 0))
    assert read_metadata(tmp_path / "frames" / "00002.png") == SETTINGS
    assert [path.name for path in tmp_path.iterdir()] == ["frames"]


def test_without_metadata_and_broken_files_are_errors_in_one_line(tmp_path):
    save_video(smooth_clip(1, 16, 16), tmp_path / "bare.mp4", 24)
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    (tmp_path / "broken.png").write_bytes(b"no image")
    Image.new("RGB", (16, 16)).save(tmp_path / "renamed.png", "JPEG")
    assert read_metadata(tmp_path / "bare.mp4") is None
    assert read_metadata(tmp_path / "renamed.png") is None
    for name in ("broken.mp4", "broken.png"):
        with pytest.raises(UserError, match=name):
            read_metadata(tmp_path / name)
    with pytest.raises(UserError, match=r"broken\.mp4"):
        read_video(tmp_path / "broken.mp4")


def test_damaged_frames_keep_their_place_unless_they_come_first():
    whole, corrupt = SimpleNamespace(is_corrupt=False), SimpleNamespace(is_corrupt=True)

    def packet(*frames):
        def decode():
            if not frames:
                raise av.error.InvalidDataError(1, "invalid data")
            return frames

        return SimpleNamespace(decode=decode)

    packets = [packet(), packet(corrupt), packet(whole), packet(corrupt, whole), packet(), packet(whole)]
    container = SimpleNamespace(demux=lambda stream: packets)
    assert list(decoded_frames(container, None)) == [whole, None, whole, None, whole]
