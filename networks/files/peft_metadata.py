"""PEFT's configuration of a LoRA, which newer versions of diffusers store as JSON in the metadata of the file.

The JSON has `r`, `lora_alpha`, `rank_pattern`, `alpha_pattern`, ...; each name has the prefix `transformer.`.
"""

import json
import re
from collections import Counter
from collections.abc import Mapping

from torch import Tensor

from networks.factors import SUFFIXES
from networks.files.names import split_key
from utils.errors import UserError, one_line

PEFT_KEY = "lora_adapter_metadata"


class PeftAlphas:
    """The alphas that PEFT's configuration gives to the modules of a file; false if the file has no configuration."""

    def __init__(self, text: str | None, source: str):
        try:
            values = json.loads(text) if text else {}
            patterns = values.get("transformer.alpha_pattern") or values.get("alpha_pattern") or {}
            self._patterns = {re.compile(rf"(.*\.)?({name})"): float(alpha) for name, alpha in patterns.items()}
        except (ValueError, TypeError, AttributeError, re.error) as error:
            raise UserError(f"{source}: {PEFT_KEY} cannot be read: {one_line(error)}") from None
        self._values = {name.removeprefix("transformer."): value for name, value in values.items()}

    def __bool__(self) -> bool:
        return bool(self._values)

    def of_module(self, name: str, rank: int) -> float | None:
        """The alpha of the module `name` (without prefix), or None if there is none."""
        alpha = self._values.get("lora_alpha")
        alpha = next((value for pattern, value in self._patterns.items() if pattern.fullmatch(name)), alpha)
        # Rank-stabilised LoRA scales by alpha / sqrt(rank).
        return alpha if alpha is None else float(alpha) * (rank**0.5 if self._values.get("use_rslora") else 1)


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
