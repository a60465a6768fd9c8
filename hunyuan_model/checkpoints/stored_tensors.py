"""The tensors of one model in a checkpoint, by the names of our modules' parameters, and how they fill a model.

A model is built on the meta device, without memory. Its tensors are then read one by one and moved to their device and
dtype, so that the peak of main memory is the final size plus one tensor.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn

from hunyuan_model.checkpoints.identification import (
    DIT,
    FP8_DTYPES,
    SCALE_LEAVES,
    VAE,
    ModelFile,
    read_fp8_map,
)
from hunyuan_model.checkpoints.names import (
    dit_naming,
    dit_official_shapes,
    dit_parts,
    dit_to_official,
    vae_official_name,
)
from hunyuan_model.quantization import FP8, Fp8Linear, dequantize
from hunyuan_model.shapes import Shapes
from utils.device_utils import dtype_word
from utils.errors import UserError, one_line

Device = torch.device | str
Devices = Device | Callable[[str], Device]
Dtypes = torch.dtype | Callable[[str], torch.dtype]
Change = Callable[[Tensor], Tensor]

BROKEN_FILE = "download it again"
BROKEN_MERGE = "they come from the LoRAs merged into it: lower the multiplier or use another LoRA"


class StoredTensors:
    """The tensors of one part of a file (DIT, VAE, LLM or CLIP), by the names of our modules' parameters.

    This class is for files with our names, possibly after a prefix; subclasses know other layouts.

    Attributes:
        file: what `identify` found.
        shapes: {parameter name: shape} of all tensors of this part.
    """

    def __init__(self, file: ModelFile, part: str) -> None:
        self.file = file
        self.shapes: Shapes = {name: info.shape for name, info in file.tensors(part).items()}
        self._prefix = file.prefixes[part]
        self._infos = file.checkpoint.infos
        # A tensor of a .pt file is a view that keeps pages of the file in memory until it is copied.
        self._copy = file.checkpoint.container == ".pt"

    def stored_names(self, name: str) -> list[str]:
        """The tensors of the file whose rows, stacked, are the parameter `name`."""
        return [self._prefix + name]

    def assemble(self, name: str, stored: Sequence[Tensor]) -> Tensor:
        """The parameter `name` from the tensors that `stored_names` lists."""
        return stored[0]

    def dtype(self, name: str) -> torch.dtype:
        """The dtype in which the file holds a parameter."""
        return self._infos[self.stored_names(name)[0]].dtype

    def check_complete(self, model: nn.Module) -> None:
        """Checks that every parameter of the model is in the file with its shape.

        Raises:
            UserError: one is missing or has another shape.
        """
        expected = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
        missing = [name for name in expected if name not in self.shapes]
        if missing:
            found = f"{len(missing)} of {len(expected)} tensors are missing, the first is {missing[0]}"
            raise UserError(f"{self.file.path}: {found}")
        for name, shape in expected.items():
            found = tuple(self.shapes[name])
            if found != shape:
                raise UserError(f"{self.file.path}: {name} has shape {found}, {shape} is expected")

    def check_exact(self, model: nn.Module) -> None:
        """Checks that every parameter of the model is in the file with its shape, and that it holds no other tensor.

        Raises:
            UserError: a tensor is missing, superfluous or has another shape.
        """
        expected = {name for name, _ in model.named_parameters()}
        others = [name for name in self.shapes if name not in expected]
        if others:
            found = f"{len(others)} tensors do not belong to this model, the first is {others[0]}"
            raise UserError(f"{self.file.path}: {found}")
        self.check_complete(model)

    def fill(
        self,
        model: nn.Module,
        device: Devices,
        dtype: Dtypes,
        compute_device: Device | None = None,
        changes: Mapping[str, Change] | None = None,
    ) -> nn.Module:
        """Gives every parameter of a model on the meta device its frozen tensor, and prints what the file is.

        Args:
            device, dtype, compute_device, changes: as in `load_dit`.
        """
        for name in [name for name, _ in model.named_parameters()]:
            owner, _, leaf = name.rpartition(".")
            module = model.get_submodule(owner)
            target, change = device(name) if callable(device) else device, (changes or {}).get(name)
            working_device = target if compute_device is None else compute_device
            if not isinstance(module, Fp8Linear) or leaf == "bias":
                wanted = dtype if isinstance(dtype, torch.dtype) else dtype(name)
                tensor = self._read_as(name, target, wanted, working_device, change)
                setattr(module, leaf, nn.Parameter(tensor, requires_grad=False))
            elif leaf == "weight":
                self._fill_fp8(name, module, working_device, change)
                for part in ("weight", "scale"):
                    setattr(module, part, nn.Parameter(getattr(module, part).to(target), requires_grad=False))
        print(self.file.summary())
        return model.eval()

    def _read_as(
        self, name: str, device: Device, dtype: torch.dtype, working_device: Device, change: Change | None
    ) -> Tensor:
        if change is not None:
            changed = change(self._read_float32(name, working_device))
            return self._require_finite(name, changed.to(device, dtype), BROKEN_MERGE)
        tensor, scale = self.read(name)
        if scale is None:
            tensor = tensor.to(device, dtype, copy=self._copy)
        else:
            tensor = dequantize(tensor.to(device), scale.to(device), dtype)
        return self._require_finite(name, tensor)

    def _read_float32(self, name: str, device: Device) -> Tensor:
        """A copy in float32, which the caller may change in place."""
        tensor, scale = self.read(name)
        if scale is None:
            return self._require_finite(name, tensor.to(device, torch.float32, copy=True))
        return self._require_finite(name, dequantize(tensor.to(device), scale.to(device), torch.float32))

    def _fill_fp8(self, name: str, layer: Fp8Linear, device: Device, change: Change | None) -> None:
        if change is not None:
            layer.set_weight(change(self._read_float32(name, device)))
            self._require_finite(name, layer.weight, BROKEN_MERGE)
            self._require_finite(name, layer.scale, BROKEN_MERGE)
            return
        tensor, scale = self.read(name)
        if tensor.dtype != FP8:
            tensor = tensor.to(device)
            layer.set_weight(tensor if scale is None else dequantize(tensor, scale.to(device), torch.float32))
        else:
            scale = torch.ones(1, 1) if scale is None else scale
            rows = scale.repeat(layer.out_features // len(scale), 1).to(device)
            layer.weight = nn.Parameter(tensor.to(device, copy=self._copy), requires_grad=False)
            layer.scale = nn.Parameter(rows, requires_grad=False)
        self._require_finite(name, layer.weight)
        self._require_finite(name, layer.scale)

    def read(self, name: str) -> tuple[Tensor, Tensor | None]:
        """A parameter on the CPU as it is stored, and the scale (1 or out, 1) if it is scaled fp8.

        The tensor may be a view of the file, valid until the next one is read.
        """
        stored = self.stored_names(name)
        tensor = self.assemble(name, [self.file.checkpoint.read(each) for each in stored])
        if not tensor.dtype.is_floating_point:
            found = dtype_word(tensor.dtype)
            raise UserError(f"{self.file.path}: {stored[0]} is {found}; files quantised to integers are not read")
        if tensor.dtype not in FP8_DTYPES or self.file.fp8 in ("none", "plain"):
            return tensor, None
        scales = [self._scale(each) for each in stored]
        if len(stored) == 1:
            return tensor, scales[0]
        rows = [self._infos[each].shape[0] for each in stored]
        return tensor, torch.cat([scale.expand(count, 1) for scale, count in zip(scales, rows, strict=True)])

    @cached_property
    def _fp8_map(self) -> dict[str, Tensor]:
        return read_fp8_map(self.file.checkpoint) if self.file.fp8 == "official" else {}

    def _scale(self, stored: str) -> Tensor:
        """The scale (1, 1) or (out, 1) of a float8 tensor of the file."""
        module, rows = stored.removesuffix(".weight"), self._infos[stored].shape[0]
        beside = next((f"{module}.{leaf}" for leaf in SCALE_LEAVES if f"{module}.{leaf}" in self._infos), None)
        scale = self._fp8_map.get(module) if beside is None else self.file.checkpoint.read(beside).float()
        if scale is None:
            raise UserError(f"{self.file.path}: {stored} is fp8 but has no scale, unlike others of this file")
        if scale.numel() not in (1, rows):
            found = f"the scale of {stored} has shape {tuple(scale.shape)}"
            raise UserError(f"{self.file.path}: {found}; one or {rows} numbers are expected")
        return scale.reshape(-1, 1)

    def _require_finite(self, name: str, tensor: Tensor, advice: str = BROKEN_FILE) -> Tensor:
        values = tensor.detach()
        if values.dtype == FP8:
            # Its NaNs are the bytes 0x7F and 0xFF, the largest ones as signed and as unsigned; it has no infinity.
            finite = bool(values.view(torch.int8).max() < 0x7F) and bool(values.view(torch.uint8).max() < 0xFF)
        else:
            finite = values.numel() == 0 or all(bool(torch.isfinite(extreme)) for extreme in values.aminmax())
        if not finite:
            word = dtype_word(values.dtype)
            raise UserError(f"{self.file.path}: {name} holds NaN or infinite numbers (as {word}); {advice}")
        return tensor


class DitTensors(StoredTensors):
    """The tensors of a DiT file in any layout, by official name."""

    def __init__(self, file: ModelFile) -> None:
        super().__init__(file, DIT)
        self._naming = dit_naming(self.shapes)
        self.shapes = dit_official_shapes(self.shapes, self._naming)

    def stored_names(self, name: str) -> list[str]:
        return [self._prefix + part for part in dit_parts(name, self._naming)]

    def assemble(self, name: str, stored: Sequence[Tensor]) -> Tensor:
        return dit_to_official(name, stored, self._naming)


class VaeTensors(StoredTensors):
    """The tensors of a VAE file in any layout, by official name."""

    def __init__(self, file: ModelFile) -> None:
        super().__init__(file, VAE)
        self._stored_names = {vae_official_name(name): name for name in self.shapes}
        self.shapes = {
            official: self._matrix_shape(official, self.shapes[name]) for official, name in self._stored_names.items()
        }

    def stored_names(self, name: str) -> list[str]:
        return [self._prefix + self._stored_names[name]]

    def assemble(self, name: str, stored: Sequence[Tensor]) -> Tensor:
        return stored[0].reshape(self.shapes[name])

    @staticmethod
    def _matrix_shape(name: str, shape: Sequence[int]) -> tuple[int, ...]:
        """ComfyUI keeps the four attention matrices as 1x1x1 convolutions."""
        return tuple(shape[:2]) if ".attentions." in name else tuple(shape)


@contextlib.contextmanager
def errors_naming(path: str | Path) -> Iterator[None]:
    """Inside, errors about the sizes of a model name the file that the sizes come from."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except (ValueError, TypeError, LookupError, ArithmeticError, RuntimeError) as error:
        # Impossible shapes, or a config.json without sense, fail in the layer that uses them first.
        reason = f"{type(error).__name__}: {one_line(error)[:150]}"
        raise UserError(f"{path}: no model can be built from its sizes ({reason})") from None
