"""One command from a clone to a trained LoRA and a video, on any machine with Python 3.11.

    python quickstart.py            # sets up .venv, then trains and tries a LoRA on a small model
    python quickstart.py test       # sets up .venv, then runs the tests
    python quickstart.py install    # sets up .venv only

Standard library only. What exists is reused; delete `.venv` or `quickstart_output` to begin anew.
"""

import hashlib
import json
import os
import subprocess
import sys
import time
import venv
from array import array
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent
VENV = ROOT / ".venv"
OUTPUT = Path("quickstart_output")
REQUIREMENTS = ("constraints.txt", "requirements.txt", "requirements-dev.txt")
MODELS = Path("examples/shapes/models")
VIDEOS = ("without", "with", "converted")
PROMPT = "A zorb moves to the right on a black background."


def executable(name: str) -> Path:
    """A program of the virtual environment."""
    return VENV / ("Scripts" if os.name == "nt" else "bin") / (f"{name}.exe" if os.name == "nt" else name)


def install() -> None:
    """Creates .venv and installs the tested versions, unless exactly that has been done before."""
    wanted = hashlib.sha256(b"".join((ROOT / name).read_bytes() for name in REQUIREMENTS)).hexdigest()
    stamp = VENV / "installed.sha256"
    if stamp.exists() and stamp.read_text() == wanted:
        print("environment: .venv is up to date", flush=True)
        return
    print("environment: installing into .venv (the first time takes a few minutes)", flush=True)
    if not executable("python").exists():
        venv.create(VENV, with_pip=True)
    packages = [word for name in REQUIREMENTS[1:] for word in ("-r", name)]
    run([executable("python"), "-m", "pip", "install", "--quiet", "-c", REQUIREMENTS[0], *packages])
    stamp.write_text(wanted)


def run(command: list) -> None:
    """Runs a command in the project's root and ends this program with its exit code if it fails."""
    code = subprocess.run([str(word) for word in command], cwd=ROOT).returncode
    if code:
        sys.exit(code)


@dataclass
class Stage:
    """One step of the road: a command, and the files by which it is known to be done."""

    name: str
    command: list
    products: Callable[[], list[Path]]
    seconds: float = 0.0

    def run(self) -> None:
        shown = " ".join(map(quoted, self.command))
        if self.products():
            print(f"\n=== {self.name}: done before, kept", flush=True)
            return
        print(f"\n=== {self.name}\n{shown}", flush=True)
        start = time.monotonic()
        run([executable(self.command[0]), *self.command[1:]])
        self.seconds = time.monotonic() - start


def quoted(word: object) -> str:
    """A word of a command as a shell takes it."""
    text = Path(word).as_posix() if isinstance(word, Path) else str(word)
    return f'"{text}"' if " " in text else text


def stages() -> list[Stage]:
    """The road from clips to videos with a LoRA. Every command can be pasted and run alone."""
    dataset, lora, videos = OUTPUT / "dataset", OUTPUT / "lora", OUTPUT / "videos"
    config, trained, converted = dataset / "dataset.toml", lora / "zorb.safetensors", lora / "zorb_comfyui.safetensors"
    dit, vae = MODELS / "dit.safetensors", MODELS / "vae.safetensors"
    text_encoders = ["--text_encoder1", MODELS / "text_encoder", "--text_encoder2", MODELS / "text_encoder_2"]
    accelerate = "accelerate launch --num_cpu_threads_per_process 1 --num_processes 1 --num_machines 1"
    training = (
        "--sdpa --mixed_precision no --optimizer_type adamw --learning_rate 8e-4 --lr_scheduler cosine "
        "--max_data_loader_n_workers 1 --network_module networks.lora --network_dim 16 --network_alpha 16 "
        "--guidance_scale 6.0 --timestep_sampling shift --discrete_flow_shift 3.0 --max_train_epochs 200 --seed 42 "
        "--output_name zorb"
    )
    sampling = (
        "--video_size 64 64 --video_length 9 --infer_steps 20 --flow_shift 3.0 --fps 8 --seed 1234 --output_type both"
    )
    models = ["--dit", dit, "--vae", vae, *text_encoders]
    generate = ["python", "hv_generate_video.py", *models, "--prompt", PROMPT, *sampling.split()]
    convert = ["python", "convert_lora.py"]
    return [
        Stage(
            "dataset: ten clips of a thing that the small model has never seen, a zorb, and ten that it knows",
            ["python", "-m", "examples.shapes.proof", dataset, "--dataset_only"],
            lambda: found(dataset, "dataset.toml"),
        ),
        Stage(
            "1. cache latents",
            ["python", "cache_latents.py", "--dataset_config", config, "--vae", vae],
            lambda: found(dataset, "*/cache_*/*_hv.safetensors"),
        ),
        Stage(
            "2. cache text encoder outputs",
            ["python", "cache_text_encoder_outputs.py", "--dataset_config", config, *text_encoders],
            lambda: found(dataset, "*/cache_*/*_hv_te.safetensors"),
        ),
        Stage(
            "3. train a LoRA",
            [
                *accelerate.split(),
                *["--mixed_precision", "no", "--dynamo_backend", "no", "hv_train_network.py"],
                *["--dit", dit, "--dataset_config", config, "--output_dir", lora],
                *training.split(),
            ],
            lambda: found(lora, "zorb.safetensors"),
        ),
        Stage(
            "4. generate a video without the LoRA",
            [*generate, "--save_path", videos / "without"],
            lambda: found(videos, "without/*.mp4"),
        ),
        Stage(
            "   and the same with it",
            [*generate, "--save_path", videos / "with", "--lora_weight", trained],
            lambda: found(videos, "with/*.mp4"),
        ),
        Stage(
            "   both on one sheet",
            [
                *["python", "-m", "examples.shapes.sheet", OUTPUT / "before_and_after"],
                *[f"without the LoRA={(videos / 'without').as_posix()}", f"with it={(videos / 'with').as_posix()}"],
            ],
            lambda: found(OUTPUT, "before_and_after.*"),
        ),
        Stage(
            "5. convert the LoRA for ComfyUI",
            [*convert, "--input", trained, "--output", converted, "--target", "other"],
            lambda: found(lora, "zorb_comfyui.safetensors"),
        ),
        Stage(
            "   and back",
            [*convert, "--input", converted, "--output", lora / "zorb_back.safetensors", "--target", "default"],
            lambda: found(lora, "zorb_back.safetensors"),
        ),
        Stage(
            "   and generate with what came back",
            [*generate, "--save_path", videos / "converted", "--lora_weight", lora / "zorb_back.safetensors"],
            lambda: found(videos, "converted/*.mp4"),
        ),
    ]


