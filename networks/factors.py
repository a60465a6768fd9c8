"""The factors (small matrices) of one adapted module, of any kind, and the change of the weight that they define.

Factors have the dtype of their file; every product is computed in float32. Sources: LyCORIS (arXiv:2309.14859) for
LoHa and LoKr, arXiv:2402.09353 for DoRA.
"""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from utils.safetensors_utils import is_finite


@dataclass(frozen=True, kw_only=True)
class Factors:
    """What LoRA, LoHa and LoKr have in common.

    Attributes:
        alpha: the update of the weight is scaled by alpha / rank; None means alpha = rank.
        dora_scale: for DoRA, the norms of the rows (out, 1) or of the columns (1, in) of the adapted weight.
    """

    # The low-rank products in the update, as names of fields: (factor with the rows, factor with the columns).
    PAIRS: ClassVar[tuple[tuple[str, str], ...]] = ()
    kind: ClassVar[str]  # its name for the user

    alpha: float | None = None
    dora_scale: Tensor | None = None

    @property
    def rank(self) -> int:
        raise NotImplementedError

    @property
    def scale(self) -> float:
        return 1.0 if self.alpha is None else self.alpha / self.rank

    def tensors(self) -> dict[str, Tensor]:
        """The factors by field name, and dora_scale; not alpha."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, Tensor)}

    def map(self, change: Callable[[Tensor], Tensor]) -> "Factors":
        """The same with `change` applied to every tensor."""
        return dataclasses.replace(self, **{name: change(tensor) for name, tensor in self.tensors().items()})

    def delta_weight(self) -> Tensor:
        """The update of the weight, a float32 matrix (out, in), without what DoRA does to norms."""
        raise NotImplementedError

    def is_zero(self) -> bool:
        """Whether it leaves every weight as it is, as a scale of 0 or a product with a factor of zeros does.

        DoRA is taken to change something: its lengths may differ from those of the weight.
        """
        if self.dora_scale is not None:
            return False
        return self.scale == 0 or not all(tensor.any() for tensor in self.tensors().values())

    def norm(self) -> float:
        """The Frobenius norm of `delta_weight`."""
        return self.delta_weight().norm().item()

    @property
    def out_features(self) -> int:
        raise NotImplementedError

    @property
    def in_features(self) -> int:
        raise NotImplementedError

    @property
    def has_separable_rows(self) -> bool:
        """Whether rows of the update can be computed separately. LoKr and DoRA by columns do not allow it."""
        return bool(self.PAIRS) and (self.dora_scale is None or self.dora_scale.shape[0] == self.out_features)

    def rows(self, start: int, stop: int) -> "Factors":
        """The factors of some rows of the weight; only with `has_separable_rows`."""
        sides = {side: getattr(self, side)[start:stop] for side, _ in self.PAIRS}
        if self.dora_scale is not None:
            sides["dora_scale"] = self.dora_scale[start:stop]
        return dataclasses.replace(self, **sides)

    def apply(self, weight: Tensor, multiplier: float = 1.0) -> Tensor:
        """The adapted weight, float32, in the shape of `weight`.

        Args:
            weight: float32, (out, in) or (out, in, *kernel).
            multiplier: factor of the update; with DoRA, the position between the old weight (0) and the new one (1).
        """
        flat = weight.flatten(1)
        update = self.delta_weight()
        if self.dora_scale is None:
            return torch.add(flat, update, alpha=multiplier).view_as(weight)
        direction = flat + update
        by_rows = self.dora_scale.shape[0] == flat.shape[0]
        lengths = direction.norm(dim=1 if by_rows else 0, keepdim=True)
        target = direction * (self.dora_scale.float().view_as(lengths) / lengths)
        return torch.lerp(flat, target, multiplier).view_as(weight)


@dataclass(frozen=True, kw_only=True)
class LoraFactors(Factors):
    """delta_weight = alpha / rank * up @ down; down (rank, in), up (out, rank); a convolution's kernel may follow."""

    PAIRS: ClassVar[tuple[tuple[str, str], ...]] = (("up", "down"),)
    kind: ClassVar[str] = "LoRA"

    down: Tensor
    up: Tensor

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    @property
    def out_features(self) -> int:
        return self.up.shape[0]

    @property
    def in_features(self) -> int:
        return self.down.flatten(1).shape[1]

    def delta_weight(self) -> Tensor:
        return (self.up.flatten(1).float() * self.scale) @ self.down.flatten(1).float()

    def norm(self) -> float:
        # |up @ down|^2 from two Gram matrices (rank, rank), so that no matrix of the weight's size is needed.
        up, down = self.up.flatten(1).float(), self.down.flatten(1).float()
        return abs(self.scale) * ((up.T @ up) * (down @ down.T)).sum().clamp_min(0).sqrt().item()


