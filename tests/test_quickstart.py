"""The quick start: what it keeps and what it makes anew, how it ends, and that its commands are those of the proof."""

import ast
import errno
import importlib
import re
import shlex
import sys
import venv
from array import array
from pathlib import Path

import pytest

import quickstart
from examples.shapes import proof, sheet
from quickstart import Stage, check_conversion, found, run_stages, stages
from tests.test_readme import SCRIPTS, StopHereError, parse

OF_SCRIPTS = [stage for stage in stages() if set(stage.command) & set(SCRIPTS)]
OF_MODULES = {"examples.shapes.proof": (proof, "write_clips"), "examples.shapes.sheet": (sheet, "read_clips")}


def options_of(words: list) -> dict[str, list[str]]:
    """Options with their values."""
    options: dict[str, list[str]] = {}
    for word in map(str, words):
        if word.startswith("--"):
            values = options.setdefault(word, [])
        elif options:
            values.append(word)
    return options


def command_of(script: str) -> list:
    """The words behind a script's name in the first stage that runs it."""
    command = next(stage.command for stage in stages() if script in stage.command)
    return command[command.index(script) + 1 :]


@pytest.mark.parametrize(
    ("script", "words"), [("hv_train_network.py", proof.TRAINING), ("hv_generate_video.py", proof.SAMPLING)]
)
def test_the_settings_are_those_of_the_proof(script, words):
    expected, here = options_of(words.split()), options_of(command_of(script))
    expected.pop("--output_type", None)  # the quick start keeps latents too, to compare them
    assert {option: here.get(option) for option in expected} == expected


