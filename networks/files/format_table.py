"""The LoRA file formats in circulation for HunyuanVideo, as a table (docs/formats.md 2.4); imports nothing heavy.

A key is prefix + module name + suffix. Module names are the official ones, those of diffusers (where q, k, v and mlp
are separate modules) or those of ComfyUI, with dots or with underscores instead. Factors have kohya's names (lora_down,
lora_up) or PEFT's (lora_A, lora_B). In a format without alpha, alpha is the rank.
"""

from dataclasses import dataclass

MAX_MULTIPLIER = 1e6  # of a LoRA; larger ones overflow
LORA_ONLY = frozenset({"LoRA"})
NO_DIFFERENCES = LORA_ONLY | {"LoHa", "LoKr"}
DIFFERENCE = "whole difference"
ALL_KINDS = NO_DIFFERENCES | {DIFFERENCE}


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
        kinds: the kinds of factors that the programs that read the format know.
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
    kinds: frozenset[str] = ALL_KINDS
    adapter_metadata: bool = False

    @property
    def differences(self) -> bool:
        """Whether its readers know changes of whole weights, biases and weights of norms (`diff`, `diff_b`)."""
        return DIFFERENCE in self.kinds

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
    Format("onetrainer-comfy", "OneTrainer COMFY_LORA", "diffusion_model.", kinds=NO_DIFFERENCES),
    Format(
        "diffusion-pipe", "diffusion-pipe", "transformer.", alpha=False, dora=None, kinds=frozenset({"LoRA", "LoKr"})
    ),
    Format(
        "diffusers",
        "diffusers, finetrainers (PEFT)",
        "transformer.",
        "diffusers",
        alpha=False,
        dora="lora_magnitude_vector",
        kinds=LORA_ONLY,
        adapter_metadata=True,
    ),
    Format(
        "onetrainer-diffusers",
        "OneTrainer DIFFUSERS_LORA",
        "transformer.",
        "diffusers",
        alpha=False,
        dora="lora_magnitude_vector.weight",
        kinds=LORA_ONLY,
    ),
    _kohya("onetrainer-legacy", "OneTrainer LEGACY_LORA", "lora_transformer_", "diffusers", kinds=NO_DIFFERENCES),
    Format("onetrainer-original", "OneTrainer ORIGINAL_LORA", "", kinds=NO_DIFFERENCES),
    _kohya("onetrainer-kohya", "OneTrainer KOHYA_LORA", "lora_unet_", kinds=NO_DIFFERENCES),
    # Tencent's loader ignores alpha and knows no other kind.
    _kohya(
        "hunyuan-i2v",
        "official HunyuanVideo-I2V trainer",
        "Hunyuan_video_I2V_lora_",
        alpha=False,
        dora=None,
        kinds=LORA_ONLY,
    ),
    _kohya("comfyui-flat", "ComfyUI, flattened names", "lora_unet_", "ComfyUI"),
    Format("comfyui", "ComfyUI, its own names", "diffusion_model.", "ComfyUI"),
]
FORMATS: dict[str, Format] = {format_.name: format_ for format_ in _TABLE}
NATIVE = FORMATS["default"]
