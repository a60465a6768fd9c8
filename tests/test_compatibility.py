"""What commit e813d33 wrote is taken by today's scripts and gives the same: caches, states, settings, LoRAs, videos.

`tests/data/e813d33` holds small models, media, what was made of them, and the command lines (commands.json). Bit by
bit on a machine like the one that wrote it (machine.json); elsewhere sums are rounded in another order.
"""

import hashlib
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from safetensors import safe_open

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT / "tests" / "data" / "e813d33"
COMMANDS = json.loads((DATA / "commands.json").read_text(encoding="utf-8"))
MEDIA = ("images", "clips")
TIMES = ("ss_session_id", "ss_training_started_at", "ss_training_finished_at", "modelspec.date")
HASHES = ("sshs_model_hash", "sshs_legacy_hash")


def this_machine() -> dict[str, str]:
    """What decides how sums are rounded."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    capability = torch.backends.cpu.get_cpu_capability()
    return {"torch": torch.__version__, "cpu": names[0] if names else platform.processor(), "capability": capability}


EXACT = this_machine() == json.loads((DATA / "machine.json").read_text(encoding="utf-8"))


@pytest.fixture
def old(tmp_path) -> Path:
    """A copy of the data, in which the scripts run as they did then."""
    return Path(shutil.copytree(DATA, tmp_path / "old"))


def run(folder: Path, name: str) -> None:
    """One of the old command lines, with today's script."""
    script, *words = shlex.split(COMMANDS[name])
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, str(ROOT / script), *words],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        encoding="utf-8",
    )
    assert result.returncode == 0, result.stderr


def only(folder: Path, pattern: str, but: frozenset[str] = frozenset()) -> Path:
    """The one file that fits the pattern and has none of the names."""
    (path,) = (path for path in folder.glob(pattern) if path.name not in but)
    return path


