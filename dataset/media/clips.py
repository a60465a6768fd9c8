"""From a source to the pixels of its items. Every file is opened once and decoded from front to end.

A clip is handed out when its last frame is there, so that no more frames are kept than the longest clip has.
"""

from collections import defaultdict, deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np

from dataset.buckets import Size, kept_by_counting, nearest_in_time
from dataset.config_utils import DatasetSettings
from dataset.items import Item, MediaInfo, frames_after_resampling
from dataset.media.images import MediaError, Picture, as_media_error, image_info, load_image, resize_to_bucket
from dataset.media.video import UnusableTimesError, VideoFrames, read_video_info
from dataset.sources import Source, frame_files

# After the last clip of a file, so many frames are decoded at most to see whether the file ends where it should.
CHECKED_BEYOND = 250

Clip = np.ndarray | MediaError  # (F, H, W, 3) uint8, or why it cannot be had


class MiscountError(MediaError):
    """The decoder shows another number of frames than the packets promised; `info` holds the true one."""

    def __init__(self, path: Path, expected: MediaInfo, info: MediaInfo) -> None:
        super().__init__(f"{path}: {expected.frames} frames were counted, but {info.frames} are decoded")
        self.info = info


def _frame_folder_info(path: Path) -> MediaInfo:
    """Raises MediaError if the folder is empty or a frame differs in size from the first."""
    frames = frame_files(path)
    if not frames:
        raise MediaError(f"{path}: no images in this folder")
    first = image_info(frames[0])
    for frame in frames[1:]:
        size = image_info(frame).size
        if size != first.size:
            raise MediaError(
                f"{frame}: this frame is {size[0]}x{size[1]}, but {frames[0].name} is {first.width}x{first.height}; "
                "all frames of a folder must have one size"
            )
    # Version 1 of the decoder sorted the frames as text: 1, 10, 2.
    decoder = 1 if frames == sorted(frames) else 2
    return MediaInfo(first.width, first.height, frames=len(frames), decoder=decoder)


def _with_times(info: MediaInfo, frames: int, last_time: float) -> MediaInfo:
    fps = (frames - 1) / last_time if last_time > 0 else 0.0
    return replace(info, frames=frames, last_time=last_time, fps=fps)


def _video_info(path: Path) -> MediaInfo:
    with as_media_error(path):
        found = read_video_info(path)
    info = MediaInfo(*found.size, decoder=found.decoder, notes=found.notes)
    return _with_times(info, found.frames, found.last_time)


def read_media_info(source: Source) -> MediaInfo:
    """Size, number of frames and times of a source. Decodes no more than the first frame.

    Raises:
        MediaError: the file cannot be opened or holds no picture.
    """
    readers = {"image": image_info, "frames": _frame_folder_info, "video": _video_info}
    info = readers[source.kind](source.path)
    with as_media_error(source.path):
        return replace(info, digest=source.identity)


def _resampled(frames: Iterable[tuple[float, Picture]], settings: DatasetSettings) -> Iterator[Picture]:
    """The frames that the clips are cut from; the settings decide which frames are dropped or repeated."""
    if settings.source_fps == "auto":
        return nearest_in_time(frames, settings.target_fps)
    pictures = (picture for _, picture in frames)
    if settings.source_fps is None:
        return pictures
    return kept_by_counting(pictures, settings.source_fps, settings.target_fps)


def _pixels_of(picture: Picture) -> Clip:
    try:
        return picture()
    except MediaError as error:
        return error


def _joined(frames: Sequence[Clip]) -> Clip:
    return next((frame for frame in frames if isinstance(frame, MediaError)), None) or np.stack(frames)


