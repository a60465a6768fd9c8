"""Shows the pixels that would be encoded: in windows, as characters on the console, or as an HTML page."""

import os
import sys
from collections.abc import Iterator, Sequence
from itertools import groupby, islice

import cv2
import numpy as np
from PIL import Image

from dataset.items import Item
from dataset.media import MediaError, read_clips
from dataset.options import PreviewOptions
from dataset.preview_page import write_page
from dataset.report import NATIVE_FPS
from dataset.scan import ScannedDataset
from dataset.sources import Source
from utils.errors import UserError

WINDOW = "dataset"
ESCAPE = 27


def _clips(dataset: ScannedDataset, limit: int | None) -> Iterator[tuple[Source, Item, np.ndarray]]:
    """Items with their pixels (F, H, W, 3); items that cannot be decoded are reported and skipped."""
    per_source = groupby(islice(dataset.items, limit), key=lambda member: member[0])
    for source, members in per_source:
        for item, pixels in read_clips(source, [item for _, item in members], dataset.settings):
            if isinstance(pixels, MediaError):
                print(f"skipped: {pixels}")
                continue
            print(f"{item.name}  {item.bucket_name}  {source.caption}")
            yield source, item, pixels


def _require_display() -> None:
    if sys.platform == "linux" and not (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
        raise UserError("--debug_mode image and video open a window, but there is no display; use --debug_mode html")


def _show_windows(datasets: Sequence[ScannedDataset], options: PreviewOptions) -> None:
    """Any key shows the next item, Esc stops; with --console_num_images nothing waits for a key."""
    _require_display()
    pause = round(1000 / NATIVE_FPS)
    last_pause = 1 if options.console_num_images else 0  # milliseconds; OpenCV takes 0 as "wait for a key"
    try:
        for dataset in datasets:
            for _, _, clip in _clips(dataset, options.console_num_images):
                frames = clip if options.debug_mode == "video" else clip[:1]
                for number, frame in enumerate(frames):
                    cv2.imshow(WINDOW, frame[..., ::-1])
                    if cv2.waitKey(pause if number < len(frames) - 1 else last_pause) == ESCAPE:
                        return
    except cv2.error as error:
        raise UserError(f"OpenCV cannot open a window ({error.err}); use --debug_mode html") from None
    finally:
        cv2.destroyAllWindows()


def _show_characters(datasets: Sequence[ScannedDataset], options: PreviewOptions) -> None:
    try:
        from ascii_magic import AsciiArt, Back
    except ImportError:
        raise UserError("--debug_mode console needs the package ascii-magic: pip install ascii-magic") from None
    name = (options.console_back or "").upper()
    if name and name not in Back.__members__:
        raise UserError(f"--console_back {options.console_back}: allowed: {', '.join(Back.__members__)}")
    for dataset in datasets:
        for _, _, clip in _clips(dataset, options.console_num_images):
            art = AsciiArt.from_pillow_image(Image.fromarray(clip[0]))
            art.to_terminal(columns=options.console_width, back=Back[name] if name else None)
            if options.console_num_images is None and _user_quits():
                return


def _user_quits() -> bool:
    try:
        return input("Enter: next, q: quit ").strip() == "q"
    except EOFError:
        return True


def show(datasets: Sequence[ScannedDataset], options: PreviewOptions) -> None:
    """Shows all items, in the way that `options.debug_mode` names.

    Raises:
        UserError: there is no display, or a package is missing.
    """
    if options.debug_mode == "html":
        write_page(datasets, options.debug_output, options.console_num_images)
        print(f"wrote {options.debug_output}; open it in a browser")
    elif options.debug_mode == "console":
        _show_characters(datasets, options)
    else:
        _show_windows(datasets, options)
