"""From requests to jobs: seeds are drawn, files are named, and what an earlier run has finished is left out.

The files of a video begin with `{time}_{i}_{seed}`. A line of a prompt file adds `_{key}`, a hash of everything that
decides how the video looks: contents of files, not their paths and times. By its key a later run with the same prompt
file finds what is finished.
"""

import dataclasses
import hashlib
import random
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from hunyuan_model.checkpoints import identify, read_vae_config
from hunyuan_model.tokenizers import CLIP_REPOSITORY, LLM_REPOSITORY, find_tokenizer, tokenizer_files
from modules.generation.options import GenerationOptions
from modules.generation.outputs import Job, OutputFolder, load_latents, sampled_stem
from modules.generation.requests import LINE_HELP, Request, parse_line
from modules.generation.settings import video_settings
from modules.generation.source_pixels import check_sources
from modules.generation.variants import request_for_dit
from utils.content_hashes import ContentHashes
from utils.errors import UserError
from utils.processes import process_share

KEY_LENGTH = 10
HASHES = ".hashes.json"  # in --save_path, the hashes of large model files


def new_job(
    options: GenerationOptions, request: Request, index: int, key: str | None = None, sampled: str | None = None
) -> Job:
    """The job that makes a request.

    Args:
        index: position of the request among all of this run, for the name.
        key: the key of the line, if the request is a line of a prompt file.
        sampled: stem of latents that an earlier run has saved for this line; the job takes it with its seed.
    """
    if sampled is not None:
        request = dataclasses.replace(request, seed=int(sampled.split("_")[-2]))
    elif request.seed is None:
        request = dataclasses.replace(request, seed=drawn_seed())
    request = request_for_dit(request, options.dit)
    name = sampled or stem(time_stamp(), index, request.seed, key)
    return Job(request, name, None if options.output.no_metadata else video_settings(options, request))


def unfinished_jobs(options: GenerationOptions, requests: Sequence[Request], typed: GenerationOptions) -> list[Job]:
    """The lines of a prompt file that are not finished; under `accelerate launch` the share of this process.

    Args:
        typed: the options before --vram_gb changed them. They decide the keys, so that another --vram_gb does not make
            finished lines again.
    """
    outputs = OutputFolder(options.output.save_path, options.output.output_type)
    rank, world = process_share()
    hashes = ContentHashes(options.output.save_path / HASHES)
    keys = run_keys(requests, video_identity(typed, hashes), hashes)
    keyed = list(enumerate(zip(requests, keys, strict=True)))[rank::world]
    found = outputs.by_key()
    pending = [(index, request, key) for index, (request, key) in keyed if not outputs.is_finished(key, found[key])]
    if len(pending) < len(keyed):
        print(f"{len(keyed) - len(pending)} of {len(keyed)} prompts are finished and skipped")
    return [new_job(options, request, index, key, sampled_stem(key, found[key])) for index, request, key in pending]


def interactive_jobs(options: GenerationOptions) -> Iterator[Job]:
    """Reads a prompt from the terminal whenever the next job is asked for, until `exit` or the end of input.

    An empty line asks again, and `help` lists the options of a line.
    """
    print("a prompt with options (A cat --w 960 --h 544 --d 42); help lists the options, exit ends")
    index = 0
    for line in iter(_next_line, None):
        if line in ("", "help"):
            print(LINE_HELP if line else "type a prompt, help or exit")
            continue
        try:
            request = options.prompt.valid(parse_line(line, options.prompt.request()))
            check_sources([request])
            job = new_job(options, request, index)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            continue
        index += 1
        yield job


def _next_line() -> str | None:
    """What was typed; None at the end: `exit`, `quit` or the end of input."""
    try:
        line = input("> ").strip()
    except EOFError:
        return None
    return None if line in ("exit", "quit") else line


def saved_latent_jobs(options: GenerationOptions) -> list[Job]:
    """The files of --latent_path, read and checked, as jobs that only decode.

    Raises:
        UserError: a file holds no latents, or latents of another VAE.
    """
    channels, output, jobs = read_vae_config(options.vae.vae).latent_channels, options.output, []
    for index, path in enumerate(output.latent_path):
        latents, settings = load_latents(path)
        if latents.shape[1] != channels:
            raise UserError(f"{path}: latents with {latents.shape[1]} channels, this VAE has {channels}")
        job = decoding_job(path, settings, index, options.prompt.fps, not output.no_metadata)
        jobs.append(dataclasses.replace(job, latents=latents))
    return jobs


