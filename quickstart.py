"""Trains a LoRA and generates a video with one command, on any machine with Python 3.11.

    python quickstart.py            # sets up .venv, then trains and tries a LoRA on a small model
    python quickstart.py test       # sets up .venv, then runs the tests
    python quickstart.py install    # sets up .venv only

Only the standard library is needed. Finished stages are kept; delete `.venv` or `quickstart_output` to start over.
"""

# With this, Python 3.8 can run this file up to the message that a newer version is needed.
from __future__ import annotations

import hashlib
import json
import math
import os
import subprocess
import sys
import time
import venv
from array import array
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn, TextIO

if os.name == "nt":
    import msvcrt
else:
    import fcntl

ROOT = Path(__file__).resolve().parent
VENV = ROOT / ".venv"
OUTPUT = Path("quickstart_output")
REQUIREMENTS = ("constraints.txt", "requirements.txt", "requirements-dev.txt")
MODELS = Path("examples/shapes/models")
VIDEOS = ("without", "with", "converted")
LABELS = ("without the LoRA", "with it")  # of the first two on the sheet
FILES_OF_A_VIDEO = ("*.mp4", "*_latent.safetensors")
# Latents have a standard deviation of about 1. Two generations of the same video differ only by float32 rounding.
LARGEST_DIFFERENCE = 1e-3
PROMPT = "A zorb moves to the left on a black background."


def executable(name: str) -> Path:
    """A program of the virtual environment."""
    return VENV / ("Scripts" if os.name == "nt" else "bin") / (f"{name}.exe" if os.name == "nt" else name)


def install() -> None:
    """Creates .venv and installs the tested versions, unless this has been done before with the same versions."""
    wanted = hash_of(os.fsencode(ROOT), *((ROOT / name).read_bytes() for name in REQUIREMENTS))
    stamp = VENV / "installed.sha256"
    if stamp.exists() and stamp.read_text() == wanted:
        print("environment: .venv is up to date", flush=True)
        return
    print("environment: installing into .venv (the first time takes a few minutes)", flush=True)
    if not is_whole():
        make_environment()
    packages = [word for name in REQUIREMENTS[1:] for word in ("-r", name)]
    run([executable("python"), "-m", "pip", "install", "--quiet", "-c", REQUIREMENTS[0], *packages])
    stamp.write_text(wanted)


def is_whole() -> bool:
    """Whether .venv is complete: its pip runs and is in this folder.

    pip is missing without python3-venv or after Ctrl+C. It is in another folder if this one was moved.
    """
    try:
        pip = subprocess.run([executable("pip"), "--version"], capture_output=True, text=True)
    except OSError:
        return False
    return str(VENV) in pip.stdout


def make_environment() -> None:
    try:
        venv.create(VENV, clear=True, with_pip=True)
    except subprocess.CalledProcessError:
        fail("Python's venv cannot install pip; on Debian and Ubuntu: apt install python3-venv, then run again")


def lock() -> TextIO:
    """A file that stays locked until this process ends, because two quick starts at once would disturb each other."""
    file = (ROOT / ".quickstart.lock").open("w")
    try:
        if os.name == "nt":
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        fail("another quickstart.py is running in this folder; wait until it has ended", 2)
    except OSError:  # a network drive that cannot lock
        pass
    return file


def run(command: list) -> None:
    """Runs a command in the root folder. If it fails, this program ends with the same exit code."""
    code = subprocess.run([str(word) for word in command], cwd=ROOT).returncode
    if code:
        sys.exit(code if code > 0 else 128 - code)  # a shell reports signal N as 128 + N


def fail(message: str, code: int = 1) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(code)


@dataclass
class Stage:
    """One stage: a command, and the patterns of the files that it writes into its folder."""

    name: str
    command: list
    folder: Path
    patterns: tuple[str, ...]
    seconds: float = 0.0

    @property
    def shown(self) -> str:
        """The command, ready to paste into a shell."""
        return " ".join(map(quoted, self.command))

    def products(self) -> list[Path]:
        return [path for pattern in self.patterns for path in found(self.folder, pattern)]

    def is_complete(self) -> bool:
        return all(found(self.folder, pattern) for pattern in self.patterns)

    def run(self) -> None:
        """Runs the command, after deleting what an incomplete run may have left."""
        print(f"\n=== {self.name}\n{self.shown}", flush=True)
        for path in self.products():
            (ROOT / path).unlink()
        start = time.monotonic()
        run([executable(self.command[0]), *self.command[1:]])
        self.seconds = time.monotonic() - start


