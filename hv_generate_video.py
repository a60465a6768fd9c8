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
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from modules.generation.options import (
    GenerationOptions,
    decode_command,
    drawn_seed,
    page_settings,
    parse_generation_options,
    video_settings,
)
from modules.generation.requests import Request, parse_line
from utils.cli import print_table, run_script
from utils.errors import UserError

if TYPE_CHECKING:
    import torch

    from hunyuan_model.models import HYVideoDiffusionTransformer
    from modules.blocks.step_cache import StepCache
    from modules.generation.outputs import Job
    from modules.generation.pipeline import Generator


def main() -> None:
    options = parse_generation_options(__doc__)
    if options.lora.save_merged_model is not None:
        save_merged_model(options)
    elif options.output.latent_path:
        decode_saved(options)
    else:
        generate(options)


def generate(options: GenerationOptions) -> None:
    """Makes what the prompts ask for, or says what memory that needs."""
    requests, typed = options.prompt.requests(), options
    check_model_files(options)
    if options.speed.plans:
        from modules.memory.generation import plan_memory

        options = plan_memory(options, requests)
    if options.speed.dry_run:
        return
    if options.lora.compare:
        compare(options, requests)
    elif options.prompt.interactive:
        interact(options)
    elif options.prompt.from_file is not None:
        generate_file(options, requests, surroundings(typed))
    else:
        generate_one(options, requests[0])


def generate_one(options: GenerationOptions, request: Request) -> None:
    generator = build_generator(options)
    job = new_job(options, request, index=0)
    generator.run([job])
    report(generator, [job])


def generate_file(options: GenerationOptions, requests: Sequence[Request], origin: Sequence[object]) -> None:
    """The lines of a prompt file that are not finished; under `accelerate launch` every process takes its share.

    Args:
        origin: the `surroundings` of the options as they were typed, before --vram_gb chose others.
    """
    from modules.generation.outputs import OutputFolder, remove_leftovers, run_keys, sampled_stem
    from utils.processes import process_share

    outputs = OutputFolder(options.output.save_path, options.output.output_type)
    rank, world = process_share()
    keyed = list(enumerate(zip(requests, run_keys(requests, origin), strict=True)))[rank::world]
    found = outputs.by_key()
    pending = [(index, request, key) for index, (request, key) in keyed if not outputs.is_finished(key, found[key])]
    if len(pending) < len(keyed):
        print(f"{len(keyed) - len(pending)} of {len(keyed)} prompts are finished and skipped")
    if not pending:
        return
    for _, _, key in pending:
        remove_leftovers(found[key])
    jobs = [new_job(options, request, index, key, sampled_stem(key, found[key])) for index, request, key in pending]
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
    from modules.generation.compare import ComparisonOutput, Page, Row
    from modules.generation.outputs import Job, time_stamp
    from modules.generation.variants import conditioned
    from networks.hooks import LoraHooks

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
    loras = functools.cache(lambda: LoraHooks(generator.dit.model))
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
    outputs.remove_latents(jobs.values())
    print_table("compared", [[path] for path in paths])
    report_failures(generator, len(jobs))


def decode_saved(options: GenerationOptions) -> None:
    """--latent_path: only the VAE is loaded."""
    from hunyuan_model.checkpoints import read_vae_config
    from modules.generation.outputs import decoding_job, load_latents

    check_model_files(options)
    channels, output = read_vae_config(options.vae.vae).latent_channels, options.output
    jobs, latents_of = [], {}
    for index, path in enumerate(output.latent_path):
        latents, settings = load_latents(path)
        if latents.shape[1] != channels:
            raise UserError(f"{path}: latents with {latents.shape[1]} channels, this VAE has {channels}")
        jobs.append(decoding_job(path, settings, index, options.prompt.fps, not output.no_metadata))
        latents_of[jobs[-1].stem] = latents
    if options.speed.plans:
        from modules.memory.generation import plan_decoding, print_plan

        largest = max((latents.shape for latents in latents_of.values()), key=math.prod)
        options, rows = plan_decoding(options, largest)
        print_plan(largest, rows)
    if options.speed.dry_run:
        return
    generator = build_generator(options)
    for job in jobs:
        generator.attempt(
            job, lambda job: generator.outputs.save_pixels(job, generator.decoder.decode(latents_of[job.stem]))
        )
    report(generator, jobs)


