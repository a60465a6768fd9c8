"""Loads the DiT, the VAE and the text encoders from every layout in which they are published.

A model is built without memory and its tensors are then read one by one, straight to their device and dtype: the peak
of host memory is the final size plus one tensor. Each loader prints one line that says what the file is.
"""

import contextlib
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from hunyuan_model.block_swap import swapped_blocks
from hunyuan_model.checkpoints.identification import (
    CLIP,
    DIT,
    FP8_DTYPES,
    LLM,
    SCALE_LEAVES,
    VAE,
    ModelFile,
    identify,
    read_fp8_map,
)
from hunyuan_model.checkpoints.names import (
    dit_naming,
    dit_official_shapes,
    dit_parts,
    dit_to_official,
    vae_official_name,
)
from hunyuan_model.models import HunyuanVideoConfig, HYVideoDiffusionTransformer
from hunyuan_model.quantization import FP8, Fp8Linear, dequantize, quantize_linears
from utils.device_utils import dtype_word
from utils.errors import UserError, one_line

if TYPE_CHECKING:
    from hunyuan_model.text_encoder import ClipTextEncoder, LlmTextEncoder  # imports transformers
    from hunyuan_model.vae import VaeConfig

Device = torch.device | str
Devices = Device | Callable[[str], Device]
Shapes = Mapping[str, Sequence[int]]
MERGED = "they come from the LoRAs merged into it: lower the multiplier or use another LoRA"


def load_dit(
    path: str | Path,
    device: Devices = "cpu",
    dtype: torch.dtype | Callable[[str], torch.dtype] = torch.bfloat16,
    fp8: bool = False,
    attention: str = "torch",
    split_attention: bool = False,
    compute: Device | None = None,
    changes: Mapping[str, Callable[[Tensor], Tensor]] | None = None,
) -> HYVideoDiffusionTransformer:
    """A frozen DiT.

    Args:
        path: file or folder in any published layout.
        device: where the weights go, one by one, or where each goes by its official name; see `beside_swapped`.
        dtype: of all weights that are not fp8, or of each by its official name.
        fp8: keep the linear weights of the blocks, modulation excepted, as float8; those of an fp8 file as they are.
        attention: the backend, a value of --attn_mode.
        split_attention: attend to the items of a batch one after the other.
        compute: where weights are changed and quantised, one at a time; by default where they go.
        changes: by official name, what becomes of the float32 form of a weight before it is rounded, once.

    Raises:
        UserError: not a HunyuanVideo DiT, or a broken or incomplete one.
    """
    file = identify(path)
    naming, shapes = _dit_shapes(file)
    with _about(path):
        with torch.device("meta"):
            model = HYVideoDiffusionTransformer(_dit_config(file, shapes))
        model.set_attention(attention, split_attention)
    _check_names(path, model, shapes)
    if fp8:
        quantize_linears(model, is_quantized_in_dit)
    return _dit_weights(file, naming).fill(model, device, dtype, compute, changes)


def _dit_weights(file: ModelFile, naming: str) -> "_Weights":
    return _Weights(
        file,
        parts=lambda name: [file.prefixes[DIT] + part for part in dit_parts(name, naming)],
        join=lambda name, parts: dit_to_official(name, parts, naming),
    )


def open_dit(path: str | Path) -> "DitTensors":
    """A DiT file whose tensors are read one at a time, for programs that never need the whole model.

    Raises:
        UserError: not a HunyuanVideo DiT.
    """
    file = identify(path)
    naming, shapes = _dit_shapes(file)
    return DitTensors(file, shapes, _dit_weights(file, naming))


@dataclass
class DitTensors:
    """The tensors of a DiT file by official name, as they are stored."""

    file: ModelFile
    shapes: Shapes
    weights: "_Weights"

    def dtype(self, name: str) -> torch.dtype:
        return self.weights.infos[self.weights.parts(name)[0]].dtype

    def read(self, name: str) -> tuple[Tensor, Tensor | None]:
        """The tensor on the CPU, valid until the next is read, and the scale (1 or out, 1) of a scaled fp8 one."""
        return self.weights.read(name)


def read_dit_config(path: str | Path) -> HunyuanVideoConfig:
    """The sizes of a DiT, from headers only.

    Raises:
        UserError: not a HunyuanVideo DiT.
    """
    file = identify(path)
    with _about(path):
        return _dit_config(file, _dit_shapes(file)[1])


def _dit_shapes(file: ModelFile) -> tuple[str, Shapes]:
    """The naming that a DiT file follows, and its shapes under official names."""
    found = {name: info.shape for name, info in file.tensors(DIT).items()}
    naming = dit_naming(found)
    return naming, dit_official_shapes(found, naming)


