"""How a person stops a run, or asks it to save: Ctrl+C, SIGTERM, a file `save` or `save_quit` in the output folder."""

import contextlib
import os
import signal
from pathlib import Path
from types import FrameType
from typing import Any

SAVE_FILE, SAVE_AND_QUIT_FILE = "save", "save_quit"


class StopRequests:
    """Context in which signals ask for a clean stop; a second Ctrl+C interrupts at once.

    Args:
        folder: where the request files are expected.
        speaks: say what a signal does; one process of a run is enough.
    """

    def __init__(self, folder: Path, speaks: bool = True) -> None:
        self.folder, self.speaks = folder, speaks
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
        # A launcher that is interrupted sends SIGTERM after the terminal's SIGINT: only Ctrl+C twice means at once.
        if number == signal.SIGINT and self._interrupted:
            raise KeyboardInterrupt
        self._interrupted |= number == signal.SIGINT
        speaks, self.quit = self.speaks and not self.quit, True
        # Past sys.stderr: the progress bar may be writing to it, and Python lets nobody in twice.
        with contextlib.suppress(OSError):
            if speaks:
                text = f"\n{signal.Signals(number).name}: saving after this step; Ctrl+C stops at once\n"
                os.write(2, text.encode())

    def poll_files(self) -> None:
        """Takes notice of the request files and removes them; for the process that writes."""
        for name in (SAVE_FILE, SAVE_AND_QUIT_FILE):
            path = self.folder / name
            if path.is_file():
                path.unlink(missing_ok=True)
                self.save = True
                self.quit |= name == SAVE_AND_QUIT_FILE
