"""The causal 3D VAE against diffusers' AutoencoderKLHunyuanVideo, and its memory settings against its plain path."""

from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLHunyuanVideo

from hunyuan_model.vae import AutoencoderKLCausal3D, VaeConfig
from hunyuan_model.vae_layers import WINDOW_ELEMENTS, CausalConv3d, Downsample, Frames, ResnetBlock
from hunyuan_model.vae_tiling import blend_weights, overlapping_spans, pixel_spans, run_tiles
from modules.memory.meter import MemoryMeter
from utils.errors import UserError

KEYS = Path(__file__).parent.parent / "data" / "hunyuanvideo_vae_keys.tsv"


def key_table() -> dict[str, tuple[int, ...]]:
    rows = (line.split("\t") for line in KEYS.read_text(encoding="utf-8").splitlines())
    return {key: tuple(map(int, shape.split("x"))) for key, shape in rows}


def reference(**config) -> AutoencoderKLHunyuanVideo:
    """diffusers' model with random weights, also where its initialisation is trivial; without its temporal tiles."""
    torch.manual_seed(0)
    model = AutoencoderKLHunyuanVideo(**config).eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.add_(0.2 * torch.randn_like(parameter))
    model.use_framewise_encoding = model.use_framewise_decoding = False
    return model


def with_weights_of(model: torch.nn.Module, metadata_config: dict | None = None) -> AutoencoderKLCausal3D:
    state = model.state_dict()
    with torch.device("meta"):
        vae = AutoencoderKLCausal3D(VaeConfig.from_shapes({k: v.shape for k, v in state.items()}, metadata_config))
    vae.load_state_dict(state, assign=True)
    return vae


SMALL = {"block_out_channels": (8, 16, 16, 24), "layers_per_block": 1, "norm_num_groups": 4}


@pytest.fixture(scope="module")
def small_reference() -> AutoencoderKLHunyuanVideo:
    return reference(**SMALL)


@pytest.fixture
def vae(small_reference) -> AutoencoderKLCausal3D:
    return with_weights_of(small_reference, {"norm_num_groups": 4})


def random_pixels(*shape: int) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(1)) * 2 - 1


def random_latents(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(2))


