"""One command from a clone to a trained LoRA and a video, on any machine with Python 3.11.

    python quickstart.py            # sets up .venv, then runs the five stages on a small model
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
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent
VENV = ROOT / ".venv"
OUTPUT = Path("quickstart_output")
REQUIREMENTS = ("constraints.txt", "requirements.txt", "requirements-dev.txt")
PROMPT = "A red circle moves to the right on a black background."
FRAMES, HEIGHT, WIDTH = 9, 64, 64


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
    """The road from nothing to a video. Every command can be pasted and run alone."""
    models, dataset, lora = OUTPUT / "models", OUTPUT / "dataset", OUTPUT / "lora"
    config = dataset / "dataset.toml"
    dit = models / "transformers" / "mp_rank_00_model_states.pt"
    vae = models / "vae" / "pytorch_model.pt"
    text_encoders = ["--text_encoder1", models / "text_encoder", "--text_encoder2", models / "text_encoder_2"]
    accelerate = "accelerate launch --num_cpu_threads_per_process 1 --num_processes 1 --num_machines 1"
    training = (
        "--sdpa --mixed_precision no --optimizer_type adamw8bit --learning_rate 2e-3 --gradient_checkpointing "
        "--max_data_loader_n_workers 1 --network_module networks.lora --network_dim 8 --network_alpha 8 "
        "--timestep_sampling sigmoid --max_train_epochs 16 --save_every_n_epochs 8 --seed 42 --output_name shapes"
    )
    sampling = f"--video_size {HEIGHT} {WIDTH} --video_length {FRAMES} --infer_steps 8 --seed 1234 --output_type both"
    return [
        Stage(
            "models: a small set with random weights",
            ["python", "-m", "utils.tiny_models", models],
            lambda: found(models, "*/*.pt"),
        ),
        Stage(
            "dataset: clips and images of moving shapes",
            ["python", "-m", "examples.shapes.world", dataset],
            lambda: found(dataset, "dataset.toml"),
        ),
        Stage(
            "1. cache latents",
            ["python", "cache_latents.py", "--dataset_config", config, "--vae", vae],
            lambda: found(dataset, "cache_*/*_hv.safetensors"),
        ),
        Stage(
            "2. cache text encoder outputs",
            ["python", "cache_text_encoder_outputs.py", "--dataset_config", config, *text_encoders],
            lambda: found(dataset, "cache_*/*_hv_te.safetensors"),
        ),
        Stage(
            "3. train a LoRA",
            [
                *accelerate.split(),
                *["--mixed_precision", "no", "--dynamo_backend", "no", "hv_train_network.py"],
                *["--dit", dit, "--dataset_config", config, "--output_dir", lora],
                *training.split(),
            ],
            lambda: found(lora, "shapes.safetensors"),
        ),
        Stage(
            "4. generate a video",
            [
                *["python", "hv_generate_video.py", "--dit", dit, "--vae", vae, *text_encoders],
                *["--prompt", PROMPT, "--save_path", OUTPUT / "videos"],
                *["--lora_weight", lora / "shapes.safetensors", "--lora_multiplier", "1.0", *sampling.split()],
            ],
            lambda: found(OUTPUT / "videos", "*.mp4"),
        ),
        Stage(
            "5. convert the LoRA for ComfyUI",
            [
                *["python", "convert_lora.py", "--input", lora / "shapes.safetensors"],
                *["--output", lora / "shapes_comfyui.safetensors", "--target", "other"],
            ],
            lambda: found(lora, "shapes_comfyui.safetensors"),
        ),
    ]


def found(folder: Path, pattern: str) -> list[Path]:
    """Files below the project's root, as paths relative to it."""
    return sorted(path.relative_to(ROOT) for path in (ROOT / folder).glob(pattern))


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
    print(f"the models have random weights, so the video is noise; see README.md for the real ones. All in {OUTPUT}/")
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
