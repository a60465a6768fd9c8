"""Listing sources: cache names, captions, folders and JSONL files, with unusual file names."""

import json
import os
from pathlib import Path

import pytest

from dataset.config_utils import DatasetSettings
from dataset.sources import LONGEST_NAME, cache_names, explain_empty, file_identity, frame_files, list_sources
from tests.media_samples import write_caption, write_image
from tests.platforms import needs_posix


def settings(folder: Path, **keys) -> DatasetSettings:
    return DatasetSettings(**{"image_directory": str(folder), "cache_directory": "c"} | keys)


def test_names_are_stems_unless_they_collide() -> None:
    names = cache_names([Path(p) for p in ("d/a.png", "d/a.jpg", "d/b.png", "d/B.webp", "e/b.png", "d/c.tar.png")])
    assert names[:2] == ["a-png", "a-jpg"]
    assert names[5] == "c.tar"
    assert len({name.casefold() for name in names}) == len(names)


def test_a_suffixed_name_does_not_collide_with_a_real_one() -> None:
    names = cache_names([Path(p) for p in ("a.png", "a.jpg", "a-png.webp", "A-PNG.bmp")])
    assert len({name.casefold() for name in names}) == 4


def test_names_do_not_depend_on_the_order() -> None:
    paths = [Path(p) for p in ("x/a.png", "y/a.png", "x/a.jpg", "x/b.png")]
    forwards = dict(zip(paths, cache_names(paths), strict=True))
    assert dict(zip(paths[::-1], cache_names(paths[::-1]), strict=True)) == forwards


def test_long_names_are_cut_and_stay_distinct() -> None:
    paths = [Path("猫" * 84 + end + ".png") for end in "ab"]
    names = cache_names(paths)
    assert all(len(name.encode()) <= LONGEST_NAME for name in names) and names[0] != names[1]
    assert cache_names([Path("x" * 200 + ".png")]) == ["x" * 200]


def test_strange_file_names_and_captions(tmp_path: Path) -> None:
    names = ["a b.png", "c#1.png", "d[2].png", "猫の写真.png", "e" * 200 + ".png", "f.with.dots.png"]
    for name in names:
        write_caption(write_image(tmp_path / name), f"\ufeff  caption of {name[:9]}\n")
    sources = list_sources(settings(tmp_path))
    assert sorted(source.path.name for source in sources) == sorted(names)
    for source in sources:
        assert source.problem is None
        assert source.caption == f"caption of {source.path.name[:9]}"
        assert source.name == source.path.stem


def test_captions_that_cannot_be_used_are_problems(tmp_path: Path) -> None:
    write_image(tmp_path / "none.png")
    latin = write_image(tmp_path / "latin.png")
    latin.with_suffix(".txt").write_bytes("Müller".encode("latin-1"))
    empty = write_image(tmp_path / "empty.png")
    write_caption(empty, "")
    found = {source.name: source for source in list_sources(settings(tmp_path))}
    assert "caption not found" in found["none"].problem
    assert "byte 1" in found["latin"].problem and "latin.txt" in found["latin"].problem
    assert (found["empty"].problem, found["empty"].caption) == (None, "")


def test_a_zero_byte_file_is_a_problem(tmp_path: Path) -> None:
    path = tmp_path / "zero.png"
    path.touch()
    write_caption(path)
    (source,) = list_sources(settings(tmp_path))
    assert "empty" in source.problem


def test_jsonl_lists_files_anywhere(tmp_path: Path) -> None:
    for folder in ("x", "y"):
        (tmp_path / folder).mkdir()
        write_image(tmp_path / folder / "a.png")
    lines = [
        json.dumps({"image_path": str(tmp_path / "x" / "a.png"), "caption": " first\u2028one "}, ensure_ascii=False),
        "",
        json.dumps({"image_path": "\u202ay/a.png", "caption": "second", "control_path": "z"}),
        json.dumps({"image_path": str(tmp_path / "x" / "a.png"), "caption": "again"}),
        json.dumps({"image_path": str(tmp_path / "gone.png"), "caption": "third"}),
        json.dumps({"image_path": str(tmp_path / "x" / "a.png")}),
        "{not json",
        "[1]",
    ]
    file = tmp_path / "list.jsonl"
    file.write_text("\n".join(lines), encoding="utf-8")
    keys = {"image_directory": None, "image_jsonl_file": str(file)}
    sources = list_sources(settings(tmp_path, **keys))
    usable = [source for source in sources if source.problem is None]
    assert [source.caption for source in usable] == ["first\u2028one", "second"]
    assert len({source.name for source in usable}) == 2
    problems = [source.problem for source in sources if source.problem]
    assert len(problems) == 5
    for part in ("listed twice", "gone.png", "line 6", "line 7", "line 8"):
        assert any(part in problem for problem in problems), part


