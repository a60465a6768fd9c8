"""From prompts to what conditions the DiT, for generation and for the previews of training."""

import functools
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Literal

import torch
from tqdm import tqdm

from hunyuan_model import checkpoints
from modules.generation.lazy_model import LazyModel
from modules.generation.sampler import Conditioning
from modules.options import TextEncoderOptions
from utils.device_utils import default_dtype

if TYPE_CHECKING:  # transformers takes seconds to import
    from hunyuan_model.text_encoder import ClipTextEncoder, LlmTextEncoder


def lazy_text_encoders(
    options: TextEncoderOptions, device: torch.device, when_released: Literal["free", "keep"] = "free"
) -> tuple[LazyModel["LlmTextEncoder"], LazyModel["ClipTextEncoder"]]:
    """Both text encoders that the options describe. Each is loaded at its first use."""
    dtype = default_dtype(options.text_encoder_dtype, device)
    llm = functools.partial(
        checkpoints.load_text_encoder_1, options.text_encoder1, device, dtype, options.fp8_llm, options.tokenizer1
    )
    clip = functools.partial(checkpoints.load_text_encoder_2, options.text_encoder2, device, dtype, options.tokenizer2)
    return (
        LazyModel(llm, device, when_released, advice="use --fp8_llm"),
        LazyModel(clip, device, when_released, advice="use --text_encoder_dtype float16"),
    )


@torch.no_grad()
def encode_texts(
    texts: Iterable[str], encoder_1: LazyModel["LlmTextEncoder"], encoder_2: LazyModel["ClipTextEncoder"]
) -> dict[str, Conditioning]:
    """Encodes each different text once and returns the results by text, on the CPU.

    One text encoder is in memory at a time. Each text is encoded alone, so the result does not depend on the others.
    """
    texts = list(dict.fromkeys(texts))
    if not texts:
        return {}
    states, pooled = {}, {}
    encoder_1.load()
    for lost in filter(None, encoder_1.model.truncated(texts)):
        print(f"warning: a prompt is too long for text encoder 1, its end is cut off: '{lost}'", file=sys.stderr)
    for text in tqdm(texts, desc="text encoder 1", disable=len(texts) < 3):
        states[text] = [tensor.cpu() for tensor in encoder_1.model.encode([text])]  # (1, L, D) and (1, L)
    encoder_1.release()
    for text in texts:
        pooled[text] = encoder_2.model.encode([text]).cpu()  # (1, D2)
    encoder_2.release()
    return {text: Conditioning(*states[text], pooled[text]) for text in texts}
