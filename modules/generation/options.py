"""The options of hv_generate_video.py: what to make, from which LoRAs, how fast, and where it goes."""

import dataclasses
import random
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from hunyuan_model.attention_modes import ATTENTION_MODES, require_attention
from modules.generation.requests import MAX_STEPS, Request, read_prompt_file, with_valid_size
from modules.options import (
    COMPILE_MODES,
    BlockSwapOptions,
    CompileOptions,
    DeviceOptions,
    DitOptions,
    TextEncoderOptions,
    VaeOptions,
    require,
)
from utils.cli import option, parse_options
from utils.errors import UserError
from utils.files import refuse_overwriting

MEDIA_SUFFIXES = (".mp4", ".png", ".safetensors")


@dataclass(frozen=True, kw_only=True)
class PromptOptions:
    """what to make"""

    prompt: str | None = option(None, help="what the video shows")
    negative_prompt: str | None = option(None, help="what it is steered away from; used with --guidance_scale above 1")
    from_file: Path | None = option(
        None,
        help="many prompts (.txt, .toml, .json; lines as `A cat --w 960 --h 544 --f 49 --d 42`), finished ones are "
        "skipped; or an .mp4, .png or latent .safetensors of ours, whose settings are run again",
        path="file",
    )
    interactive: bool = option(False, help="read prompt after prompt from the terminal, with every model kept loaded")
    video_size: tuple[int, int] = option((256, 256), help="height and width in pixels, multiples of 16", minimum=1)
    video_length: int = option(129, help="frames, 4n + 1", minimum=1)
    fps: int | None = option(
        None, help="frames per second of the file (default: 24, or what saved latents say)", minimum=1
    )
    infer_steps: int = option(50, help="denoising steps", minimum=1, maximum=MAX_STEPS)
    seed: int | None = option(None, help="seed of the noise; drawn and reported when omitted", minimum=0)
    embedded_cfg_scale: float = option(6.0, help="guidance of the distilled model (embedded)", minimum=0)
    guidance_scale: float = option(
        1.0, help="classifier-free guidance; 1 is none, else two predictions a step", minimum=0
    )
    flow_shift: float = option(7.0, help="7 at 50 steps, 17 below 20 steps", minimum=1e-6)
    video_path: Path | None = option(None, help="video to start from (video to video)", path="file")
    strength: float = option(0.8, help="how much of that video is replaced, 0 to 1", minimum=0, maximum=1)
    image_path: Path | None = option(None, help="first frame, for SkyReels-V1-I2V (32 input channels)", path="file")
    strict: bool = option(False, help="refuse sizes and lengths that the model does not have instead of rounding them")

    def __post_init__(self) -> None:
        sources = [f"--{name}" for name in ("prompt", "from_file", "interactive") if getattr(self, name)]
        if len(sources) > 1:
            raise UserError(f"{' and '.join(sources)} exclude each other; give one")
        if self.strength == 0:
            raise UserError("--strength 0 leaves the video as it is; give a number above 0")
        if self.seed is not None and self.seed >= 2**63:
            raise UserError(f"--seed {self.seed}: seeds are below 2^63")

    def request(self) -> Request:
        """The options as a request; lines of a prompt file start from it."""
        return Request(
            prompt=self.prompt or "",
            negative_prompt=self.negative_prompt or "",
            height=self.video_size[0],
            width=self.video_size[1],
            frames=self.video_length,
            seed=self.seed,
            steps=self.infer_steps,
            guidance=self.embedded_cfg_scale,
            cfg_scale=self.guidance_scale,
            flow_shift=self.flow_shift,
            fps=self.fps or Request.fps,
            video_path=None if self.video_path is None else str(self.video_path),
            strength=self.strength,
            image_path=None if self.image_path is None else str(self.image_path),
        )

    def requests(self) -> list[Request]:
        """Everything that is to be made, with valid sizes; what was rounded is printed."""
        requests = [self.request()] if self.from_file is None else read_prompt_file(self.from_file, self.request())
        return [self.valid(request, f"video {index}: ") for index, request in enumerate(requests, start=1)]

    def valid(self, request: Request, place: str = "") -> Request:
        """The request with a size that the model has; see --strict."""
        request, warnings = with_valid_size(request, self.strict)
        for warning in warnings:
            print(f"warning: {place}{warning}", file=sys.stderr)
        return request


