"""Makes videos from prompts with HunyuanVideo and LoRAs.

Before: convert nothing; --lora_weight takes a LoRA of hv_train_network.py or of any public tool.
After:  {time}_{i}_{seed}.mp4 in --save_path, playable in a browser, with its settings inside.

    python hv_generate_video.py --prompt "A cat walks on the grass, realistic style." --video_size 544 960 \
        --video_length 49 --infer_steps 30 --fp8 --save_path out --output_type both --seed 1234 \
        --dit ckpts/hunyuan-video-t2v-720p/transformers/mp_rank_00_model_states.pt \
        --vae ckpts/hunyuan-video-t2v-720p/vae/pytorch_model.pt --vae_chunk_size 32 \
        --text_encoder1 ckpts/text_encoder --text_encoder2 ckpts/text_encoder_2 --lora_weight my_lora.safetensors

Models are loaded one after the other: text encoders, DiT, VAE. Latents are on disk before the VAE is loaded.
"""

import dataclasses
import functools
import itertools
import math
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from utils.cli import print_table, run_script
from utils.errors import UserError
from utils.generation_options import (
    GenerationOptions,
    drawn_seed,
    page_settings,
    parse_generation_options,
    video_settings,
)
from utils.option_groups import DitOptions
from utils.prompt_files import Request, parse_line

TEXT_TO_VIDEO_CHANNELS, SKYREELS_I2V_CHANNELS = 16, 32
SKYREELS_TRIGGER = "FPS-24, "  # every caption that SkyReels-V1 was trained on begins with it

if TYPE_CHECKING:
    import torch

    from hunyuan_model.models import HYVideoDiffusionTransformer
    from modules.generation import Generator
    from modules.outputs import Job
    from modules.step_cache import StepCache
    from utils.memory_meter import ModelUsage


def main() -> None:
    options = parse_generation_options(__doc__)
    if options.dit.dit is not None and (options.speed.vram_gb is not None or options.speed.dry_run):
        check_model_files(options)
        options = plan_memory(options)
    if options.speed.dry_run:
        return
    if options.lora.save_merged_model is not None:
        save_merged_model(options)
    elif options.output.latent_path:
        decode_saved(options)
    elif options.lora.compare:
        compare(options, options.prompt.requests())
    elif options.prompt.interactive:
        interact(options)
    elif options.prompt.from_file is not None:
        generate_file(options, options.prompt.requests())
    else:
        generate_one(options, options.prompt.requests()[0])


def generate_one(options: GenerationOptions, request: Request) -> None:
    generator = build_generator(options)
    job = new_job(options, request, index=0)
    generator.run([job])
    report(generator, [job])


def generate_file(options: GenerationOptions, requests: Sequence[Request]) -> None:
    """The lines of a prompt file that are not finished; under `accelerate launch` every process takes its share."""
    from modules.outputs import OutputFolder, run_keys
    from utils.processes import process_share

    outputs = OutputFolder(options.output.save_path, options.output.output_type)
    rank, world = process_share()
    keyed = list(enumerate(zip(requests, run_keys(requests, surroundings(options)), strict=True)))[rank::world]
    pending = [(index, request, key) for index, (request, key) in keyed if not outputs.is_finished(key)]
    if len(pending) < len(keyed):
        print(f"{len(keyed) - len(pending)} of {len(keyed)} prompts are finished and skipped")
    if not pending:
        return
    for _, _, key in pending:
        outputs.remove_leftovers(key)
    jobs = [new_job(options, request, index, key, outputs.sampled_stem(key)) for index, request, key in pending]
    generator = build_generator(options)
    generator.run(jobs)
    report(generator, jobs)


def interact(options: GenerationOptions) -> None:
    """Prompt after prompt until an empty line or the end of input."""
    generator = build_generator(options, keep_loaded=True)
    print("prompt with options (A cat --w 960 --h 544 --d 42), an empty line ends")
    for index, line in enumerate(iter(_next_line, "")):
        try:
            job = new_job(options, options.prompt.valid(parse_line(line, options.prompt.request())), index)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            continue
        generator.run([job])
        if job.stem not in generator.failures:
            print(generator.outputs.result_path(job))


def _next_line() -> str:
    try:
        return input("> ").strip()
    except EOFError:
        return ""


