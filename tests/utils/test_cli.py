"""Options: every mistake is one line that helps, and a config file is checked like the command line."""

import dataclasses
import errno
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from utils.cli import (
    one_value_each,
    option,
    parse_options,
    print_table,
    run_script,
    settings_toml,
    unused_options,
)
from utils.errors import UserError

ROOT = Path(__file__).parents[2]


class Percent(float):
    expected = "a percentage such as 5%"

    def __new__(cls, text: object) -> "Percent":
        if not str(text).endswith("%"):
            raise ValueError
        return super().__new__(cls, float(str(text)[:-1]))

    def __str__(self) -> str:
        return f"{float(self):g}%"


@dataclass(frozen=True, kw_only=True)
class Model:
    """model"""

    dit: Path = option(help="the DiT", path="any")
    dtype: str = option("bfloat16", help="dtype", choices=("float32", "bfloat16"))
    fp8: bool = option(False, help="saves 50% disk")


@dataclass(frozen=True, kw_only=True)
class Run:
    """run"""

    learning_rate: float = option(1e-4, help="rate", minimum=0)
    max_train_steps: int = option(100, help="steps", minimum=1, maximum=1000)
    seed: int | None = option(None, help="seed")
    video_size: tuple[int, int] = option((256, 256), help="height and width")
    network_args: list[str] = option([], help="key=value")
    multipliers: list[float] = option([1.0], help="multipliers")
    warm_up: Percent | None = option(None, help="warm-up")
    token: str | None = option(None, help="token", secret=True)
    comment: str | None = option(None, help="any text")

    def __post_init__(self) -> None:
        if self.seed == self.max_train_steps:
            raise UserError("--seed is --max_train_steps")


@pytest.fixture
def dit(tmp_path: Path) -> str:
    path = tmp_path / "dit.pt"
    path.write_bytes(b"x")
    return str(path)


def parse(*argv: str) -> tuple[Model, Run]:
    return tuple(parse_options("Does 100% of it.", Model, Run, argv=argv))


def config(tmp_path: Path, text: str) -> str:
    path = tmp_path / "config.toml"
    path.write_text(text, encoding="utf-8")
    return f"--config_file={path}"


def test_defaults_and_values_have_their_types(dit: str) -> None:
    model, run = parse("--dit", dit)
    assert model == Model(dit=Path(dit)) and run == Run()
    model, run = parse(
        *["--dit", f" {dit}\u200b", "--fp8", "--dtype=float32", "--learning_rate", "5", "--seed", "-3"],
        *["--video_size", "544", "960", "--network_args", "a=1", "b=2", "--multipliers", "-0.5", "2", "--warm_up=5%"],
    )
    assert model == Model(dit=Path(dit), fp8=True, dtype="float32")
    assert run == Run(
        learning_rate=5.0,
        seed=-3,
        video_size=(544, 960),
        network_args=["a=1", "b=2"],
        multipliers=[-0.5, 2.0],
        warm_up=Percent("5%"),
    )
    assert parse("--dit", dit, "--network_args")[1].network_args == []


