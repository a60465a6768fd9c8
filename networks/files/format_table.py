"""The LoRA file formats in circulation for HunyuanVideo, as a table (docs/formats.md 2.4); imports nothing heavy.

A key is prefix + module name + suffix. Module names are the official ones, those of diffusers (where q, k, v and mlp
are separate modules) or those of ComfyUI, with dots or with underscores instead. Factors have kohya's names (lora_down,
lora_up) or PEFT's (lora_A, lora_B). In a format without alpha, alpha is the rank.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Format:
    """One way to write a LoRA file.

    Attributes:
        name: its name for --target.
        title: the programs that read or write it.
        prefix: prefix of every module name.
        naming: a naming of `hunyuan_model.checkpoints.names`: official, diffusers or ComfyUI.
        flat: module names have underscores instead of dots.
        peft: factors are called lora_A and lora_B; otherwise lora_down and lora_up.
        alpha: alpha is stored.
        dora: suffix of the key of `dora_scale`; None if the programs that read the format know no DoRA.
        other_kinds: the programs that read the format know LoHa and LoKr.
        adapter_metadata: `lora_adapter_metadata` of diffusers (rank and alpha as JSON) is written.
    """

    name: str
    title: str
    prefix: str
    naming: str = "official"
    flat: bool = False
    peft: bool = True
    alpha: bool = True
    dora: str | None = "dora_scale"
    other_kinds: bool = True
    adapter_metadata: bool = False

    @property
    def splits(self) -> bool:
        """Whether q, k, v and mlp are separate modules."""
        return self.naming == "diffusers"


def _kohya(name: str, title: str, prefix: str, naming: str = "official", **differences: object) -> Format:
    return Format(name, title, prefix, naming, flat=True, peft=False, **differences)


# `detect_format` takes the first of several formats that fit equally well.
_TABLE = [
    _kohya("default", "musubi native, OneTrainer KOHYA_LORA", "lora_unet_"),
    Format("other", "ComfyUI-safe, musubi 'other'", "diffusion_model.", alpha=False),
    Format("onetrainer-comfy", "OneTrainer COMFY_LORA", "diffusion_model."),
    Format("diffusion-pipe", "diffusion-pipe", "transformer.", alpha=False, dora=None, other_kinds=False),
    Format(
        "diffusers",
        "diffusers, finetrainers (PEFT)",
        "transformer.",
        "diffusers",
        alpha=False,
        dora="lora_magnitude_vector",
        other_kinds=False,
        adapter_metadata=True,
    ),
    Format(
        "onetrainer-diffusers",
        "OneTrainer DIFFUSERS_LORA",
        "transformer.",
        "diffusers",
        alpha=False,
        dora=None,
        other_kinds=False,
    ),
    _kohya("onetrainer-legacy", "OneTrainer LEGACY_LORA", "lora_transformer_", "diffusers"),
    Format("onetrainer-original", "OneTrainer ORIGINAL_LORA", ""),
    _kohya("onetrainer-kohya", "OneTrainer KOHYA_LORA", "lora_unet_"),
    _kohya("hunyuan-i2v", "official HunyuanVideo-I2V trainer", "Hunyuan_video_I2V_lora_", other_kinds=False),
    _kohya("comfyui-flat", "ComfyUI, flattened names", "lora_unet_", "ComfyUI"),
    Format("comfyui", "ComfyUI, its own names", "diffusion_model.", "ComfyUI"),
]
FORMATS: dict[str, Format] = {format_.name: format_ for format_ in _TABLE}
NATIVE = FORMATS["default"]
