"""From any published file of HunyuanVideo's models to tensors and models. Other rooms import these names from here."""

import importlib
from typing import TYPE_CHECKING, Any

from hunyuan_model.checkpoints.identification import identify
from hunyuan_model.checkpoints.load import (
    block_swap_placement,
    is_quantized_in_dit,
    load_dit,
    load_vae,
    open_dit,
    read_dit_config,
    read_vae_config,
)
from hunyuan_model.checkpoints.stored_tensors import DitTensors

if TYPE_CHECKING:
    from hunyuan_model.checkpoints.text_encoders import (
        empty_text_encoder_1,
        load_text_encoder_1,
        load_text_encoder_2,
    )

__all__ = [
    "DitTensors",
    "block_swap_placement",
    "empty_text_encoder_1",
    "identify",
    "is_quantized_in_dit",
    "load_dit",
    "load_text_encoder_1",
    "load_text_encoder_2",
    "load_vae",
    "open_dit",
    "read_dit_config",
    "read_vae_config",
]


def __getattr__(name: str) -> Any:
    """The names of text_encoders.py, imported at their first use: transformers takes seconds to import."""
    if name not in __all__:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    return getattr(importlib.import_module("hunyuan_model.checkpoints.text_encoders"), name)
