"""Uploads and downloads against a stand-in for the Hub; nothing here reaches the network."""

import threading
from pathlib import Path

import huggingface_hub
import pytest

from modules.training.files import HuggingFaceOptions, RemoteState, download_state
from modules.training.saver import Uploader
from utils.errors import UserError

TOKEN = "hf_secret"


class Hub:
    """What HfApi would be asked for."""

    calls: list[tuple]
    fail: Exception | None = None
    gate: threading.Event | None = None

    def __init__(self, token: str | None = None) -> None:
        self.token = token

    def create_repo(self, repo_id: str, **settings) -> None:
        if Hub.fail:
            raise Hub.fail
        Hub.calls.append(("create", repo_id, self.token, settings["private"], settings["repo_type"]))

    def upload_file(self, *, path_or_fileobj: Path, path_in_repo: str, **settings) -> None:
        if Hub.gate:
            Hub.gate.wait(10)
        if Hub.fail:
            raise Hub.fail
        Hub.calls.append(("file", path_or_fileobj.name, path_in_repo, settings["repo_id"]))

    def upload_folder(self, *, folder_path: Path, path_in_repo: str, **settings) -> None:
        Hub.calls.append(("folder", folder_path.name, path_in_repo, settings["repo_id"]))


@pytest.fixture(autouse=True)
def hub(monkeypatch: pytest.MonkeyPatch) -> type[Hub]:
    Hub.calls, Hub.fail, Hub.gate = [], None, None
    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    return Hub


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    checkpoint, state = tmp_path / "cat.safetensors", tmp_path / "cat-state"
    checkpoint.write_bytes(b"x")
    state.mkdir()
    return checkpoint, state


def options(**settings) -> HuggingFaceOptions:
    return HuggingFaceOptions(huggingface_repo_id="me/cats", huggingface_token=TOKEN, **settings)


def test_without_a_repository_nothing_happens(files: tuple[Path, Path]) -> None:
    uploader = Uploader(HuggingFaceOptions())
    uploader.upload(files[0])
    uploader.close()
    assert Hub.calls == []


def test_checkpoints_go_up_and_states_if_wanted(files: tuple[Path, Path]) -> None:
    for wanted in (False, True):
        uploader = Uploader(options(save_state_to_huggingface=wanted, huggingface_path_in_repo="run/1"))
        for path in files:
            uploader.upload(path)
    checkpoint = ("file", "cat.safetensors", "run/1/cat.safetensors", "me/cats")
    created = ("create", "me/cats", TOKEN, True, None)
    assert Hub.calls == [
        created,
        checkpoint,
        created,
        checkpoint,
        ("folder", "cat-state", "run/1/cat-state", "me/cats"),
    ]


def test_async_upload_does_not_wait_until_close(files: tuple[Path, Path]) -> None:
    Hub.gate = threading.Event()
    uploader = Uploader(options(async_upload=True, huggingface_repo_visibility="public"))
    uploader.upload(files[0])
    assert Hub.calls == [("create", "me/cats", TOKEN, False, None)]
    Hub.gate.set()
    uploader.close()
    assert Hub.calls[1:] == [("file", "cat.safetensors", "cat.safetensors", "me/cats")]


@pytest.mark.parametrize("behind", [False, True])
def test_a_failed_upload_is_a_warning_without_the_token(
    behind: bool, files: tuple[Path, Path], capsys: pytest.CaptureFixture
) -> None:
    uploader = Uploader(options(async_upload=behind))
    Hub.fail = ConnectionError(f"no route\nfor token {TOKEN}")
    uploader.upload(files[0])
    uploader.close()
    at_once, at_the_end = capsys.readouterr().err.splitlines()
    assert at_once.endswith("cat.safetensors: no route for token ***")
    assert at_the_end == f"warning: on disk but not uploaded: {files[0]}"


def test_a_refused_repository_stops_before_training() -> None:
    Hub.fail = PermissionError(f"401 for {TOKEN}")
    with pytest.raises(UserError, match=r"--huggingface_repo_id me/cats: 401 for \*\*\*$"):
        Uploader(options())


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("me/cats/run/cat-state", RemoteState("me/cats", "run/cat-state", None, "model")),
        ("me/cats/cat-state:main", RemoteState("me/cats", "cat-state", "main", "model")),
        ("me/cats/cat-state::dataset", RemoteState("me/cats", "cat-state", None, "dataset")),
    ],
)
def test_where_a_state_lies(text: str, expected: RemoteState) -> None:
    assert RemoteState.parse(text) == expected


@pytest.mark.parametrize(
    "text", ["auto", "me/cats", "me/cats/", "me/cats/s:main:models", "me/cats/s:a:model:b", "/c/s"]
)
def test_other_forms_are_refused(text: str) -> None:
    with pytest.raises(UserError, match="--resume"):
        RemoteState.parse(text)


def test_download_fetches_the_one_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked = {}

    def snapshot_download(repo_id: str, **settings) -> str:
        asked.update(settings, repo_id=repo_id)
        (tmp_path / "cat-state").mkdir()
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert download_state("me/cats/cat-state:v1", options()) == tmp_path / "cat-state"
    assert asked == {
        "repo_id": "me/cats",
        "repo_type": "model",
        "revision": "v1",
        "allow_patterns": "cat-state/**",
        "token": TOKEN,
    }


def test_a_failed_download_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(*_, **__) -> str:
        raise OSError(f"404\n{TOKEN}")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(UserError, match=r"^--resume me/cats/s: 404 \*\*\*$"):
        download_state("me/cats/s", options())
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(tmp_path))
    with pytest.raises(UserError, match="me/cats has no folder s"):
        download_state("me/cats/s", options())


@pytest.mark.parametrize(
    "settings", [{"huggingface_repo_id": "cats"}, {"huggingface_repo_id": "/cats"}, {"save_state_to_huggingface": True}]
)
def test_contradictions_are_refused(settings: dict) -> None:
    with pytest.raises(UserError, match="--huggingface_repo_id"):
        HuggingFaceOptions(**settings)
