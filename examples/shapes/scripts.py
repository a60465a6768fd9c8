"""Runs the toolkit's scripts as separate processes, as a user does."""

import subprocess
import sys
from pathlib import Path

from examples.tiny_models import TinyModels
from utils.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
# Arguments of Python that run the training script after them in two processes of one thread each.
TWO_PROCESSES = (
    *("-m", "accelerate.commands.launch", "--num_cpu_threads_per_process", "1", "--multi_gpu", "--num_processes", "2"),
    *("--num_machines", "1", "--main_process_port", "0", "--mixed_precision", "no", "--dynamo_backend", "no"),
)


def run(*command: object) -> None:
    """Runs Python with these arguments in the project's root.

    Raises:
        UserError: it failed; its own message says why.
    """
    words = list(map(str, command))
    code = subprocess.run([sys.executable, *words], cwd=ROOT).returncode
    if code:
        script = next((word for word in words if word.endswith(".py")), " ".join(words[:2]))
        raise UserError(f"{script} ended with exit code {code}; see its own message above")


def cache(config: Path, models: TinyModels) -> None:
    """Caches the latents and the text states of a dataset's TOML file in float32."""
    run("cache_latents.py", "--dataset_config", config, "--vae", models.vae, "--vae_dtype", "float32")
    encoders = ["--text_encoder1", models.text_encoder1, "--text_encoder2", models.text_encoder2]
    run("cache_text_encoder_outputs.py", "--dataset_config", config, *encoders, "--text_encoder_dtype", "float32")


def models_in(folder: Path) -> TinyModels:
    """The paths of the small models in a folder that the recipe has written."""
    return TinyModels(
        folder / "dit.safetensors", folder / "vae.safetensors", folder / "text_encoder", folder / "text_encoder_2"
    )
