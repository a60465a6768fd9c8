"""From any public file of HunyuanVideo's models to tensors and models; these are the names that other rooms use."""

from hunyuan_model.checkpoints.identification import identify
from hunyuan_model.checkpoints.load import (
    DitTensors,
    beside_swapped,
    empty_text_encoder_1,
    is_quantized_in_dit,
    load_dit,
    load_text_encoder_1,
    load_text_encoder_2,
    load_vae,
    open_dit,
    read_dit_config,
    read_vae_config,
)

__all__ = [
    "DitTensors",
    "beside_swapped",
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
