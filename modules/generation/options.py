"""The options of hv_generate_video.py: what to make, from which LoRAs, how fast, and where to write it."""

import dataclasses
import sys
from dataclasses import dataclass
from pathlib import Path

from hunyuan_model.attention_modes import ATTENTION_MODES, require_attention
from modules.generation.requests import (
    MAX_FACTOR,
    MAX_FPS,
    MAX_FRAMES,
    MAX_SIDE,
    MAX_STEPS,
    MIN_SHIFT,
    Request,
    read_prompt_file,
    with_valid_size,
)
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
from networks.files.format_table import MAX_MULTIPLIER
from utils.cli import one_value_each, option
from utils.errors import UserError
from utils.files import require_output, require_suffix, require_writable


@dataclass(frozen=True, kw_only=True)
class PromptOptions:
    """what to make"""

    prompt: str | None = option(None, help="text that describes the video")
    negative_prompt: str | None = option(
        None, help="text that the video is steered away from; used unless --guidance_scale is 1"
    )
    from_file: Path | None = option(
        None,
        help="prompt file (.txt, .toml, .json; a line is like `A cat --w 960 --h 544 --f 49 --d 42`); videos that are "
        "finished are skipped; or an .mp4, .png or latent .safetensors of this script, to make its video again",
        path="file",
    )
    interactive: bool = option(False, help="read prompts from the terminal one by one; all models stay loaded")
    video_size: tuple[int, int] = option(
        (256, 256), help="height and width in pixels, multiples of 16", minimum=1, maximum=MAX_SIDE
    )
    video_length: int = option(129, help="frames, 4n + 1", minimum=1, maximum=MAX_FRAMES)
    fps: int | None = option(
        None,
        help="frames per second of the video (default: 24, or the setting inside saved latents)",
        minimum=1,
        maximum=MAX_FPS,
    )
    infer_steps: int = option(50, help="denoising steps", minimum=1, maximum=MAX_STEPS)
    seed: int | None = option(
        None, help="seed of the noise; drawn at random when omitted, and part of the file name", minimum=0
    )
    embedded_cfg_scale: float = option(
        6.0, help="embedded guidance, an input of the distilled model", minimum=0, maximum=MAX_FACTOR
    )
    guidance_scale: float = option(
        1.0,
        help="classifier-free guidance; 1 is none, other values need two predictions per step",
        minimum=0,
        maximum=MAX_FACTOR,
    )
    flow_shift: float = option(
        7.0, help="flow shift; 7 is good for 50 steps, 17 for fewer than 20", minimum=MIN_SHIFT, maximum=MAX_FACTOR
    )
    video_path: Path | None = option(None, help="video to start from (video to video)", path="file")
    strength: float | None = option(
        None,
        help="share of the denoising steps that are run on that video, above 0 and up to 1; unset: 0.8",
        minimum=0,
        maximum=1,
    )
    image_path: Path | None = option(None, help="first frame, for SkyReels-V1-I2V (32 input channels)", path="file")
    strict: bool = option(
        False, help="refuse sizes and lengths that the model does not support, instead of rounding them"
    )

    def __post_init__(self) -> None:
        sources = [f"--{name}" for name in ("prompt", "from_file", "interactive") if getattr(self, name)]
        if len(sources) > 1:
            raise UserError(f"{' and '.join(sources)} exclude each other; give one")
        if self.strength == 0:
            raise UserError("--strength 0 would not change the video; give a number above 0")
        if self.strength is not None and self.prompt and not self.video_path:
            raise UserError("--strength needs a video to start from; give --video_path")
        if self.seed is not None and self.seed >= 2**63:
            raise UserError(f"--seed {self.seed}: seeds are below 2^63")

    def request(self) -> Request:
        """The options as a request. It is also the default for the lines of a prompt file."""
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
            strength=Request.strength if self.strength is None else self.strength,
            image_path=None if self.image_path is None else str(self.image_path),
        )

    def requests(self) -> list[Request]:
        """The videos to make, with valid sizes; prints a warning for each value that was rounded."""
        requests = [self.request()] if self.from_file is None else read_prompt_file(self.from_file, self.request())
        if self.strength is not None and not any(request.video_path for request in requests):
            raise UserError(f"--strength needs a video to start from; no line of {self.from_file} has a video_path")
        return [self.valid(request, f"video {index}: ") for index, request in enumerate(requests, start=1)]

    def valid(self, request: Request, place: str = "") -> Request:
        """The request with its size rounded to one that the model supports; with --strict a UserError instead."""
        request, warnings = with_valid_size(request, self.strict)
        for warning in warnings:
            print(f"warning: {place}{warning}", file=sys.stderr)
        return request


