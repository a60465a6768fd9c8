"""The defaults that decide how results look: those of the reference tool, written down a second time."""

import dataclasses

import pytest

from modules.generation.options import GenerationOptions
from modules.generation.requests import PREVIEW_DEFAULTS, Request
from modules.options import VaeOptions
from modules.training.options import FullTrainerOptions, LoraTrainerOptions
from networks.adapters import DEFAULT_RANK


def defaults(options: type) -> dict[str, object]:
    """Every option of a script with its default, by name."""
    found = {}
    for group in dataclasses.fields(options):
        for field in dataclasses.fields(group.type):
            found[field.name] = field.default
    return found


def test_generation() -> None:
    expected = {
        "video_size": (256, 256),
        "video_length": 129,
        "infer_steps": 50,
        "embedded_cfg_scale": 6.0,
        "guidance_scale": 1.0,
        "flow_shift": 7.0,
        "strength": None,  # as in Request below
        "fps": None,
        "output_type": "video",
        "attn_mode": "torch",
        "split_attn": False,
        "split_uncond": False,
    }
    found = defaults(GenerationOptions)
    assert {name: found[name] for name in expected} == expected
    assert Request() == Request(
        width=256, height=256, frames=129, steps=50, guidance=6.0, cfg_scale=1.0, flow_shift=7.0, fps=24, strength=0.8
    )
    assert dataclasses.replace(PREVIEW_DEFAULTS) == Request(frames=1, steps=20, flow_shift=14.5)


TRAINING = {
    "max_train_steps": 1600,
    "gradient_accumulation_steps": 1,
    "guidance_scale": 1.0,
    "max_grad_norm": 1.0,
    "learning_rate": 2e-6,
    "optimizer_type": "AdamW",
    "lr_scheduler": "constant",
    "lr_warmup_steps": 0,
    "lr_scheduler_num_cycles": 1,
    "lr_scheduler_power": 1.0,
    "timestep_sampling": "sigma",
    "discrete_flow_shift": 1.0,
    "sigmoid_scale": 1.0,
    "weighting_scheme": "none",
    "logit_mean": 0.0,
    "logit_std": 1.0,
    "mode_scale": 1.29,
}
LORA = {"network_alpha": 1.0, "network_dim": None, "network_dropout": None, "block_swap_ring_size": 2}


@pytest.mark.parametrize(
    ("options", "expected"), [(LoraTrainerOptions, TRAINING | LORA), (FullTrainerOptions, TRAINING)]
)
def test_training(options: type, expected: dict[str, object]) -> None:
    found = defaults(options)
    assert {name: found[name] for name in expected} == expected
    assert DEFAULT_RANK == 4


def test_sizes_of_the_vaes_tiles() -> None:
    assert VaeOptions().tile_size is None
    assert VaeOptions(vae_tiling=True).tile_size == 256
    assert VaeOptions(vae_tiling=True, vae_spatial_tile_sample_min_size=128).tile_size == 128
    assert VaeOptions(vae_spatial_tile_sample_min_size=128).tile_size == 128
