"""Stopping a run: what asks for it, and what stops at once."""

import io
import signal
import sys

import pytest

from modules.training.stop_requests import StopRequests


def test_a_launchers_sigterm_after_ctrl_c_still_lets_the_run_save(tmp_path):
    with StopRequests(tmp_path) as requests:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        assert requests.quit


def test_ctrl_c_twice_stops_at_once(tmp_path):
    with StopRequests(tmp_path) as requests:
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert requests.quit


def test_a_signal_while_the_progress_bar_is_written_is_taken_notice_of(tmp_path, monkeypatch, capfd):
    """Python lets nobody enter the buffer of a file twice."""

    coming = [signal.SIGTERM]

    class Interrupted(io.RawIOBase):
        def writable(self) -> bool:
            return True

        def write(self, data: bytes) -> int:
            if coming:
                signal.raise_signal(coming.pop())
            return len(data)

    monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(io.BufferedWriter(Interrupted()), line_buffering=True))
    with StopRequests(tmp_path) as requests:
        sys.stderr.write("50 %")
        sys.stderr.flush()
    assert requests.quit and "SIGTERM: saving after this step" in capfd.readouterr().err


def test_a_terminal_that_is_gone_does_not_lose_the_request(tmp_path, monkeypatch):
    def gone(*_: object) -> None:
        raise BrokenPipeError

    monkeypatch.setattr("os.write", gone)
    with StopRequests(tmp_path) as requests:
        signal.raise_signal(signal.SIGTERM)
    assert requests.quit


def test_handlers_are_put_back(tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    with StopRequests(tmp_path):
        assert signal.getsignal(signal.SIGTERM) != before
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.parametrize(("name", "quits"), [("save", False), ("save_quit", True)])
def test_request_files_are_taken_once(tmp_path, name, quits):
    (tmp_path / name).touch()
    requests = StopRequests(tmp_path)
    requests.poll_files()
    assert (requests.save, requests.quit) == (not quits, quits) and not (tmp_path / name).exists()
    requests.save = requests.quit = False
    requests.poll_files()
    assert not requests.save and not requests.quit