@dataclass(frozen=True, kw_only=True)
class LoraOptions:
    """LoRA"""

    lora_weight: list[Path] = option([], help="LoRA, LoHa or LoKr files in any format", path="file")
    lora_multiplier: list[float] = option(
        [],
        help="one per --lora_weight, or one for all; 1.0 when omitted",
        minimum=-MAX_MULTIPLIER,
        maximum=MAX_MULTIPLIER,
    )
    exclude_single_blocks: bool = option(False, help="do not apply LoRAs to the single blocks")
    lycoris: bool = option(False, help="has no effect: LoHa and LoKr are always merged, without the lycoris package")
    save_merged_model: Path | None = option(
        None, help="write the DiT with the LoRAs merged to this .safetensors file, and end"
    )
    compare: bool = option(
        False,
        help="make one labelled page (mp4 and PNG): every --lora_weight at every --lora_multiplier for every prompt, "
        "next to the model without LoRA, all with the same seed",
    )

    def __post_init__(self) -> None:
        if not self.lora_weight and (self.lora_multiplier or self.compare):
            raise UserError(f"--{'compare' if self.compare else 'lora_multiplier'} needs --lora_weight")
        self.merged()  # checks the number of multipliers
        if self.save_merged_model is not None:
            require_suffix("--save_merged_model", self.save_merged_model, ".safetensors")

    def merged(self) -> list[tuple[Path, float]]:
        """The LoRA files to merge, with multipliers; an empty list with --compare, whose LoRAs are not merged.

        Raises:
            UserError: the number of multipliers does not fit.
        """
        if self.compare:
            return []
        files = self.lora_weight
        multipliers = one_value_each("--lora_multiplier", self.lora_multiplier, len(files), "--lora_weight")
        return list(zip(files, multipliers, strict=True))


@dataclass(frozen=True, kw_only=True)
class SpeedOptions:
    """memory and speed"""

    attn_mode: str = option("torch", help="attention; torch and sdpa are the same", choices=list(ATTENTION_MODES))
    split_attn: bool = option(False, help="call the model with one prompt at a time; implies --split_uncond")
    split_uncond: bool = option(
        False,
        help="with classifier-free guidance, two calls of the model with batch 1 instead of one with batch 2, which "
        "halves the memory of activations",
    )
    fp8: bool = option(
        False, help="store the Linear weights of the DiT's blocks as float8, half the memory of bfloat16"
    )
    fp8_fast: bool = option(False, help="also multiply in float8 (needs --fp8 and an RTX 40, H100 or newer GPU)")
    step_cache: float | None = option(
        None,
        help="skip most blocks in steps that change less than this, e.g. 0.1; faster, but videos differ slightly",
        minimum=0,
    )
    vram_gb: float | None = option(
        None,
        help="choose --fp8, --blocks_to_swap, --fp8_llm and the VAE's tiles so that this many GiB of GPU memory "
        "suffice; 0: all that is free",
        minimum=0,
    )
    dry_run: bool = option(False, help="print how much memory is needed, and end")
    compile_args: list[str] = option(
        [], help="deprecated, use --compile_backend and so on: backend, mode, dynamic, fullgraph"
    )

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

    save_path: Path | None = option(None, help="output folder for videos, images and latents")
    output_type: str = option(
        "video", help="what to write; both is video and latent", choices=("video", "images", "latent", "both")
    )
    no_metadata: bool = option(False, help="do not store the settings inside the files")
    latent_path: list[Path] = option(
        [], help="decode these saved latents, and end; the only model it needs is --vae", path="file"
    )


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
        require_writable(self.output.save_path, "--save_path", create=False)
        if self.output.latent_path:
            require(self.vae, "vae")
            if self.output.output_type == "latent":
                raise UserError("--latent_path with --output_type latent: there is nothing to do; use video or images")
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
        require_output("--save_merged_model", output, [self.dit.dit, *self.lora.lora_weight])
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
        """The options of torch.compile, with the values of the deprecated --compile_args if it is given."""
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
        """Every option that differs from its default, as a --config_file would have it."""
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
