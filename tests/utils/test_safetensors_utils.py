"""The reader refuses what is not whole, the writer keeps the old file if it fails; both against the library."""

import errno
import json
import signal
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch

from tests.platforms import needs_posix
from utils.errors import UserError
from utils.safetensors_utils import TORCH_DTYPES, iterate_tensors, load_file, read_header, save_file

ROOT = Path(__file__).parents[2]


def every_dtype() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    tensors = {name: (torch.randn(3, 5) * 4).to(dtype) for name, dtype in TORCH_DTYPES.items()}
    return tensors | {"scalar": torch.tensor(2.5), "empty": torch.zeros(0, 4), "turned": torch.randn(4, 6).t()}


def equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    same_bytes = torch.equal(a.contiguous().view(-1).view(torch.uint8), b.contiguous().view(-1).view(torch.uint8))
    return a.dtype == b.dtype and a.shape == b.shape and same_bytes


def raw_file(path: Path, header: object, data: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def test_the_library_reads_what_we_write_and_we_read_what_it_writes(tmp_path: Path) -> None:
    tensors = every_dtype()
    save_file(tensors, tmp_path / "ours.safetensors", {"key": "välue"})
    library = {name: tensor.contiguous() for name, tensor in tensors.items()}
    safetensors.torch.save_file(library, tmp_path / "library.safetensors", {"key": "välue"})
    assert (tmp_path / "ours.safetensors").read_bytes() == (tmp_path / "library.safetensors").read_bytes()
    theirs = safetensors.torch.load_file(tmp_path / "ours.safetensors")
    ours = load_file(tmp_path / "library.safetensors")
    assert theirs.keys() == ours.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert equal(theirs[name], tensor) and equal(ours[name], tensor), name
    infos, metadata = read_header(tmp_path / "library.safetensors")
    assert metadata == {"key": "välue"}
    assert all((infos[name].dtype, infos[name].shape) == (t.dtype, tuple(t.shape)) for name, t in tensors.items())
    assert infos["F32"].nbytes == 60 and infos["empty"].nbytes == 0


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "the file is empty"),
        (b"\x10\0\0", "3 bytes"),
        (struct.pack("<Q", 2**60) + b"{}", "header of 1,152,921,504,606,846,976 bytes claimed"),
        (struct.pack("<Q", 50) + b"{}", "header of 50 bytes claimed"),
        (struct.pack("<Q", 0), "header of 0 bytes claimed"),
        (b"PK\x03\x04" + b"\0" * 100, "not a safetensors file"),
        (struct.pack("<Q", 4) + b"\xff\xff\xff\xff", "its header is not JSON"),
        (struct.pack("<Q", 4) + b'{"a"', "its header is not JSON"),
        (struct.pack("<Q", 100_000) + b"[" * 100_000, "its header is not JSON"),
        (struct.pack("<Q", 5000) + b"1" * 5000, "its header is not JSON"),
    ],
)
def test_files_that_are_none(tmp_path: Path, data: bytes, words: str) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(data)
    with pytest.raises(UserError, match=f"^{path}: .*{words}"):
        read_header(path)


GOOD = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}


@pytest.mark.parametrize(
    "header",
    [
        [],
        7,
        {"x": 3},
        {"x": {"dtype": "F32"}},
        {"x": GOOD | {"dtype": "F3"}},
        {"x": GOOD | {"shape": "ab"}},
        {"x": GOOD | {"shape": None}},
        {"x": GOOD | {"shape": [2, 3]}},
        {"x": GOOD | {"shape": [-2, -2]}},
        {"x": GOOD | {"data_offsets": [-16, 0]}},
        {"x": GOOD | {"shape": [-4], "data_offsets": [16, 0]}},
        {"x": GOOD | {"data_offsets": [0]}},
        {"x": GOOD, "__metadata__": ["a"]},
    ],
)
def test_headers_that_make_no_sense(tmp_path: Path, header: object) -> None:
    path = raw_file(tmp_path / "x.safetensors", header, b"\0" * 16)
    with pytest.raises(UserError, match=f"^{path}: "):
        read_header(path)


def test_a_download_that_was_cut_off(tmp_path: Path) -> None:
    path = raw_file(tmp_path / "x.safetensors", {"x": GOOD}, b"\0" * 15)
    with pytest.raises(UserError, match=r"cut off: .* bytes of"):
        next(iterate_tensors(path))


def test_missing_file_and_folder(tmp_path: Path) -> None:
    for path in (tmp_path / "none.safetensors", tmp_path):
        with pytest.raises(UserError, match=f"^{path}: cannot be read: "):
            read_header(path)


@needs_posix
def test_a_process_killed_while_it_writes_leaves_one_file_that_is_known_as_a_leftover(tmp_path: Path) -> None:
    code = (
        "import resource, signal, sys, torch; from utils.safetensors_utils import save_file\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # the first byte beyond the limit kills\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "save_file({'x': torch.zeros(1_000_000)}, sys.argv[1])"
    )
    path = tmp_path / "x.safetensors"
    died = subprocess.run([sys.executable, "-c", code, str(path)], cwd=ROOT, timeout=600).returncode
    assert died == -signal.SIGXFSZ
    assert [leftover.suffix for leftover in tmp_path.iterdir()] == [".partial"]


def test_metadata_may_hold_what_is_no_utf8(tmp_path: Path) -> None:
    """As names of files may, on Linux."""
    save_file({"x": torch.zeros(1)}, tmp_path / "x.safetensors", {"name": "caf\udce9 ä"})
    assert read_header(tmp_path / "x.safetensors")[1] == {"name": "caf\udce9 ä"}


@needs_posix
def test_files_are_as_readable_as_the_user_lets_them_be(tmp_path: Path) -> None:
    save_file({"x": torch.zeros(4)}, tmp_path / "x.safetensors")
    (tmp_path / "any").touch()
    assert (tmp_path / "x.safetensors").stat().st_mode == (tmp_path / "any").stat().st_mode


@needs_posix
def test_a_full_disk_leaves_the_old_file(tmp_path: Path) -> None:
    import resource

    path = tmp_path / "x.safetensors"
    save_file({"x": torch.zeros(4)}, path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(OSError, match=r"x\.safetensors") as error:
            save_file({"x": torch.zeros(1_000_000)}, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert error.value.errno == errno.EFBIG and "too large" in error.value.strerror
    assert list(tmp_path.iterdir()) == [path]
    assert torch.equal(load_file(path)["x"], torch.zeros(4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn])
@pytest.mark.parametrize("value", ["nan", "inf"])
def test_no_value_that_is_not_finite_is_ever_written(tmp_path, dtype, value):
    if dtype == torch.float8_e4m3fn and value == "inf":
        pytest.skip("this dtype has no infinity")
    path = tmp_path / "a.safetensors"
    path.write_bytes(b"old")
    bad = torch.zeros(2, 3)
    bad[1, 1] = float(value)
    with pytest.raises(UserError, match=r"a.safetensors: not written: b would have values that are not finite"):
        save_file({"a": torch.ones(2), "b": bad.to(dtype)}, path)
    assert path.read_bytes() == b"old" and [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


def test_mxfp8_is_named(tmp_path):
    header = b'{"a.weight_scale":{"dtype":"F8_E8M0","shape":[4],"data_offsets":[0,4]}}'
    (tmp_path / "a.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))
    with pytest.raises(UserError, match=r"is mxfp8, which is not supported; use the bf16, fp16 or fp8 file"):
        read_header(tmp_path / "a.safetensors")
