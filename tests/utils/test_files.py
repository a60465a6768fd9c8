"""Files are whole or not there, and read as the user meant them."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import av
import pytest
import torch

from tests.platforms import needs_posix
from utils.errors import UserError, did_you_mean, one_line
from utils.files import (
    atomic_folder,
    atomic_path,
    clean_path,
    has_right_checksums,
    is_leftover,
    read_text,
    read_toml,
    remove_leftovers,
    user_path,
    write_text,
)

ROOT = Path(__file__).parents[2]


def test_a_finished_file_replaces_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "a.txt"
    for text in ("old", "new ä\nline"):
        write_text(path, text)
        assert path.read_bytes() == text.encode()
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path: Path, error: type[BaseException]) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(error), atomic_path(path) as temporary:
        temporary.write_text("half")
        assert path.read_text() == "old"
        raise error
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_is_replaced_as_a_whole_or_not_at_all(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "state"
    for name in ("first", "second"):
        with atomic_folder(folder) as temporary:
            (temporary / name).touch()
        assert [path.name for path in folder.iterdir()] == [name]
    with pytest.raises(KeyboardInterrupt), atomic_folder(folder) as temporary:
        (temporary / "third").touch()
        raise KeyboardInterrupt
    assert [path.name for path in folder.iterdir()] == ["second"]
    assert list(folder.parent.iterdir()) == [folder]


def test_an_error_of_the_disk_names_the_file(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"No space left on device: '.*a\.txt'"), atomic_path(tmp_path / "a.txt"):
        raise OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(OSError, match=r"^broken data stream$"), atomic_path(tmp_path / "a.txt"):
        raise OSError("broken data stream")
    with pytest.raises(av.error.OSError, match="No space left"), atomic_path(tmp_path / "a.mp4"):
        av.error.err_check(-errno.ENOSPC)


def test_a_folder_is_no_file_name(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is a folder, a file name is expected"):
        write_text(tmp_path, "x")


def test_a_killed_process_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    code = (
        "import os, sys; from utils.files import atomic_path\n"
        "with atomic_path(sys.argv[1]) as temporary:\n    temporary.write_text('half'); os._exit(9)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(path)], cwd=ROOT, timeout=60).returncode == 9
    assert path.read_text() == "old"
    (leftover,) = tmp_path.glob("*.partial")
    assert leftover.read_text() == "half"


def test_the_next_write_to_a_folder_removes_what_killed_processes_left(tmp_path: Path) -> None:
    code = (
        "import os, sys; from utils.files import atomic_path\n"
        "with atomic_path(sys.argv[1]) as temporary:\n    temporary.write_text('half'); os._exit(9)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "model.safetensors")], cwd=ROOT, timeout=60)
    assert len(list(tmp_path.iterdir())) == 1
    write_text(tmp_path / "another name.txt", "new")
    assert [path.name for path in tmp_path.iterdir()] == ["another name.txt"]


def test_what_a_running_process_or_another_program_writes_is_left_alone(tmp_path: Path) -> None:
    names = {f"a.mp4.{os.getpid()}.partial", f"b.{os.getppid()}.partial", "c.12345678.partial", "d.txt.partial"}
    for name in names:
        (tmp_path / name).touch()
    (tmp_path / "e.4194305.partial").touch()  # Linux gives no process this number
    remove_leftovers(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == names


def test_a_process_that_started_after_the_file_was_written_is_not_its_writer(tmp_path: Path) -> None:
    path = tmp_path / f"a.{os.getpid()}.partial"
    path.touch()
    assert not is_leftover(path)
    os.utime(path, (0, 0))
    assert is_leftover(path)


def test_a_folder_that_was_being_replaced_is_restored_unless_that_goes_on(tmp_path: Path) -> None:
    for name in ("lost", "busy", "done"):
        (tmp_path / f"{name}.old.partial").mkdir()
    (tmp_path / "done").mkdir()
    (tmp_path / f"busy.{os.getppid()}.partial").mkdir()
    remove_leftovers(tmp_path)
    names = {"lost", "done", "busy.old.partial", f"busy.{os.getppid()}.partial"}
    assert {path.name for path in tmp_path.iterdir()} == names


def test_a_temporary_path_is_written_directly_and_errors_name_the_final_one(tmp_path: Path) -> None:
    with atomic_path(tmp_path / "a.txt") as outer, atomic_path(outer) as inner:
        assert inner == outer
        inner.write_text("x")
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]
    with pytest.raises(FileNotFoundError) as caught, atomic_path(tmp_path / "b.txt") as temporary:
        temporary.read_text()
    assert caught.value.filename == str(tmp_path / "b.txt")


def test_the_longest_legal_name_can_be_written(tmp_path: Path) -> None:
    path = tmp_path / ("ü" * 127)  # 254 bytes of the 255 that a file system allows
    write_text(path, "x")
    assert path.read_text() == "x"


def test_text_with_and_without_a_mark(tmp_path: Path) -> None:
    for data in (b"\xef\xbb\xbfcaf\xc3\xa9", b"caf\xc3\xa9"):
        (tmp_path / "a.txt").write_bytes(data)
        assert read_text(tmp_path / "a.txt", "caption") == "café"


def test_reading_mistakes_name_file_and_place(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    with pytest.raises(UserError, match=r"a.txt: caption not found"):
        read_text(path, "caption")
    path.write_bytes(b"caf\xe9")
    with pytest.raises(UserError, match=r"a.txt: caption is not UTF-8 \(byte 3\)"):
        read_text(path, "caption")
    with pytest.raises(UserError, match="cannot be read"):
        read_text(tmp_path, "caption")


def test_toml_mistakes_name_the_line_and_the_cure(tmp_path: Path) -> None:
    path = tmp_path / "a.toml"
    path.write_text('a = 1\nfolder = "C:\\media"\n')
    with pytest.raises(UserError, match=r"a.toml: config is not valid TOML: .*line 2.*write Windows paths with /"):
        read_toml(path, "config")
    path.write_text("a = \n")
    with pytest.raises(UserError, match=r"line 1") as error:
        read_toml(path, "config")
    assert "Windows" not in str(error.value)


def test_paths_lose_what_nobody_sees() -> None:
    assert clean_path("\u202a C:\\media\u200b \ufeff") == "C:\\media"
    for name in ("a\u00a0b ü", "نامه\u200cها", "\U0001f468\u200d\U0001f469.mp4"):
        assert clean_path(name) == name


def test_a_tilde_is_the_home_folder_only_when_it_stands_alone(monkeypatch, tmp_path: Path) -> None:
    for variable in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(variable, str(tmp_path))
    assert (user_path("~"), user_path(" ~/a.png")) == (tmp_path, tmp_path / "a.png")
    for name in ("~tmp.png", "~$clip.mp4", "~root/a.png", "a/~"):
        assert user_path(name) == Path(name)


def test_messages() -> None:
    assert one_line("a\n  b\tc ") == "a b c"
    assert did_you_mean("learning_rte", ["seed", "learning_rate"]) == " (did you mean 'learning_rate'?)"
    assert did_you_mean("xyz", ["seed", "learning_rate"]) == ""


@needs_posix
def test_files_are_as_readable_as_the_umask_says(tmp_path: Path) -> None:
    from utils.safetensors_utils import save_file

    plain = tmp_path / "plain"
    plain.write_text("x")
    save_file({}, tmp_path / "ours.safetensors")
    assert (tmp_path / "ours.safetensors").stat().st_mode == plain.stat().st_mode


def test_every_flipped_byte_of_data_is_noticed_where_torch_wrote_checksums(tmp_path: Path) -> None:
    path, numbers = tmp_path / "a.pt", torch.arange(3.0)
    torch.save({"numbers": numbers}, path)
    good = path.read_bytes()
    assert has_right_checksums(path)
    start = good.index(numbers.numpy().tobytes())
    for place in range(start, start + numbers.nbytes):
        path.write_bytes(good[:place] + bytes([good[place] ^ 128]) + good[place + 1 :])
        assert not has_right_checksums(path), place
    path.write_bytes(good[:-30])
    assert not has_right_checksums(path) and not has_right_checksums(tmp_path / "absent.pt")


def test_a_file_that_torch_wrote_without_checksums_is_not_called_damaged(tmp_path: Path) -> None:
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"numbers": torch.arange(3.0)}, tmp_path / "a.pt")
    finally:
        torch.serialization.set_crc32_options(True)
    assert has_right_checksums(tmp_path / "a.pt")