def quoted(word: object) -> str:
    """A word of a command, quoted for a shell if it contains a space."""
    text = Path(word).as_posix() if isinstance(word, Path) else str(word)
    return f'"{text}"' if " " in text else text


DATASET, LORA = OUTPUT / "dataset", OUTPUT / "lora"
TRAINED, CONVERTED, BACK = (LORA / f"{name}.safetensors" for name in ("zorb", "zorb_comfyui", "zorb_back"))
TEXT_ENCODERS = ["--text_encoder1", MODELS / "text_encoder", "--text_encoder2", MODELS / "text_encoder_2"]
LAUNCH = (
    "accelerate launch --num_cpu_threads_per_process 1 --num_processes 1 --num_machines 1 --mixed_precision no "
    "--dynamo_backend no"
)
TRAINING = (
    "--sdpa --mixed_precision no --optimizer_type adamw --learning_rate 8e-4 --lr_scheduler cosine "
    "--max_data_loader_n_workers 1 --network_module networks.lora --network_dim 16 --network_alpha 16 "
    "--guidance_scale 6.0 --timestep_sampling shift --discrete_flow_shift 3.0 --max_train_epochs 110 --seed 0 "
    "--output_name zorb"
)
SAMPLING = (
    "--video_size 64 64 --video_length 9 --infer_steps 20 --flow_shift 3.0 --fps 8 --seed 1234 --output_type both"
)


def stages() -> list[Stage]:
    """All stages, from making clips to generating videos with a LoRA. Each command can be pasted and run alone."""
    sheet = [f"{label}={(OUTPUT / 'videos' / name).as_posix()}" for label, name in zip(LABELS, VIDEOS, strict=False)]
    return [
        Stage(
            "dataset: twelve clips of an object that the small model has never seen, a zorb, and clips that it knows",
            ["python", "-m", "examples.shapes.proof", DATASET, "--dataset_only"],
            DATASET,
            ("dataset.toml", "*/dataset.toml", "*/videos/*.*"),
        ),
        *training_stages(DATASET / "dataset.toml"),
        video_stage("4. generate a video without the LoRA", "without"),
        video_stage("   generate the same video with the LoRA", "with", TRAINED),
        Stage(
            "   put both videos on one sheet",
            ["python", "-m", "examples.shapes.sheet", OUTPUT / "before_and_after", *sheet],
            OUTPUT,
            ("before_and_after.png", "before_and_after.mp4"),
        ),
        conversion_stage("5. convert the LoRA for ComfyUI", TRAINED, CONVERTED, "other"),
        conversion_stage("   convert it back", CONVERTED, BACK, "default"),
        video_stage("   generate with the LoRA that was converted back", "converted", BACK),
    ]


def training_stages(config: Path) -> list[Stage]:
    """Caching and training."""
    return [
        Stage(
            "1. cache latents",
            ["python", "cache_latents.py", "--dataset_config", config, "--vae", MODELS / "vae.safetensors"],
            DATASET,
            ("*/cache_*/*_hv.safetensors",),
        ),
        Stage(
            "2. cache text encoder outputs",
            ["python", "cache_text_encoder_outputs.py", "--dataset_config", config, *TEXT_ENCODERS],
            DATASET,
            ("*/cache_*/*_hv_te.safetensors",),
        ),
        Stage(
            "3. train a LoRA",
            [
                *[*LAUNCH.split(), "hv_train_network.py", "--dit", MODELS / "dit.safetensors"],
                *["--dataset_config", config, "--output_dir", LORA, *TRAINING.split()],
            ],
            LORA,
            (TRAINED.name, "train_log.jsonl"),
        ),
    ]


def video_stage(name: str, folder: str, lora: Path | None = None) -> Stage:
    """Generates the video of PROMPT into its own folder."""
    models = ["--dit", MODELS / "dit.safetensors", "--vae", MODELS / "vae.safetensors", *TEXT_ENCODERS]
    path = OUTPUT / "videos" / folder
    command = ["python", "hv_generate_video.py", *models, "--prompt", PROMPT, *SAMPLING.split(), "--save_path", path]
    return Stage(name, [*command, *(["--lora_weight", lora] if lora else [])], path, FILES_OF_A_VIDEO)


def conversion_stage(name: str, source: Path, target: Path, target_format: str) -> Stage:
    words = ["--input", source, "--output", target, "--target", target_format]
    return Stage(name, ["python", "convert_lora.py", *words], LORA, (target.name,))


def hash_of(*contents: bytes) -> str:
    return hashlib.sha256(b"".join(contents)).hexdigest()


