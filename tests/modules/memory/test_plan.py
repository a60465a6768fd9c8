"""The planner's predictions against the bytes of real models that train or sample on the CPU."""

import functools
import itertools
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from hunyuan_model.block_swap import enable_block_swap, swapped_blocks
from hunyuan_model.checkpoints import is_quantized_in_dit
from hunyuan_model.quantization import quantize_linears
from hunyuan_model.vae import AutoencoderKLCausal3D, VaeConfig
from modules.blocks.step_cache import StepCache, apply_step_cache
from modules.generation.options import GenerationOptions, LoraOptions, OutputOptions, PromptOptions, SpeedOptions
from modules.memory import generation as planned
from modules.memory.measure import add_step_cache_memory, estimate_vae, measure_dit, measure_vae
from modules.memory.meter import BlockUsage, MemoryMeter, ModelUsage, nbytes
from modules.memory.plan import (
    GIB,
    MemoryPlan,
    Prediction,
    Settings,
    candidate_settings,
    fastest_that_fits,
    fastest_that_needs_less,
    free_main_memory,
    memory_limit,
    pinned_bytes,
    predict,
)
from modules.options import BlockSwapOptions, CompileOptions, DeviceOptions, DitOptions, TextEncoderOptions, VaeOptions
from tests.small_dit import prepare, random_dit, small_config
from utils.errors import UserError

CONFIG = small_config(hidden_size=128, heads=4, mlp_hidden=512, depth_double=3, depth_single=6, rope_dims=(4, 14, 14))
TEXT_TOKENS = 12


def really_used(shape: tuple, dtype: torch.dtype, fp8: bool, checkpointing: str | None, swap: int) -> int:
    """Bytes of resident weights and the peak of a step; `checkpointing` None is sampling."""
    dit = random_dit(CONFIG, dtype=dtype)
    if fp8:
        quantize_linears(dit, is_quantized_in_dit)
    streamed = enable_block_swap(dit, swap, "cpu")
    weights = sum(map(nbytes, dit.parameters()))
    if streamed:
        weights += sum(map(nbytes, streamed.ring)) - sum(block.nbytes for block in streamed.blocks)
    network = prepare(dit, checkpointing) if checkpointing else None
    B = shape[0]
    given = (
        torch.randn(shape, dtype=dtype),
        torch.full((B,), 500.0),
        torch.randn(B, TEXT_TOKENS, 64, dtype=dtype),
        torch.ones(B, TEXT_TOKENS) if B == 1 else (torch.arange(TEXT_TOKENS) < torch.tensor([[TEXT_TOKENS], [5]])),
        torch.randn(B, 64, dtype=dtype),
        torch.full((B,), 6000.0),
    )
    with MemoryMeter() as meter, torch.set_grad_enabled(network is not None):
        output = dit(*given)
        if network:
            output.float().square().mean().backward()
    return weights + meter.peak


TRAINING = [
    *itertools.product(["none", "offload"], [False, True], [0]),
    *itertools.product(["selective", "full"], [False, True], [0, 2]),
]
SHAPES = [(1, 16, 3, 32, 32), (2, 16, 1, 32, 32)]


@pytest.mark.parametrize(("checkpointing", "fp8", "swap"), TRAINING)
def test_training_is_predicted_within_a_tenth(checkpointing: str, fp8: bool, swap: int) -> None:
    shape, dtype = SHAPES[0], torch.float32
    usage = measure_dit(CONFIG, shape, TEXT_TOKENS, dtype, fp8, True, lambda dit: prepare(dit, checkpointing))
    offload = checkpointing == "offload"
    predicted = predict(usage, swapped_blocks(swap, 3, 6), offload=offload)
    offloaded = sum(sum(block.streams) for block in usage.blocks) if offload else 0
    assert offloaded <= predicted.offloaded <= 2 * offloaded
    expected = predicted.tensors + offloaded
    assert expected == pytest.approx(really_used(shape, dtype, fp8, checkpointing, swap), rel=0.1)