def compare(options: GenerationOptions, requests: Sequence[Request]) -> None:
    """--compare: every LoRA file at every multiplier for every prompt, with one seed and one load of the DiT."""
    from modules.compare import ComparisonOutput, Page, Row
    from modules.outputs import Job, time_stamp
    from networks.live import LiveLoras

    seed = drawn_seed() if options.prompt.seed is None else options.prompt.seed
    requests = [dataclasses.replace(each, seed=seed if each.seed is None else each.seed) for each in requests]
    multipliers = options.lora.lora_multiplier or [1.0]
    stem = f"{time_stamp()}_{seed}_compare"
    jobs: dict[tuple[int, Path | None, float], Job] = {}
    for index, request in enumerate(requests):
        for path, multiplier in [(None, 0.0), *itertools.product(options.lora.lora_weight, multipliers)]:
            jobs[index, path, multiplier] = Job(conditioned(request, options.dit), f"{stem}_{len(jobs):03d}")
    lora_of = {job.stem: [] if path is None else [(path, multiplier)] for (_, path, multiplier), job in jobs.items()}

    generator = build_generator(options)
    generator.outputs = outputs = ComparisonOutput(options.output.save_path, options.output.output_type)
    loras = functools.cache(lambda: LiveLoras(generator.dit.model))
    generator.before_job = lambda job: loras().use(lora_of[job.stem], options.lora.exclude_single_blocks)
    generator.run(list(jobs.values()))
    if not outputs.pixels:
        raise UserError(f"no video could be made: {next(iter(generator.failures.values()))}")
    columns = ["without LoRA", *(f"multiplier {multiplier:g}" for multiplier in multipliers)]
    rows = [
        Row(
            f"{path.stem}: {request.prompt}",
            [
                outputs.pixels.get(jobs[key].stem)
                for key in [(index, None, 0.0), *((index, path, multiplier) for multiplier in multipliers)]
            ],
        )
        for index, request in enumerate(requests)
        for path in options.lora.lora_weight
    ]
    metadata = None if options.output.no_metadata else page_settings(options, seed)
    paths = Page(columns, rows).save(options.output.save_path / stem, requests[0].fps, metadata)
    print_table("compared", [[path] for path in paths])
    report_failures(generator, len(jobs))


def decode_saved(options: GenerationOptions) -> None:
    """--latent_path: only the VAE is loaded."""
    from modules.outputs import Job, load_latents, stem, time_stamp

    saved = [load_latents(path) for path in options.output.latent_path]
    generator, jobs = build_generator(options), []
    for index, (path, (latents, settings)) in enumerate(zip(options.output.latent_path, saved, strict=True)):
        request = Request(fps=options.prompt.fps or int(settings.get("fps", 0)) or Request.fps)
        name = f"{stem(time_stamp(), index, settings.get('seed'))}_{path.stem.removesuffix('_latent')}"
        job = Job(request, name, None if options.output.no_metadata or not settings else settings)
        generator.attempt(
            job, lambda job, latents=latents: generator.outputs.save_pixels(job, generator.decode(latents))
        )
        jobs.append(job)
    report(generator, jobs)


def save_merged_model(options: GenerationOptions) -> None:
    """--save_merged_model: the DiT's file with the LoRAs in its weights, tensor by tensor, and no video."""
    from networks.merged_files import merge_files
    from utils.device_utils import DTYPES
    from utils.processes import own_device

    lora, dtype = options.lora, options.dit.dit_dtype
    reports = merge_files(
        options.dit.dit,
        lora.merged(),
        lora.save_merged_model,
        dtype=None if dtype is None else DTYPES[dtype],
        fp8=options.speed.fp8,
        device=own_device(options.device.device),
        exclude_single_blocks=lora.exclude_single_blocks,
    )
    for report in reports:
        report.announce()
    print(f"written: {lora.save_merged_model}")


