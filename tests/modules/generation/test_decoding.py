"""The decoder: its memory, and what it does if the VAE fails. tests/scripts decodes with a real VAE."""

from types import SimpleNamespace

import pytest
import torch

from modules.generation.decoding import Decoder
from modules.generation.lazy_model import LazyModel
from modules.generation.sampler import NonFiniteError
from modules.memory.meter import MemoryMeter

CPU = torch.device("cpu")
LATENTS = torch.zeros(1, 16, 2, 8, 8)


def decoder_of(decode, tile_size: int | None = None) -> Decoder:
    """A decoder whose VAE is in float32, so that it cannot fall back to it."""
    vae = SimpleNamespace(decode=decode, configure_memory=lambda *_: None, parameters=lambda: iter([torch.zeros(1)]))
    return Decoder(LazyModel(lambda: vae, CPU), CPU, tile_size=tile_size)


def test_decoded_pixels_are_in_memory_once():
    decoder = decoder_of(lambda latents: torch.randn(1, 3, 8, 64, 64))
    torch.manual_seed(0)
    expected = (torch.randn(3, 8, 64, 64) / 2 + 0.5).clamp(0, 1)
    torch.manual_seed(0)
    with MemoryMeter() as meter:
        pixels = decoder.decode(LATENTS)
    assert torch.equal(pixels, expected)
    assert meter.peak < 1.2 * pixels.nbytes


def test_nan_in_float32_is_an_error():
    with pytest.raises(NonFiniteError, match="also in float32: check the VAE file"):
        decoder_of(lambda latents: torch.full((1, 3, 8, 64, 64), float("nan"))).decode(LATENTS)


def test_other_errors_and_no_memory_for_the_smallest_tiles_are_raised():
    def fail(latents):
        raise error

    for error, tile_size in ((RuntimeError("a bug"), None), (torch.OutOfMemoryError("CUDA out of memory"), 64)):
        decoder = decoder_of(fail, tile_size)
        with pytest.raises(type(error)):
            decoder.decode(LATENTS)
        assert decoder.tile_size == tile_size
