"""Requests to stop or to save: Ctrl+C, SIGTERM, or a file `save` or `save_quit` in the output folder."""

import contextlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

SAVE_FILE, SAVE_AND_QUIT_FILE = "save", "save_quit"


class StopRequests:
    """A context in which Ctrl+C and SIGTERM ask for a stop after the step; a second Ctrl+C interrupts the step.

    Args:
        folder: where the files `save` and `save_quit` are expected.
        is_main: this process reads these files and prints what a signal does.
    """

    def __init__(self, folder: Path, is_main: bool = True) -> None:
        self.folder, self.is_main = folder, is_main
        self.quit = False
        self.save = False
        self._interrupted = False
        self._uninterrupted = 0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "StopRequests":
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        # An interrupted launcher sends SIGTERM after the SIGINT of the terminal, so only SIGINT counts as Ctrl+C.
        if number == signal.SIGINT and self._interrupted and not self._uninterrupted:
            raise KeyboardInterrupt
        self._interrupted |= number == signal.SIGINT
        prints, self.quit = self.is_main and not self.quit, True
        # Not through sys.stderr: the progress bar may be writing to it, and it cannot be entered twice.
        with contextlib.suppress(OSError):
            if prints:
                name = signal.Signals(number).name
                text = f"\n{name}: saving after this step; Ctrl+C again gives this step up and saves those before it\n"
                os.write(2, text.encode())

    @contextlib.contextmanager
    def uninterrupted(self) -> Iterator[None]:
        """Inside, Ctrl+C interrupts nothing, however often it is pressed: weights are changed, or files are written."""
        self._uninterrupted += 1
        try:
            yield
        finally:
            self._uninterrupted -= 1

    def asked_to_stop(self) -> bool:
        """Whether this process was asked to stop by a signal, or by a file if it is the main process."""
        if self.is_main:
            self.poll_files()
        return self.quit

    def take_save(self) -> bool:
        """Whether a checkpoint was asked for since the last call."""
        if self.is_main:
            self.poll_files()
        asked, self.save = self.save, False
        return asked

    def poll_files(self) -> None:
        """Reads and removes the files `save` and `save_quit`."""
        for name in (SAVE_FILE, SAVE_AND_QUIT_FILE):
            path = self.folder / name
            if path.is_file():
                path.unlink(missing_ok=True)
                self.save |= name == SAVE_FILE
                self.quit |= name == SAVE_AND_QUIT_FILE