def _dit_config(file: ModelFile, shapes: Shapes) -> HunyuanVideoConfig:
    given = file.checkpoint.config
    return HunyuanVideoConfig.from_shapes(shapes, given.get("rope_dims") or given.get("rope_axes_dim"))


def beside_swapped(config: HunyuanVideoConfig, blocks_to_swap: int, device: Device) -> Callable[[str], Device]:
    """The device of each weight by its official name, so that main memory only ever holds the blocks to be swapped.

    Raises:
        UserError: more blocks than the model can swap.
    """
    blocks = [f"double_blocks.{index}." for index in range(config.depth_double)]
    blocks += [f"single_blocks.{index}." for index in range(config.depth_single)]
    on_host = tuple(blocks[index] for index in swapped_blocks(blocks_to_swap, config.depth_double, config.depth_single))
    return lambda name: "cpu" if name.startswith(on_host) else device


def is_quantized_in_dit(name: str) -> bool:
    """Whether fp8 keeps the linear layer of this dotted name as float8; rounding hurts modulation most."""
    return name.startswith(("double_blocks.", "single_blocks.")) and "mod" not in name.split(".", 2)[2]


def load_vae(path: str | Path, device: Device = "cpu", dtype: torch.dtype = torch.float32) -> nn.Module:
    """A frozen VAE.

    Raises:
        UserError: not the HunyuanVideo VAE, or a broken or incomplete one.
    """
    from hunyuan_model.vae import AutoencoderKLCausal3D

    file = identify(path)
    names, shapes = _vae_names_and_shapes(file)
    with _about(path), torch.device("meta"):
        model = AutoencoderKLCausal3D(_vae_config(file, shapes))
    _check_names(path, model, shapes)
    weights = _Weights(
        file,
        parts=lambda name: [file.prefixes[VAE] + names[name]],
        join=lambda name, parts: parts[0].reshape(shapes[name]),
    )
    return weights.fill(model, device, dtype)


def read_vae_config(path: str | Path) -> "VaeConfig":
    """The sizes of a VAE, from headers only.

    Raises:
        UserError: not the HunyuanVideo VAE.
    """
    file = identify(path)
    with _about(path):
        return _vae_config(file, _vae_names_and_shapes(file)[1])


def _vae_names_and_shapes(file: ModelFile) -> tuple[dict[str, str], Shapes]:
    """The names in a file by official name, and the shapes under official names."""
    infos = file.tensors(VAE)
    names = {vae_official_name(name): name for name in infos}
    return names, {official: _matrix_shape(official, infos[name].shape) for official, name in names.items()}


def _vae_config(file: ModelFile, shapes: Shapes) -> "VaeConfig":
    from hunyuan_model.vae import VaeConfig

    return VaeConfig.from_shapes(shapes, file.checkpoint.config)


def _matrix_shape(name: str, shape: Sequence[int]) -> tuple[int, ...]:
    """ComfyUI keeps the four attention matrices of the VAE as 1x1x1 convolutions."""
    return tuple(shape[:2]) if ".attentions." in name else tuple(shape)


def load_text_encoder_1(
    path: str | Path,
    device: Device = "cpu",
    dtype: torch.dtype = torch.float16,
    fp8: bool = False,
    tokenizer: str | Path | None = None,
) -> "LlmTextEncoder":
    """The language model of LLaVA-Llama-3-8B, as far as it is used.

    Args:
        path: Hugging Face folder (of a whole LLaVA only the language part is read) or one file.
        device, dtype: where and as what the weights are kept.
        fp8: keep the linear weights of the layers as float8.
        tokenizer: folder or tokenizer.json; by default what lies beside the model, or the Hugging Face cache.

    Raises:
        UserError: not this model, broken, or without a sound tokenizer.
    """
    from hunyuan_model.text_encoder import LlmTextEncoder
    from hunyuan_model.tokenizers import LLM_REPOSITORY, find_tokenizer, llm_tokenizer

    file = identify(path)
    words = llm_tokenizer(find_tokenizer(path, tokenizer, LLM_REPOSITORY))
    model = empty_text_encoder_1(file, fp8)
    _Weights(file, parts=lambda name: [file.prefixes[LLM] + name]).fill(model, device, dtype)
    return LlmTextEncoder(model, words, _fingerprint(file, words.fingerprint, fp8))


