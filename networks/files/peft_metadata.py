"""PEFT's configuration of a LoRA, which newer versions of diffusers store as JSON in the metadata of the file.

The JSON has `r`, `lora_alpha`, `rank_pattern`, `alpha_pattern`, ...; each name has the prefix `transformer.`.
"""

import dataclasses
import json
import math
import re
from collections import Counter
from collections.abc import Mapping

from torch import Tensor

from networks.factors import SUFFIXES, Factors, LokrFactors
from networks.files.names import split_key
from utils.errors import UserError, one_line
from utils.files import parse_json

PEFT_KEY = "lora_adapter_metadata"


class PeftAlphas:
    """The alphas that PEFT's configuration gives to the modules of a file; false if the file has no configuration."""

    def __init__(self, text: str | None, source: str):
        try:
            values = parse_json(text) if text else {}
            values = {name.removeprefix("transformer."): value for name, value in values.items()}
            patterns = values.get("alpha_pattern") or {}
            # LoHa and LoKr call it alpha.
            alpha = values.get("lora_alpha", values.get("alpha"))
            self._alpha = None if alpha is None else _finite(alpha)
            self._rank = _finite(values.get("r") or 1)
            self._root = bool(values.get("use_rslora"))
            self._patterns = {re.compile(rf"(.*\.)?({name})"): _finite(alpha) for name, alpha in patterns.items()}
        except (ValueError, RecursionError, TypeError, AttributeError, re.error) as error:
            raise UserError(f"{source}: {PEFT_KEY} cannot be read: {one_line(error)}") from None

    def __bool__(self) -> bool:
        return self._alpha is not None or bool(self._patterns)

    def applied(self, factors: Factors, name: str) -> Factors:
        """The factors of the module `name` (without prefix) with their alpha."""
        alpha = next((value for pattern, value in self._patterns.items() if pattern.fullmatch(name)), self._alpha)
        if alpha is None:
            return factors
        if isinstance(factors, LokrFactors) and factors.w1 is not None and factors.w2 is not None:
            # Other programs do not scale a LoKr of two whole matrices, PEFT does.
            return dataclasses.replace(factors, w1=factors.w1.float() * (alpha / self._rank))
        # Rank-stabilised LoRA scales by alpha / sqrt(rank).
        alpha *= factors.rank**0.5 if self._root else 1
        return factors if alpha == factors.rank else dataclasses.replace(factors, alpha=alpha)


def _finite(number: float) -> float:
    if not math.isfinite(float(number)):
        raise ValueError(f"{number} is not finite")
    return float(number)


def peft_metadata(tensors: Mapping[str, Tensor], prefix: str) -> str:
    """The configuration of a file in which every module has alpha = rank, as diffusers stores it."""
    ranks = {}
    for key, tensor in tensors.items():
        module, suffix = split_key(key)
        if SUFFIXES[suffix] == "down":
            ranks[module.removeprefix(prefix)] = tensor.shape[0]
    rank = Counter(ranks.values()).most_common(1)[0][0]
    # Without `^`, the pattern `proj_out` would also match the proj_out of every block.
    pattern = {f"^{name}": other for name, other in ranks.items() if other != rank}
    values = {
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": pattern,
        "alpha_pattern": pattern,
        "target_modules": sorted(ranks),
        "use_dora": any(key.endswith("lora_magnitude_vector") for key in tensors),
    }
    return json.dumps({f"{prefix}{name}": value for name, value in values.items()})