def found(folder: Path, pattern: str) -> list[Path]:
    """Files below the project's root, as paths relative to it."""
    return sorted(path.relative_to(ROOT) for path in (ROOT / folder).glob(pattern))


def latents(path: Path) -> array:
    """The float32 numbers behind the header of a safetensors file."""
    content = (ROOT / path).read_bytes()
    return array("f", content[8 + int.from_bytes(content[:8], "little") :])


def training_losses() -> tuple[float, float] | None:
    """Mean loss of the first and of the last tenth of the training steps."""
    log = ROOT / OUTPUT / "lora" / "train_log.jsonl"
    if not log.exists():
        return None
    lines = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    tenth = max(len(losses) // 10, 1)
    return sum(losses[:tenth]) / tenth, sum(losses[-tenth:]) / tenth


def report(done: list[Stage]) -> None:
    """What each stage wrote, how long it took, and how to run it alone."""
    print("\n\nstage | seconds | files")
    for stage in done:
        products = stage.products()
        names = ", ".join(path.as_posix() for path in products[:2])
        more = f" and {len(products) - 2} more" if len(products) > 2 else ""
        print(f"\n{stage.name} | {stage.seconds:.1f} s | {names}{more}")
        print("  " + " ".join(map(quoted, stage.command)))
    if losses := training_losses():
        print(f"\ntraining loss: {losses[0]:.3f} at the start, {losses[1]:.3f} at the end")
    print(flush=True)
    run([executable("python"), "-m", "examples.shapes.judge", *(OUTPUT / "videos" / name for name in VIDEOS)])
    with_it, converted = (latents(found(OUTPUT, f"videos/{name}/*_latent.safetensors")[0]) for name in VIDEOS[1:])
    largest = max(abs(a - b) for a, b in zip(with_it, converted, strict=True))
    print(f"\nconverted for ComfyUI and back, the LoRA makes the same video: latents differ by {largest:.1g} at most")
    print(f"look at {OUTPUT}/before_and_after.png and .mp4")
    activate = r".venv\Scripts\activate" if os.name == "nt" else "source .venv/bin/activate"
    print(f"the commands above run after: {activate}")


def demo() -> None:
    done = stages()
    for stage in done:
        stage.run()
    report(done)


def main() -> None:
    actions = {
        "demo": demo,
        "install": lambda: None,
        "test": lambda: run([executable("python"), "-m", "pytest", "-n", "2"]),
    }
    action = sys.argv[1] if len(sys.argv) > 1 else "demo"
    if len(sys.argv) > 2 or action not in actions:
        print(f"error: '{' '.join(sys.argv[1:])}' is unknown; use no argument, test or install", file=sys.stderr)
        sys.exit(2)
    if sys.version_info < (3, 11):  # noqa: UP036 - the one file that an older Python can start
        print(f"error: Python 3.11 or newer is needed, this is {sys.version.split()[0]}", file=sys.stderr)
        sys.exit(2)
    install()
    actions[action]()


if __name__ == "__main__":
    main()
