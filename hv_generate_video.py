r"""Makes videos from prompts with HunyuanVideo and LoRAs.

Before: nothing is required. --lora_weight takes LoRA files of hv_train_network.py and of other trainers as they are.
After:  {time}_{i}_{seed}.mp4 in --save_path, playable in a browser, with its settings inside.

    python hv_generate_video.py --prompt "A cat walks on the grass, realistic style." --video_size 544 960 \
        --video_length 49 --infer_steps 30 --fp8 --save_path out --output_type both --seed 1234 \
        --dit ckpts/hunyuan-video-t2v-720p/transformers/mp_rank_00_model_states.pt \
        --vae ckpts/hunyuan-video-t2v-720p/vae/pytorch_model.pt --vae_chunk_size 32 \
        --text_encoder1 ckpts/text_encoder --text_encoder2 ckpts/text_encoder_2 --lora_weight my_lora.safetensors

Models are loaded one after the other: text encoders, DiT, VAE. Latents are saved before the VAE is loaded.
"""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from modules.generation.settings import parse_generation_options
from utils.cli import print_table, run_script
from utils.errors import UserError

if TYPE_CHECKING:
    from modules.generation.compare import Comparison
    from modules.generation.outputs import Job
    from modules.generation.pipeline import Pipeline


def main() -> None:
    options = parse_generation_options(__doc__)
    requests = options.prompt.requests() if options.samples else []

    # These import torch, which takes seconds. The options are checked by now.
    from modules.generation import jobs, models
    from modules.generation.compare import Comparison
    from modules.generation.pipeline import Pipeline
    from modules.generation.source_pixels import check_sources
    from modules.memory.generation import plan_memory, plan_memory_of_decoding

    if options.lora.save_merged_model is not None:
        models.save_merged_model(options)
        return
    check_sources(requests)
    models.check_models(options)
    saved = jobs.saved_latent_jobs(options) if options.output.latent_path else []
    planned = options
    if options.speed.plans:
        planned = plan_memory_of_decoding(options, saved) if saved else plan_memory(options, requests)
    if options.speed.dry_run:
        return
    if saved:
        make_videos(Pipeline(planned), saved)
    elif options.lora.compare:
        comparison = Comparison.create(planned, requests)
        compare(Pipeline(planned), comparison)
    elif options.prompt.interactive:
        interact(Pipeline(planned, when_released="keep"), jobs.interactive_jobs(planned))
    elif options.prompt.from_file is not None:
        if unfinished := jobs.unfinished_jobs(planned, requests, typed=options):
            make_videos(Pipeline(planned), unfinished)
    else:
        make_videos(Pipeline(planned), [jobs.new_job(planned, requests[0], index=0)])


def make_videos(pipeline: "Pipeline", jobs: Sequence["Job"]) -> None:
    pipeline.sample(jobs)
    pipeline.decode(jobs)
    rows = [
        [
            job.stem,
            f"{pipeline.seconds.get(job.stem, 0):.1f} s",
            pipeline.failures.get(job.stem) or pipeline.outputs.result_path(job),
        ]
        for job in jobs
    ]
    print_table("generated", rows, ["video", "time", "result"])
    if pipeline.step_cache is not None:
        print(f"step cache: {pipeline.step_cache.evaluated} of {pipeline.step_cache.total} blocks were evaluated")
    raise_if_failed(pipeline, len(jobs))


def interact(pipeline: "Pipeline", jobs: Iterable["Job"]) -> None:
    """Makes each video as soon as its prompt is typed."""
    for job in jobs:
        pipeline.sample([job])
        pipeline.decode([job])
        if job.stem not in pipeline.failures:
            print(pipeline.outputs.result_path(job))


def compare(pipeline: "Pipeline", comparison: "Comparison") -> None:
    """Puts all videos on one page. Their latents are kept until it is saved."""
    pipeline.sample(comparison.jobs)
    with comparison.kept_frames() as frames:
        pipeline.decode(comparison.jobs, save=frames.keep)
        if not frames:
            raise UserError(f"no video could be made: {next(iter(pipeline.failures.values()))}")
        paths = comparison.save(frames)
        for job in comparison.jobs:
            if job.stem in frames:
                pipeline.remove_unwanted_latents(job)
    print_table("compared", [[path] for path in paths])
    raise_if_failed(pipeline, len(comparison.jobs))


def raise_if_failed(pipeline: "Pipeline", total: int) -> None:
    """Makes the exit code 2 if a video failed."""
    if failures := list(pipeline.failures.values()):
        raise UserError(f"{len(failures)} of {total} videos failed: {failures[0]}")


if __name__ == "__main__":
    run_script(main)