def names_in_jsonl(folder: Path, paths: list[str]) -> dict[str, str]:
    """The name of each listed path; captions are the paths."""
    file = folder / "list.jsonl"
    file.write_text("\n".join(json.dumps({"image_path": path, "caption": path}) for path in paths), encoding="utf-8")
    keys = {"image_directory": None, "image_jsonl_file": str(file)}
    return {source.caption: source.name for source in list_sources(settings(folder, **keys))}


def test_names_in_a_jsonl_file_depend_on_what_is_written_in_it_alone(tmp_path: Path, monkeypatch) -> None:
    listed = ["x/a.png", "y/a.png", "~tmp.png"]
    absent = names_in_jsonl(tmp_path, listed)
    for folder in ("x", "y"):
        (tmp_path / folder).mkdir()
        write_image(tmp_path / folder / "a.png")
    assert names_in_jsonl(tmp_path, listed) == absent
    monkeypatch.chdir(tmp_path)
    assert names_in_jsonl(tmp_path, listed) == absent
    windows = names_in_jsonl(tmp_path, ["x\\a.png", "y\\a.png", "~tmp.png"])
    assert list(windows.values()) == list(absent.values())


@needs_posix
def test_a_name_that_is_not_utf8_is_a_problem_that_can_be_printed(tmp_path: Path) -> None:
    for stem in (b"caf\xe9", b"caf\xe8", b"good"):
        path = tmp_path / os.fsdecode(stem + b".png")
        try:
            write_image(path)
        except OSError:
            pytest.skip("this file system takes UTF-8 alone")
        write_caption(path)
    sources = list_sources(settings(tmp_path))
    assert [source.name for source in sources if source.problem is None] == ["good"]
    problems = [source.problem for source in sources if source.problem]
    assert len(problems) == 2 and all("the name is not UTF-8; rename the file" in text for text in problems)
    "".join(problems).encode()

    half = "half \ud800.png"
    file = tmp_path / "list.jsonl"
    file.write_text(
        json.dumps({"image_path": half, "caption": ""}) + "\n" + json.dumps({"image_path": "\0", "caption": ""})
    )
    sources = list_sources(settings(tmp_path, image_directory=None, image_jsonl_file=str(file)))
    assert '"image_path" is missing or not a text' in sources[0].problem and "cannot be read" in sources[1].problem


def test_a_folder_of_frames_counts_only_with_a_caption(tmp_path: Path) -> None:
    for name in ("scene", "thumbnails"):
        (tmp_path / name).mkdir()
        write_image(tmp_path / name / "0.png")
    (tmp_path / "scene.txt").write_text("a scene")
    keys = {"image_directory": None, "video_directory": str(tmp_path)}
    (source,) = list_sources(settings(tmp_path, **keys))
    assert (source.kind, source.name, source.caption) == ("frames", "scene", "a scene")


def test_a_touched_file_changes_its_stamp(tmp_path: Path) -> None:
    path = write_image(tmp_path / "a.png")
    write_caption(path)
    before = list_sources(settings(tmp_path))[0].stamp
    os.utime(path, ns=(1, 1))
    assert list_sources(settings(tmp_path))[0].stamp != before


def test_an_empty_dataset_is_explained(tmp_path: Path) -> None:
    write_image(tmp_path / "a.png")
    keys = {"image_directory": None, "video_directory": str(tmp_path)}
    text = explain_empty(settings(tmp_path, **keys))
    assert "1 images and 0 videos" in text and "write image_directory" in text
    assert "no such file" in explain_empty(settings(tmp_path / "gone"))


def test_identity_is_of_the_content(tmp_path: Path) -> None:
    data = bytes(range(256)) * 20_000
    for name in ("a", "b"):
        (tmp_path / name).write_bytes(data)
    assert file_identity(tmp_path / "a") == file_identity(tmp_path / "b")
    (tmp_path / "b").write_bytes(data[:-1] + b"x")
    assert file_identity(tmp_path / "a") != file_identity(tmp_path / "b")
    folder = tmp_path / "f"
    folder.mkdir()
    (folder / "x.png").write_bytes(b"1")
    before = file_identity(folder)
    (folder / "y.png").write_bytes(b"2")
    assert file_identity(folder) != before


def test_frames_are_in_natural_order_and_hidden_files_are_no_frames(tmp_path: Path) -> None:
    names = ["f1.png", "f2.png", "f9.png", "f10.png", "f010.png", "f11.jpg", "f100.png"]
    for name in [*reversed(names), "._f3.png", ".DS_Store", "Thumbs.db", "notes.txt"]:
        (tmp_path / name).write_bytes(b"x")
    natural = ["f1.png", "f2.png", "f9.png", "f010.png", "f10.png", "f11.jpg", "f100.png"]
    assert [path.name for path in frame_files(tmp_path)] == natural