@dataclass(frozen=True, kw_only=True)
class LoraOptions:
    """LoRA"""

    lora_weight: list[Path] = option([], help="LoRA, LoHa or LoKr files in any format", path="file")
    lora_multiplier: list[float] = option([], help="one per --lora_weight, or one for all; 1.0 when omitted")
    exclude_single_blocks: bool = option(False, help="leave the single blocks without LoRA")
    lycoris: bool = option(False, help="accepted; LoHa and LoKr are merged without the lycoris package")
    save_merged_model: Path | None = option(None, help="write the DiT with the LoRAs merged (.safetensors) and stop")
    compare: bool = option(
        False,
        help="one labelled page (mp4 and PNG) of every --lora_weight at every --lora_multiplier for every prompt, "
        "with one seed, beside the model without LoRA",
    )

    def __post_init__(self) -> None:
        files, multipliers = len(self.lora_weight), len(self.lora_multiplier)
        if not files and (multipliers or self.compare):
            raise UserError(f"--{'compare' if self.compare else 'lora_multiplier'} needs --lora_weight")
        if not self.compare and multipliers > 1 and multipliers != files:
            raise UserError(f"--lora_multiplier: {multipliers} values for {files} --lora_weight; give one each, or one")
        if self.save_merged_model is not None and self.save_merged_model.suffix != ".safetensors":
            raise UserError(
                f"--save_merged_model {self.save_merged_model}: a name that ends in .safetensors is expected"
            )

    def merged(self) -> list[tuple[Path, float]]:
        """Every LoRA file with its multiplier; none where they are compared one by one."""
        if self.compare:
            return []
        multipliers = self.lora_multiplier or [1.0]
        if len(multipliers) == 1:
            multipliers = multipliers * len(self.lora_weight)
        return list(zip(self.lora_weight, multipliers, strict=True))


@dataclass(frozen=True, kw_only=True)
class SpeedOptions:
    """memory and speed"""

    attn_mode: str = option("torch", help="attention; torch and sdpa are the same", choices=list(ATTENTION_MODES))
    split_attn: bool = option(False, help="one prompt per call of the model; implies --split_uncond")
    split_uncond: bool = option(False, help="two calls with one video instead of one with two; half the activations")
    fp8: bool = option(False, help="keep the Linear weights of the DiT's blocks as float8, half the memory of bfloat16")
    fp8_fast: bool = option(False, help="multiply in float8 as well (needs --fp8 and an RTX 40, H100 or newer GPU)")
    step_cache: float | None = option(
        None,
        help="leave out the blocks of steps that change less than this, e.g. 0.1; faster, slightly different videos",
        minimum=0,
    )
    vram_gb: float | None = option(
        None,
        help="choose --fp8, --blocks_to_swap, --fp8_llm and the VAE's tiles to fit so many GiB; 0: what is free",
        minimum=0,
    )
    dry_run: bool = option(False, help="print the memory that is needed, and end")
    compile_args: list[str] = option([], help="deprecated: backend, mode, dynamic, fullgraph of --compile in one")

    @property
    def plans(self) -> bool:
        """Whether the memory is planned before a model is loaded."""
        return self.dry_run or self.vram_gb is not None

    def __post_init__(self) -> None:
        require_attention(self.attn_mode)
        if self.fp8_fast and not self.fp8:
            raise UserError("--fp8_fast needs --fp8")
        if not self.compile_args:
            return
        if len(self.compile_args) != 4:
            raise UserError("--compile_args takes four values: backend mode dynamic fullgraph")
        _, mode, dynamic, fullgraph = self.compile_args
        for word, known in (
            (mode, COMPILE_MODES),
            (dynamic.lower(), ("true", "false", "auto")),
            (fullgraph.lower(), ("true", "false")),
        ):
            if word not in known:
                raise UserError(f"--compile_args: '{word}' is not one of {', '.join(known)}")


