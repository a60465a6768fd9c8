"""Stopping a run: what asks for it, and what stops at once."""

import signal

import pytest

from modules.stop_requests import StopRequests


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
    assert requests.save and requests.quit == quits and not (tmp_path / name).exists()
    requests.save = requests.quit = False
    requests.poll_files()
    assert not requests.save and not requests.quit
