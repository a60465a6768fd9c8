"""Hugging Face Hub: uploads checkpoints and states, and fetches a state to resume from.

The token comes from --huggingface_token, or from where huggingface_hub looks itself (HF_TOKEN, `hf auth login`). It is
handed to that library and to nothing else.
"""

import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils.cli import option
from utils.errors import UserError, one_line

if TYPE_CHECKING:
    from huggingface_hub import HfApi

REPO_TYPES = ("model", "dataset", "space")


@dataclass(frozen=True, kw_only=True)
class HuggingFaceOptions:
    """Hugging Face Hub"""

    huggingface_repo_id: str | None = option(None, help="repository to upload to, user/name")
    huggingface_repo_type: str | None = option(None, help="kind of the repository; model", choices=REPO_TYPES)
    huggingface_path_in_repo: str | None = option(None, help="folder in the repository; its root")
    huggingface_token: str | None = option(None, help="access token; better: the variable HF_TOKEN", secret=True)
    huggingface_repo_visibility: str | None = option(
        None, help="of a repository that does not exist yet; private", choices=("public", "private")
    )
    save_state_to_huggingface: bool = option(False, help="upload the states as well")
    resume_from_huggingface: bool = option(
        False, help="--resume is user/name/folder[:revision[:repo_type]] on the Hub instead of a local folder"
    )
    async_upload: bool = option(False, help="train on while files are uploaded")

    def __post_init__(self) -> None:
        if self.huggingface_repo_id is None:
            if self.save_state_to_huggingface:
                raise UserError("--save_state_to_huggingface needs --huggingface_repo_id, the repository to upload to")
        elif self.huggingface_repo_id.count("/") != 1 or not all(self.huggingface_repo_id.split("/")):
            raise UserError(f"--huggingface_repo_id {self.huggingface_repo_id}: user/name is expected")


@dataclass(frozen=True)
class RemoteState:
    """Where on the Hub a state lies."""

    repo_id: str
    folder: str
    revision: str | None
    repo_type: str

    @classmethod
    def parse(cls, text: str) -> "RemoteState":
        """Reads `user/name/folder[:revision[:repo_type]]`.

        Raises:
            UserError: another form.
        """
        place, *rest = text.split(":")
        user, _, place = place.partition("/")
        name, _, folder = place.partition("/")
        revision, repo_type = (*rest, "", "")[:2]
        if not (user and name and folder) or len(rest) > 2 or (repo_type or "model") not in REPO_TYPES:
            raise UserError(f"--resume {text}: user/name/folder[:revision[:repo_type]] is expected")
        return cls(f"{user}/{name}", folder.strip("/"), revision or None, repo_type or "model")


def download_state(text: str, options: HuggingFaceOptions) -> Path:
    """Fetches the state that `--resume` names with `--resume_from_huggingface`; returns its local folder.

    Raises:
        UserError: the text has another form, or the Hub does not have or give the files.
    """
    state = RemoteState.parse(text)
    try:
        from huggingface_hub import snapshot_download

        root = snapshot_download(
            state.repo_id,
            repo_type=state.repo_type,
            revision=state.revision,
            allow_patterns=f"{state.folder}/**",
            token=options.huggingface_token,
        )
    except Exception as error:  # the library passes on the errors of several HTTP and file libraries
        raise UserError(f"--resume {text}: {_said(error, options)}") from None
    folder = Path(root, state.folder)
    if not folder.is_dir():
        raise UserError(f"--resume {text}: {state.repo_id} has no folder {state.folder}")
    return folder


class Uploader:
    """Uploads files and folders, one after another, at once or behind the training.

    A failed upload costs a warning, never the training: the files are on disk.
    """

    def __init__(self, options: HuggingFaceOptions) -> None:
        """Creates the repository where it does not exist.

        Raises:
            UserError: the Hub refuses it, for example because of the token.
        """
        self.options = options
        self.failures: list[Path] = []
        self._pool = ThreadPoolExecutor(1) if options.async_upload else None
        self._api = self._open_repository() if options.huggingface_repo_id is not None else None

    def _open_repository(self) -> "HfApi":
        options = self.options
        try:
            from huggingface_hub import HfApi
            from huggingface_hub.utils import disable_progress_bars

            disable_progress_bars()
            api = HfApi(token=options.huggingface_token)
            api.create_repo(
                options.huggingface_repo_id,
                repo_type=options.huggingface_repo_type,
                private=options.huggingface_repo_visibility != "public",
                exist_ok=True,
            )
        except Exception as error:  # as above
            raise UserError(f"--huggingface_repo_id {options.huggingface_repo_id}: {_said(error, options)}") from None
        return api

    def upload(self, path: Path) -> None:
        """Uploads a file, or a folder if states are wanted, under its own name; nothing without a repository."""
        if self._api is None or (path.is_dir() and not self.options.save_state_to_huggingface):
            return
        if self._pool is None:
            self._send(path)
        else:
            self._pool.submit(self._send, path)

    def close(self) -> None:
        """Waits for what is still on its way, and names once more what did not arrive."""
        if self._pool is not None:
            self._pool.shutdown(wait=True)
        if self.failures:
            print(f"warning: on disk but not uploaded: {', '.join(map(str, self.failures))}", file=sys.stderr)

    def _send(self, path: Path) -> None:
        options = self.options
        target = "/".join(part for part in (options.huggingface_path_in_repo, path.name) if part).strip("/")
        place: dict[str, Any] = {
            "repo_id": options.huggingface_repo_id,
            "repo_type": options.huggingface_repo_type,
            "path_in_repo": target,
            "commit_message": f"Upload {path.name}",
        }
        try:
            if path.is_dir():
                self._api.upload_folder(folder_path=path, **place)
            else:
                self._api.upload_file(path_or_fileobj=path, **place)
        except Exception as error:  # the library's own errors, the network's, the file system's: none may stop a run
            self.failures.append(path)
            print(f"warning: not uploaded: {path}: {_said(error, options)}", file=sys.stderr)


def _said(error: Exception, options: HuggingFaceOptions) -> str:
    """What the library said, in one line and without the token."""
    text = one_line(error) or type(error).__name__
    return text.replace(options.huggingface_token, "***") if options.huggingface_token else text