@dataclass(frozen=True, kw_only=True)
class OutputOptions:
    """what is written"""

    save_path: Path | None = option(None, help="folder for videos, images and latents")
    output_type: str = option("video", help="both is video and latent", choices=("video", "images", "latent", "both"))
    no_metadata: bool = option(False, help="leave the settings out of the files")
    latent_path: list[Path] = option([], help="decode these saved latents and stop; needs --vae only", path="file")


@dataclass(frozen=True)
class GenerationOptions:
    """Every option of hv_generate_video.py."""

    prompt: PromptOptions
    dit: DitOptions
    text: TextEncoderOptions
    vae: VaeOptions
    lora: LoraOptions
    speed: SpeedOptions
    compile: CompileOptions
    swap: BlockSwapOptions
    output: OutputOptions
    device: DeviceOptions

    def __post_init__(self) -> None:
        if self.lora.save_merged_model is not None:
            self._check_merging()
            return
        require(self.output, "save_path")
        if self.output.save_path.exists() and not self.output.save_path.is_dir():
            raise UserError(f"--save_path {self.output.save_path}: is a file, a folder is expected")
        if self.output.latent_path:
            require(self.vae, "vae")
            if self.output.output_type == "latent":
                raise UserError("--latent_path with --output_type latent has nothing to do; use video or images")
            return
        require(self.dit, "dit")
        require(self.text, "text_encoder1", "text_encoder2")
        self._check_sources()
        if self.output.output_type != "latent" or self.prompt.video_path or self.prompt.image_path:
            require(self.vae, "vae")

    @property
    def samples(self) -> bool:
        """Whether videos are sampled. Otherwise LoRAs are merged into a file, or saved latents are decoded."""
        return self.lora.save_merged_model is None and not self.output.latent_path

    def _check_merging(self) -> None:
        require(self.dit, "dit")
        output, speed = self.lora.save_merged_model, self.speed
        refuse_overwriting("--save_merged_model", output, [self.dit.dit, *self.lora.lora_weight])
        others = {"compare": self.lora.compare, "dry_run": speed.dry_run, "vram_gb": speed.vram_gb is not None}
        for name in (name for name, given in others.items() if given):
            raise UserError(f"--save_merged_model writes a model and stops; leave --{name} out")

    def _check_sources(self) -> None:
        if not (self.prompt.prompt or self.prompt.from_file or self.prompt.interactive):
            raise UserError("nothing to make: give --prompt, --from_file, --interactive or --latent_path")
        if self.lora.compare and self.compile.compile:
            raise UserError("--compare and --compile exclude each other: a compiled model cannot change its LoRAs")
        if self.lora.compare and self.prompt.interactive:
            raise UserError("--compare and --interactive exclude each other; use --prompt or --from_file")
        if self.lora.compare and self.output.output_type == "latent":
            raise UserError("--compare writes videos; leave --output_type latent out")

    def compilation(self) -> CompileOptions:
        """The options of torch.compile, also where they were given by the deprecated --compile_args."""
        if not self.speed.compile_args:
            return self.compile
        backend, mode, dynamic, fullgraph = self.speed.compile_args
        return dataclasses.replace(
            self.compile,
            compile_backend=backend,
            compile_mode=mode,
            compile_dynamic=dynamic.lower(),
            compile_fullgraph=fullgraph.lower() == "true",
        )

    def settings(self) -> dict[str, object]:
        """Every option that differs from its default, as it could stand in a config file."""
        settings = {}
        for group in vars(self).values():
            for field in dataclasses.fields(group):
                value = getattr(group, field.name)
                default = field.default_factory() if field.default is dataclasses.MISSING else field.default
                if value != default:
                    settings[field.name] = _plain(value)
        return settings


def _plain(value: object) -> object:
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


# Options that say where and how to run and what to write, not what the video is.
_WHERE = ("device", "save_path", "output_type", "latent_path", "no_metadata", "save_merged_model", "interactive")
_PLAN = ("vram_gb", "dry_run")
_SOURCES = ("prompt", "from_file", "compare")