def difference(ours: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference relative to the largest expected value."""
    assert ours.shape == expected.shape
    return ((ours - expected).abs().max() / expected.abs().max()).item()


def test_full_size_model_has_the_official_keys_and_shapes():
    with torch.device("meta"):
        vae = AutoencoderKLCausal3D(VaeConfig.from_shapes(key_table()))
    assert {key: tuple(tensor.shape) for key, tensor in vae.state_dict().items()} == key_table()


def test_full_size_model_matches_diffusers():
    model = reference()
    vae = with_weights_of(model)
    for frames in (1, 9):
        pixels = random_pixels(1, 3, frames, 48, 32)
        expected = model.encode(pixels).latent_dist
        posterior = vae.encode(pixels)
        assert difference(posterior.mean, expected.mean) < 5e-5
        assert difference(posterior.logvar, expected.logvar) < 5e-5
    latents = random_latents(1, 16, 3, 6, 4)
    assert difference(vae.decode(latents), model.decode(latents).sample) < 5e-5


def test_small_model_of_another_group_count_matches_diffusers(small_reference, vae):
    pixels = random_pixels(2, 3, 5, 40, 24)
    expected = small_reference.encode(pixels).latent_dist
    posterior = vae.encode(pixels)
    assert difference(posterior.mean, expected.mean) < 5e-5
    assert difference(vae.decode(posterior.mean), small_reference.decode(expected.mean).sample) < 5e-5


def test_posterior_samples_as_diffusers_does(small_reference, vae):
    pixels = random_pixels(1, 3, 5, 32, 32)
    expected = small_reference.encode(pixels).latent_dist.sample(torch.Generator().manual_seed(7))
    assert difference(vae.encode(pixels).sample(torch.Generator().manual_seed(7)), expected) < 5e-5


def test_posterior_draws_the_same_noise_in_half_precision(vae):
    pixels = random_pixels(1, 3, 1, 32, 32)
    posterior, half = vae.encode(pixels), vae.half().encode(pixels)
    sample = half.sample(torch.Generator().manual_seed(3))
    assert sample.dtype == torch.float16
    assert difference(sample.float(), posterior.sample(torch.Generator().manual_seed(3))) < 2e-2


def test_later_frames_do_not_reach_an_earlier_frames_attention(vae):
    attention = vae.decoder.mid_block.attentions[0]
    attention.group_norm = torch.nn.Identity()  # its statistics span all frames, also in the official model
    x = random_latents(1, 24, 4, 3, 5)
    changed = torch.cat([x[:, :, :2], x[:, :, 2:] + 1], dim=2)
    before, after = attention(x.clone()), attention(changed)
    assert torch.equal(before[:, :, :2], after[:, :, :2])
    assert not torch.allclose(before[:, :, 2:], after[:, :, 2:] - 1)


@pytest.mark.parametrize("chunk_size", [1, 2, 3, 5, 100])
def test_chunks_are_exact(vae, chunk_size):
    pixels, latents = random_pixels(1, 3, 13, 32, 40), random_latents(1, 16, 4, 5, 4)
    vae.configure_memory(chunk_size=1000)
    mean, decoded = vae.encode(pixels).mean, vae.decode(latents)
    vae.configure_memory(chunk_size=chunk_size)
    assert difference(vae.encode(pixels).mean, mean) < 1e-5
    assert difference(vae.decode(latents), decoded) < 1e-5


@pytest.mark.parametrize("chunk_size", [None, 32])
@pytest.mark.parametrize("channels", [(3, 128), (128, 3)])
def test_no_piece_of_a_large_clip_is_larger_than_a_window(channels, chunk_size):
    with torch.device("meta"):
        convolution = CausalConv3d(*channels)
        convolution.chunk_size = chunk_size
        pieces = convolution.chunks(Frames(torch.empty(1, channels[0], 33, 544, 960)))
        assert max(piece.numel() for _, piece in pieces) <= WINDOW_ELEMENTS


@pytest.mark.parametrize("layer", ["convolution", "resnet"])
def test_one_piece_at_a_time_is_in_memory(layer):
    x = torch.randn(1, 8, 12, 32, 32)
    module = ResnetBlock(8, 8, groups=8) if layer == "resnet" else Downsample(8, (1, 1, 1))
    for conv in module.modules():
        if isinstance(conv, CausalConv3d):
            conv.chunk_size = 4
    with torch.no_grad(), MemoryMeter() as meter:
        module(x)
    piece, window = 8 * 4 * 32 * 32 * 4, 8 * 6 * 34 * 34 * 4
    assert meter.peak <= x.nbytes + window + piece + 2000  # statistics and indices


def test_inputs_are_left_as_they_were(vae):
    pixels, latents = random_pixels(1, 3, 5, 32, 32), random_latents(1, 16, 2, 4, 4)
    pixels_before, latents_before = pixels.clone(), latents.clone()
    vae.encode(pixels), vae.decode(latents)
    assert torch.equal(pixels, pixels_before) and torch.equal(latents, latents_before)


@pytest.mark.parametrize("tile_size", [None, 32])
def test_batch_of_two_is_two_batches_of_one(vae, tile_size):
    vae.configure_memory(chunk_size=2, tile_size=tile_size)
    pixels, latents = random_pixels(2, 3, 5, 48, 32), random_latents(2, 16, 2, 6, 4)
    assert torch.equal(vae.encode(pixels).mean, torch.cat([vae.encode(p[None]).mean for p in pixels]))
    assert torch.equal(vae.decode(latents), torch.cat([vae.decode(z[None]) for z in latents]))


@pytest.mark.parametrize("frames", [1, 2])
def test_a_tile_larger_than_the_picture_changes_nothing(vae, frames):
    pixels, latents = random_pixels(1, 3, 4 * frames - 3, 48, 32), random_latents(1, 16, frames, 6, 4)
    mean, decoded = vae.encode(pixels).mean, vae.decode(latents)
    vae.configure_memory(tile_size=48)
    assert torch.equal(vae.encode(pixels).mean, mean)
    assert torch.equal(vae.decode(latents), decoded)


@pytest.mark.parametrize("frames", [1, 2])
@pytest.mark.parametrize("tall", [False, True])
def test_a_row_of_tiles_matches_diffusers(small_reference, vae, frames, tall):
    latents = random_latents(1, 16, frames, 6, 27)
    pixels = random_pixels(1, 3, 4 * frames - 3, 48, 216)
    if tall:
        latents, pixels = latents.transpose(3, 4), pixels.transpose(3, 4)
    vae.configure_memory(tile_size=64)
    try:
        small_reference.enable_tiling(64, 64, tile_sample_stride_height=48, tile_sample_stride_width=48)
        expected = small_reference.encode(pixels).latent_dist.mean
        expected_pixels = small_reference.decode(latents).sample
    finally:
        small_reference.use_tiling = False
    assert difference(vae.encode(pixels).mean, expected) < 5e-5
    assert difference(vae.decode(latents), expected_pixels) < 5e-5


@pytest.mark.parametrize("length", [1, 2, 9, 10, 33, 34, 58, 100])
def test_blend_weights_of_all_tiles_add_up_to_one(length):
    spans = overlapping_spans(length, tile=33, overlap=9)
    for axis in [spans, *pixel_spans([spans, spans, spans])]:
        total = torch.zeros(axis[-1][1])
        for index, (start, stop) in enumerate(axis):
            total[start:stop] += blend_weights(axis, index)
        torch.testing.assert_close(total, torch.ones_like(total))


def repeat_pixels(latents: torch.Tensor) -> torch.Tensor:
    """A decoder without reach: each latent becomes its own pixels, the first one a single frame."""
    pixels = latents.repeat_interleave(4, 2).repeat_interleave(8, 3).repeat_interleave(8, 4)
    return pixels[:, :, 3:]


@pytest.mark.parametrize("shape", [(1, 4, 4), (2, 5, 7), (33, 1, 9), (34, 4, 1), (70, 11, 2)])
def test_tiles_of_a_network_without_reach_are_exact(shape):
    latents = random_latents(2, 3, *shape)
    spans = [overlapping_spans(shape[0], 33, 9), overlapping_spans(shape[1], 4, 1), overlapping_spans(shape[2], 4, 1)]
    expected = repeat_pixels(latents)
    pixels = torch.zeros_like(expected)
    run_tiles(repeat_pixels, latents, spans, pixels, pixel_spans(spans))
    torch.testing.assert_close(pixels, expected)


def test_a_clip_longer_than_a_tile_is_blended_from_two(vae):
    latents = random_latents(1, 16, 34, 2, 2)
    first, second = vae.decode(latents[:, :, :33]), vae.decode(latents[:, :, 24:])
    vae.configure_memory(tile_size=32)
    decoded = vae.decode(latents)
    assert torch.equal(decoded[:, :, :97], first[:, :, :97])
    assert torch.equal(decoded[:, :, 129:], second[:, :, 33:])
    weight = torch.arange(33).view(-1, 1, 1) / 33
    blended = first[:, :, 96:] * (1 - weight) + second[:, :, :33] * weight
    assert difference(decoded[:, :, 96:129], blended) < 1e-5


@pytest.mark.parametrize("shape", [(1, 3, 4, 32, 32), (1, 3, 5, 36, 32), (1, 3, 5, 32, 33)])
def test_sizes_that_do_not_compress_are_refused(vae, shape):
    with pytest.raises(ValueError, match="multiples of 8"):
        vae.encode(torch.zeros(shape))


def test_config_errors_name_what_is_wrong():
    table = key_table()
    with pytest.raises(UserError, match=r"'encoder.down_blocks.0.resnets.0.conv1.conv.weight' is missing"):
        VaeConfig.from_shapes({"decoder.middle.0.weight": (3,)})
    without = {key: shape for key, shape in table.items() if "down_blocks.1.downsamplers" not in key}
    with pytest.raises(UserError, match=r"down_blocks.1.downsamplers.*4x8x8"):
        VaeConfig.from_shapes(without)
    with pytest.raises(UserError, match="128 channels cannot be divided into 24 norm groups"):
        VaeConfig.from_shapes(table, {"norm_num_groups": 24})
    with pytest.raises(UserError, match="norm_num_groups = '8'"):
        VaeConfig.from_shapes(table, {"norm_num_groups": "8"})