def test_exchanged_frames_are_another_source(tmp_path: Path) -> None:
    folder = tmp_path / "scene"
    folder.mkdir()
    (tmp_path / "scene.txt").write_text("a caption")
    for number in range(4):
        write_image(folder / f"{number}.bmp", (32, 32), (60 * number, 0, 0))
        os.utime(folder / f"{number}.bmp", ns=(10**18, 10**18 + number))
    video = settings(tmp_path, image_directory=None, video_directory=str(tmp_path))

    (before,) = list_sources(video)
    entry = {"stamp": before.stamp, "probe": {"digest": before.identity}}
    (folder / ".DS_Store").write_bytes(b"a file manager was here")
    (again,) = list_sources(video)
    assert again.is_described_by(entry) and again.identity == before.identity
    (folder / "1.bmp").rename(folder / "x")
    (folder / "2.bmp").rename(folder / "1.bmp")
    (folder / "x").rename(folder / "2.bmp")
    (after,) = list_sources(video)
    assert after.size == before.size and not after.is_described_by(entry)


def test_captions_in_utf16_or_behind_a_pipe_are_problems(tmp_path: Path) -> None:
    for name in ("with", "without", "pipe"):
        write_image(tmp_path / f"{name}.png")
    (tmp_path / "with.txt").write_text("a cat", encoding="utf-16")
    (tmp_path / "without.txt").write_bytes("a cat".encode("utf-16-le"))
    os.mkfifo(tmp_path / "pipe.txt")
    found = {source.name: source.problem for source in list_sources(settings(tmp_path))}
    assert "without.txt: caption holds NUL characters, so it is probably UTF-16" in found["without"]
    assert "with.txt: caption is not UTF-8" in found["with"]
    assert "pipe.txt: a file with the caption is expected" in found["pipe"]


def test_composed_and_decomposed_names_find_each_other(tmp_path: Path) -> None:
    composed, decomposed = "caf\u00e9", "cafe\u0301"
    write_image(tmp_path / f"{decomposed}.png")
    (tmp_path / f"{composed}.txt").write_text("a cat", encoding="utf-8")
    (source,) = list_sources(settings(tmp_path))
    assert (source.problem, source.caption) == (None, "a cat")
    (tmp_path / "list.jsonl").write_text(json.dumps({"image_path": f"{composed}.png", "caption": "a dog"}))
    keys = {"image_directory": None, "image_jsonl_file": str(tmp_path / "list.jsonl")}
    (source,) = list_sources(settings(tmp_path, **keys))
    assert source.problem is None and source.path.name == f"{decomposed}.png"


def test_a_repeat_in_a_jsonl_file_renames_nothing_and_counts_once(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    write_image(tmp_path / "a.png")
    for spellings in (["a.png", "a.png"], ["a.png", "./a.png", "x/../a.png", str(tmp_path / "a.png")]):
        lines = [json.dumps({"image_path": path, "caption": "c"}) for path in spellings]
        (tmp_path / "list.jsonl").write_text("\n".join(lines))
        keys = {"image_directory": None, "image_jsonl_file": str(tmp_path / "list.jsonl")}
        sources = list_sources(settings(tmp_path, **keys))
        assert [source.problem is None for source in sources] == [True] + [False] * (len(spellings) - 1)
        assert len({source.name for source in sources}) == len(spellings)
    assert names_in_jsonl(tmp_path, ["a.png", "a.png"])["a.png"] == "a.png#2"
    assert list_sources(settings(tmp_path, **keys))[0].name == "a"


def test_a_windows_path_in_a_jsonl_file_gets_a_hint(tmp_path: Path) -> None:
    (tmp_path / "list.jsonl").write_text(r'{"image_path": "C:\Users\a.png", "caption": ""}')
    (source,) = list_sources(settings(tmp_path, image_directory=None, image_jsonl_file=str(tmp_path / "list.jsonl")))
    assert "write Windows paths with / or \\\\" in source.problem


@needs_posix
def test_links_that_lead_nowhere_are_named(tmp_path: Path) -> None:
    for name, target in (("gone", tmp_path / "nothing"), ("loop", tmp_path / "loop.png")):
        (tmp_path / f"{name}.png").symlink_to(target)
        write_caption(tmp_path / f"{name}.png")
    write_caption(write_image(tmp_path / "good.png"))
    found = {source.name: source.problem for source in list_sources(settings(tmp_path))}
    assert found.pop("good") is None
    assert "gone.png: cannot be read: No such file" in found["gone"]
    assert "loop.png: cannot be read: Too many levels of symbolic links" in found["loop"]


@pytest.mark.parametrize("line", ["[" * 100_000, '{"image_path": ' + "9" * 5000 + "}"])
def test_a_jsonl_line_that_is_nested_too_deeply_or_too_long_is_a_problem(tmp_path: Path, line: str) -> None:
    (tmp_path / "list.jsonl").write_text(line + "\n")
    (source,) = list_sources(settings(tmp_path, image_directory=None, image_jsonl_file=str(tmp_path / "list.jsonl")))
    assert "not valid JSON: " in source.problem