def page_settings(options: GenerationOptions, seed: int) -> dict[str, object]:
    """What it takes to make a page of --compare again."""
    return {name: value for name, value in options.settings().items() if name not in _WHERE + _PLAN} | {"seed": seed}


def video_settings(options: GenerationOptions, request: Request) -> dict[str, object]:
    """What it takes to make this video again: the options that made it, with the request's own values on top."""
    settings = {name: value for name, value in options.settings().items() if name not in _WHERE + _PLAN + _SOURCES}
    own = {
        "prompt": request.prompt,
        "negative_prompt": request.negative_prompt,
        "video_size": [request.height, request.width],
        "video_length": request.frames,
        "seed": request.seed,
        "infer_steps": request.steps,
        "embedded_cfg_scale": request.guidance,
        "guidance_scale": request.cfg_scale,
        "flow_shift": request.flow_shift,
        "fps": request.fps,
        "video_path": request.video_path,
        "strength": request.strength,
        "image_path": request.image_path,
    }
    needless = {"strength"} if request.video_path is None else set()
    return settings | {name: value for name, value in own.items() if value not in (None, "") and name not in needless}


def parse_generation_options(description: str, argv: Sequence[str] | None = None) -> GenerationOptions:
    """The command line; `--from_file` with a file of ours stands for the settings inside it."""
    argv = list(sys.argv[1:] if argv is None else argv)
    groups = [field.type for field in dataclasses.fields(GenerationOptions)]
    path = _media_source(argv)
    if path is None:
        return GenerationOptions(*parse_options(description, *groups, argv=argv))
    from modules.generation.outputs import read_settings

    if not path.is_file():
        raise UserError(f"--from_file {path}: no such file")
    made_by = {field.name for group in groups for field in dataclasses.fields(group)}.difference(_WHERE, _PLAN)
    settings = {name: value for name, value in read_settings(path).items() if name in made_by}
    return GenerationOptions(*parse_options(description, *groups, argv=[*_words(path, settings, argv), *argv]))


def _media_source(argv: list[str]) -> Path | None:
    """Takes `--from_file X` out of argv and returns X where it is a video, image or latent of ours."""
    for index, word in enumerate(argv):
        name, equals, value = word.partition("=")
        if name == "--from_file":
            value = value if equals else "".join(argv[index + 1 : index + 2])
            if value.lower().endswith(MEDIA_SUFFIXES):
                del argv[index : index + (1 if equals else 2)]
                return Path(value)
    return None


def _words(path: Path, settings: Mapping[str, object], argv: Sequence[str]) -> list[str]:
    """Settings as command-line words, without those that the command line itself gives.

    Raises:
        UserError: a value would be read as another option.
    """
    typed = {word.partition("=")[0] for word in argv}
    words: list[str] = []
    for name, value in settings.items():
        if f"--{name}" in typed:
            continue
        if value is True:
            words.append(f"--{name}")
        elif isinstance(value, list):
            if any(isinstance(item, str) and item.startswith("-") for item in value):
                raise UserError(f"{path}: its setting {name} = {value} is not what hv_generate_video.py writes")
            words += [f"--{name}", *map(str, value)]
        else:
            words.append(f"--{name}={value}")
    return words


def decode_command(options: GenerationOptions, latents: Path) -> str:
    """The command that decodes saved latents as these options would have."""
    vae, output = options.vae, options.output
    given = {
        "vae": vae.vae,
        "vae_dtype": vae.vae_dtype,
        "vae_chunk_size": vae.vae_chunk_size,
        "vae_spatial_tile_sample_min_size": vae.tile_size,
        "device": options.device.device,
        "output_type": "images" if output.output_type == "images" else None,
        "latent_path": latents,
        "save_path": output.save_path,
    }
    words = [word for name, value in given.items() if value is not None for word in (f"--{name}", str(value))]
    join = subprocess.list2cmdline if sys.platform == "win32" else shlex.join
    return join(["python", "hv_generate_video.py", *words])


def drawn_seed() -> int:
    """A seed for those who gave none."""
    return random.SystemRandom().randrange(2**32)