def test_a_list_default_is_not_shared(dit: str) -> None:
    parse("--dit", dit)[1].multipliers.append(9.0)
    assert parse("--dit", dit)[1].multipliers == [1.0]


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (
            ["--learning_rte", "1"],
            r"unknown option --learning_rte \(did you mean '--learning_rate'\?\); --help lists all",
        ),
        (["--learning_rte=1"], "did you mean '--learning_rate'"),
        (["--learning", "1"], "unknown option --learning "),
        (["stray"], "unknown option stray"),
        (["--dtype", "bfloat61"], r"--dtype: 'bfloat61' is not one of float32, bfloat16 \(did you mean 'bfloat16'\?\)"),
        (["--learning_rate", "fast"], "--learning_rate: 'fast' is not a number"),
        (["--learning_rate", "nan"], "not a finite number"),
        (["--learning_rate=-1"], "--learning_rate: -1 is too small: the minimum is 0"),
        (["--max_train_steps", "1e3"], "'1e3' is not a whole number"),
        (["--max_train_steps", "1001"], "1001 is too large: the maximum is 1000"),
        (["--max_train_steps"], "--max_train_steps: expected one argument"),
        (["--video_size", "544"], "--video_size: expected 2 arguments"),
        (["--multipliers", "1", "x"], "--multipliers: 'x' is not a number"),
        (["--warm_up", "5"], "--warm_up: '5' is not a percentage such as 5%"),
        (["--dit", "/no/such/file"], "--dit: /no/such/file: no such file or folder"),
        (["--config_file", "/no/such.toml"], "/no/such.toml: config file not found"),
        (["--seed", "100"], "--seed is --max_train_steps"),
    ],
)
def test_mistakes_on_the_command_line(dit: str, argv: list[str], words: str) -> None:
    with pytest.raises(UserError, match=words):
        parse("--dit", dit, *argv)


def test_required_options_are_named_and_may_come_from_the_file(dit: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="required and not given: --dit"):
        parse()
    assert parse(config(tmp_path, f"dit = '{dit}'"))[0].dit == Path(dit)


def test_file_or_folder(tmp_path: Path) -> None:
    @dataclass(frozen=True)
    class Paths:
        """paths"""

        file: Path | None = option(None, help="a file", path="file")
        folder: Path | None = option(None, help="a folder", path="dir")
        output: Path | None = option(None, help="made later")

    (tmp_path / "a").write_text("")
    with pytest.raises(UserError, match=r"--file: .*is a folder, a file is expected"):
        parse_options("", Paths, argv=["--file", str(tmp_path)])
    with pytest.raises(UserError, match=r"--folder: .*is a file, a folder is expected"):
        parse_options("", Paths, argv=["--folder", str(tmp_path / "a")])
    (paths,) = parse_options("", Paths, argv=["--output", str(tmp_path / "b"), "--folder", str(tmp_path)])
    assert paths == Paths(folder=tmp_path, output=tmp_path / "b")