def cut_clips(pictures: Iterable[Picture], items: Sequence[Item]) -> Iterator[tuple[Item, Clip]]:
    """Cuts clips out of a stream of frames; yields each as soon as its last frame is there.

    A frame that no clip needs is not converted to pixels. Stops behind the last frame of the last clip.
    """
    waiting = deque(sorted(items, key=lambda item: item.span))
    unfinished: list[Item] = []
    kept: dict[Size, dict[int, Clip]] = defaultdict(dict)  # resized frames by bucket and position
    for position, picture in enumerate(pictures):
        while waiting and waiting[0].span.start == position:
            unfinished.append(waiting.popleft())
        pixels = _pixels_of(picture) if unfinished else None
        for bucket in {item.bucket for item in unfinished}:
            is_pixels = isinstance(pixels, np.ndarray)
            kept[bucket][position] = resize_to_bucket(pixels, bucket) if is_pixels else pixels
        finished = [item for item in unfinished if item.span.stop == position + 1]
        unfinished = [item for item in unfinished if item.span.stop > position + 1]
        for item in finished:
            yield item, _joined([kept[item.bucket][index] for index in range(item.span.start, item.span.stop)])
        if not waiting and not unfinished:
            return
        if finished:
            first_needed = min((item.span.start for item in unfinished), default=position + 1)
            for frames in kept.values():
                for index in [index for index in frames if index < first_needed]:
                    del frames[index]


def _read_video(
    source: Source, items: Sequence[Item], settings: DatasetSettings, expected: MediaInfo | None
) -> Iterator[tuple[Item, Clip]]:
    remaining = dict.fromkeys(items)
    for use_times in (True, False) if settings.source_fps == "auto" else (False,):
        frames = VideoFrames(source.path, use_times)
        stream = iter(frames)
        try:
            for item, clip in cut_clips(_resampled(stream, settings), list(remaining)):
                del remaining[item]
                yield item, clip
            if expected and settings.frame_extraction != "head" and expected.frames - frames.count < CHECKED_BEYOND:
                deque(islice(stream, 2 * CHECKED_BEYOND), maxlen=0)
        except UnusableTimesError:
            continue
        break
    if frames.at_end and expected:
        is_timed = settings.source_fps == "auto"
        last_time = frames.last_time if is_timed else expected.last_time * frames.count / expected.frames
        true = _with_times(expected, frames.count, last_time)
        lengths = [frames_after_resampling(info, settings) for info in (expected, true)]
        if expected.frames != frames.count or lengths[0] != lengths[1]:
            raise MiscountError(source.path, expected, true)
    for item in remaining:
        yield item, MediaError(f"{source.path}: {item.name} cannot be decoded, there are {frames.count} frames")


def _read_all(
    source: Source, items: Sequence[Item], settings: DatasetSettings, expected: MediaInfo | None
) -> Iterator[tuple[Item, Clip]]:
    if source.kind == "video":
        yield from _read_video(source, items, settings, expected)
    elif source.kind == "frames":
        pictures = [(0.0, partial(load_image, path)) for path in frame_files(source.path)]
        # A folder has no times: `auto` takes its frames as they are.
        as_they_are = settings.model_copy(update={"source_fps": None})
        yield from cut_clips(_resampled(pictures, as_they_are if settings.source_fps == "auto" else settings), items)
    else:
        pixels = load_image(source.path)
        yield from ((item, resize_to_bucket(pixels, item.bucket)[None]) for item in items)


def read_clips(
    source: Source, items: Sequence[Item], settings: DatasetSettings, expected: MediaInfo | None = None
) -> Iterator[tuple[Item, Clip]]:
    """The pixels that the VAE encodes for items of one source, each when it is complete; a video is decoded once.

    Args:
        items: of one source. They may belong to several datasets with the same rule for resampling in time.
        settings: of one of these datasets.
        expected: what the items were planned with.

    Raises:
        MiscountError: the video has another number of frames than `expected`. The clips before are right where they
            remain in a plan with the true number.
    """
    remaining = dict.fromkeys(items)
    try:
        with as_media_error(source.path):
            for item, clip in _read_all(source, items, settings, expected):
                del remaining[item]
                yield item, clip
    except MiscountError:
        raise
    except MediaError as error:
        yield from ((item, error) for item in remaining)


def load_pixels(source: Source, item: Item, settings: DatasetSettings) -> np.ndarray:
    """The pixels that the VAE encodes for one item, (F, H, W, 3) uint8.

    Raises:
        MediaError: a frame of the item cannot be decoded.
    """
    for _, pixels in read_clips(source, [item], settings):
        if isinstance(pixels, MediaError):
            raise pixels
        return pixels
    raise MediaError(f"{source.path}: {item.name} needs more frames than there are")
