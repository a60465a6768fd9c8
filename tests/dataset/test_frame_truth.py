"""Every clip of every extraction mode shows exactly the frames that a player shows, whatever the container and codec.

Each frame of the files carries its number as a picture, so the tests know which frame they see.
"""

from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import pytest

from dataset.config_utils import DatasetSettings
from dataset.items import Item, plan_items
from dataset.media import MediaError, MiscountError, read_clips, read_media_info
from dataset.sources import Source
from tests.media_samples import number_of, remux, turn_video, write_video
from utils.video_io import decoded_frames, iterate_frames

MODES = ("head", "chunk", "slide", "uniform", "full")
# With b-adapt=0, x264 places B-frames even on pictures as simple as these.
B_FRAMES = "b-adapt=0:bframes=3:keyint=20:scenecut=0"
X264 = {"x264-params": B_FRAMES}
OPEN_GOP = {"x264-params": f"{B_FRAMES}:open-gop=1"}
X265 = {"codec": "libx265", "options": {"x265-params": f"log-level=none:{B_FRAMES}:open-gop=1"}}
INTRA_REFRESH = {"x264-params": "intra-refresh=1:keyint=20:bframes=0"}


def settings(mode: str, **keys) -> DatasetSettings:
    values = {"video_directory": "v", "cache_directory": "c", "resolution": [64, 32], "target_frames": [1, 13, 25]}
    return DatasetSettings(**values | {"frame_extraction": mode, "frame_stride": 7, "frame_sample": 4} | keys)


def source(path: Path) -> Source:
    return Source(path, path.stem, "video")


def shown(clip: np.ndarray | MediaError) -> list[int] | str:
    return str(clip) if isinstance(clip, MediaError) else [number_of(frame) for frame in clip]


def clips_of(path: Path, chosen: DatasetSettings) -> tuple[dict[Item, list[int] | str], int]:
    """What each clip shows, as cache_latents.py would take them, and how often the file was read."""
    info = read_media_info(source(path))
    plan = plan_items(chosen, path.stem, info)
    found = {}
    try:
        found |= {item: shown(clip) for item, clip in read_clips(source(path), plan.items, chosen, info)}
    except MiscountError as error:
        plan = plan_items(chosen, path.stem, error.info)
        return {item: shown(clip) for item, clip in read_clips(source(path), plan.items, chosen)}, 2
    assert set(found) == set(plan.items)
    return found, 1


def check_all_modes(path: Path, expected: list[int]) -> int:
    """Compares the clips of all modes; returns how often the file had to be read at most."""
    readings = []
    for mode in MODES:
        chosen = settings(mode)
        found, times = clips_of(path, chosen)
        for item, numbers in found.items():
            assert numbers == expected[item.span.start : item.span.stop], (path.name, mode, item.name)
        if mode in ("chunk", "uniform"):  # these two show every frame or the last one
            assert max(item.span.stop for item in found) == len(expected), (path.name, mode)
        readings.append(times)
    return max(readings)


def avi(folder: Path) -> tuple[Path, range]:
    return write_video(folder / "a.avi", 60, options=X264), range(60)


def edit_list(folder: Path) -> tuple[Path, range]:
    return remux(write_video(folder / "a.mp4", 60, options=X264), folder / "b.mp4", later=-30 / 24), range(30, 60)


def edit_list_in_open_gop(folder: Path) -> tuple[Path, range]:
    return remux(write_video(folder / "a.mov", 60, **X265), folder / "b.mov", later=-30 / 24), range(30, 60)


def cut_in_open_gop(folder: Path) -> tuple[Path, range]:
    return remux(write_video(folder / "a.mp4", 60, **X265), folder / "b.mp4", skipped_packets=20), range(40, 60)


def cut_transport_stream(folder: Path) -> tuple[Path, range]:
    path = write_video(folder / "a.ts", 60, options=OPEN_GOP)
    return remux(path, folder / "b.ts", skipped_packets=22), range(40, 60)


def late_start(folder: Path) -> tuple[Path, range]:
    return remux(write_video(folder / "a.mp4", 60, options=X264), folder / "b.mkv", later=5), range(60)


