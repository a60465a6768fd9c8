"""Shows in numbers that training works: what the base model knows, and what a LoRA trained for a few minutes adds.

    python -m examples.shapes.proof FOLDER

trains a LoRA on a dozen clips of a concept that the base model has never seen, makes videos with and without it, and
prints what the judge sees in them. It runs the scripts of this toolkit as a user does.
"""

import argparse
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from examples.shapes.judge import Verdict, judge_video, score
from examples.shapes.scripts import cache, models_in, run
from examples.shapes.world import CONCEPT, Scene, random_scene, write_dataset
from examples.tiny_models import TinyModels
from utils.cli import print_table, run_script
from utils.errors import UserError
from utils.files import write_text

SHIPPED = Path(__file__).parent / "models"
CLIPS, REPEATS, KNOWN_CLIPS, BATCH_SIZE = 12, 2, 24, 6
KNOWN_PROMPTS, CONCEPT_SEEDS = 50, 20
# The settings with which the models were trained; see recipe.py.
SAMPLING = "--video_size 64 64 --video_length 9 --infer_steps 20 --flow_shift 3.0 --output_type video --fps 8"
TRAINING = (
    "--sdpa --mixed_precision no --guidance_scale 6.0 --timestep_sampling shift --discrete_flow_shift 3.0 "
    "--optimizer_type adamw --learning_rate 8e-4 --lr_scheduler cosine --max_train_epochs 110 "
    "--network_module networks.lora --network_dim 16 --network_alpha 16 --max_data_loader_n_workers 1 --seed 0"
)


def known_scenes() -> list[Scene]:
    generator = random.Random("known")
    return [random_scene(generator) for _ in range(KNOWN_PROMPTS)]


def concept_scenes() -> list[Scene]:
    generator = random.Random("concept")
    return [random_scene(generator, concept=True) for _ in range(CONCEPT_SEEDS)]


def judged_videos(models: TinyModels, scenes: Sequence[Scene], folder: Path, *options: object) -> list[Verdict]:
    """Makes one video of each scene, with its index as seed, and judges them."""
    prompts = folder / "prompts.txt"
    write_text(prompts, "".join(f"{scene.caption} --d {seed}\n" for seed, scene in enumerate(scenes)))
    files = ["--dit", models.dit, "--vae", models.vae, "--save_path", folder]
    files += ["--text_encoder1", models.text_encoder1, "--text_encoder2", models.text_encoder2]
    run("hv_generate_video.py", "--from_file", prompts, *files, *SAMPLING.split(), *options)
    videos = {int(path.stem.split("_")[2]): path for path in sorted(folder.glob("*.mp4"))}
    return [judge_video(videos[seed]) for seed in range(len(scenes))]


def write_clips(folder: Path) -> Path:
    """Writes clips of the concept, and of the known world so that it is not forgotten; returns the dataset's TOML."""
    concept = write_dataset(folder / "concept", CLIPS, images=0, seed=1, batch_size=BATCH_SIZE, concept=True)
    known = write_dataset(folder / "known", KNOWN_CLIPS, images=0, seed=500, batch_size=BATCH_SIZE)
    config, header = folder / "dataset.toml", "[[datasets]]"
    known_part = header + known.read_text("utf-8").split(header)[1]
    write_text(config, f"{concept.read_text('utf-8')}num_repeats = {REPEATS}\n\n{known_part}")
    return config


def concept_dataset(models: TinyModels, folder: Path) -> Path:
    """Writes the clips and their caches; returns the dataset's TOML file."""
    config = write_clips(folder)
    cache(config, models)
    return config


def training_words(models: TinyModels, config: Path, folder: Path, *options: object) -> list[object]:
    """Arguments of hv_train_network.py to train the LoRA of the concept; `options` override the usual ones."""
    files = ["--dit", models.dit, "--dataset_config", config, "--output_dir", folder, "--output_name", CONCEPT]
    return [*files, *TRAINING.split(), *options]


def train_lora(
    models: TinyModels, config: Path, folder: Path, *options: object, script: Sequence[str] = ("hv_train_network.py",)
) -> Path:
    """Trains the LoRA of the concept; `script` are the arguments of Python that run hv_train_network.py."""
    run(*script, *training_words(models, config, folder, *options))
    return folder / f"{CONCEPT}.safetensors"


def share_of_concept(verdicts: Sequence[Verdict]) -> float:
    return fmean(verdict.is_concept for verdict in verdicts)


@dataclass(frozen=True)
class Proof:
    """The judge's results: shares of the videos in 0..1, without the LoRA and with it."""

    base: dict[str, float]
    tuned: dict[str, float]
    concept_before: float
    concept_after: float

    @property
    def rows(self) -> list[tuple[str, str]]:
        known = [(f"known {name}", f"{self.base[name]:.0%} -> {self.tuned[name]:.0%}") for name in self.base]
        return [*known, (f"{CONCEPT} present", f"{self.concept_before:.0%} -> {self.concept_after:.0%}")]


def prove(models: TinyModels, folder: Path) -> Proof:
    """Trains the LoRA and judges videos with and without it."""
    config = concept_dataset(models, folder / "dataset")
    lora = train_lora(models, config, folder / "lora")
    known, concept, given = known_scenes(), concept_scenes(), ("--lora_weight", lora)
    return Proof(
        score(judged_videos(models, known, folder / "known_base"), known),
        score(judged_videos(models, known, folder / "known_lora", *given), known),
        share_of_concept(judged_videos(models, concept, folder / "concept_base")),
        share_of_concept(judged_videos(models, concept, folder / "concept_lora", *given)),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--models", type=Path, default=SHIPPED, help="folder of the small models")
    parser.add_argument("--dataset_only", action="store_true", help="only write the training clips")
    args = parser.parse_args()
    if args.dataset_only:
        print(write_clips(args.folder))
        return
    if args.folder.exists() and any(args.folder.iterdir()):
        raise UserError(f"{args.folder}: is not empty; name a new folder, so that no old video is judged")
    print_table("before -> after the LoRA", prove(models_in(args.models.resolve()), args.folder.resolve()).rows)


if __name__ == "__main__":
    run_script(main)