def found(folder: Path, pattern: str) -> list[Path]:
    """Files in a folder of the project, as paths relative to the root folder."""
    return sorted(path.relative_to(ROOT) for path in (ROOT / folder).glob(pattern))


def latents(path: Path) -> array:
    """The float32 numbers after the header of a safetensors file."""
    content = (ROOT / path).read_bytes()
    return array("f", content[8 + int.from_bytes(content[:8], "little") :])


def training_losses() -> tuple[float, float] | None:
    """Mean loss over the first and over the last tenth of the training steps."""
    log = ROOT / OUTPUT / "lora" / "train_log.jsonl"
    if not log.exists():
        return None
    lines = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    tenth = max(len(losses) // 10, 1)
    return sum(losses[:tenth]) / tenth, sum(losses[-tenth:]) / tenth


def report(done: list[Stage]) -> None:
    """Prints what each stage wrote, how long it took, and its command."""
    print("\n\nstage | seconds | files")
    for stage in done:
        products = stage.products()
        names = ", ".join(path.as_posix() for path in products[:2])
        more = f" and {len(products) - 2} more" if len(products) > 2 else ""
        took = f"{stage.seconds:.1f} s" if stage.seconds else "kept"
        print(f"\n{stage.name} | {took} | {names}{more}")
        print("  " + stage.shown)
    if losses := training_losses():
        print(f"\ntraining loss: {losses[0]:.3f} at the start, {losses[1]:.3f} at the end")
    print(flush=True)
    run([executable("python"), "-m", "examples.shapes.judge", *(OUTPUT / "videos" / name for name in VIDEOS)])
    check_conversion()
    print(f"look at {OUTPUT}/before_and_after.png and .mp4")
    activate = r".venv\Scripts\activate" if os.name == "nt" else "source .venv/bin/activate"
    print(f"the commands above run after: {activate}")


def check_conversion() -> None:
    """Checks that the LoRA makes the same video after conversion for ComfyUI and back; if not, exit code 1."""
    with_it, converted = (latents(found(OUTPUT / "videos" / name, FILES_OF_A_VIDEO[1])[0]) for name in VIDEOS[1:])
    differences = [abs(a - b) for a, b in zip(with_it, converted, strict=True)]
    worst = max(differences, key=lambda difference: (math.isnan(difference), difference))
    largest = f"latents differ by {worst:.2g} at most"
    if not worst <= LARGEST_DIFFERENCE:
        fail(f"converted for ComfyUI and back, the LoRA makes another video: {largest}, above {LARGEST_DIFFERENCE:g}")
    print(f"\nconverted for ComfyUI and back, the LoRA makes the same video: {largest}")


def run_stages(stages: list[Stage]) -> None:
    """Runs the stages in order. Keeps the first ones if they finished earlier with the same commands and models."""
    stamp = ROOT / OUTPUT / "finished.sha256"
    earlier = stamp.read_text().split() if stamp.exists() else []
    models = hash_of(*(path.read_bytes() for path in sorted((ROOT / MODELS).rglob("*")) if path.is_file()))
    finished: list[str] = []
    for stage in stages:
        # The folder counts, because the dataset config contains absolute paths.
        finished.append(hash_of(models.encode(), os.fsencode(ROOT), stage.shown.encode()))
        if finished[-1] in earlier and stage.is_complete():
            print(f"\n=== {stage.name}: done before, kept", flush=True)
            continue
        earlier = []  # the later stages depend on this one, so they run again too
        stamp.parent.mkdir(exist_ok=True)
        stamp.write_text("\n".join(finished[:-1]))
        stage.run()
        stamp.write_text("\n".join(finished))


def demo() -> None:
    all_stages = stages()
    run_stages(all_stages)
    report(all_stages)


def main() -> None:
    actions = {
        "demo": demo,
        "install": lambda: None,
        "test": lambda: run([executable("python"), "-m", "pytest", "-n", "2"]),
    }
    action = sys.argv[1] if len(sys.argv) > 1 else "demo"
    if len(sys.argv) > 2 or action not in actions:
        fail(f"'{' '.join(sys.argv[1:])}' is unknown; use no argument, test or install", 2)
    if sys.version_info < (3, 11):  # noqa: UP036 - an older Python can start this file
        fail(f"Python 3.11 or newer is needed, this is {sys.version.split()[0]}", 2)
    try:
        with lock():
            install()
            actions[action]()
    except KeyboardInterrupt:
        fail("interrupted; run again to continue after the last finished stage", 130)
    except OSError as error:
        fail(f"{error.filename or ROOT}: {error.strerror or error}", 2)


if __name__ == "__main__":
    main()
