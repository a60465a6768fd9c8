"""Selects the Linear modules of the DiT that get an adapter, and reads `--network_args`."""

import ast
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from utils.errors import UserError, did_you_mean, one_line

TARGET_BLOCKS = ("MMDoubleStreamBlock", "MMSingleStreamBlock")
# musubi-tuner does not adapt modulation, and other programs do not expect it in files.
DEFAULT_EXCLUDE = ".*(img_mod|txt_mod|modulation).*"


def find_targets(
    model: nn.Module, exclude_patterns: list[str] | None = None, include_patterns: list[str] | None = None
) -> dict[str, nn.Module]:
    """The Linear modules (plain or quantised) of the model's blocks by official dotted name, in the model's order.

    A module is left out if DEFAULT_EXCLUDE or one of `exclude_patterns` matches its whole name, unless one of
    `include_patterns` matches its whole name too.

    Raises:
        UserError: no module is left.
    """
    excluded = [re.compile(pattern) for pattern in [DEFAULT_EXCLUDE, *(exclude_patterns or [])]]
    included = [re.compile(pattern) for pattern in include_patterns or []]
    targets = {}
    for block_name, block in model.named_modules():
        if type(block).__name__ not in TARGET_BLOCKS:
            continue
        for name, module in block.named_modules(prefix=block_name):
            wanted = not _matches(excluded, name) or _matches(included, name)
            if wanted and is_linear(module):
                targets[name] = module
    if not targets:
        raise UserError("network_args: exclude_patterns leave no module to train; check them, or add include_patterns")
    return targets


def is_linear(module: nn.Module) -> bool:
    """Whether this is a Linear, plain or quantised."""
    return hasattr(module, "in_features") and hasattr(module, "out_features") and hasattr(module, "weight")


def _matches(patterns: list[re.Pattern], name: str) -> bool:
    return any(pattern.fullmatch(name) for pattern in patterns)


def _pattern_list(text: str) -> list[str]:
    patterns = ast.literal_eval(text)
    if not isinstance(patterns, list) or not all(isinstance(pattern, str) for pattern in patterns):
        raise ValueError("not a list of strings")
    for pattern in patterns:
        re.compile(pattern)
    return patterns


def _flag(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise ValueError("neither True nor False")
    return text.lower() == "true"


def _probability(text: str) -> float:
    value = float(text)
    if not 0 <= value < 1:
        raise ValueError("outside 0 <= p < 1")
    return value


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise ValueError("not a positive number")
    return value


def _factor(text: str) -> int:
    value = int(text)
    if value != -1 and value < 1:
        raise ValueError("neither -1 nor a positive number")
    return value


@dataclass(frozen=True)
class _Argument:
    read: Any
    expected: str


ARGUMENTS = {
    "conv_dim": _Argument(int, "a whole number"),
    "conv_alpha": _Argument(float, "a number"),
    "rank_dropout": _Argument(_probability, "a number from 0 to below 1"),
    "module_dropout": _Argument(_probability, "a number from 0 to below 1"),
    "verbose": _Argument(_flag, "True or False"),
    "exclude_patterns": _Argument(_pattern_list, "a list of regular expressions such as ['.*txt_mlp.*']"),
    "include_patterns": _Argument(_pattern_list, "a list of regular expressions such as ['.*img_mod.*']"),
    "loraplus_lr_ratio": _Argument(_positive, "a number above 0"),
    "use_dora": _Argument(_flag, "True or False"),
    "factor": _Argument(_factor, "-1 (automatic) or a whole number above 0"),
}


def read_arguments(given: Mapping[str, Any], known: list[str]) -> dict[str, Any]:
    """Converts the values of `--network_args` from strings to their types.

    Raises:
        UserError: a name that is not in `known`, or a value that cannot be read.
    """
    values = {}
    for name, text in given.items():
        if name not in known:
            raise UserError(
                f"network_args: unknown key '{name}'{did_you_mean(name, known)}; known are {', '.join(known)}"
            )
        argument = ARGUMENTS[name]
        try:
            values[name] = argument.read(str(text))
        except (ValueError, SyntaxError, re.error, RecursionError) as error:
            raise UserError(
                f"network_args: {name}={text}: {argument.expected} is expected ({one_line(error)})"
            ) from None
    return values