def build_generator(options: GenerationOptions, keep_loaded: bool = False) -> "Generator":
    """The models, none of them loaded yet, and everything that the options say about using them."""
    from hunyuan_model.checkpoints import load_text_encoder_1, load_text_encoder_2, load_vae
    from hunyuan_model.vae import SCALING_FACTOR
    from modules.generation import Generator, LazyModel
    from modules.outputs import OutputFolder
    from modules.step_cache import StepCache
    from utils.processes import own_device

    check_model_files(options)
    device = own_device(options.device.device)
    text, vae_dtype = options.text, default_dtype(options.vae.vae_dtype, device)
    text_dtype = default_dtype(text.text_encoder_dtype, device)
    cache = None if options.speed.step_cache is None else StepCache(options.speed.step_cache)

    def lazy(load: Callable) -> LazyModel:
        return LazyModel(load, device, keep_loaded)

    return Generator(
        text_encoder_1=lazy(
            lambda: load_text_encoder_1(text.text_encoder1, device, text_dtype, text.fp8_llm, text.tokenizer1)
        ),
        text_encoder_2=lazy(lambda: load_text_encoder_2(text.text_encoder2, device, text_dtype, text.tokenizer2)),
        dit=lazy(lambda: load_ready_dit(options, device, cache)),
        vae=lazy(lambda: load_vae(options.vae.vae, device, vae_dtype)),
        scaling_factor=SCALING_FACTOR,
        device=device,
        outputs=OutputFolder(options.output.save_path, options.output.output_type),
        source_pixels=source_pixels,
        later_command=lambda latents: decode_command(options, latents),
        split_uncond=options.speed.split_uncond or options.speed.split_attn,
        chunk_size=options.vae.vae_chunk_size,
        tile_size=options.vae.tile_size,
        step_cache=cache,
    )


def check_model_files(options: GenerationOptions) -> None:
    """Looks into every model file's header, so that a wrong file is found before the first one is loaded."""
    from hunyuan_model.model_files import CLIP, DIT, LLM, VAE, identify
    from networks.formats import detect_format
    from utils.safetensors_utils import read_header

    text = options.text
    for path, part in (
        (options.dit.dit, DIT),
        (options.vae.vae, VAE),
        (text.text_encoder1, LLM),
        (text.text_encoder2, CLIP),
    ):
        if path is not None:
            identify(path).tensors(part)
    for path in options.lora.lora_weight:
        if detect_format(list(read_header(path)[0])) is None:
            raise UserError(f"{path}: no LoRA for HunyuanVideo: none of its keys is known")


def plan_memory(options: GenerationOptions) -> GenerationOptions:
    """Prints what the largest request needs; --vram_gb chooses what the user has not.

    Raises:
        UserError: nothing fits.
    """
    from hunyuan_model.block_swap import max_blocks_to_swap, swapped_blocks
    from hunyuan_model.checkpoints import read_dit_config, read_vae_config
    from hunyuan_model.memory import estimate_decoding, measure_dit
    from hunyuan_model.tokenizers import LLM_TOKENS
    from modules import memory_plan as planner
    from modules.sampler import latent_shape
    from utils.processes import own_device

    config, device = read_dit_config(options.dit.dit), own_device(options.device.device)
    depths, requests = (config.depth_double, config.depth_single), options.prompt.requests()
    _, channels, f, h, w = max((latent_shape(request, config.out_channels) for request in requests), key=math.prod)
    in_two = any(request.cfg_scale != 1 for request in requests) and not options.speed.split_uncond
    dtype = default_dtype(options.dit.dit_dtype, device, on_gpu="bfloat16")
    vae_dtype = default_dtype(options.vae.vae_dtype, device)

    @functools.cache
    def measured(fp8: bool) -> "ModelUsage":
        return measure_dit(config, (1 + in_two, config.in_channels, f, h, w), LLM_TOKENS, dtype, fp8)

    def predicted(settings: planner.Settings) -> planner.Prediction:
        return planner.predict(measured(settings.fp8), swapped_blocks(settings.blocks_to_swap, *depths))

    def decoding(tile: int | None) -> int:
        if options.vae.vae is None:
            return 0
        vae = read_vae_config(options.vae.vae)
        return estimate_decoding(vae, (1, channels, f, h, w), vae_dtype, options.vae.vae_chunk_size, tile)

    settings = planner.Settings(options.speed.fp8, "none", options.swap.blocks_to_swap or 0)
    tile, wanted = options.vae.tile_size, options.speed.vram_gb
    if wanted is not None:
        limit = int(wanted * planner.GIB) or planner.free_memory(device)
        if limit is None:
            raise UserError(f"--vram_gb 0: {device} does not say how much memory is free; give a number")
        swap = options.swap.blocks_to_swap
        ordered = planner.candidates(max_blocks_to_swap(*depths, training=False), settings.fp8, "none", swap)
        settings = planner.cheapest(ordered, limit, predicted, training=False)
        tiles = [tile] if tile else [None, 256, 128, 64]
        tile = next((size for size in tiles if planner.with_overhead(decoding(size)) <= limit), tiles[-1])
    rows = [("settings", settings.flags(training=False)), *predicted(settings).rows(training=False)]
    rows += [("VAE tiles", tile or "none"), ("GPU memory of decoding", planner.in_words(decoding(tile)))]
    print_table(f"memory plan, latents {f}x{h}x{w}", rows)
    return dataclasses.replace(
        options,
        speed=dataclasses.replace(options.speed, fp8=settings.fp8),
        swap=dataclasses.replace(options.swap, blocks_to_swap=settings.blocks_to_swap or options.swap.blocks_to_swap),
        vae=dataclasses.replace(options.vae, vae_spatial_tile_sample_min_size=tile),
    )