def negative_start(folder: Path) -> tuple[Path, range]:
    return remux(write_video(folder / "a.mp4", 60, options=X264), folder / "b.mkv", later=-0.5), range(60)


def concatenated(folder: Path) -> tuple[Path, list[int]]:
    path = write_video(folder / "a.ts", 40, options=X264)
    path.write_bytes(path.read_bytes() * 2)
    return path, [*range(40), *range(40)]


def intra_refresh(folder: Path) -> tuple[Path, range]:
    return write_video(folder / "a.ts", 60, options=INTRA_REFRESH), range(60)


def two_fields(folder: Path) -> tuple[Path, range]:
    return write_video(folder / "a.mkv", 60, options={"x264-params": f"interlaced=1:{B_FRAMES}"}), range(60)


def variable_rate(folder: Path) -> tuple[Path, range]:
    times = list(np.cumsum(np.where(np.arange(60) % 7 < 3, 0.02, 0.045)).round(3))
    return write_video(folder / "a.mkv", 60, times=times, options=X264), range(60)


CASES: list[Callable[[Path], tuple[Path, list[int] | range]]] = [
    avi,
    edit_list,
    edit_list_in_open_gop,
    cut_in_open_gop,
    cut_transport_stream,
    late_start,
    negative_start,
    concatenated,
    intra_refresh,
    two_fields,
    variable_rate,
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_every_clip_of_a_peculiar_file_is_what_a_player_shows(tmp_path: Path, case: Callable) -> None:
    path, expected = case(tmp_path)
    assert check_all_modes(path, list(expected)) == 1, "the packets told the right number of frames"
    assert [number_of(frame) for frame, _ in iterate_frames(path)] == list(expected), "the reader of --video_path"
    was_read_wrongly = case in (avi, edit_list, edit_list_in_open_gop)
    assert read_media_info(source(path)).decoder == (2 if was_read_wrongly else 1), "only these are cached again"


def test_a_file_whose_first_frames_never_come_is_counted_again(tmp_path: Path) -> None:
    """Intra refresh without the first key frame: the picture is complete only after some frames."""
    path = remux(intra_refresh(tmp_path)[0], tmp_path / "b.ts", skipped_packets=10)
    assert read_media_info(source(path)).frames == 40
    assert check_all_modes(path, list(range(26, 60))) == 2


def test_late_clips_of_a_transport_stream_are_read(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.ts", 1300, size=(64, 32), options={"preset": "ultrafast", "g": "250"})
    found, _ = clips_of(path, settings("chunk", target_frames=[25]))
    assert [numbers[0] for numbers in found.values()] == [start % 256 for start in range(0, 1300, 25)]
    assert all(numbers == [(numbers[0] + index) % 256 for index in range(25)] for numbers in found.values())


@pytest.mark.parametrize("case", [avi, concatenated])
def test_frames_are_resampled_by_counting_where_times_do_not_ascend(tmp_path: Path, case: Callable) -> None:
    path, expected = case(tmp_path)
    found, _ = clips_of(path, settings("chunk", target_frames=[1], source_fps="auto", target_fps=12))
    assert [numbers[0] for numbers in found.values()] == list(expected)[::2]


def test_all_eight_orientations(tmp_path: Path) -> None:
    """The matrix maps stored (x, y) to shown (a x + c y, b x + d y), as ISO 14496-12 says; the undoing is by hand."""
    undo = {
        (1, 0, 0, 1): lambda shown: shown,
        (-1, 0, 0, 1): np.fliplr,
        (1, 0, 0, -1): np.flipud,
        (-1, 0, 0, -1): lambda shown: np.rot90(shown, 2),
        (0, 1, -1, 0): lambda shown: np.rot90(shown, 1),  # shown 90 degrees clockwise
        (0, -1, 1, 0): lambda shown: np.rot90(shown, -1),
        (0, 1, 1, 0): lambda shown: shown.swapaxes(0, 1),
        (0, -1, -1, 0): lambda shown: np.rot90(shown, 2).swapaxes(0, 1),
    }
    chosen = settings("head", target_frames=[5])
    for matrix, undone in undo.items():
        path = write_video(tmp_path / "a.mp4", 5)
        turn_video(path, matrix)
        info = read_media_info(source(path))
        assert info.size == ((128, 64) if matrix[0] else (64, 128))
        assert info.decoder == (2 if matrix[0] * matrix[3] - matrix[1] * matrix[2] < 0 else 1), "mirrors were wrong"
        frames = [frame for frame, _ in iterate_frames(path)]
        assert [number_of(undone(frame)) for frame in frames] == list(range(5)), matrix
        upright = chosen.model_copy(update={"resolution": info.size})
        for _, clip in read_clips(source(path), plan_items(upright, "a", info).items, upright):
            assert np.array_equal(clip, np.stack(frames)), matrix


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["a.mp4", "a.avi", "a.webm"])
def test_no_frame_is_decoded_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, mode: str) -> None:
    codec = {"codec": "libvpx"} if name == "a.webm" else {"options": X264}
    path = write_video(tmp_path / name, 120, size=(64, 32), **codec)
    decoded = []

    def counted(*stream: object):
        for frame in decoded_frames(*stream):
            decoded.append(frame is None)
            yield frame

    monkeypatch.setattr("dataset.media.video.decoded_frames", counted)
    monkeypatch.setattr("utils.video_io.decoded_frames", counted)
    clips_of(path, settings(mode))
    assert len(decoded) <= 1.05 * 120


