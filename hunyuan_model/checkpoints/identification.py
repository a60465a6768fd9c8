"""Tells what a model file is from the names, shapes and dtypes of its tensors. It reads no tensor.

Sources of the facts: docs/formats.md 2.4 (LoRA), 2.8 and 2.8a (detection, fp8), 2.9 to 2.12 (names, variants).
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from hunyuan_model.checkpoints.names import dit_naming, dit_official_shapes, vae_official_name
from hunyuan_model.checkpoints.tensors import Checkpoint, load_pickle, open_checkpoint
from utils.device_utils import dtype_word
from utils.errors import UserError, printable
from utils.safetensors_utils import TensorInfo, load_file

DIT, VAE, LLM, CLIP, LORA = "DiT", "VAE", "LLM", "CLIP", "LoRA"
FP8_DTYPES = (torch.float8_e4m3fn, torch.float8_e5m2)
# How the scale of a weight `Y.weight` may be called: `Y.` and ComfyUI's name, kijai's, or ComfyUI's since late 2025.
SCALE_LEAVES = ("scale_weight", "fp8_scale", "weight_scale")
# Tensors beside the weights: scales and markers of fp8 files.
_NO_WEIGHTS = re.compile(r"(^|\.)(scaled_fp8|scale_weight|scale_input|fp8_scale|weight_scale|input_scale|comfy_quant)$")

# The names, one for each layout, of a tensor that only this part has. What stands before that name in a file is the
# prefix of all tensors of the part.
_PARTS = {
    DIT: (
        "txt_in.individual_token_refiner.blocks.0.norm1.weight",
        "context_embedder.token_refiner.refiner_blocks.0.norm1.weight",
    ),
    VAE: ("decoder.conv_in.conv.weight",),
    LLM: ("layers.0.post_attention_layernorm.weight",),
    CLIP: ("embeddings.token_embedding.weight",),
}

# Files that users may give by mistake, and a pattern that one of their names matches. The first match counts. They are
# tried before _PARTS, since some of them hold a tensor of _PARTS too.
_RELATED_FILES = {
    "HunyuanVideo 1.5 DiT": r"(^|\.)(byt5_in|cond_type_embedding)\.",
    "FramePack DiT": r"(^|\.)clean_x_embedder\.",
    "model in nvfp4, which is not supported (use the bf16, fp16 or fp8 file)": r"\.weight_scale_2$",
    "training state (optimizer)": r"(^|\.)exp_avg(_sq)?$",
    "latent cache of this program": r"^latents_\d+x\d+x\d+_",
    "text encoder cache of this program": r"^(llm|clipL)_(float|bfloat)",
}
# The same for files that are tried after _PARTS.
_OTHER_MODELS = {
    "Wan VAE": r"(^|\.)(decoder\.middle\.0\.residual\.0|decoder\.mid_block\.resnets\.0\.norm1)\.gamma$",
    "Wan DiT": r"(^|\.)blocks\.0\.(self_attn\.q|attn1\.to_q)\.weight$",
    "SDXL or Stable Diffusion UNet": r"(^|\.)(input_blocks\.0\.0|down_blocks\.0\.resnets\.0\.time_emb_proj)\.weight$",
    "Stable Diffusion, SDXL or Flux VAE": r"(^|\.)decoder\.conv_in\.weight$",
    "Flux DiT": r"(^|\.)(double_blocks\.0\.img_attn\.qkv|single_transformer_blocks\.0\.attn\.to_q)\.weight$",
    "LTX or CogVideoX DiT": r"(^|\.)transformer_blocks\.0\.(attn1|norm1\.linear)",
    "vision tower": r"(^|\.)vision_model\.",
    "T5 text encoder": r"(^|\.)block\.0\.layer\.0\.SelfAttention\.q\.weight$",
}
_LORA_LEAF = re.compile(r"\.(lora_down\.weight|lora_A(\.default)?\.weight|hada_w1_a|lokr_w[12](_a)?|lora_down|lora_A)$")
_LORA_PREFIXES = {
    "musubi native": "lora_unet_",
    "HunyuanVideo-I2V trainer": "Hunyuan_video_I2V_lora_",
    "OneTrainer legacy": "lora_transformer_",
    "diffusers": r"transformer\.(single_)?transformer_blocks\.",
    "diffusion-pipe": r"transformer\.(double|single)_blocks\.",
    "ComfyUI": r"diffusion_model\.",
    "official names": r"(double|single)_blocks\.",
}


@dataclass(frozen=True)
class ModelFile:
    """What a file or folder is."""

    path: Path
    what: str  # DiT, VAE, LLM, CLIP, several of these joined by " + ", LoRA, or a name of another kind of file
    variant: str
    layout: str
    dtype: str
    fp8: str  # none, plain, official, ComfyUI scaled, kijai
    parameters: int
    depths: dict[str, int]
    checkpoint: Checkpoint = field(repr=False)
    prefixes: dict[str, str] = field(repr=False)  # for each part in the file, the prefix of its tensors' names

    def summary(self) -> str:
        """One line of text that says what the file is."""
        depths = " + ".join(f"{depth} {name}" for name, depth in self.depths.items())
        fp8 = "" if self.fp8 == "none" else f"fp8 {self.fp8}"
        size = f"{self.parameters / 1e9:.2f} G" if self.parameters >= 1e8 else f"{self.parameters / 1e6:.2f} M"
        facts = [self.variant, self.layout, self.dtype, fp8, f"{size} parameters", depths]
        return printable(f"{self.what}: {', '.join(fact for fact in facts if fact)} ({self.path})")

    def tensors(self, part: str) -> dict[str, TensorInfo]:
        """Headers of the weights of one part by name without prefix, scales excepted.

        Raises:
            UserError: the file does not hold this part.
        """
        if part not in self.prefixes:
            raise UserError(
                f"{self.path}: {_with_article(part)} of HunyuanVideo is expected, this is {_with_article(self.what)}"
            )
        return _below(self.checkpoint.infos, self.prefixes[part])


def identify(path: str | Path) -> ModelFile:
    """What a model file or folder is, from headers only.

    Raises:
        UserError: missing, cut off, not a model file, or an fp8 file without its scales.
    """
    checkpoint = open_checkpoint(path)
    infos = {name: info for name, info in checkpoint.infos.items() if not _NO_WEIGHTS.search(name)}
    what, prefixes = _what(infos)
    main = next(iter(prefixes), None)
    tensors = _below(infos, prefixes[main]) if main else infos
    return ModelFile(
        path=Path(path),
        what=what,
        variant=_variant(what, Path(path), infos, tensors),
        layout=_layout(checkpoint, main, prefixes.get(main, ""), tensors),
        dtype=_dtypes(infos),
        fp8=_fp8_kind(checkpoint),
        parameters=sum(info.count for info in infos.values()),
        depths=_depths(main, tensors),
        checkpoint=checkpoint,
        prefixes=prefixes,
    )


def _with_article(what: str) -> str:
    return f"an {what}" if what.startswith(("LLM", "LTX", "SDXL", "unknown")) else f"a {what}"


def _below(infos: Mapping[str, TensorInfo], prefix: str) -> dict[str, TensorInfo]:
    return {
        name.removeprefix(prefix): info
        for name, info in infos.items()
        if name.startswith(prefix) and not _NO_WEIGHTS.search(name)
    }


def _what(infos: Mapping[str, TensorInfo]) -> tuple[str, dict[str, str]]:
    """What the file is, and the prefix of each part of HunyuanVideo that it holds."""
    if any(_LORA_LEAF.search(name) for name in infos):
        return LORA, {}
    for what, pattern in _RELATED_FILES.items():
        if any(re.search(pattern, name) for name in infos):
            return what, {}
    prefixes = {part: prefix for part in _PARTS if (prefix := _prefix(infos, part)) is not None}
    if prefixes:
        return " + ".join(prefixes), prefixes
    for what, pattern in _OTHER_MODELS.items():
        if any(re.search(pattern, name) for name in infos):
            return what, {}
    return f"unknown model (its first tensor is {next(iter(infos), 'none')})", {}


def _prefix(infos: Mapping[str, TensorInfo], part: str) -> str | None:
    for marker in _PARTS[part]:
        for name in infos:
            if name == marker or name.endswith("." + marker):
                return name.removesuffix(marker)
    return None


def _variant(what: str, path: Path, infos: Mapping[str, TensorInfo], tensors: Mapping[str, TensorInfo]) -> str:
    if what == LORA:
        module = next(name for name in infos if _LORA_LEAF.search(name))
        return next((name for name, prefix in _LORA_PREFIXES.items() if re.match(prefix, module)), "unknown format")
    if what.startswith(DIT):
        weight = tensors.get("img_in.proj.weight") or tensors.get("x_embedder.proj.weight")
        channels = weight.shape[1] if weight and len(weight.shape) > 1 else 0
        # The I2V model "token replace" has the same names and shapes as T2V. Only the path can tell them apart.
        sixteen = "I2V, token replace" if "i2v" in "/".join(path.parts[-3:]).lower() else "T2V"
        known = {16: sixteen, 32: "SkyReels I2V", 33: "I2V, latent concat"}
        return known.get(channels, f"{channels} input channels")
    if what.startswith(LLM):
        return "LLaVA with vision tower" if any("vision_tower." in name for name in infos) else ""
    return "with vision tower" if what == CLIP and any("vision_model." in name for name in infos) else ""


def _layout(checkpoint: Checkpoint, part: str | None, prefix: str, tensors: Mapping[str, TensorInfo]) -> str:
    container = checkpoint.container
    if checkpoint.path.is_dir():
        container = f"folder of {len(checkpoint.files)} shards" if len(checkpoint.files) > 1 else "folder"
    elif container == ".pt":
        container = f".pt (key {checkpoint.wrapper})" if checkpoint.wrapper else "bare .pt"
    naming = ""
    if part == DIT:
        naming = f"{dit_naming(tensors)} names"
    elif part == VAE:
        naming = "ComfyUI names" if any(vae_official_name(name) != name for name in tensors) else "official names"
    shown_prefix = f"prefix {prefix}" if prefix and part in (DIT, VAE) else ""
    return ", ".join(piece for piece in (container, naming, shown_prefix) if piece)


def _dtypes(infos: Mapping[str, TensorInfo]) -> str:
    """The dtypes of the weights, the one with the most bytes first."""
    sizes: dict[str, int] = {}
    for info in infos.values():
        if info.dtype.is_floating_point:
            sizes[dtype_word(info.dtype)] = sizes.get(dtype_word(info.dtype), 0) + info.nbytes
    return " + ".join(sorted(sizes, key=lambda word: -sizes[word]))


def _depths(part: str | None, tensors: Mapping[str, TensorInfo]) -> dict[str, int]:
    if part == DIT:
        tensors = dit_official_shapes({name: info.shape for name, info in tensors.items()}, dit_naming(tensors))
        lists = {"double blocks": "double_blocks", "single blocks": "single_blocks"}
    else:
        lists = {"layers": "layers"} if part in (LLM, CLIP) else {}
    pattern = r"(?:^|\.){}\.(\d+)\."
    return {
        name: len({match[1] for key in tensors if (match := re.search(pattern.format(modules), key))})
        for name, modules in lists.items()
    }


def fp8_map_path(checkpoint: Checkpoint) -> Path | None:
    """The file `X_map.pt` or `X_map.safetensors` beside an official fp8 file `X.pt`, which holds its scales."""
    path = checkpoint.paths[0]
    candidates = [path.with_name(f"{path.stem}_map{suffix}") for suffix in (".pt", ".safetensors")]
    return next((candidate for candidate in candidates if candidate.is_file()), None)


def read_fp8_map(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    """The scales in the file beside an official fp8 file, by module name; empty if there is no such file.

    Raises:
        UserError: the file does not map module names to scales.
    """
    path = fp8_map_path(checkpoint)
    if path is None:
        return {}
    content = load_file(path) if path.suffix == ".safetensors" else load_pickle(path)
    try:
        return {name.removesuffix(".weight"): torch.as_tensor(scale).float() for name, scale in content.items()}
    except (AttributeError, TypeError, ValueError, RuntimeError):
        raise UserError(f"{path}: not a map from module names to fp8 scales") from None


def _fp8_kind(checkpoint: Checkpoint) -> str:
    """How the float8 weights of a file are scaled.

    Raises:
        UserError: an official fp8 file without its scales. Its weights would be useless.
    """
    infos = checkpoint.infos
    if not any(info.dtype in FP8_DTYPES for info in infos.values()):
        return "none"
    if any(name.endswith(".fp8_scale") for name in infos):
        return "kijai"
    if any(name.rpartition(".")[2] in ("scaled_fp8", *SCALE_LEAVES) for name in infos):
        return "ComfyUI scaled"
    if fp8_map_path(checkpoint) is not None:
        return "official"
    path = checkpoint.paths[0]
    if _is_official_fp8(path):
        raise UserError(
            f"{path}: an official fp8 file whose scales are missing; put {path.stem}_map.pt beside it, or use the bf16 "
            "file with --fp8_base (training) or --fp8 (generation)"
        )
    return "plain"


def _is_official_fp8(path: Path) -> bool:
    """Whether its name says so, or a map without its model file lies beside it: then the model was renamed."""
    named = "model_states_fp8" in path.name or (path.suffix == ".pt" and path.stem.endswith("_fp8"))
    maps = path.parent.glob("*_map.pt")
    return named or any(not file.with_name(file.name.replace("_map.pt", ".pt")).exists() for file in maps)