def conditioned(request: Request, dit: DitOptions) -> Request:
    """The request as this DiT needs it: with an image and its trigger words, or without an image.

    Raises:
        UserError: request and DiT do not go together.
    """
    channels = dit_input_channels(dit.dit)
    if dit.dit_in_channels not in (None, channels):
        raise UserError(f"--dit_in_channels {dit.dit_in_channels}: {dit.dit} has {channels}")
    if channels == SKYREELS_I2V_CHANNELS:
        if request.image_path is None:
            raise UserError(f"{dit.dit}: SkyReels-V1-I2V makes videos of an image; give --image_path")
        prompt = request.prompt.removeprefix(SKYREELS_TRIGGER)
        return dataclasses.replace(request, prompt=SKYREELS_TRIGGER + prompt)
    if channels != TEXT_TO_VIDEO_CHANNELS:
        raise UserError(f"{dit.dit}: {channels} input channels; only 16 (T2V) and 32 (SkyReels-V1-I2V) are supported")
    if request.image_path is not None:
        raise UserError(f"--image_path needs SkyReels-V1-I2V (32 input channels), {dit.dit} has {channels}")
    return request


@functools.cache
def dit_input_channels(path: Path) -> int:
    """From the file's header."""
    from hunyuan_model.checkpoints import read_dit_config

    return read_dit_config(path).in_channels


def source_pixels(request: Request) -> tuple["torch.Tensor | None", "torch.Tensor | None"]:
    """The video and the image that a request starts from, at its size: (3, F, H, W) and (3, 1, H, W) in 0..1."""
    import numpy as np
    import torch
    from einops import rearrange

    from dataset.media import MediaError, load_image, resize_to_bucket
    from utils.video_io import read_frames

    def fitted(frames: Sequence[np.ndarray]) -> torch.Tensor:
        resized = np.stack([resize_to_bucket(frame, (request.width, request.height)) for frame in frames])
        return rearrange(torch.from_numpy(resized), "F H W C -> C F H W").float() / 255

    video = image = None
    if request.video_path is not None:
        frames = read_frames(request.video_path, request.frames)[0].numpy()
        if len(frames) < request.frames:
            shorter = (len(frames) - 1) // 4 * 4 + 1
            raise UserError(
                f"{request.video_path}: {len(frames)} frames, --video_length {request.frames} needs more; "
                f"the longest is {shorter}"
            )
        video = fitted(frames)
    if request.image_path is not None:
        try:
            image = fitted([load_image(Path(request.image_path))])
        except MediaError as error:
            raise UserError(f"{request.image_path}: {error}") from None
    return video, image


def default_dtype(word: str | None, device: "torch.device", on_gpu: str = "float16") -> "torch.dtype":
    """A dtype by its word; unset it is float32 on a CPU and `on_gpu` elsewhere."""
    from utils.device_utils import DTYPES

    return DTYPES[word or ("float32" if device.type == "cpu" else on_gpu)]


def load_merged_dit(options: GenerationOptions, device: "torch.device", fp8: bool) -> "HYVideoDiffusionTransformer":
    """The DiT with its LoRAs merged before it is quantised; on the CPU where it would not fit otherwise."""
    from hunyuan_model.checkpoints import is_quantized_in_dit, load_dit
    from hunyuan_model.model_files import identify
    from networks.live import LiveLoras
    from networks.merging import merge_lora_into
    from utils.fp8 import quantize_linears

    dtype = default_dtype(options.dit.dit_dtype, device, on_gpu="bfloat16")
    loras, speed = options.lora.merged(), options.speed
    # A small change of a weight that is fp8 already would be lost in rounding it back to the same value.
    beside = bool(loras) and fp8 and identify(options.dit.dit).fp8 != "none"
    quantize_later = bool(loras) and fp8 and not beside
    place = "cpu" if options.swap.blocks_to_swap or quantize_later else device
    model = load_dit(options.dit.dit, place, dtype, fp8 and not quantize_later, speed.attn_mode, speed.split_attn)
    if beside:
        LiveLoras(model).use(loras, options.lora.exclude_single_blocks)
    elif loras:
        merge_lora_into(model, loras, options.lora.exclude_single_blocks)
    if quantize_later:
        quantize_linears(model, is_quantized_in_dit)
    return model


