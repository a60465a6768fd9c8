"""cache_text_encoder_outputs.py on real files and the small models."""

import json
import re
import subprocess
import sys
import time
import weakref
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import cache_text_encoder_outputs as script
from dataset.config_utils import load_dataset_config
from dataset.image_video_dataset import TrainingDataset
from dataset.scan import scan_datasets
from hunyuan_model import checkpoints
from modules.caching import text
from utils.errors import UserError
from utils.safetensors_utils import load_file, read_header

ROOT = Path(__file__).parents[2]
CAPTIONS = {
    "cat": "a cat walks on the grass",
    "ball 1": "a red ball moves from the left to the right",
    "海 #[x]": "  the camera pans slowly over the sea at night\n",
}


@pytest.fixture
def dataset(tmp_path) -> Path:
    """A dataset config of three captioned images; caches go to tmp_path/cache."""
    for name, caption in CAPTIONS.items():
        add_image(tmp_path, name, caption)
    config = tmp_path / "dataset.toml"
    config.write_text(
        "[general]\nresolution = [64, 64]\nbatch_size = 2\n\n[[datasets]]\n"
        f"image_directory = '{tmp_path / 'images'}'\ncache_directory = '{tmp_path / 'cache'}'\n",
        encoding="utf-8",
    )
    return config


def add_image(folder: Path, name: str, caption: str | None) -> None:
    (folder / "images").mkdir(exist_ok=True)
    Image.new("RGB", (80, 64), "red").save(folder / "images" / f"{name}.png")
    if caption is not None:
        (folder / "images" / f"{name}.txt").write_text(caption, encoding="utf-8")


def arguments(dataset: Path, models, *more: object) -> list[str]:
    return [
        *("--dataset_config", str(dataset), "--device", "cpu"),
        *("--text_encoder1", str(models.text_encoder1), "--text_encoder2", str(models.text_encoder2)),
        *map(str, more),
    ]


@pytest.fixture
def run(dataset, tiny_models, monkeypatch, capsys):
    """Runs the script's main in this process; returns the numbers of the table by column."""

    def run_main(*more: object) -> dict[str, str]:
        monkeypatch.setattr(sys, "argv", ["cache_text_encoder_outputs.py", *arguments(dataset, tiny_models, *more)])
        capsys.readouterr()
        script.main()
        run_main.output = capsys.readouterr()
        return outcome(run_main.output.out, dataset)

    return run_main


def outcome(printed: str, dataset: Path) -> dict[str, str]:
    """The row of the last table, by column."""
    _, header, _, row = printed.strip().split("Text encoder outputs")[1].split("\n")
    columns, values = header.split(), row.strip().removeprefix(str(dataset.parent / "cache")).split(maxsplit=6)
    return dict(zip(columns[2:8], values, strict=False)) | {"because": "".join(values[6:])}


@pytest.fixture
def loads(monkeypatch) -> list[str]:
    """The names of the text encoders that are loaded during the test."""
    loaded = []

    def noting(name: str, load):
        def noted(*arguments):
            loaded.append(name)
            return load(*arguments)

        return noted

    for name in ("load_text_encoder_1", "load_text_encoder_2"):
        monkeypatch.setattr(text, name, noting(name, getattr(checkpoints, name)))
    return loaded


def caches(dataset: Path) -> dict[str, Path]:
    found = (dataset.parent / "cache").glob("*_hv_te.safetensors")
    return {path.name.removesuffix("_hv_te.safetensors"): path for path in found}


def counts(result: dict[str, str]) -> tuple[int, ...]:
    return tuple(int(result[word]) for word in ("new", "changed", "kept", "orphaned"))