def test_config_file_gives_options_and_the_command_line_wins(dit: str, tmp_path: Path) -> None:
    text = f"""
        learning_rate = 2
        seed = 7
        ["any heading"]
        dit = '{dit}'
        fp8 = true
        video_size = [544, 960]
        network_args = ["a=1", "b='--x y'"]
        multipliers = [-0.5, 1]
        comment = "--looks like an option"
        warm_up = "5%"
    """
    model, run = parse(config(tmp_path, text), "--learning_rate", "3", "--multipliers", "4")
    assert model.fp8 and model.dit == Path(dit)
    assert (run.learning_rate, run.seed, run.video_size, run.multipliers) == (3.0, 7, (544, 960), [4.0])
    assert run.network_args == ["a=1", "b='--x y'"]
    assert (run.comment, run.warm_up) == ("--looks like an option", 5.0)
    assert not parse("--dit", dit, config(tmp_path, "fp8 = false"))[0].fp8


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("learning_rte = 1e-4", r"unknown option 'learning_rte' \(did you mean 'learning_rate'\?\)"),
        ("seed = 1\n[other]\nseed = 2", "'seed' is given twice"),
        ("learning_rate = 'fast'", "learning_rate = 'fast': a number is expected"),
        ("learning_rate = '1e-4'", "learning_rate = '1e-4': a number is expected"),
        ("learning_rate = true", "learning_rate = True: a number is expected"),
        ("learning_rate = [1]", "one value is expected, not a list"),
        ("learning_rate = nan", "not a finite number"),
        ("max_train_steps = 5000", "--max_train_steps: 5000 is too large: the maximum is 1000"),
        ("max_train_steps = 1.5", "'1.5' is not a whole number"),
        ("fp8 = 'True'", "fp8 = 'True': true or false is expected"),
        ("fp8 = 1", "fp8 = 1: true or false is expected"),
        ("dtype = 'bf61'", "--dtype: 'bf61' is not one of"),
        ("dtype = 1979-05-27", "a text is expected"),
        ("video_size = [544]", "--video_size: expected 2 arguments"),
        ("network_args = [['a=1']]", r"network_args = \['a=1'\]: a text is expected"),
        ("multipliers = ['1']", "multipliers = '1': a number is expected"),
        ("warm_up = '5'", "'5' is not a percentage"),
        ("[run.inner]\nseed = 1", "unknown option 'inner'"),
        ("dit = '/no/such/file'", "--dit: /no/such/file: no such file"),
        ("seed = 1\nsteps\n", "not valid TOML: .*line 2"),
    ],
)
def test_mistakes_in_the_config_file(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(UserError, match=f"config.toml: .*{words}"):
        parse(config(tmp_path, text))


def test_saved_settings_are_a_config_file_without_secrets(dit: str, tmp_path: Path) -> None:
    given = parse(
        *["--dit", dit, "--fp8", "--learning_rate", "1e-5", "--token", "hf_secret", "--video_size", "544", "960"],
        *["--network_args", 'a="x\\y"', "b='ü'", "--multipliers", "--comment", 'two\nlines \x7f "\\', "--warm_up=5%"],
    )
    text = settings_toml(*given)
    assert "hf_secret" not in text and '["model"]' in text
    model, run = parse(config(tmp_path, text))
    assert (model, run) == (given[0], dataclasses.replace(given[1], token=None))


def test_help_shows_defaults_and_survives_percent_signs(dit: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        parse("--help")
    text = " ".join(capsys.readouterr().out.split())
    for words in (
        "Does 100% of it.",
        "saves 50% disk",
        "{float32,bfloat16} dtype (default: bfloat16)",
        "the DiT (required)",
    ):
        assert words in text
    assert "(default: 256 256)" in text and "(default: )" not in text and "(default: None)" not in text


def test_unused_options_are_those_that_were_changed() -> None:
    used = {"learning_rate": False, "seed": False, "multipliers": False, "max_train_steps": True}
    assert unused_options(Run(), used) == []
    assert unused_options(Run(seed=3, max_train_steps=5, multipliers=[2.0]), used) == ["seed", "multipliers"]


def test_an_option_takes_one_value_for_each_or_one_for_all() -> None:
    assert one_value_each("--scale", [0.5, 2.0], 2, "files") == [0.5, 2.0]
    assert one_value_each("--scale", [0.5], 3, "files") == [0.5, 0.5, 0.5]
    assert one_value_each("--scale", [], 2, "files") == [1.0, 1.0]
    assert one_value_each("--scale", [0.5], 0, "files") == []
    with pytest.raises(UserError, match="--scale: 3 values for 2 files; give one for each, or one for all"):
        one_value_each("--scale", [1, 2, 3], 2, "files")


def exit_of(main, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> tuple[int, str]:
    for stream in (sys.stdout, sys.stderr):
        monkeypatch.setattr(stream, "reconfigure", lambda **_: None, raising=False)
    with pytest.raises(SystemExit) as exit_:
        run_script(main)
    return exit_.value.code, capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (UserError("--seed\n  is wrong"), 2, "error: --seed is wrong\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
        (
            OSError(errno.ENOSPC, "No space left on device", "out/a.mp4"),
            2,
            "error: out/a.mp4: No space left on device\n",
        ),
        (PermissionError(errno.EACCES, "Permission denied", "out"), 2, "error: out: Permission denied\n"),
        (NotADirectoryError(errno.ENOTDIR, "Not a directory", "a/b"), 2, "error: a/b: Not a directory\n"),
        (OSError(errno.ENAMETOOLONG, "File name too long", "xxx"), 2, "error: xxx: File name too long\n"),
    ],
)
def test_script_ends_in_one_line(error, code: int, line: str, capsys, monkeypatch) -> None:
    def main() -> None:
        raise error

    assert exit_of(main, capsys, monkeypatch) == (code, line)


def test_script_ends_well(capsys, monkeypatch) -> None:
    assert exit_of(lambda: None, capsys, monkeypatch) == (0, "")


@pytest.mark.parametrize("error", [KeyError("x"), FileNotFoundError(errno.ENOENT, "not found", "x"), ValueError("x")])
def test_our_bugs_keep_their_traceback(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def main() -> None:
        raise error

    for stream in (sys.stdout, sys.stderr):
        monkeypatch.setattr(stream, "reconfigure", lambda **_: None, raising=False)
    with pytest.raises(type(error)):
        run_script(main)


def test_a_real_process_prints_any_name_and_one_line() -> None:
    code = (
        "from utils.cli import run_script; from utils.errors import UserError\n"
        "def main():\n    print('\\udce9'); raise UserError('file \\udce9: wrong')\n"
        "run_script(main)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, timeout=60)
    assert (done.returncode, done.stdout.strip(), done.stderr.strip()) == (2, rb"\udce9", rb"error: file \udce9: wrong")


def test_table_columns_are_aligned(capsys: pytest.CaptureFixture) -> None:
    print_table("title", [("a", 1), ("long", 22)], ("name", "n"))
    assert capsys.readouterr().out.splitlines() == ["", "title", "  name  n", "  ----  --", "  a     1", "  long  22"]


def test_texts_of_files_cannot_control_the_terminal(capsys: pytest.CaptureFixture, monkeypatch) -> None:
    text = "a\x1b[2Jb\rc\nd\u202ee\u2028"
    print_table(text, [(text, "x")])
    printed = capsys.readouterr().out
    assert printed == "\n" + r"a\x1b[2Jb\rc\nd\u202ee\u2028" + "\n  " + r"a\x1b[2Jb\rc\nd\u202ee\u2028" + "  x\n"
    names = "نامه\u200cها \U0001f468\u200d\U0001f469 日本語\u3000é"
    print_table(names, [])
    assert capsys.readouterr().out == f"\n{names}\n"

    def main() -> None:
        raise UserError("\x1b]0;title\x07")

    with pytest.raises(SystemExit):
        run_script(main)
    assert capsys.readouterr().err == r"error: \x1b]0;title\x07" + "\n"


@dataclass(frozen=True, kw_only=True)
class Several:
    """several values"""

    factor: list[float] = option([], help="factors")
    one: float = option(0.0, help="one number")
    fast: bool = option(False, help="be fast")


@pytest.mark.parametrize("text", ["-5e-1", "-.5", "-0.5", "-5.E-1", "-0.05e+1"])
def test_a_negative_number_is_no_option_in_any_notation(text: str) -> None:
    assert parse_options("", Several, argv=["--factor", "1", text, "--one", text]) == [
        Several(factor=[1, -0.5], one=-0.5)
    ]


def test_a_list_may_be_given_in_pieces_and_replaces_that_of_the_file(tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_text("factor = [9]\n")
    words = ["--config_file", str(tmp_path / "c.toml")]
    assert parse_options("", Several, argv=words) == [Several(factor=[9])]
    assert parse_options("", Several, argv=[*words, "--factor", "1", "2", "--factor", "3"]) == [
        Several(factor=[1, 2, 3])
    ]
    assert parse_options("", Several, argv=["--factor", "4"]) == [Several(factor=[4])]


def test_the_command_line_unsets_a_flag_of_the_file(tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_text("fast = true\n")
    words = ["--config_file", str(tmp_path / "c.toml")]
    assert parse_options("", Several, argv=words) == [Several(fast=True)]
    assert parse_options("", Several, argv=[*words, "--fast=false"]) == [Several(fast=False)]
    with pytest.raises(UserError, match="--fast"):
        parse_options("", Several, argv=["--fast=maybe"])
