"""Requests to stop or to save: Ctrl+C, SIGTERM, or a file `save` or `save_quit` in the output folder."""

import contextlib
import os
import signal
from pathlib import Path
from types import FrameType
from typing import Any

SAVE_FILE, SAVE_AND_QUIT_FILE = "save", "save_quit"


class StopRequests:
    """A context in which Ctrl+C and SIGTERM ask for a stop after the step; a second Ctrl+C interrupts at once.

    Args:
        folder: where the files `save` and `save_quit` are expected.
        prints: print what a signal does; for one process of a run.
    """

    def __init__(self, folder: Path, prints: bool = True) -> None:
        self.folder, self.prints = folder, prints
        self.quit = False
        self.save = False
        self._interrupted = False
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
        if number == signal.SIGINT and self._interrupted:
            raise KeyboardInterrupt
        self._interrupted |= number == signal.SIGINT
        prints, self.quit = self.prints and not self.quit, True
        # Not through sys.stderr: the progress bar may be writing to it, and it cannot be entered twice.
        with contextlib.suppress(OSError):
            if prints:
                text = f"\n{signal.Signals(number).name}: saving after this step; Ctrl+C stops at once\n"
                os.write(2, text.encode())

    def poll_files(self) -> None:
        """Reads and removes the files `save` and `save_quit`; for the main process."""
        for name in (SAVE_FILE, SAVE_AND_QUIT_FILE):
            path = self.folder / name
            if path.is_file():
                path.unlink(missing_ok=True)
                self.save = True
                self.quit |= name == SAVE_AND_QUIT_FILE