@dataclass(frozen=True, kw_only=True)
class LohaFactors(Factors):
    """delta_weight = alpha / rank * (w1_a @ w1_b) * (w2_a @ w2_b), `*` by element; a (out, rank), b (rank, in)."""

    PAIRS: ClassVar[tuple[tuple[str, str], ...]] = (("w1_a", "w1_b"), ("w2_a", "w2_b"))
    kind: ClassVar[str] = "LoHa"

    w1_a: Tensor
    w1_b: Tensor
    w2_a: Tensor
    w2_b: Tensor

    @property
    def rank(self) -> int:
        return self.w1_b.shape[0]

    @property
    def out_features(self) -> int:
        return self.w1_a.shape[0]

    @property
    def in_features(self) -> int:
        return self.w1_b.shape[1]

    def delta_weight(self) -> Tensor:
        first = (self.w1_a.float() * self.scale) @ self.w1_b.float()
        return first * (self.w2_a.float() @ self.w2_b.float())


@dataclass(frozen=True, kw_only=True)
class LokrFactors(Factors):
    """delta_weight = scale * kron(w1, w2), each stored whole or as a @ b; scale is 1 if both are stored whole."""

    kind: ClassVar[str] = "LoKr"

    w1: Tensor | None = None
    w1_a: Tensor | None = None
    w1_b: Tensor | None = None
    w2: Tensor | None = None
    w2_a: Tensor | None = None
    w2_b: Tensor | None = None

    @property
    def rank(self) -> int:
        products = [b for b in (self.w1_b, self.w2_b) if b is not None]
        return products[0].shape[0] if products else 1

    @property
    def scale(self) -> float:
        return 1.0 if not self.has_rank or self.alpha is None else self.alpha / self.rank

    @property
    def has_rank(self) -> bool:
        """Whether one of the matrices is stored as a product."""
        return self.w1_b is not None or self.w2_b is not None

    @property
    def out_features(self) -> int:
        first = self.w1_a if self.w1 is None else self.w1
        second = self.w2_a if self.w2 is None else self.w2
        return first.shape[0] * second.shape[0]

    @property
    def in_features(self) -> int:
        first = self.w1_b if self.w1 is None else self.w1
        second = self.w2_b if self.w2 is None else self.w2.flatten(1)  # the kernel of a convolution may follow
        return first.shape[1] * second.shape[1]

    def delta_weight(self) -> Tensor:
        w1 = self.w1.float() if self.w1 is not None else self.w1_a.float() @ self.w1_b.float()
        w2 = self.w2.flatten(1).float() if self.w2 is not None else self.w2_a.float() @ self.w2_b.float()
        return torch.kron(w1 * self.scale, w2)


@dataclass(frozen=True, kw_only=True)
class DifferenceFactors(Factors):
    """delta_weight = diff, the whole change of a weight (out, in); a convolution's kernel may follow. No alpha."""

    kind: ClassVar[str] = "whole difference"

    diff: Tensor

    @property
    def rank(self) -> int:
        return min(self.out_features, self.in_features)

    @property
    def scale(self) -> float:
        return 1.0

    @property
    def out_features(self) -> int:
        return self.diff.shape[0]

    @property
    def in_features(self) -> int:
        return self.diff.flatten(1).shape[1]

    @property
    def has_separable_rows(self) -> bool:
        return True

    def rows(self, start: int, stop: int) -> "DifferenceFactors":
        return dataclasses.replace(self, diff=self.diff[start:stop])

    def delta_weight(self) -> Tensor:
        return self.diff.flatten(1).float()