def test_overlapping_clips_keep_no_more_frames_than_the_longest(tmp_path: Path) -> None:
    """Slides of stride 1: 96 clips are unfinished at the same time, but their frames are kept only once."""
    path = write_video(tmp_path / "a.mp4", 200, size=(64, 32))
    chosen = settings("slide", target_frames=[97], frame_stride=1)
    found, _ = clips_of(path, chosen)
    assert len(found) == 104 and all(numbers[0] == item.span.start for item, numbers in found.items())


CONTAINERS = ("mp4", "mov", "m4v", "mkv", "webm", "avi", "ts", "m2ts", "mpg", "flv", "wmv", "mpeg")
CODECS = {
    "libx264": {"options": X264},
    "libx265": X265,
    "libvpx": {"options": {"auto-alt-ref": "1", "lag-in-frames": "16"}},
    "libvpx-vp9": {"options": {"cpu-used": "8"}},
    "libsvtav1": {"options": {"preset": "8", "crf": "10"}},
    "mpeg4": {"options": {"bf": "2"}},
    "mpeg2video": {"options": {"bf": "2"}},
    "mjpeg": {"pix_fmt": "yuvj420p"},
    "prores_ks": {"pix_fmt": "yuv422p10le"},
    "wmv2": {},
    "ffv1": {},
    "flv": {},
}


@pytest.mark.slow
def test_every_container_with_every_codec(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Prints a table: how often each file is read, `named` where it is reported as unusable, `-` where FFmpeg does not
    write the pair."""

    def tried(codec: str, container: str) -> str:
        path = tmp_path / f"{codec}.{container}"
        try:
            write_video(path, 40, **{"codec": codec, **CODECS[codec]})
        except (av.FFmpegError, ValueError):
            return "-"
        try:
            return str(check_all_modes(path, list(range(40))))
        except MediaError as error:
            assert path.name in str(error)
            return "named"

    table = {codec: [tried(codec, container) for container in CONTAINERS] for codec in CODECS}
    with capsys.disabled():
        for heading, words in {"": CONTAINERS, **table}.items():
            print("".join(f"{word:>11}" for word in (heading, *words)))
    results = [word for words in table.values() for word in words]
    assert results.count("1") >= 70 and results.count("2") == 0
    # FFmpeg writes codecs that these containers have no number for as data that nothing can read.
    misfits = {
        container
        for words in table.values()
        for container, word in zip(CONTAINERS, words, strict=True)
        if word == "named"
    }
    assert misfits <= {"ts", "m2ts", "mpg", "mpeg"}