@pytest.mark.parametrize("stage", OF_SCRIPTS, ids=lambda stage: stage.name.strip())
def test_every_script_takes_its_command(stage, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    parse(stage.shown)


def test_the_modules_of_the_shapes_world_take_their_commands(monkeypatch):
    def stop(*arguments):
        raise StopHereError

    others = [stage for stage in stages() if stage.command[1] == "-m"]
    assert {stage.command[2] for stage in others} == set(OF_MODULES)
    assert len(others) + len(OF_SCRIPTS) == len(stages())
    for stage in others:
        module, worker = OF_MODULES[stage.command[2]]
        monkeypatch.setattr(module, worker, stop)
        monkeypatch.setattr(sys, "argv", list(map(str, stage.command[2:])))
        with pytest.raises(StopHereError):
            module.main()


def test_accelerate_takes_its_options():
    launcher = importlib.import_module("accelerate.commands.launch").launch_command_parser()
    (words,) = (shlex.split(stage.shown)[2:] for stage in stages() if stage.command[0] == "accelerate")
    assert launcher.parse_args(words).training_script == "hv_train_network.py"


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """Three stages in an empty project."""
    monkeypatch.setattr(quickstart, "ROOT", tmp_path)
    (tmp_path / quickstart.MODELS).mkdir(parents=True)
    (tmp_path / quickstart.MODELS / "dit").write_text("old")
    fake = FakeStages(
        [Stage(name, ["python", name], quickstart.OUTPUT, (f"{name}_[0-9]", f"{name}_more")) for name in "abc"]
    )
    monkeypatch.setattr(quickstart, "run", fake.run_one)
    return fake


class FakeStages:
    """Stages that leave two files each."""

    def __init__(self, stages: list[Stage]):
        self.stages, self.run, self.stops_in = stages, "", ""

    def run_one(self, command: list) -> None:
        name, folder = command[1], quickstart.ROOT / quickstart.OUTPUT
        self.run += name[0]
        folder.mkdir(exist_ok=True)
        (folder / f"{name[0]}_{len(self.run)}").touch()
        (folder / f"{name[0]}_more").touch()
        if name == self.stops_in:
            raise KeyboardInterrupt

    def run_stages(self) -> str:
        """The stages that ran."""
        self.run = ""
        try:
            run_stages(self.stages)
        except KeyboardInterrupt:
            self.run += "!"
        return self.run


def test_what_is_finished_is_kept(fake):
    assert [fake.run_stages(), fake.run_stages()] == ["abc", ""]


def test_a_stage_that_was_interrupted_begins_anew(fake):
    fake.stops_in = "b"
    assert fake.run_stages() == "ab!"
    fake.stops_in = ""
    assert fake.run_stages() == "bc"
    assert [path.name for path in found(quickstart.OUTPUT, "b_*")] == ["b_1", "b_more"]
    assert fake.run_stages() == ""


def test_a_repeated_stage_that_was_interrupted_begins_anew(fake):
    fake.run_stages()
    (quickstart.ROOT / quickstart.OUTPUT / "b_more").unlink()
    fake.stops_in = "b"
    assert fake.run_stages() == "b!"
    fake.stops_in = ""
    assert fake.run_stages() == "bc"


def test_another_command_repeats_its_stage_and_what_follows(fake):
    fake.run_stages()
    fake.stages[1].command.append("--other")
    assert [fake.run_stages(), fake.run_stages()] == ["bc", ""]


def test_other_models_repeat_everything(fake):
    fake.run_stages()
    (quickstart.ROOT / quickstart.MODELS / "dit").write_text("new")
    assert [fake.run_stages(), fake.run_stages()] == ["abc", ""]


def test_a_deleted_product_is_made_again(fake):
    fake.run_stages()
    (quickstart.ROOT / quickstart.OUTPUT / "b_more").unlink()
    assert fake.run_stages() == "bc"


@pytest.fixture
def saved_videos(tmp_path, monkeypatch):
    """Writes latents of a video with the LoRA and of one with the converted LoRA."""

    def save(*videos: list[float]) -> None:
        for name, numbers in zip(quickstart.VIDEOS[1:], videos, strict=True):
            folder = tmp_path / quickstart.OUTPUT / "videos" / name
            folder.mkdir(parents=True)
            content = (2).to_bytes(8, "little") + b"{}" + array("f", numbers).tobytes()
            (folder / "0_latent.safetensors").write_bytes(content)

    monkeypatch.setattr(quickstart, "ROOT", tmp_path)
    return save


def test_the_same_video_is_said_to_be_the_same(saved_videos, capsys):
    saved_videos([1.0, -2.0], [1.0, -2.0001])
    check_conversion()
    assert "makes the same video: latents differ by 0.0001 at most" in capsys.readouterr().out


@pytest.mark.parametrize("number", [-1.99, float("nan")])
def test_another_video_is_an_error(saved_videos, capsys, number):
    saved_videos([1.0, -2.0], [1.0, number])
    with pytest.raises(SystemExit, match=r"^1$"):
        check_conversion()
    said = f"error: .* makes another video: latents differ by {abs(number + 2):.2g} at most, above 0.001\n"
    assert re.fullmatch(said, capsys.readouterr().err)


@pytest.fixture
def installing(tmp_path, monkeypatch):
    """Runs install() in an empty project without pip's work; returns how the environment was made."""
    made = []
    for name in quickstart.REQUIREMENTS:
        (tmp_path / name).write_text("")
    monkeypatch.setattr(quickstart, "ROOT", tmp_path)
    monkeypatch.setattr(quickstart, "VENV", tmp_path / ".venv")
    monkeypatch.setattr(quickstart, "run", lambda command: None)

    def make(folder: Path, **options: bool) -> None:
        made.append(options)
        folder.mkdir(exist_ok=True)

    def install() -> list[dict]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(quickstart.venv, "create", make)
            quickstart.install()
        return made

    return install


def test_an_environment_without_pip_is_made_anew(installing, tmp_path):
    venv.create(tmp_path / ".venv", with_pip=False)
    assert installing() == [{"clear": True, "with_pip": True}]
    assert len(installing()) == 1


def test_an_environment_of_a_folder_that_was_moved_is_made_anew(installing, tmp_path, monkeypatch):
    venv.create(tmp_path / ".venv", with_pip=True)
    assert installing() == []
    moved = tmp_path.rename(tmp_path.with_name("moved here"))
    monkeypatch.setattr(quickstart, "ROOT", moved)
    monkeypatch.setattr(quickstart, "VENV", moved / ".venv")
    assert installing() == [{"clear": True, "with_pip": True}]


def test_a_python_without_ensurepip_ends_in_one_line(installing, monkeypatch, capsys):
    def cannot(*arguments, **options):
        raise quickstart.subprocess.CalledProcessError(1, "ensurepip")

    monkeypatch.setattr(quickstart.venv, "create", cannot)
    with pytest.raises(SystemExit, match=r"^1$"):
        quickstart.make_environment()
    assert "apt install python3-venv" in capsys.readouterr().err


@pytest.mark.parametrize(("end", "code"), [("sys.exit(3)", 3), ("os.kill(os.getpid(), 9)", 137)])
def test_a_failing_command_ends_with_its_exit_code(end, code):
    with pytest.raises(SystemExit) as ended:
        quickstart.run([sys.executable, "-c", f"import os, sys; {end}"])
    assert ended.value.code == (code if sys.platform != "win32" or code == 3 else 9)


def test_control_c_ends_in_one_line(tmp_path, monkeypatch, capsys):
    def interrupted():
        raise KeyboardInterrupt

    monkeypatch.setattr(quickstart, "ROOT", tmp_path)
    monkeypatch.setattr(quickstart, "install", interrupted)
    monkeypatch.setattr(sys, "argv", ["quickstart.py"])
    with pytest.raises(SystemExit, match=r"^130$"):
        quickstart.main()
    assert capsys.readouterr().err.startswith("error: interrupted; run again")


def test_a_full_disk_ends_in_one_line(tmp_path, monkeypatch, capsys):
    def cannot():
        raise OSError(errno.ENOSPC, "No space left on device", "finished.sha256")

    monkeypatch.setattr(quickstart, "ROOT", tmp_path)
    monkeypatch.setattr(quickstart, "install", cannot)
    monkeypatch.setattr(sys, "argv", ["quickstart.py"])
    with pytest.raises(SystemExit, match=r"^2$"):
        quickstart.main()
    assert capsys.readouterr().err == "error: finished.sha256: No space left on device\n"


def test_two_at_once_do_not_disturb_each_other(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(quickstart, "ROOT", tmp_path)
    with quickstart.lock(), pytest.raises(SystemExit, match=r"^2$"):
        quickstart.lock()
    assert "another quickstart.py is running in this folder" in capsys.readouterr().err
    quickstart.lock().close()


def test_an_older_python_is_told_which_one_is_needed(monkeypatch, capsys):
    monkeypatch.setattr(sys, "version_info", (3, 8, 0))
    monkeypatch.setattr(sys, "argv", ["quickstart.py"])
    with pytest.raises(SystemExit, match=r"^2$"):
        quickstart.main()
    assert "Python 3.11 or newer is needed" in capsys.readouterr().err


def test_an_older_python_reads_the_file():
    tree = ast.parse(Path(quickstart.__file__).read_text(encoding="utf-8"), feature_version=(3, 8))
    futures = [node for node in tree.body if isinstance(node, ast.ImportFrom) and node.module == "__future__"]
    assert [name.name for node in futures for name in node.names] == ["annotations"]