# Suffix of a key in a file -> field of the factors. LoRA factors have several spellings in circulation.
SUFFIXES = {
    **{f"{name}.weight": "down" for name in ("lora_down", "lora_A", "lora.down")},
    **{f"{name}.weight": "up" for name in ("lora_up", "lora_B", "lora.up")},
    "lora_A": "down",
    "lora_B": "up",
    "lora_down": "down",
    "lora_up": "up",
    "alpha": "alpha",
    "dora_scale": "dora_scale",
    "lora_magnitude_vector": "dora_scale",
    "diff": "diff",
    **{f"hada_{name}": name for name in ("w1_a", "w1_b", "w2_a", "w2_b")},
    **{f"lokr_{name}": name for name in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b")},
}
# Suffix of a key in a file -> the tensor of the module to which that tensor is added.
VECTOR_SUFFIXES = {**dict.fromkeys(("diff_b", "b_norm", "lora_B.bias", "lora_up.bias"), "bias"), "w_norm": "weight"}
KINDS: dict[str, type[Factors]] = {
    "lora": LoraFactors,
    "hada": LohaFactors,
    "lokr": LokrFactors,
    "diff": DifferenceFactors,
}


def factors_from(tensors: Mapping[str, Tensor]) -> Factors:
    """The factors of one module from its tensors; keys are suffixes (those of `SUFFIXES`).

    Raises:
        ValueError: factors are missing, of two kinds, or do not fit together; the text is the end of a sentence that
            begins with the module.
    """
    kinds = {suffix[:4] for suffix in tensors} & KINDS.keys()
    if len(kinds) != 1:
        raise ValueError(f"has {', '.join(sorted(tensors))}, which is no complete LoRA, LoHa or LoKr")
    values = {SUFFIXES[suffix]: tensor for suffix, tensor in tensors.items()}
    if kinds == {"diff"}:
        values.pop("alpha", None)  # programs that write whole differences do not scale them
    if "alpha" in values:
        values["alpha"] = _alpha(values["alpha"])
    if "dora_scale" in values and values["dora_scale"].dim() == 1:
        values["dora_scale"] = values["dora_scale"][:, None]
    try:
        factors = KINDS[kinds.pop()](**values)
    except TypeError:
        raise ValueError(f"has only {', '.join(sorted(tensors))}") from None
    _check_shapes(factors)
    return factors


def _alpha(tensor: Tensor) -> float:
    if tensor.numel() != 1:
        raise ValueError(f"alpha has {tensor.numel()} values, one is expected")
    alpha = float(tensor)
    if alpha != alpha or abs(alpha) == float("inf"):
        raise ValueError("alpha is not finite")
    return alpha


def _check_shapes(factors: Factors) -> None:
    shapes = {name: tuple(tensor.shape) for name, tensor in factors.tensors().items()}
    for name, tensor in factors.tensors().items():
        if tensor.dim() < 2 or not tensor.is_floating_point() or 0 in tensor.shape:
            raise ValueError(f"{name} is {tuple(tensor.shape)} of {tensor.dtype}, a matrix of numbers is expected")
        if not is_finite(tensor):
            raise ValueError(f"{name} has values that are not finite")
    for a, b in factors.PAIRS or LohaFactors.PAIRS:
        if (a in shapes) != (b in shapes):
            raise ValueError(f"has {a if a in shapes else b} without {b if a in shapes else a}")
        if a in shapes and shapes[a][1] != shapes[b][0]:
            raise ValueError(f"{a} is {shapes[a]} and {b} is {shapes[b]}: the ranks differ")
    if isinstance(factors, LohaFactors) and (
        shapes["w1_a"][0] != shapes["w2_a"][0] or shapes["w1_b"][1] != shapes["w2_b"][1]
    ):
        raise ValueError(f"is a LoHa whose two products differ in shape: {shapes}")
    if isinstance(factors, LokrFactors):
        for whole, product in (("w1", "w1_a"), ("w2", "w2_a")):
            if (whole in shapes) == (product in shapes):
                raise ValueError(f"needs either lokr_{whole} or lokr_{product} and lokr_{whole}_b")
