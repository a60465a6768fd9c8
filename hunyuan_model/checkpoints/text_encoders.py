"""Loads the two text encoders from every layout in which they are published.

Each loader prints one line that says what the file is.
"""

import hashlib
from pathlib import Path

import torch
from torch import nn

from hunyuan_model.checkpoints.identification import CLIP, LLM, ModelFile, identify
from hunyuan_model.checkpoints.stored_tensors import Device, StoredTensors, errors_naming
from hunyuan_model.quantization import quantize_linears
from hunyuan_model.text_encoder import (
    ClipTextEncoder,
    LlmTextEncoder,
    clip_config_from_shapes,
    empty_clip,
    empty_llm,
    llm_config_from_shapes,
)
from hunyuan_model.tokenizers import (
    CLIP_REPOSITORY,
    LLM_REPOSITORY,
    clip_tokenizer,
    find_tokenizer,
    llm_tokenizer,
)


def load_text_encoder_1(
    path: str | Path,
    device: Device = "cpu",
    dtype: torch.dtype = torch.float16,
    fp8: bool = False,
    tokenizer: str | Path | None = None,
) -> LlmTextEncoder:
    """The language model of LLaVA-Llama-3-8B, without the layers whose output is not used.

    Args:
        path: Hugging Face folder (of a whole LLaVA only the language part is read) or one file.
        device, dtype: of the weights.
        fp8: keep the weights of the linear layers as float8.
        tokenizer: folder or tokenizer.json; by default it is looked for beside the model and in the Hugging Face cache.

    Raises:
        UserError: not this model, broken, or without a sound tokenizer.
    """
    file = identify(path)
    prompt_tokenizer = llm_tokenizer(find_tokenizer(path, tokenizer, LLM_REPOSITORY))
    model = empty_text_encoder_1(file, fp8)
    StoredTensors(file, LLM).fill(model, device, dtype)
    return LlmTextEncoder(model, prompt_tokenizer, _fingerprint(file, prompt_tokenizer.fingerprint, fp8))


def empty_text_encoder_1(file: ModelFile, fp8: bool) -> nn.Module:
    """The model that `load_text_encoder_1` fills, with its parameters on the meta device.

    Raises:
        UserError: the file's tensors are not this model's.
    """
    tensors = StoredTensors(file, LLM)
    with errors_naming(file.path):
        published = {f"model.{name}": shape for name, shape in tensors.shapes.items()}
        model = empty_llm(llm_config_from_shapes(published, file.checkpoint.config))
    tensors.check_complete(model)
    if fp8:
        quantize_linears(model, lambda name: name.startswith("layers."))
    return model


def load_text_encoder_2(
    path: str | Path,
    device: Device = "cpu",
    dtype: torch.dtype = torch.float16,
    tokenizer: str | Path | None = None,
) -> ClipTextEncoder:
    """The text model of CLIP-L; arguments and errors as in `load_text_encoder_1`."""
    file = identify(path)
    tensors = StoredTensors(file, CLIP)
    prompt_tokenizer = clip_tokenizer(find_tokenizer(path, tokenizer, CLIP_REPOSITORY))
    with errors_naming(path):
        published = {f"text_model.{name}": shape for name, shape in tensors.shapes.items()}
        model = empty_clip(clip_config_from_shapes(published, file.checkpoint.config))
    tensors.check_complete(model)
    tensors.fill(model, device, dtype)
    return ClipTextEncoder(model, prompt_tokenizer, _fingerprint(file, prompt_tokenizer.fingerprint, False))


def _fingerprint(file: ModelFile, tokenizer: str, fp8: bool) -> str:
    return hashlib.sha256(f"{file.checkpoint.fingerprint} {tokenizer} {fp8}".encode()).hexdigest()[:16]
