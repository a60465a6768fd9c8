"""Hashes of files, and how long they are remembered."""

import hashlib
import os

import pytest

from utils import content_hashes
from utils.content_hashes import ContentHashes


def test_a_hash_is_that_of_the_content(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    # FIPS 180-2, appendix B.1
    assert ContentHashes(tmp_path / "kept.json").of(tmp_path / "a") == (
        "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    )
    assert not (tmp_path / "kept.json").exists()


def test_a_large_file_is_read_once_until_it_changes(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(content_hashes, "LARGE", 3)
    path = tmp_path / "a"

    def of():
        return ContentHashes(tmp_path / "kept.json").of(path), bool(capsys.readouterr().out)

    path.write_bytes(b"abc")
    assert of() == (hashlib.sha256(b"abc").hexdigest(), True)
    assert of() == (hashlib.sha256(b"abc").hexdigest(), False)
    stat = path.stat()
    path.write_bytes(b"abd")
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 10))
    assert of() == (hashlib.sha256(b"abd").hexdigest(), True)


@pytest.mark.parametrize("text", ["", "[1]", "{", "[" * 100000])
def test_a_damaged_memory_is_no_memory(tmp_path, text):
    (tmp_path / "kept.json").write_text(text)
    (tmp_path / "a").write_bytes(b"abc")
    assert len(ContentHashes(tmp_path / "kept.json").of(tmp_path / "a")) == 64
