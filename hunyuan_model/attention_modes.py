"""The attention backends that users can choose, and the package that each one needs. Imports nothing heavy."""

import importlib.metadata
import importlib.util
from dataclasses import dataclass

from packaging.version import Version

from utils.errors import UserError, did_you_mean

# In older releases scaled dot product attention with a key mask can give wrong results on CUDA: the videos are black.
MINIMUM_TORCH = "2.5.1"


@dataclass(frozen=True)
class AttentionMode:
    """The module that a backend imports, and the command that installs it."""

    module: str
    install: str


ATTENTION_MODES = {
    "torch": AttentionMode("torch", f"pip install 'torch>={MINIMUM_TORCH}'"),
    "sdpa": AttentionMode("torch", f"pip install 'torch>={MINIMUM_TORCH}'"),
    "flash": AttentionMode("flash_attn", "pip install flash-attn --no-build-isolation"),
    "flash3": AttentionMode("flash_attn_interface", "pip install flash-attn-3 (Hopper GPUs, from PyTorch's own index)"),
    "sageattn": AttentionMode("sageattention", "pip install sageattention"),
    "xformers": AttentionMode("xformers", "pip install xformers"),
}


def require_attention(name: str) -> None:
    """Checks that a backend is known and installed, without importing it.

    Raises:
        UserError: the backend is unknown or not installed, or the attention of this torch release is broken.
    """
    mode = ATTENTION_MODES.get(name)
    if mode is None:
        hint = did_you_mean(name, list(ATTENTION_MODES))
        raise UserError(f"attention mode '{name}' is not one of {', '.join(ATTENTION_MODES)}{hint}")
    if importlib.util.find_spec(mode.module) is None:
        raise UserError(f"attention mode '{name}': the package {mode.module} is not installed; {mode.install}")
    if mode.module == "torch" and Version(importlib.metadata.version("torch")) < Version(MINIMUM_TORCH):
        found = importlib.metadata.version("torch")
        raise UserError(f"attention mode '{name}': broken in torch {found} (black videos); {mode.install}")
