"""Resident memory while files are probed and decoded ahead, measured in a process of its own."""

import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest

from tests.media_samples import write_video

ROOT = Path(__file__).parents[2]
MEASURE = """
import re, sys
from pathlib import Path
from dataset.config_utils import DatasetSettings
from dataset.items import plan_items
from dataset.media import read_media_info
from dataset.media.ahead import Job, read_ahead
from dataset.sources import Source

def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 1024

size, frames, *paths = sys.argv[1:]
settings = DatasetSettings(
    video_directory="v",
    cache_directory="c",
    resolution=eval(size),
    target_frames=[int(frames)],
    frame_extraction="chunk",
)
before = peak()
jobs = []
for path in map(Path, paths):
    source = Source(path, path.stem, "video")
    info = read_media_info(source)
    jobs.append(Job(source, plan_items(settings, path.stem, info).items, settings, info, info))
print(peak() - before)
count = sum(clip.ndim == 4 for _, _, clip in read_ahead(jobs, workers=16))
print(peak() - before, count)
"""


def measured(paths: list[Path], size: tuple[int, int], frames: int) -> tuple[float, float, int]:
    """MiB added by looking at the files, and by reading their clips; the number of clips."""
    command = [sys.executable, "-c", MEASURE, str(size), str(frames), *map(str, paths)]
    run = subprocess.run(command, capture_output=True, check=True, cwd=ROOT)
    probing, reading, count = run.stdout.split()
    return float(probing), float(reading), int(count)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.slow
def test_4k_hevc_with_sixteen_workers_stays_below_a_gibibyte(tmp_path: Path) -> None:
    options = {"preset": "ultrafast", "x265-params": "log-level=none"}
    first = write_video(tmp_path / "0.mp4", 30, size=(3840, 2160), codec="libx265", options=options)
    paths = [first, *(first.with_name(f"{number}.mp4") for number in range(1, 8))]
    for path in paths[1:]:
        path.hardlink_to(first)
    probing, reading, count = measured(paths, (960, 544), 29)
    print(f"probing {probing:.0f} MiB, reading {reading:.0f} MiB")
    assert count == 8 and reading < 1024


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.slow
def test_a_large_file_is_not_held_in_memory(tmp_path: Path) -> None:
    path = tmp_path / "large.avi"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("rawvideo", rate=24)
        stream.width, stream.height, stream.pix_fmt = 1024, 512, "rgb24"
        frame = av.VideoFrame.from_ndarray(np.zeros((512, 1024, 3), np.uint8), format="rgb24")
        for _ in range(700):
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    assert path.stat().st_size > 1 << 30
    probing, reading, count = measured([path], (64, 32), 25)
    print(f"probing {probing:.0f} MiB, reading {reading:.0f} MiB")
    assert count == 28 and probing < 50 and reading < 80