def empty_text_encoder_1(file: ModelFile, fp8: bool) -> nn.Module:
    """The layers that `load_text_encoder_1` fills, on the meta device.

    Raises:
        UserError: the file's tensors are not this model's.
    """
    from hunyuan_model.text_encoder import empty_llm, llm_config_from_shapes

    shapes = {name: info.shape for name, info in file.tensors(LLM).items()}
    with _about(file.path):
        published = {f"model.{name}": shape for name, shape in shapes.items()}
        model = empty_llm(llm_config_from_shapes(published, file.checkpoint.config))
    _check_needed(file.path, model, shapes)
    if fp8:
        quantize_linears(model, lambda name: name.startswith("layers."))
    return model


def load_text_encoder_2(
    path: str | Path,
    device: Device = "cpu",
    dtype: torch.dtype = torch.float16,
    tokenizer: str | Path | None = None,
) -> "ClipTextEncoder":
    """The text model of CLIP-L; arguments and errors as `load_text_encoder_1`."""
    from hunyuan_model.text_encoder import ClipTextEncoder, clip_config_from_shapes, empty_clip
    from hunyuan_model.tokenizers import CLIP_REPOSITORY, clip_tokenizer, find_tokenizer

    file = identify(path)
    shapes = {f"text_model.{name}": info.shape for name, info in file.tensors(CLIP).items()}
    words = clip_tokenizer(find_tokenizer(path, tokenizer, CLIP_REPOSITORY))
    with _about(path):
        model = empty_clip(clip_config_from_shapes(shapes, file.checkpoint.config))
    _check_needed(path, model, {name.removeprefix("text_model."): shape for name, shape in shapes.items()})
    _Weights(file, parts=lambda name: [file.prefixes[CLIP] + name]).fill(model, device, dtype)
    return ClipTextEncoder(model, words, _fingerprint(file, words.fingerprint, False))


def _fingerprint(file: ModelFile, tokenizer: str, fp8: bool) -> str:
    return hashlib.sha256(f"{file.checkpoint.fingerprint} {tokenizer} {fp8}".encode()).hexdigest()[:16]