def test_the_script_writes_exactly_the_documented_files(dataset, tiny_models):
    command = [sys.executable, "cache_text_encoder_outputs.py", *arguments(dataset, tiny_models, "--batch_size", "16")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    assert "Text encoder outputs" in done.stdout and "caption/s" in done.stderr

    files = {f"{name}_hv_te.safetensors" for name in CAPTIONS}
    assert {path.name for path in (dataset.parent / "cache").iterdir()} == files | {"hv_text.manifest.json"}
    llm = checkpoints.load_text_encoder_1(tiny_models.text_encoder1, dtype=torch.float32)
    clip = checkpoints.load_text_encoder_2(tiny_models.text_encoder2, dtype=torch.float32)
    for name, path in caches(dataset).items():
        caption = CAPTIONS[name].strip()
        infos, metadata = read_header(path)
        assert {key: (info.dtype, info.shape) for key, info in infos.items()} == {
            "llm_float16": (torch.float16, (256, 64)),
            "llm_mask": (torch.int64, (256,)),
            "clipL_float16": (torch.float16, (128,)),
            "clipL_mask": (torch.int64, (77,)),
        }
        assert set(metadata) == {"architecture", "caption1", "format_version", "made_from"}
        assert (metadata["architecture"], metadata["format_version"]) == ("hunyuan_video", "1.0.1")
        assert metadata["caption1"] == caption
        tensors = load_file(path)
        states, mask = llm.encode([caption])
        torch.testing.assert_close(tensors["llm_float16"].float(), states[0], rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(tensors["clipL_float16"].float(), clip.encode([caption])[0], rtol=1e-3, atol=1e-3)
        assert torch.equal(tensors["llm_mask"], mask[0])
        assert tensors["clipL_mask"].sum() == clip.tokenizer([caption])[1].sum()


def test_a_second_run_loads_no_model_and_an_edited_caption_is_encoded_alone(dataset, run, loads):
    assert counts(run()) == (3, 0, 0, 0)
    assert loads == ["load_text_encoder_2", "load_text_encoder_1"]
    loads.clear()
    before = {name: path.stat().st_mtime_ns for name, path in caches(dataset).items()}
    assert counts(run()) == (0, 0, 3, 0)
    assert loads == []

    (dataset.parent / "images" / "cat.txt").write_text("a yellow triangle", encoding="utf-8")
    result = run()
    assert counts(result) == (0, 1, 2, 0) and result["because"] == "caption (1)"
    after = {name: path.stat().st_mtime_ns for name, path in caches(dataset).items()}
    assert {name for name in after if after[name] != before[name]} == {"cat"}
    assert read_header(caches(dataset)["cat"])[1]["caption1"] == "a yellow triangle"


def test_one_text_encoder_is_in_memory_at_a_time(run, monkeypatch):
    alive = []
    load_1, load_2 = checkpoints.load_text_encoder_1, checkpoints.load_text_encoder_2

    def load_clip(*arguments):
        clip = load_2(*arguments)
        alive.append(weakref.ref(clip.model))
        return clip

    def load_llm(*arguments):
        assert alive[0]() is None
        return load_1(*arguments)

    monkeypatch.setattr(text, "load_text_encoder_2", load_clip)
    monkeypatch.setattr(text, "load_text_encoder_1", load_llm)
    run()
    assert alive


def test_options_that_change_the_embeddings_are_noticed(dataset, run):
    run()
    plain = load_file(caches(dataset)["cat"])["llm_float16"].float()
    result = run("--fp8_llm")
    assert counts(result) == (0, 3, 0, 0) and result["because"] == "fp8_llm (3)"
    rounded = load_file(caches(dataset)["cat"])["llm_float16"].float()
    assert 0 < (plain - rounded).norm() / plain.norm() < 0.15
    result = run("--fp8_llm", "--text_encoder_dtype", "bf16")
    assert result["because"] == "dtype (3)"
    assert {"llm_bfloat16", "clipL_bfloat16"} < set(read_header(caches(dataset)["cat"])[0])


def test_damaged_files_are_made_again_equal(dataset, run):
    run()
    sound = {name: load_file(path) for name, path in caches(dataset).items()}
    cat, ball, sea = (caches(dataset)[name] for name in CAPTIONS)
    cat.write_bytes(cat.read_bytes()[:-100])
    ball.write_bytes(b"")
    tensors = load_file(sea)
    save_file({**tensors, "clipL_float16": tensors["clipL_float16"] * float("nan")}, sea, read_header(sea)[1])
    result = run()
    assert counts(result) == (0, 3, 0, 0) and result["because"] == "the cache file is damaged (3)"
    for name, path in caches(dataset).items():
        assert all(torch.equal(tensor, sound[name][key]) for key, tensor in load_file(path).items())


def test_only_prune_deletes(dataset, run):
    run()
    (dataset.parent / "images" / "cat.png").unlink()
    foreign = dataset.parent / "cache" / "notes.txt"
    foreign.write_text("mine")
    assert counts(run("--keep_cache")) == (0, 0, 2, 1)
    assert "cat" in caches(dataset)
    run("--prune")
    assert set(caches(dataset)) == {"ball 1", "海 #[x]"} and foreign.exists()


def refusal(dataset: Path) -> str:
    """Why the trainer refuses the dataset, whose latents are not cached."""
    for taken in scan_datasets(load_dataset_config(dataset)):
        taken.manifest.save()
    with pytest.raises(UserError, match="not cached") as caught:
        TrainingDataset(load_dataset_config(dataset), seed=0)
    return str(caught.value)


def test_skip_existing_trusts_the_name(dataset, run, loads):
    run()
    loads.clear()
    (dataset.parent / "images" / "cat.txt").write_text("something else", encoding="utf-8")
    assert counts(run("--skip_existing")) == (0, 0, 3, 0)
    assert loads == []
    assert "caption" not in refusal(dataset)
    (dataset.parent / "images" / "cat.txt").write_text("something else again", encoding="utf-8")
    assert "caches cannot be used (caption: cat)" in refusal(dataset)


def test_caches_of_musubi_are_used(dataset, run, loads):
    run()
    for path in caches(dataset).values():
        tensors, (_, metadata) = load_file(path), read_header(path)
        save_file(tensors, path, {key: value for key, value in metadata.items() if key != "made_from"})
    loads.clear()
    assert counts(run()) == (0, 0, 3, 0) and loads == []
    assert "made by musubi-tuner" in run.output.out


def test_long_captions_are_reported_in_this_run_and_the_next(dataset, run):
    add_image(dataset.parent, "long", "grass " * 300)
    run()
    for _ in range(2):
        assert "1 captions exceed 256 tokens" in run.output.err
        assert f"{dataset.parent / 'images' / 'long.png'}: grass grass" in run.output.err
        run()


def test_a_missing_caption_is_skipped_or_with_strict_stops(dataset, run, loads):
    add_image(dataset.parent, "silent", None)
    with pytest.raises(UserError, match=r"silent\.txt.*--strict"):
        run("--strict")
    assert loads == []
    result = run()
    assert counts(result) == (3, 0, 0, 0) and result["skipped"] == "1"
    assert "silent.txt" in run.output.err


def test_processes_share_the_captions(dataset, run, monkeypatch, tiny_models):
    """Each caption is written by one process, also when one is done before the other begins."""
    monkeypatch.setattr(sys, "argv", ["cache_text_encoder_outputs.py", *arguments(dataset, tiny_models)])
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    script.main()
    first = {name: path.stat().st_mtime_ns for name, path in caches(dataset).items()}
    assert len(first) == 1
    monkeypatch.setenv("RANK", "0")
    script.main()
    both = {name: path.stat().st_mtime_ns for name, path in caches(dataset).items()}
    assert set(both) == set(CAPTIONS) and first.items() < both.items()


def test_written_caches_are_not_read_again_however_the_last_run_ended(dataset, run, monkeypatch):
    write = text.encode_llm_and_write

    def write_and_end(*arguments):
        write(*arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(text, "encode_llm_and_write", write_and_end)
        patch.setenv("WORLD_SIZE", "2")
        for rank in ("1", "0"):
            patch.setenv("RANK", rank)
            with pytest.raises(KeyboardInterrupt):
                run()
    monkeypatch.setattr("dataset.manifest.load_file", lambda path: pytest.fail(f"{path.name} was read whole"))
    assert counts(run()) == (0, 0, 3, 0)
    assert list((dataset.parent / "cache").glob("*-sound-*")) == []


def test_a_process_reads_only_its_own_caches_but_process_0_reads_all(dataset, run, monkeypatch):
    run()
    (dataset.parent / "cache" / "hv_text.manifest.json").unlink()
    read = []
    monkeypatch.setattr("dataset.manifest.load_file", lambda path: read.append(path.name) or load_file(path))
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--skip_existing"])
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, number in (("1", 1), ("0", 2), ("1", 0)):
        monkeypatch.setenv("RANK", rank)
        read.clear()
        script.main()
        assert len(read) == number


def test_what_a_killed_run_left_is_removed(dataset, run):
    (dataset.parent / "cache").mkdir(exist_ok=True)
    for name in ("cat_hv_te.safetensors.4194305.partial", "other.partial"):  # Linux gives no process this number
        (dataset.parent / "cache" / name).write_text("half")
    run()
    assert {path.name for path in (dataset.parent / "cache").glob("*.partial")} == {"other.partial"}


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError()], ids=repr)
def test_out_of_memory_is_one_line(run, monkeypatch, error):
    def fail(*arguments):
        raise error

    monkeypatch.setattr(text, "load_text_encoder_1", fail)
    with pytest.raises(UserError, match="--fp8_llm"):
        run()


def test_values_beyond_the_dtype_are_one_line_and_write_nothing(dataset, run, monkeypatch):
    load = checkpoints.load_text_encoder_1

    def too_large(*arguments):
        llm = load(*arguments)
        encode = llm.encode
        monkeypatch.setattr(llm, "encode", lambda prompts: (encode(prompts)[0] * 1e6, encode(prompts)[1]))
        return llm

    monkeypatch.setattr(text, "load_text_encoder_1", too_large)
    with pytest.raises(UserError, match="--text_encoder_dtype bfloat16"):
        run()
    assert caches(dataset) == {}


def test_batches_do_not_change_results(dataset, run):
    run("--batch_size", 1)
    single = {name: load_file(path) for name, path in caches(dataset).items()}
    for path in caches(dataset).values():
        path.unlink()
    run()
    for name, path in caches(dataset).items():
        for key, tensor in load_file(path).items():
            torch.testing.assert_close(tensor, single[name][key], rtol=2e-3, atol=2e-3)


def test_swapped_encoders_are_refused_before_anything_is_loaded(dataset, run, tiny_models, loads):
    with pytest.raises(UserError, match=str(tiny_models.text_encoder2)):
        run("--text_encoder1", tiny_models.text_encoder2)
    assert loads == [] and not (dataset.parent / "cache").exists()


def test_no_usable_caption_says_why(dataset, run):
    for path in (dataset.parent / "images").glob("*.txt"):
        path.unlink()
    with pytest.raises(UserError, match="caption not found"):
        run()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "--dataset_config"),
        (["--dataset_config", "missing.toml"], "missing.toml: no such file"),
        (["--dataset_config", "{}", "--text_encoder2", "."], "--text_encoder1"),
        (
            ["--dataset_config", "{}", "--text_encoder1", ".", "--text_encoder2", ".", "--batchsize", "2"],
            "--batch_size",
        ),
        (["--dataset_config", "{}", "--batch_size", "0"], "minimum is 1"),
        (["--dataset_config", "{}", "--prune", "--keep_cache"], "--keep_cache"),
    ],
)
def test_mistakes_end_in_one_line_and_exit_2(dataset, options, message):
    command = [sys.executable, "cache_text_encoder_outputs.py", *(option.format(dataset) for option in options)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert message in done.stderr and done.stderr.count("\n") == 1


def test_help_names_every_option_and_imports_nothing_heavy():
    probe = (
        "import runpy, sys; sys.argv = ['script', '--help']\n"
        "try: runpy.run_path('cache_text_encoder_outputs.py', run_name='__main__')\n"
        "finally: assert not {'torch', 'transformers', 'pydantic', 'numpy', 'safetensors'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", probe], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    options = {word for word in done.stdout.split() if word.startswith("--")}
    reference = ["dataset_config", "device", "batch_size", "num_workers", "skip_existing", "keep_cache"]
    reference += ["text_encoder1", "text_encoder2", "text_encoder_dtype", "fp8_llm"]
    assert {f"--{name}" for name in reference} <= options


def test_the_manifest_holds_no_absolute_path(dataset, run):
    """So that the cache directory can be copied to another machine."""
    run()
    text = (dataset.parent / "cache" / "hv_text.manifest.json").read_text(encoding="utf-8")
    assert str(dataset.parent) not in text and set(json.loads(text)["sound"]) == {
        p.name for p in caches(dataset).values()
    }


@pytest.mark.slow
def test_killed_runs_go_on_to_the_same_caches(dataset, run, tiny_models):
    for number in range(40):
        add_image(dataset.parent, f"more {number}", f"a cat walks on the grass, number {number}")
    run()
    undisturbed = {name: load_file(path) for name, path in caches(dataset).items()}
    for path in (dataset.parent / "cache").iterdir():
        path.unlink()

    command = [sys.executable, "cache_text_encoder_outputs.py", *arguments(dataset, tiny_models)]
    for enough in (1, 15, 30):
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while len(caches(dataset)) < enough and process.poll() is None:
            time.sleep(0.002)
        process.kill()
        process.wait()
        assert enough <= len(caches(dataset))
    (dataset.parent / "cache" / "cat_hv_te.safetensors.4194305.partial").write_bytes(b"half")
    before = len(caches(dataset))
    last = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert counts(outcome(last.stdout, dataset)) == (43 - before, 0, before, 0)
    assert not list((dataset.parent / "cache").glob("*.partial"))
    for name, path in caches(dataset).items():
        assert all(torch.equal(tensor, undisturbed[name][key]) for key, tensor in load_file(path).items())


def test_a_dry_run_says_what_there_is_and_what_it_needs(run, dataset):
    assert run("--dry_run")["new"] == "3"
    assert re.search(r"memory plan, batch of 2\n.*\n +GPU memory of text encoder 1 +[\d.]+ [MG]iB", run.output.out)
    assert not (dataset.parent / "cache").exists()
    run()
    assert run("--dry_run")["kept"] == "3"


def test_vram_gb_takes_fp8_where_the_llm_does_not_fit_without(run, dataset, monkeypatch):
    counted = []

    def measure(path: Path, dtype: torch.dtype, fp8: bool, captions: int) -> int:
        counted.append(captions)
        return (14 - 7 * fp8) << 30

    monkeypatch.setattr("modules.memory.text_encoder.measure_text_encoder_1", measure)
    run("--vram_gb", 24)
    (path,) = (dataset.parent / "cache").glob("cat*.safetensors")
    plain = path.read_bytes()
    assert run("--vram_gb", 12, "--batch_size", 1)["kept"] == "3", "what was chosen before is as good"
    path.unlink()
    run("--vram_gb", 12)
    assert path.read_bytes() != plain and set(counted) == {2, 1}
    rounded = path.read_bytes()
    path.unlink()
    run("--fp8_llm")
    assert path.read_bytes() == rounded
