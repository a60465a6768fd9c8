"""Shows clips of the shapes world side by side: a PNG sheet with every frame, and an mp4 that plays all clips.

    python -m examples.shapes.sheet OUT LABEL=VIDEO ...

writes OUT.png and OUT.mp4. VIDEO may be a folder with one mp4.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from examples.shapes.judge import Verdict, judge, videos_in
from modules.generation.compare import Page, Row
from utils.cli import run_script
from utils.errors import UserError
from utils.video_io import read_video, to_uint8

SCALE = 2  # of the clips' 64 pixels
FPS = 8


def enlarged(pixels: Tensor, scale: int) -> Tensor:
    """(3, F, H, W) in 0..1 -> frames (F, H x scale, W x scale, 3) uint8."""
    return to_uint8(pixels).repeat_interleave(scale, dim=1).repeat_interleave(scale, dim=2)


def description(verdict: Verdict) -> str:
    """A verdict in words."""
    if verdict == Verdict():
        return "nothing"
    thing = " ".join(filter(None, (verdict.colour, verdict.shape or "thing")))
    return f"a {thing} that {verdict.motion or 'moves oddly'} on {verdict.background or 'some colour'}"


def write_sheet(out: Path, clips: dict[str, Tensor]) -> list[Path]:
    """Writes OUT.mp4 and OUT.png of clips (3, F, H, W) in 0..1 by label; returns their paths.

    Raises:
        UserError: the clips differ in length.
    """
    counts = {label: pixels.shape[1] for label, pixels in clips.items()}
    if len(set(counts.values())) > 1:
        lengths = ", ".join(f"{label} {count}" for label, count in counts.items())
        raise UserError(f"the clips differ in length, all must have the same number of frames: {lengths}")
    frames = [f"frame {index + 1}" for index in range(max(counts.values()))]
    strips = [
        Row(f"{label}: the judge sees {description(judge(pixels))}", list(enlarged(pixels, SCALE).split(1)))
        for label, pixels in clips.items()
    ]
    side_by_side = Page(list(clips), [Row("", [enlarged(pixels, 4 * SCALE) for pixels in clips.values()])])
    video, sheet = (out.with_name(out.name + suffix) for suffix in (".mp4", ".png"))
    side_by_side.save_video(video, FPS)
    Page(frames, strips).save_frame(sheet, 0)
    return [video, sheet]


def read_clips(words: Sequence[str]) -> dict[str, Tensor]:
    """Pixels (3, F, H, W) in 0..1 by label, from arguments LABEL=VIDEO.

    Raises:
        UserError: an argument has another form or its folder does not hold exactly one video, or a label occurs twice.
    """
    clips: dict[str, Tensor] = {}
    for word in words:
        label, separator, place = word.partition("=")
        if not separator:
            raise UserError(f"{word}: LABEL=VIDEO is expected")
        if label in clips:
            raise UserError(f"{word}: another clip has the label '{label}'; give each clip its own label")
        videos = videos_in(Path(place))
        if len(videos) != 1:
            raise UserError(f"{place}: holds {len(videos)} mp4s; name one of them")
        clips[label] = read_video(videos[0])[0]
    return clips


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("clips", nargs="+", metavar="LABEL=VIDEO")
    args = parser.parse_args()
    for path in write_sheet(args.out, read_clips(args.clips)):
        print(path)


if __name__ == "__main__":
    run_script(main)
