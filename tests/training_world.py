"""What tests of the trainer train on: caches without media, as on a machine that holds only the caches."""

import importlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate.state import AcceleratorState, GradientState

from dataset.cache import text_cache_path, write_latent_cache, write_text_cache
from dataset.config_utils import load_dataset_config
from dataset.items import MediaInfo, item_provenance, plan_items
from dataset.manifest import Manifest
from examples.tiny_models import TINY_DIT, dit_shapes, random_weights
from utils.safetensors_utils import load_file

STAMP = [1000, 0]


@dataclass(frozen=True)
class World:
    """A dataset config and its cache folder."""

    config: Path
    cache: Path

    def latent_files(self) -> list[Path]:
        return sorted(path for path in self.cache.glob("*_hv.safetensors"))


def write_world(
    folder: Path, items: int = 5, batch_size: int = 1, size: tuple[int, int] = (64, 48), frames: int = 1
) -> World:
    """Writes `items` cached images, or clips of so many frames; size is (width, height)."""
    cache = folder / "cache"
    cache.mkdir(parents=True)
    config = folder / "dataset.toml"
    media = "image_directory" if frames == 1 else f"target_frames = [{frames}]\nvideo_directory"
    config.write_text(
        f"[general]\nresolution = {list(size)}\nbatch_size = {batch_size}\n[[datasets]]\n"
        f"{media} = '{(folder / 'absent').as_posix()}'\ncache_directory = '{cache.as_posix()}'\n",
        encoding="utf-8",
    )
    settings = load_dataset_config(config).datasets[0]
    manifest = Manifest(cache, "latents")
    text = TINY_DIT
    for index in range(items):
        name = f"item{index}"
        generator = torch.Generator().manual_seed(index)
        info = MediaInfo(*size, frames=frames)
        manifest.sources[name] = {"stamp": STAMP, "probe": info.to_json()}
        for item in plan_items(settings, name, info).items:
            latents = 2.1 * torch.randn(16, *item.latent_shape, generator=generator)
            write_latent_cache(
                item.path, latents, item.size, frames if frames > 1 else None, item_provenance(item, settings, STAMP)
            )
        mask = (torch.arange(256) < 5 + 3 * index).long()
        write_text_cache(
            text_cache_path(cache, name),
            torch.randn(256, text.text_dim, generator=generator),
            mask,
            torch.randn(text.text_dim_2, generator=generator),
            torch.ones(77),
            f"caption {index}",
            {},
        )
    manifest.save()
    return World(config, cache)


def write_small_dit(folder: Path) -> Path:
    """A DiT with one block of each kind, for tests that only need some DiT."""
    path = folder / "dit.pt"
    torch.save({"module": random_weights(dit_shapes(depth_double=1, depth_single=1), seed=0)}, path)
    return path


def run_training(words: Sequence[object], script: str = "hv_train_network") -> None:
    """Runs a script in this process, with one thread as in the subprocesses that it is compared with."""
    main = importlib.import_module(script).main
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        main([str(word) for word in words])
    finally:
        torch.set_num_threads(threads)
        AcceleratorState._reset_state(reset_partial_state=True)


def train(world: World, dit: Path, output: Path, *words: object) -> dict[str, torch.Tensor]:
    """A short run; returns the tensors of its last checkpoint, if it was written."""
    run_training(command(world, dit, output, *words))
    checkpoint = output / "lora.safetensors"
    return load_file(checkpoint) if checkpoint.exists() else {}


def command(world: World, dit: Path, output: Path, *words: object) -> list[str]:
    """Command-line words of a short run; what stands in `words` wins."""
    network = {"network_module": "networks.lora", "network_dim": 4, "network_alpha": 4}
    if "--dim_from_weights" in words:
        del network["network_dim"], network["network_alpha"]
    return _short_run(world, dit, output, words, {**network, "learning_rate": 1e-2, "output_name": "lora"})


def _short_run(
    world: World, dit: Path, output: Path, words: Sequence[object], given: Mapping[str, object]
) -> list[str]:
    """`given` and what every short run has, unless `words` say otherwise, then `words`."""
    run = {"max_data_loader_n_workers": 0, "max_train_steps": 4, "seed": 7}
    given = {"dit": dit, "dataset_config": world.config, **given, **run, "output_dir": output}
    defaults = [f"--{name}={value}" for name, value in given.items() if f"--{name}" not in words]
    return [*defaults, *map(str, words)]


def tune(world: World, dit: Path, output: Path, *words: object) -> dict[str, torch.Tensor]:
    """A short run of hv_train.py; returns the tensors of its last checkpoint, if it was written."""
    run_training(full_command(world, dit, output, *words), "hv_train")
    checkpoint = output / "full.safetensors"
    return load_file(checkpoint) if checkpoint.exists() else {}


def full_command(world: World, dit: Path, output: Path, *words: object) -> list[str]:
    """Command-line words of a short run of hv_train.py; what stands in `words` wins."""
    return _short_run(world, dit, output, words, {"learning_rate": 1e-3, "output_name": "full"})


def log_of(output: Path) -> list[dict]:
    """The lines of train_log.jsonl."""
    return [json.loads(line) for line in (output / "train_log.jsonl").read_text(encoding="utf-8").splitlines()]


def assert_same_course(first: Path, second: Path) -> None:
    """Losses and gradients of two runs agree: Adam itself would hide a gradient of another scale."""
    courses = [[(line["loss"], line["gradient_norm"]) for line in log_of(output)] for output in (first, second)]
    torch.testing.assert_close(torch.tensor(courses[0]), torch.tensor(courses[1]), rtol=1e-4, atol=0)


def assert_same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    """Both have the same tensors, bit by bit."""
    assert first.keys() == second.keys() and first
    different = [name for name in first if not torch.equal(first[name], second[name])]
    assert not different