def decoding_job(path: Path, settings: Mapping[str, object], index: int, fps: int | None, metadata: bool) -> Job:
    """The job that makes a video of saved latents, without the latents.

    Args:
        settings: those inside the file.
        index: position of the file among all of this run, for the name.
        fps: frames per second of the video; None: the value in the settings.
        metadata: whether the video gets the settings.

    Raises:
        UserError: the frames per second of the settings are not a whole number.
    """
    saved, seed = str(settings.get("fps", Request.fps)), str(settings.get("seed"))
    if fps is None and (not saved.isdecimal() or int(saved) == 0):
        raise UserError(f"{path}: its settings say fps {saved}, a whole number is expected; give --fps")
    name = f"{stem(time_stamp(), index, int(seed) if seed.isdecimal() else None)}_{path.stem.removesuffix('_latent')}"
    return Job(Request(fps=fps or int(saved)), name, settings if metadata and settings else None)


def drawn_seed() -> int:
    """A random seed."""
    return random.SystemRandom().randrange(2**32)


def time_stamp() -> str:
    """Date and time for file names."""
    return time.strftime("%Y%m%d-%H%M%S")


def stem(stamp: str, index: int, seed: int | None, key: str | None = None) -> str:
    """`{time}_{i}_{seed}`, and `_{key}` for a line of a prompt file."""
    return "_".join(str(part) for part in (stamp, index, seed, key) if part is not None)


def run_keys(requests: Sequence[Request], identity: object, hashes: ContentHashes) -> list[str]:
    """A key for each line of a prompt file, the same in every run.

    Equal lines get different keys by their order. A line keeps its key when other lines are added or removed.

    Args:
        identity: everything else that decides how the videos look, such as model files; any object with a stable repr.
    """
    keys, seen = [], Counter()
    for request in requests:
        own = repr(_request_identity(request, hashes))
        seen[own] += 1
        line = repr((own, seen[own], identity))
        keys.append(hashlib.sha256(line.encode(errors="surrogatepass")).hexdigest()[:KEY_LENGTH])
    return keys


def _request_identity(request: Request, hashes: ContentHashes) -> Request:
    """The request with only what decides its pixels: contents instead of paths, and nothing that is not used."""
    unused = {"fps": 0} | ({"negative_prompt": ""} if request.cfg_scale == 1.0 else {})
    sources = {name: path for name in ("video_path", "image_path") if (path := getattr(request, name)) is not None}
    contents = {name: hashes.of(Path(path)) for name, path in sources.items()}
    return dataclasses.replace(request, **unused, **contents)


def video_identity(options: GenerationOptions, hashes: ContentHashes) -> list[object]:
    """Everything that decides how a video looks, except its request: some options, and contents of model files.

    Options that only trade memory for time are left out.
    """
    dit, text, vae, lora, speed = options.dit, options.text, options.vae, options.lora, options.speed
    models = [dit.dit, vae.vae, text.text_encoder1, text.text_encoder2]
    checkpoints = [identify(path).checkpoint for path in models if path is not None]
    contents = [([hashes.of(path) for path in checkpoint.paths], checkpoint.config) for checkpoint in checkpoints]
    for model, given, repository in (
        (text.text_encoder1, text.tokenizer1, LLM_REPOSITORY),
        (text.text_encoder2, text.tokenizer2, CLIP_REPOSITORY),
    ):
        contents.append([hashes.of(path) for path in tokenizer_files(find_tokenizer(model, given, repository))])
    dtypes = [dit.dit_dtype, vae.vae_dtype, text.text_encoder_dtype, text.fp8_llm, speed.fp8, speed.fp8_fast]
    loras = [(hashes.of(path), multiplier) for path, multiplier in lora.merged()]
    return [contents, dtypes, loras, lora.exclude_single_blocks, speed.step_cache]
