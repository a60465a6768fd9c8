"""The documents tell the truth: their commands parse, their options and links exist, and both READMEs say the same."""

import ast
import csv
import importlib
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from lora_tool import COMMANDS
from modules.generation.requests import KEYS
from utils.errors import UserError

ROOT = Path(__file__).parent.parent
READMES = ("README.md", "README.ja.md")
DOCUMENTS = (
    *READMES,
    "CONTRIBUTING.md",
    "dataset/dataset_config.md",
    *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md"))),
)
# Folders in which a file may be that a document names without its folder.
ROOMS = ("hunyuan_model", "modules", "networks", "dataset", "utils", "examples")
SCRIPTS = (
    "cache_latents.py",
    "cache_text_encoder_outputs.py",
    "hv_train_network.py",
    "hv_train.py",
    "hv_generate_video.py",
    "convert_lora.py",
    "merge_lora.py",
    "lora_tool.py",
)
# What the README of the original, as of 2025-01-03, tells its users to type.
ORIGINAL_COMMANDS = (
    "python cache_latents.py --dataset_config path/to/toml "
    "--vae path/to/ckpts/hunyuan-video-t2v-720p/vae/pytorch_model.pt --vae_chunk_size 32 --vae_tiling",
    "python cache_text_encoder_outputs.py --dataset_config path/to/toml  --text_encoder1 path/to/ckpts/text_encoder "
    "--text_encoder2 path/to/ckpts/text_encoder_2 --batch_size 16",
    "accelerate launch --num_cpu_threads_per_process 1 --mixed_precision bf16 hv_train_network.py "
    "--dit path/to/ckpts/hunyuan-video-t2v-720p/transformers/mp_rank_00_model_states.pt "
    "--dataset_config path/to/toml --sdpa --mixed_precision bf16 --fp8_base "
    "--optimizer_type adamw8bit --learning_rate 1e-3 --gradient_checkpointing "
    "--max_data_loader_n_workers 2 --persistent_data_loader_workers "
    "--network_module=networks.lora --network_dim=32 --timestep_sampling sigmoid --discrete_flow_shift 1.0 "
    "--max_train_epochs 16 --save_every_n_epochs=1 --seed 42 "
    "--output_dir path/to/output_dir --output_name name-of-lora",
    "python hv_generate_video.py --fp8 --video_size 544 960 --video_length 5 --infer_steps 30 "
    '--prompt "A cat walks on the grass, realistic style."  --save_path path/to/save/dir --output_type both '
    "--dit path/to/ckpts/hunyuan-video-t2v-720p/transformers/mp_rank_00_model_states.pt --attn_mode sdpa "
    "--vae path/to/ckpts/hunyuan-video-t2v-720p/vae/pytorch_model.pt "
    "--vae_chunk_size 32 --vae_spatial_tile_sample_min_size 128 "
    "--text_encoder1 path/to/ckpts/text_encoder --text_encoder2 path/to/ckpts/text_encoder_2 "
    "--seed 1234 --lora_multiplier 1.0 --lora_weight path/to/lora.safetensors",
    "python convert_lora.py --input path/to/musubi_lora.safetensors "
    "--output path/to/another_format.safetensors --target other",
)
# The function of a script with which it is done with its options.
LAST_CHECK = {
    "hv_train_network.py": "LoraTrainerOptions.check",
    "hv_train.py": "FullTrainerOptions.check",
    "hv_generate_video.py": "parse_generation_options",
}
WRITTEN = ("--output", "--output_dir", "--output_file", "--save_path", "--save_merged_model", "--png")
FILE_SUFFIXES = (".toml", ".txt", ".pt", ".safetensors")
# Options of pip, hf and accelerate that the documents mention.
OF_OTHERS = ("--index-url", "--local-dir", "--multi_gpu", "--num_processes")


class StopHereError(Exception):
    """The script has checked its options; what it would do next needs real files."""


def read(name: str | Path) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def code_blocks(name: str) -> list[str]:
    """Fenced blocks with their language."""
    return re.findall(r"^ *(```.*?^ *```)", read(name), re.MULTILINE | re.DOTALL)


def script_commands(text: str) -> list[str]:
    """The lines that start one of our scripts, with their continuations."""
    lines = [line.strip() for line in text.replace("\\\n", " ").splitlines()]
    start = re.compile(rf"(python|accelerate launch) .*\b({'|'.join(map(re.escape, SCRIPTS))}) ")
    return [line for line in lines if start.match(line)]


def documented_commands() -> list[str]:
    documents = [text for name in DOCUMENTS for text in code_blocks(name)]
    docstrings = [ast.get_docstring(ast.parse(read(name))) for name in SCRIPTS]
    return list(dict.fromkeys(command for text in documents + docstrings for command in script_commands(text)))


def with_files(words: list[str]) -> list[str]:
    """The words, with every file and folder that they name made in the current folder."""
    # The shell replaces a pattern by the files that match; two will do.
    words = [word.replace("*", number) for word in words for number in ("000001", "000002")[: 1 + ("*" in word)]]
    option = ""
    for word in words:
        if word.startswith("--"):
            option = word.partition("=")[0]
            continue
        path = Path(word)
        is_file = path.suffix in FILE_SUFFIXES or option == "--dataset_config"
        if option in WRITTEN or not (is_file or "/" in word):
            continue
        (path.parent if is_file else path).mkdir(parents=True, exist_ok=True)
        if is_file:
            path.touch()
    return words


