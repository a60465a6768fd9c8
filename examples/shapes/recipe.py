"""Makes the small models of `examples/shapes/models` from scratch, with the scripts of this toolkit.

    python -m examples.shapes.recipe FOLDER

Trains the VAE, writes the text encoders, renders and caches the dataset, trains the DiT with hv_train.py, and writes
float16 weights to FOLDER/models. A run that was stopped continues when it is started again. It takes about an hour on
two cores and needs Linux: on Windows, processes cannot share gradients on a CPU.
"""

import argparse
import json
import os
import shutil
from pathlib import Path

from examples.shapes.scripts import TWO_PROCESSES, cache, models_in, run
from examples.shapes.untrained import write_new_dit, write_text_encoders
from examples.shapes.world import write_dataset
from utils.cli import run_script
from utils.errors import UserError
from utils.files import atomic_path, write_text
from utils.safetensors_utils import load_file, save_file

CLIPS = 960
BATCH_SIZE = 16  # of each of the two processes
STEPS = 4000
# The embedded guidance scale in training. It is the default of hv_generate_video.py, which the videos use.
GUIDANCE = 6.0


def train_dit(folder: Path, new_dit: Path, config: Path, seed: int) -> Path:
    """Trains the DiT from scratch in two processes of one thread each; returns its path."""
    training = (
        "--sdpa --optimizer_type adamw --optimizer_args betas=0.9,0.99 weight_decay=0.0 --learning_rate 1e-3 "
        f"--lr_scheduler cosine --lr_warmup_steps 100 --max_train_steps {STEPS} --guidance_scale {GUIDANCE} "
        "--timestep_sampling shift --discrete_flow_shift 3.0 --max_data_loader_n_workers 1 "
        "--save_every_n_steps 250 --save_last_n_steps 250 --save_state --resume auto --output_name dit"
    )
    files = ["--dit", new_dit, "--dataset_config", config, "--output_dir", folder / "dit"]
    run(*TWO_PROCESSES, "hv_train.py", *files, "--seed", seed, *training.split())
    return folder / "dit" / "dit.safetensors"


def shortened_log(path: Path) -> str:
    """Step, smoothed loss and learning rate of every 50th step."""
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    kept = [line for line in lines if "smoothed_loss" in line and line["step"] % 50 == 0]
    return "".join(json.dumps({key: line[key] for key in ("step", "smoothed_loss", "lr")}) + "\n" for line in kept)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    folder, seed = args.folder.resolve(), args.seed
    seed_file = folder / "seed"
    if seed_file.exists() and int(seed_file.read_text("utf-8")) != seed:
        raise UserError(f"{folder}: was started with another --seed; name another folder")
    write_text(seed_file, f"{seed}\n")
    # Two processes cannot share a GPU, and on CPUs the models are the same everywhere.
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    models, new_dit = models_in(folder / "models"), folder / "new_dit.safetensors"
    if not models.vae.exists():
        run("-m", "examples.shapes.vae_training", folder, "--seed", seed)
        # The model comes last: if it exists, this stage is done.
        for name in ("vae_log.jsonl", models.vae.name):
            with atomic_path(models.vae.with_name(name)) as temporary:
                shutil.copyfile(folder / name, temporary)
    if not new_dit.exists():
        write_text_encoders(models.vae.parent, seed)
        write_new_dit(new_dit, seed)
    config = folder / "dataset" / "dataset.toml"
    if not config.exists():
        write_dataset(config.parent, CLIPS, images=0, seed=seed, batch_size=BATCH_SIZE)
    cache(config, models)
    dit = train_dit(folder, new_dit, config, seed)
    save_file({name: tensor.half() for name, tensor in load_file(dit).items()}, models.dit)
    write_text(models.dit.with_name("dit_log.jsonl"), shortened_log(dit.with_name("train_log.jsonl")))
    print(f"the models are in {models.dit.parent}")


if __name__ == "__main__":
    run_script(main)