@contextlib.contextmanager
def _about(path: str | Path) -> Iterator[None]:
    """Errors of a model's sizes name the file they came from."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except (ValueError, TypeError, LookupError, ArithmeticError, RuntimeError) as error:
        # Shapes or a config.json that no model has fail wherever they are used first.
        raise UserError(f"{path}: its sizes make no model ({type(error).__name__}: {one_line(error)[:150]})") from None


def _check_names(path: str | Path, model: nn.Module, shapes: Shapes) -> None:
    """Every tensor of the model is there with its shape, and no other."""
    expected = {name for name, _ in model.named_parameters()}
    foreign = [name for name in shapes if name not in expected]
    if foreign:
        raise UserError(f"{path}: {len(foreign)} tensors do not belong to this model, the first is {foreign[0]}")
    _check_needed(path, model, shapes)


def _check_needed(path: str | Path, model: nn.Module, shapes: Shapes) -> None:
    """Every tensor of the model is there with its shape."""
    expected = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    missing = [name for name in expected if name not in shapes]
    if missing:
        raise UserError(f"{path}: {len(missing)} of {len(expected)} tensors are missing, the first is {missing[0]}")
    for name, shape in expected.items():
        if tuple(shapes[name]) != shape:
            raise UserError(f"{path}: {name} has shape {tuple(shapes[name])}, {shape} is expected")


@dataclass
class _Weights:
    """A model's tensors in a file, under the names of our modules."""

    file: ModelFile
    parts: Callable[[str], Sequence[str]]  # our name -> the file's tensors whose rows, stacked, it is
    join: Callable[[str, Sequence[Tensor]], Tensor] = lambda name, parts: parts[0]

    def __post_init__(self) -> None:
        self.infos = self.file.checkpoint.infos
        self.copies = self.file.checkpoint.container == ".pt"  # what is read is a view of the file
        self.map = read_fp8_map(self.file.checkpoint) if self.file.fp8 == "official" else {}

    def fill(
        self,
        model: nn.Module,
        device: Devices,
        dtype: torch.dtype | Callable[[str], torch.dtype],
        compute: Device | None = None,
        changes: Mapping[str, Callable[[Tensor], Tensor]] | None = None,
    ) -> nn.Module:
        """Gives every parameter of a model on the meta device its tensor, frozen; arguments as `load_dit`."""
        for name in [name for name, _ in model.named_parameters()]:
            owner, _, leaf = name.rpartition(".")
            module = model.get_submodule(owner)
            wanted = dtype if isinstance(dtype, torch.dtype) else dtype(name)
            place, change = device(name) if callable(device) else device, (changes or {}).get(name)
            at = place if compute is None else compute
            if not isinstance(module, Fp8Linear) or leaf == "bias":
                dense = self._dense(name, place, wanted, at, change)
                setattr(module, leaf, nn.Parameter(dense, requires_grad=False))
            elif leaf == "weight":
                self._fill_fp8(name, module, at, change)
                for part in ("weight", "scale"):
                    setattr(module, part, nn.Parameter(getattr(module, part).to(place), requires_grad=False))
        print(self.file.summary())
        return model.eval()

    def _dense(
        self, name: str, device: Device, dtype: torch.dtype, compute: Device, change: Callable[[Tensor], Tensor] | None
    ) -> Tensor:
        if change is not None:
            return self._finite(name, change(self._wide(name, compute)).to(device, dtype), MERGED)
        tensor, scale = self.read(name)
        if scale is None:
            tensor = tensor.to(device, dtype, copy=self.copies)
        else:
            tensor = dequantize(tensor.to(device), scale.to(device), dtype)
        return self._finite(name, tensor)

    def _wide(self, name: str, device: Device) -> Tensor:
        """A copy in float32."""
        tensor, scale = self.read(name)
        if scale is None:
            return self._finite(name, tensor.to(device, torch.float32, copy=True))
        return self._finite(name, dequantize(tensor.to(device), scale.to(device), torch.float32))

    def _fill_fp8(self, name: str, layer: Fp8Linear, device: Device, change: Callable[[Tensor], Tensor] | None) -> None:
        if change is not None:
            layer.set_weight(change(self._wide(name, device)))
            self._finite(name, layer.weight, MERGED)
            self._finite(name, layer.scale, MERGED)
            return
        tensor, scale = self.read(name)
        if tensor.dtype != FP8:
            tensor = tensor.to(device)
            layer.set_weight(tensor if scale is None else dequantize(tensor, scale.to(device), torch.float32))
        else:
            scale = torch.ones(1, 1) if scale is None else scale
            layer.weight = nn.Parameter(tensor.to(device, copy=self.copies), requires_grad=False)
            layer.scale = nn.Parameter(
                scale.repeat(layer.out_features // len(scale), 1).to(device), requires_grad=False
            )
        self._finite(name, layer.weight)
        self._finite(name, layer.scale)

    def read(self, name: str) -> tuple[Tensor, Tensor | None]:
        """A tensor in the dtype of the file, a view of it possibly, and the scale of a scaled fp8 one."""
        parts = self.parts(name)
        tensor = self.join(name, [self.file.checkpoint.read(part) for part in parts])
        if not tensor.dtype.is_floating_point:
            found = dtype_word(tensor.dtype)
            raise UserError(f"{self.file.path}: {parts[0]} is {found}; files quantised to integers are not read")
        if tensor.dtype not in FP8_DTYPES or self.file.fp8 in ("none", "plain"):
            return tensor, None
        scales = [self._scale(part) for part in parts]
        if len(parts) == 1:
            return tensor, scales[0]
        rows = [self.infos[part].shape[0] for part in parts]
        return tensor, torch.cat([scale.expand(count, 1) for scale, count in zip(scales, rows, strict=True)])

    def _scale(self, part: str) -> Tensor:
        """Scale (1, 1) or (out, 1) of a float8 tensor of the file."""
        module, rows = part.removesuffix(".weight"), self.infos[part].shape[0]
        stored = next((f"{module}.{leaf}" for leaf in SCALE_LEAVES if f"{module}.{leaf}" in self.infos), None)
        scale = self.map.get(module) if stored is None else self.file.checkpoint.read(stored).float()
        if scale is None:
            raise UserError(f"{self.file.path}: {part} is fp8 but has no scale, unlike others of this file")
        if scale.numel() not in (1, rows):
            found = f"the scale of {part} has shape {tuple(scale.shape)}"
            raise UserError(f"{self.file.path}: {found}; one or {rows} numbers are expected")
        return scale.reshape(-1, 1)

    def _finite(self, name: str, tensor: Tensor, cure: str = "download it again") -> Tensor:
        values = tensor.detach()
        if values.dtype == FP8:
            # Its NaNs are the bytes 0x7F and 0xFF, the largest ones as signed and as unsigned; it has no infinity.
            sound = bool(values.view(torch.int8).max() < 0x7F) and bool(values.view(torch.uint8).max() < 0xFF)
        else:
            sound = values.numel() == 0 or all(bool(torch.isfinite(extreme)) for extreme in values.aminmax())
        if not sound:
            word = dtype_word(values.dtype)
            raise UserError(f"{self.file.path}: {name} holds NaN or infinite numbers (as {word}); {cure}")
        return tensor