def load_ready_dit(
    options: GenerationOptions, device: "torch.device", cache: "StepCache | None"
) -> "HYVideoDiffusionTransformer":
    """The DiT as it samples: merged, quantised, in place, compiled, with a step cache around its blocks."""
    from hunyuan_model.attention import verify_attention
    from hunyuan_model.block_swap import enable_block_swap, offload_embedders
    from modules.compilation import compile_blocks
    from modules.step_cache import add_step_cache
    from utils.fp8 import use_fp8_matmul

    speed = options.speed
    model = load_merged_dit(options, device, speed.fp8)
    verify_attention(speed.attn_mode, device, model.dtype, model.config.head_dim, speed.split_attn)
    if speed.fp8_fast:
        use_fp8_matmul(model, device)
    if options.compile.compile:
        compile_blocks(model.blocks, options.compilation())
    pin = options.swap.use_pinned_memory_for_block_swap or None
    enable_block_swap(model, options.swap.blocks_to_swap or 0, device, pin=pin)
    if options.swap.img_in_txt_in_offloading:
        offload_embedders(model, device)
    if cache is not None:
        streams = [2] * len(model.double_blocks) + [1] * len(model.single_blocks)
        add_step_cache(model.blocks, streams, cache)
    return model


def decode_command(options: GenerationOptions, latents: Path) -> str:
    """The command that decodes saved latents."""
    words = ["python", "hv_generate_video.py", "--vae", options.vae.vae, "--latent_path", latents]
    return shlex.join(map(str, [*words, "--save_path", options.output.save_path]))


def new_job(
    options: GenerationOptions, request: Request, index: int, key: str | None = None, sampled: str | None = None
) -> "Job":
    """A request with its seed drawn and its files named; `sampled` is the stem of latents that are there already."""
    from modules.outputs import Job, stem, time_stamp

    if sampled is not None:
        request = dataclasses.replace(request, seed=int(sampled.split("_")[-2]))
    elif request.seed is None:
        request = dataclasses.replace(request, seed=drawn_seed())
    request = conditioned(request, options.dit)
    name = sampled or stem(time_stamp(), index, request.seed, key)
    return Job(request, name, None if options.output.no_metadata else video_settings(options, request))


def report(generator: "Generator", jobs: Sequence["Job"]) -> None:
    """The table at the end; failures make the exit code 2."""
    rows = [
        [
            job.stem,
            f"{generator.seconds.get(job.stem, 0):.1f} s",
            generator.failures.get(job.stem) or generator.outputs.result_path(job),
        ]
        for job in jobs
    ]
    print_table("generated", rows, ["video", "time", "result"])
    if generator.step_cache is not None:
        print(f"step cache: {generator.step_cache.evaluated} of {generator.step_cache.total} blocks were evaluated")
    report_failures(generator, len(jobs))


def report_failures(generator: "Generator", total: int) -> None:
    if generator.failures:
        raise UserError(
            f"{len(generator.failures)} of {total} videos failed: {next(iter(generator.failures.values()))}"
        )


def surroundings(options: GenerationOptions) -> list[object]:
    """What decides, beside a request, how its video looks: options, and the state of every model file.

    Memory and speed may be traded differently in a second run, and what is finished stays finished.
    """
    dit, text, vae, lora, speed = options.dit, options.text, options.vae, options.lora, options.speed
    files = [dit.dit, vae.vae, text.text_encoder1, text.text_encoder2, *lora.lora_weight]
    states = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in files if path]
    dtypes = [dit.dit_dtype, vae.vae_dtype, text.text_encoder_dtype, text.fp8_llm, speed.fp8, speed.fp8_fast]
    return [states, dtypes, lora.merged(), lora.exclude_single_blocks, speed.step_cache]


if __name__ == "__main__":
    run_script(main)
