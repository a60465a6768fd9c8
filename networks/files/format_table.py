"""The LoRA file formats in circulation for HunyuanVideo, as a table (docs/formats.md 2.4); imports nothing heavy.

A key is prefix + module name + suffix. Module names are official, diffusers' (split q, k, v, mlp) or ComfyUI's; dots in
them are kept or written as underscores; factors are named as kohya does (lora_down, lora_up) or as PEFT does (lora_A,
lora_B). Where a format has no alpha, alpha = rank is meant.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Format:
    """One way to write a LoRA file.

    Attributes:
        name: what --target calls it.
        title: who writes or reads it.
        prefix: stands before every module name.
        naming: a naming of `hunyuan_model.checkpoints.names`: official, diffusers or ComfyUI.
        flat: dots of the module name are underscores.
        peft: factors are lora_A and lora_B, else lora_down and lora_up.
        alpha: alpha is stored.
        dora: suffix of DoRA's row lengths, None where the readers have none.
        other_kinds: LoHa and LoKr are read by the format's readers.
        adapter_metadata: diffusers' `lora_adapter_metadata` (rank and alpha as JSON) is written.
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
        """Whether q, k, v (and mlp) are modules of their own."""
        return self.naming == "diffusers"


def _kohya(name: str, title: str, prefix: str, naming: str = "official", **differences: object) -> Format:
    return Format(name, title, prefix, naming, flat=True, peft=False, **differences)


# Formats with the same keys but for alpha stand side by side; recognition takes the first that fits best.
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