def read(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file, without times and, on another machine, without hashes."""
    left_out = TIMES if EXACT else (*TIMES, *HASHES)
    with safe_open(path, "pt") as file:
        metadata = {name: text for name, text in (file.metadata() or {}).items() if name not in left_out}
        return {name: file.get_tensor(name) for name in file.keys()}, metadata  # noqa: SIM118 - no dict


def assert_close(found: object, stored: object, atol: float = 1e-2) -> None:
    """Bit by bit where that can be; numbers, or tensors and numbers in lists and dicts."""
    torch.testing.assert_close(found, stored, rtol=0 if EXACT else 1e-2, atol=0 if EXACT else atol, equal_nan=False)


def assert_same_file(found: Path, stored: Path) -> None:
    (tensors, metadata), (stored_tensors, stored_metadata) = read(found), read(stored)
    assert_close(tensors, stored_tensors)
    if not EXACT:  # measured losses
        for texts in (metadata, stored_metadata):
            for name in [name for name in texts if name.startswith("ss_validation")]:
                del texts[name]
    # The metadata of then held the paths of folders; only names are written now.
    for texts in (metadata, stored_metadata):
        if "ss_datasets" in texts:
            texts["ss_datasets"] = re.sub(r'(_directory": ")[^"]*/', r"\1", texts["ss_datasets"])
    assert metadata == stored_metadata


def log_of(path: Path, after: int = -1) -> list[dict]:
    """The lines of a training log after a step."""
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [line for line in lines if line["step"] > after]


def assert_same_log(found: list[dict], stored: list[dict]) -> None:
    assert found and len(found) == len(stored)
    for line, other in zip(found, stored, strict=True):
        texts = [{name: value for name, value in each.items() if isinstance(value, str)} for each in (line, other)]
        assert texts[0] == texts[1] and line.keys() == other.keys()
        assert_close(*({name: each[name] for name in each if name not in texts[0]} for each in (line, other)))


def settings_of(path: Path) -> dict[str, object]:
    """The options of a settings file; its sections are only headings."""
    tables = tomllib.loads(path.read_text(encoding="utf-8")).values()
    return {name: value for table in tables for name, value in table.items()}


def video(path: Path) -> tuple[np.ndarray, dict]:
    """Frames (F, H, W, 3) and the settings inside."""
    with av.open(str(path)) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        return np.stack(frames), json.loads(container.metadata["comment"])


def assert_same_frames(found: Path, stored: Path) -> None:
    pixels, stored_pixels = video(found)[0].astype(int), video(stored)[0].astype(int)
    assert pixels.shape == stored_pixels.shape
    assert abs(pixels - stored_pixels).mean() <= (0 if EXACT else 4)


def as_they_were(folder: Path) -> None:
    """Gives the media the modification times that the manifests know: git keeps none."""
    for kind in MEDIA:
        manifest = json.loads((folder / "cache" / kind / "hv_latents.manifest.json").read_text(encoding="utf-8"))
        for name, source in manifest["sources"].items():
            media = next(path for path in (folder / kind).glob(f"{name}.*") if path.suffix != ".txt")
            os.utime(media, ns=(source["stamp"][1],) * 2)


def as_copied(folder: Path) -> None:
    """Gives the media other times: they are known by what is in them."""
    for path in (path for kind in MEDIA for path in (folder / kind).iterdir()):
        os.utime(path, ns=(1_600_000_000 * 10**9,) * 2)


@pytest.mark.parametrize(
    ("name", "prepare"), [("latents", as_they_were), ("latents", as_copied), ("texts", as_they_were)]
)
def test_no_cache_is_made_again(old, name, prepare):
    prepare(old)
    caches = sorted((old / "cache").rglob("*.safetensors"))
    before = [(path.stat().st_mtime_ns, path.read_bytes()) for path in caches]
    run(old, name)
    assert sorted((old / "cache").rglob("*.safetensors")) == caches and len(caches) == 7
    assert [(path.stat().st_mtime_ns, path.read_bytes()) for path in caches] == before


@pytest.mark.slow
def test_caches_made_anew_are_the_old_ones(old):
    as_they_were(old)
    shutil.rmtree(old / "cache")
    run(old, "latents")
    run(old, "texts")
    made = {path.relative_to(old): path for path in (old / "cache").rglob("*.safetensors")}
    assert set(made) == {path.relative_to(DATA) for path in (DATA / "cache").rglob("*.safetensors")}
    for name, path in made.items():
        assert_same_file(path, DATA / name)


def test_the_command_of_then_trains_the_lora_of_then(old):
    run(old, "train")
    assert_same_file(old / "train" / "lora.safetensors", DATA / "train" / "lora.safetensors")
    assert_same_log(*(log_of(folder / "train" / "train_log.jsonl") for folder in (old, DATA)))
    settings, then = (settings_of(folder / "train" / "lora.settings.toml") for folder in (old, DATA))
    assert then.items() <= settings.items()


def test_an_old_state_goes_on_with_old_settings(old):
    """As if it had not been interrupted; the settings are those that lay beside the LoRA."""
    run(old, "resume")
    assert_same_file(old / "resumed" / "lora.safetensors", DATA / "train" / "lora.safetensors")
    log = log_of(old / "resumed" / "train_log.jsonl")
    assert_same_log(log, log_of(DATA / "train" / "train_log.jsonl", after=2))


def test_an_old_state_of_full_fine_tuning_goes_on(old):
    run(old, "tune on")
    tuned, _ = read(old / "tune" / "full.safetensors")
    expected, _ = read(DATA / "expected" / "tuned.safetensors")
    assert_close({name: tuned[name] for name in expected}, expected)
    untrained, _ = read(DATA / "models" / "dit.safetensors")
    assert tuned.keys() == untrained.keys()
    assert all(torch.equal(tuned[name], untrained[name].float()) for name in tuned if name not in expected)
    assert_same_log(log_of(old / "tune" / "train_log.jsonl"), log_of(DATA / "expected" / "tune_log.jsonl", after=2))


@pytest.mark.parametrize(("name", "folder"), [("generate", "videos"), ("generate again", "again")])
def test_the_video_of_then_is_made_again(old, name, folder):
    """From its command line, and from the settings inside its file; an old LoRA is merged."""
    then = frozenset(path.name for path in (old / folder).glob("*"))
    run(old, name)
    stored = only(DATA / "videos", "*.mp4")
    assert_same_file(only(old / folder, "*_latent.safetensors", then), only(DATA / "videos", "*_latent.safetensors"))
    assert_same_frames(only(old / folder, "*.mp4", then), stored)
    assert video(only(old / folder, "*.mp4", then))[1] == video(stored)[1]


def test_old_latents_decode_to_the_frames_of_then(old):
    run(old, "decode")
    assert_same_frames(only(old / "decoded", "*.mp4"), only(DATA / "videos", "*.mp4"))


def test_an_old_lora_converts_to_the_file_of_then(old):
    """Tensors are copied and scaled by a power of two: nothing is rounded."""
    run(old, "convert")
    tensors, _ = read(old / "converted.safetensors")
    hashes = {name: hashlib.sha256(tensor.numpy().tobytes()).hexdigest() for name, tensor in tensors.items()}
    assert hashes == json.loads((DATA / "expected" / "converted.json").read_text(encoding="utf-8"))