def save_merged_model(options: GenerationOptions) -> None:
    """--save_merged_model: the DiT's file with the LoRAs in its weights, tensor by tensor, and no video."""
    from networks.files.merged_files import merge_files
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
    from hunyuan_model.attention import verify_attention
    from hunyuan_model.checkpoints import read_dit_config
    from modules.blocks.step_cache import StepCache
    from modules.generation.decoding import Decoder, lazy_vae
    from modules.generation.lazy_model import LazyModel
    from modules.generation.outputs import OutputFolder
    from modules.generation.pipeline import Generator
    from modules.generation.source_pixels import source_pixels
    from modules.generation.text_encoding import lazy_text_encoders
    from utils.device_utils import default_dtype
    from utils.processes import own_device

    device = own_device(options.device.device)
    if not options.output.latent_path:
        dtype = default_dtype(options.dit.dit_dtype, device, on_gpu="bfloat16")
        head_dim = read_dit_config(options.dit.dit).head_dim
        verify_attention(options.speed.attn_mode, device, dtype, head_dim, options.speed.split_attn)
    cache = None if options.speed.step_cache is None else StepCache(options.speed.step_cache)

    when_released = "keep" if keep_loaded else "free"
    encoder_1, encoder_2 = lazy_text_encoders(options.text, device, when_released)
    vae = lazy_vae(options.vae, device, when_released)
    dit_advice = "use --fp8 or --blocks_to_swap"
    return Generator(
        text_encoder_1=encoder_1,
        text_encoder_2=encoder_2,
        dit=LazyModel(lambda: load_ready_dit(options, device, cache), device, when_released, dit_advice),
        decoder=Decoder(vae, device, options.vae.vae_chunk_size, options.vae.tile_size),
        device=device,
        outputs=OutputFolder(options.output.save_path, options.output.output_type),
        source_pixels=source_pixels,
        later_command=lambda latents: decode_command(options, latents),
        split_uncond=options.speed.split_uncond or options.speed.split_attn,
        step_cache=cache,
    )


def check_model_files(options: GenerationOptions) -> None:
    """Looks into every model file's header and into every LoRA, so that a wrong one is found before any is loaded."""
    from hunyuan_model.checkpoints.identification import CLIP, DIT, LLM, VAE, identify

    text = options.text
    for path, part in (
        (options.dit.dit, DIT),
        (options.vae.vae, VAE),
        (text.text_encoder1, LLM),
        (text.text_encoder2, CLIP),
    ):
        if path is not None:
            identify(path).tensors(part)
    if options.dit.dit is not None:
        check_loras(options)


def check_loras(options: GenerationOptions) -> None:
    """Reads every LoRA as merging will, one at a time, and holds it against the header of the DiT's file."""
    from hunyuan_model.checkpoints import open_dit
    from networks.merging import match_loras

    shapes = open_dit(options.dit.dit).shapes
    for path in options.lora.lora_weight:
        match_loras(shapes, [(path, 1.0)], options.lora.exclude_single_blocks)


def load_merged_dit(options: GenerationOptions, device: "torch.device", fp8: bool) -> "HYVideoDiffusionTransformer":
    """The DiT with its LoRAs: each weight is changed before it is rounded, but a weight that is fp8 and stays so.

    Most of a small change would be lost in rounding that to the same value again: there LoRAs compute beside it.
    """
    from hunyuan_model.checkpoints import beside_swapped, load_dit, open_dit, read_dit_config
    from networks.hooks import LoraHooks
    from networks.merging import weight_changes
    from utils.device_utils import default_dtype

    dtype = default_dtype(options.dit.dit_dtype, device, on_gpu="bfloat16")
    path, loras, speed = options.dit.dit, options.lora.merged(), options.speed
    place = beside_swapped(read_dit_config(path), options.swap.blocks_to_swap or 0, device)
    tensors, exclude_single_blocks = open_dit(path), options.lora.exclude_single_blocks
    beside = fp8 and tensors.file.fp8 != "none"
    changes = weight_changes(tensors.shapes, loras, exclude_single_blocks) if loras and not beside else None
    model = load_dit(path, place, dtype, fp8, speed.attn_mode, speed.split_attn, compute=device, changes=changes)
    if loras and beside:
        LoraHooks(model).use(loras, exclude_single_blocks)
    return model


def load_ready_dit(
    options: GenerationOptions, device: "torch.device", cache: "StepCache | None"
) -> "HYVideoDiffusionTransformer":
    """The DiT as it samples: merged, quantised, in place, compiled, with a step cache around its blocks."""
    from hunyuan_model.block_swap import enable_block_swap, offload_embedders
    from hunyuan_model.quantization import use_fp8_matmul
    from modules.blocks.compilation import compile_blocks
    from modules.blocks.step_cache import add_step_cache

    speed = options.speed
    model = load_merged_dit(options, device, speed.fp8)
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


def new_job(
    options: GenerationOptions, request: Request, index: int, key: str | None = None, sampled: str | None = None
) -> "Job":
    """A request with its seed drawn and its files named; `sampled` is the stem of latents that are there already."""
    from modules.generation.outputs import Job, stem, time_stamp
    from modules.generation.variants import conditioned

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