def parse(command: str) -> None:
    """Runs the command's script until it has checked its options.

    Raises:
        UserError: it refuses them.
    """
    words = with_files(shlex.split(command))
    at = next(index for index, word in enumerate(words) if word in SCRIPTS)
    module = importlib.import_module(words[at].removesuffix(".py"))
    owner, _, name = LAST_CHECK.get(words[at], "parse_options").rpartition(".")
    owner = getattr(module, owner) if owner else module
    check = getattr(owner, name)

    def check_and_stop(*arguments: object, **keywords: object) -> None:
        check(*arguments, **keywords)
        raise StopHereError

    with pytest.MonkeyPatch.context() as patch, pytest.raises(StopHereError):
        patch.setattr(owner, name, check_and_stop)
        patch.setattr(sys, "argv", words[at:])
        module.main()


@pytest.mark.parametrize("command", ORIGINAL_COMMANDS, ids=lambda command: command.split(".py")[0].split()[-1])
def test_commands_of_the_original_parse_unchanged(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    parse(command)


def test_every_documented_command_parses(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    commands = documented_commands()
    assert {script for script in SCRIPTS if any(script in command for command in commands)} == set(SCRIPTS)
    for command in commands:
        parse(command)


@pytest.mark.parametrize("wrong", ["--no_such_option", "--video_length 5.5", "--output_type film"])
def test_a_wrong_command_would_be_found(wrong, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError):
        parse(f"{ORIGINAL_COMMANDS[3]} {wrong}")


def run(*words: str) -> tuple[str, float]:
    """What Python prints, and how many seconds of processor time it takes (0 on Windows, which does not tell)."""
    before = os.times()
    environment = {**os.environ, "COLUMNS": "100", "PYTHONUTF8": "1"}
    done = subprocess.run(
        [sys.executable, *words], cwd=ROOT, env=environment, capture_output=True, encoding="utf-8", check=True
    )
    after = os.times()
    return done.stdout, sum(after[2:4]) - sum(before[2:4])


@pytest.fixture(scope="module")
def helps() -> dict[str, str]:
    """What each script, and each command of lora_tool.py, prints for --help."""
    texts = {script: run(script, "--help")[0] for script in SCRIPTS}
    return texts | {command: run("lora_tool.py", command, "--help")[0] for command in COMMANDS}


def test_help_is_quick():
    interpreter = run("-c", "pass")[1]
    seconds = {script: min(run(script, "--help")[1] for _ in range(3)) - interpreter for script in SCRIPTS}
    assert max(seconds.values()) <= 0.5, seconds


def test_help_shows_example_commands_with_their_line_breaks(helps):
    examples = [line for text in helps.values() for line in text.splitlines() if "ckpts/" in line]
    assert examples and max(map(len, examples)) <= 120, max(examples, key=len)


def kind_of(option: str, text: str) -> str | None:
    """How many values --help says that an option takes."""
    found = re.search(rf"^  {option}(?: (\S.*?))?(?:  .*)?$", text, re.MULTILINE)
    if found is None:
        return None
    values = found[1] or ""
    if values.startswith("["):
        return "many"
    return {0: "flag", 1: "one", 2: "two"}[len(values.split())]


def test_every_option_of_the_reference_tool_is_there(helps):
    rows = list(csv.DictReader(read("tests/data/options.tsv").splitlines(), delimiter="\t"))
    differing = {
        (row["script"], row["option"], row["kind"]): found
        for row in rows
        if (found := kind_of(row["option"], helps[row["script"]])) != row["kind"]
    }
    assert differing == {}
    assert len(rows) == 294


@pytest.mark.parametrize("name", DOCUMENTS)
def test_options_in_documents_exist(name, helps):
    known = {*re.findall(r"--[a-z_0-9]+", "".join(helps.values())), *(f"--{key}" for key in KEYS), *OF_OTHERS}
    assert set(re.findall(r"--[a-z][a-z_0-9-]+", read(name))) <= known


def headings(name: str | Path) -> list[tuple[int, str]]:
    text = re.sub(r"^ *```.*?^ *```", "", read(name), flags=re.MULTILINE | re.DOTALL)
    return [(len(marks), title) for marks, title in re.findall(r"^(#+) (.*)$", text, re.MULTILINE)]


def links(name: str) -> list[str]:
    return re.findall(r"\]\(([^)]+)\)", read(name))


def anchor(title: str) -> str:
    """The name that GitHub gives to a heading."""
    return re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-")


def test_both_readmes_say_the_same():
    english, japanese = READMES
    assert [level for level, _ in headings(english)] == [level for level, _ in headings(japanese)]
    assert code_blocks(english) == code_blocks(japanese)
    outside = [[link for link in links(name) if not link.startswith("#")] for name in READMES]
    assert sorted(outside[0]) == sorted(outside[1])
    tables = [[line.count("|") for line in read(name).splitlines() if line.startswith("|")] for name in READMES]
    assert tables[0] == tables[1]


@pytest.mark.parametrize("name", DOCUMENTS)
def test_links_lead_somewhere(name):
    for link in links(name):
        if "://" in link:
            continue
        path, _, place = link.partition("#")
        target = (ROOT / name).parent / path if path else ROOT / name
        assert target.exists(), link
        if place:
            assert place in {anchor(title) for _, title in headings(target)}, link


@pytest.mark.parametrize("name", READMES)
def test_the_two_commands_stand_at_the_top(name):
    top = read(name).splitlines()[:20]
    assert "python quickstart.py" in top
    assert "python quickstart.py test" in top


@pytest.mark.parametrize("name", ("CONTRIBUTING.md", "docs/design.md"))
def test_files_named_in_documents_exist(name):
    named = re.findall(r"`((?:[\w.]+/)+[\w.]*|\w+\.(?:py|md|txt|toml))`", read(name))
    assert named
    below = [folder for room in ROOMS for folder in (ROOT / room).rglob("*") if folder.is_dir()]
    folders = [ROOT, *(ROOT / room for room in ROOMS), *below]
    missing = [path for path in named if not any((folder / path).exists() for folder in folders)]
    assert missing == []