@pytest.mark.parametrize("shape", SHAPES, ids=["one", "ragged batch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_sampling_is_predicted_within_a_tenth(shape: tuple, dtype: torch.dtype) -> None:
    usage = measure_dit(CONFIG, shape, TEXT_TOKENS, dtype)
    assert predict(usage).tensors == pytest.approx(really_used(shape, dtype, False, None, 0), rel=0.1)


def test_a_step_cache_is_counted() -> None:
    shape, dit, cache = SHAPES[0], random_dit(CONFIG), StepCache(threshold=0.0)
    apply_step_cache(dit.blocks, [2] * CONFIG.depth_double + [1] * CONFIG.depth_single, cache)
    text = (torch.randn(1, TEXT_TOKENS, 64), torch.ones(1, TEXT_TOKENS), torch.randn(1, 64), torch.full((1,), 6000.0))
    with MemoryMeter() as meter, torch.no_grad():
        for step in range(3):
            cache.begin_step(step, 3)
            for _ in range(2):
                dit(torch.randn(shape), torch.full((1,), 500.0), *text)
    usage = add_step_cache_memory(measure_dit(CONFIG, shape, TEXT_TOKENS, torch.float32), calls=2)
    used = sum(map(nbytes, dit.parameters())) + meter.peak
    assert predict(usage).tensors == pytest.approx(used, rel=0.1)


@pytest.mark.parametrize(("chunk", "tile"), [(None, None), (4, None), (4, 64)])
@pytest.mark.parametrize("shape", [(1, 3, 9, 96, 96), (1, 16, 3, 12, 12)], ids=["encode", "decode"])
def test_vae_is_predicted_within_a_tenth(shape: tuple, chunk: int | None, tile: int | None) -> None:
    config = VaeConfig(block_out_channels=(8, 16, 16, 16), norm_num_groups=4)
    vae = AutoencoderKLCausal3D(config).requires_grad_(False)
    vae.configure_memory(chunk, tile)
    with MemoryMeter() as meter, torch.no_grad():
        given = torch.randn(shape)
        vae.encode(given) if shape[1] == config.pixel_channels else vae.decode(given)
    used = meter.peak + sum(map(nbytes, vae.parameters()))
    assert measure_vae(config, shape, torch.float32, chunk, tile) == pytest.approx(used, rel=0.1)


@pytest.mark.parametrize("shape", [(1, 3, 225, 32, 32), (1, 16, 57, 4, 4)], ids=["encode", "decode"])
def test_the_largest_tile_predicts_the_memory_of_all(shape: tuple) -> None:
    config = VaeConfig(block_out_channels=(4, 4, 4, 4), layers_per_block=1, norm_num_groups=4)
    used = measure_vae(config, shape, torch.float32, None, 32)
    assert estimate_vae(config, shape, torch.float32, None, 32) == pytest.approx(used, rel=0.1)


def test_the_sum_of_a_prediction_by_hand() -> None:
    """Four blocks of 3 GiB, of which two are swapped, with two buffers for the larger of these."""
    sizes = (3, 1, 3, 5)
    blocks = tuple(BlockUsage(size * GIB, GIB, 2 * GIB, size * GIB // 2, (GIB, GIB)) for size in sizes)
    predicted = predict(ModelUsage(blocks, 7 * GIB, 2 * GIB), swapped=[1, 2], trained=1000, state_bytes=8)
    assert predicted.weights == (7 + 12 + 4 - 4 + 2 * 3) * GIB
    assert predicted.trained == 16_000  # float32 weight, gradient and two moments
    assert predicted.saved == (2 + 8) * GIB and predicted.working == 5 * GIB // 2 and predicted.swapped == 4 * GIB
    assert predicted.device == pytest.approx(1.05 * predicted.tensors + 0.7 * GIB, abs=1)
    alone = predict(ModelUsage(blocks, 7 * GIB, 2 * GIB), swapped=[2], ring_size=2)
    assert alone.weights == (7 + 12 + 4 - 3 + 3) * GIB  # one block needs one buffer
    assert predict(ModelUsage(blocks, 7 * GIB, 2 * GIB), offload=True).saved == (2 + 2) * GIB
    assert predict(ModelUsage(blocks, 7 * GIB, 2 * GIB), trained=1000, state_bytes=2).trained == 10_000


@pytest.mark.parametrize(("words", "batch"), [({}, 2), ({"split_attn": True}, 1), ({"split_uncond": True}, 1)])
def test_guidance_is_planned_as_it_is_called(tiny_models, monkeypatch, words: dict, batch: int) -> None:
    measured = []

    def measure(config, shape, *_):
        measured.append(shape)
        return ModelUsage((BlockUsage(1, 1, 0, 1, (1,)),), 1, 1)

    monkeypatch.setattr(planned, "measure_dit", measure)
    options = GenerationOptions(
        prompt=PromptOptions(prompt="cat"),
        dit=DitOptions(dit=tiny_models.dit),
        text=TextEncoderOptions(text_encoder1=tiny_models.text_encoder1, text_encoder2=tiny_models.text_encoder2),
        vae=VaeOptions(),
        lora=LoraOptions(),
        speed=SpeedOptions(**words),
        compile=CompileOptions(),
        swap=BlockSwapOptions(),
        output=OutputOptions(save_path=Path("out"), output_type="latent"),
        device=DeviceOptions(device="cpu"),
    )
    planned._plan_sampling(options, (1, 16, 2, 4, 6), guided=True)
    assert measured == [(batch, 16, 2, 4, 6)]


def test_the_fastest_that_fits() -> None:
    @functools.cache
    def measured(fp8: bool, checkpointing: str) -> ModelUsage:
        apply = functools.partial(prepare, checkpointing=checkpointing)
        return measure_dit(CONFIG, SHAPES[0], TEXT_TOKENS, torch.bfloat16, fp8, True, apply)

    def predicted(settings: Settings) -> Prediction:
        usage = measured(settings.fp8, settings.checkpointing)
        return predict(
            usage, swapped_blocks(settings.blocks_to_swap, 3, 6), offload=settings.checkpointing == "offload"
        )

    ordered = candidate_settings(max_swap=4)
    assert fastest_that_fits(ordered, 80 * GIB, predicted) == Settings()
    limit = predicted(Settings(True, "full", 0)).device
    chosen = fastest_that_fits(ordered, limit, predicted)
    assert predicted(chosen).device <= limit
    assert all(predicted(s).device > limit for s in ordered if s.relative_time < chosen.relative_time)
    with pytest.raises(UserError, match=r"nothing fits 102\.4 MiB.*--fp8_base --gradient_checkpointing"):
        fastest_that_fits(ordered, GIB // 10, predicted)


def test_what_main_memory_cannot_hold_is_not_chosen() -> None:
    needed = {Settings(): (30, 0), Settings(False, "full", 20): (9, 60), Settings(True, "full"): (12, 0)}

    def predicted(settings: Settings) -> Prediction:
        device, swapped = needed[settings]
        return Prediction(device * GIB, 0, 0, 0, swapped * GIB)

    assert fastest_that_fits(list(needed), 16 * GIB, predicted, host_limit=64 * GIB) == Settings(False, "full", 20)
    assert fastest_that_fits(list(needed), 16 * GIB, predicted, host_limit=32 * GIB) == Settings(True, "full")
    with pytest.raises(UserError, match=r"--fp8_base --gradient_checkpointing 13\.30 GiB are needed, and 0\.0 MiB of"):
        fastest_that_fits(list(needed), 10 * GIB, predicted, host_limit=32 * GIB)


def write_cgroups(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True)
    for name, content in files.items():
        (folder / name.replace("__", ".")).write_text(content)


def test_a_container_may_leave_less_main_memory_than_the_machine(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=100))
    assert free_main_memory(tmp_path / "none") == 100
    write_cgroups(tmp_path / "2", memory__max="70\n", memory__current="50\n", memory__stat="anon 9\ninactive_file 20\n")
    assert free_main_memory(tmp_path / "2") == 40
    write_cgroups(tmp_path / "free", memory__max="max\n", memory__current="50\n", memory__stat="inactive_file 20\n")
    assert free_main_memory(tmp_path / "free") == 100
    old = {"memory__limit_in_bytes": "70", "memory__usage_in_bytes": "60", "memory__stat": "total_inactive_file 4"}
    write_cgroups(tmp_path / "1" / "memory", **old)
    assert free_main_memory(tmp_path / "1") == 14
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert free_main_memory(tmp_path / "1") == 7


def test_offloaded_activations_are_rounded_up_as_pinned_memory_is() -> None:
    assert [pinned_bytes(size) for size in (1, 7, 8, 9)] == [1, 8, 8, 16]
    block = BlockUsage(0, 0, 0, 0, (3 * GIB, 5))
    predicted = predict(ModelUsage((block, block), 0, 0), offload=True)
    assert predicted.host == predicted.offloaded == 2 * (4 * GIB + 8)
    assert dict(predicted.rows())["main memory for swapped blocks"] == "0.0 MiB"
    assert dict(predicted.rows())["main memory for offloaded activations"] == "8.00 GiB"


def test_vram_gb_in_bytes() -> None:
    assert memory_limit(None, 5) is None
    assert memory_limit(0.5, None) == GIB // 2
    assert memory_limit(0, 5) == 5
    with pytest.raises(UserError, match="--vram_gb 0: this device"):
        memory_limit(0, None)


def test_candidates_keep_what_the_user_chose() -> None:
    assert {s.fp8 for s in candidate_settings(4, fp8=True)} == {True}
    assert {s.checkpointing for s in candidate_settings(4, checkpointing="full")} == {"full"}
    assert {s.blocks_to_swap for s in candidate_settings(4, blocks_to_swap=3)} == {3}
    assert {s.blocks_to_swap for s in candidate_settings(38)} == set(range(0, 39, 2))
    assert not any(s.blocks_to_swap for s in candidate_settings(4) if s.checkpointing == "none")
    assert Settings(False, "none", 4) in candidate_settings(4, checkpointing="none")
    times = [s.relative_time for s in candidate_settings(4)]
    assert times == sorted(times)


def test_the_settings_to_try_after_out_of_memory() -> None:
    sizes = {Settings(): 30, Settings(True): 28, Settings(False, "selective"): 22, Settings(True, "full", 2): 9}

    def predicted(settings: Settings) -> Prediction:
        return Prediction(sizes[settings] * GIB, 0, 0, 0, 0)

    assert fastest_that_needs_less(Settings(), list(sizes), predicted) == Settings(False, "selective")
    assert fastest_that_needs_less(Settings(True, "full", 2), list(sizes), predicted) is None
    assert Settings(True, "full", 2).flags() == "--fp8_base --gradient_checkpointing --blocks_to_swap 2"
    assert Settings(True, "none", 2).flags(training=False) == "--fp8 --blocks_to_swap 2"


def plan_of(sizes: dict[Settings, int]) -> MemoryPlan:
    return MemoryPlan(
        Settings(), list(sizes), lambda settings: Prediction(sizes[settings] * GIB, 0, 0, 0, 0), "batch of 1"
    )


def test_running_out_of_memory_is_one_line_with_a_way_out() -> None:
    plan = plan_of({Settings(): 30, Settings(True, "full", 2): 9})
    advice = r"in training: batch of 1.*try --fp8_base --gradient_checkpointing --blocks_to_swap 2"
    with pytest.raises(UserError, match=advice), plan.explain_out_of_memory("in training"):
        raise torch.OutOfMemoryError("CUDA out of memory")
    with (
        pytest.raises(UserError, match="lower resolution, frames or batch size"),
        plan_of({Settings(): 1}).explain_out_of_memory("x"),
    ):
        raise torch.OutOfMemoryError("CUDA out of memory")


def test_a_prediction_above_the_free_memory_is_a_warning(capsys: pytest.CaptureFixture[str]) -> None:
    plan = plan_of({Settings(): 30, Settings(True, "full", 2): 9})
    plan.warn_if_too_large(40 * GIB)
    assert capsys.readouterr().err == ""
    plan.warn_if_too_large(20 * GIB)
    assert "--fp8_base --gradient_checkpointing --blocks_to_swap 2 would fit" in capsys.readouterr().err
    plan.warn_if_too_large(5 * GIB)
    assert "nothing fits 5.00 GiB" in capsys.readouterr().err
