"""Tokenizers of the two text encoders, read from their files alone and proven before they are used.

transformers 5 can replace the pre-tokenizer of a byte-level Llama 3 tokenizer, so that spaces vanish without an error
(its issue 45488). So no tokenizer class of it is used here, and a file that was saved in that state is refused.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Encoding, Tokenizer
from torch import Tensor

from hunyuan_model import bpe_tokenizers
from utils.errors import UserError, one_line
from utils.files import read_text

# Templates of HunyuanVideo (hyvideo/constants.py); the number is that of the tokens before the prompt with Llama 3.
VIDEO_TEMPLATE = (
    "<|start_header_id|>system<|end_header_id|>\n\nDescribe the video by detailing the following aspects: "
    "1. The main content and theme of the video."
    "2. The color, shape, size, texture, quantity, text, and spatial relationships of the objects."
    "3. Actions, events, behaviors temporal relationships, physical movement changes of the objects."
    "4. background environment, light, style and atmosphere."
    "5. camera angles, movements, and transitions used in the video:<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\n{}<|eot_id|>"
)
IMAGE_TEMPLATE = (
    "<|start_header_id|>system<|end_header_id|>\n\nDescribe the image by detailing the color, shape, size, texture, "
    "quantity, text, spatial relationships of the objects and background:<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\n{}<|eot_id|>"
)
LLAMA_3_PREFIX = {VIDEO_TEMPLATE: 95, IMAGE_TEMPLATE: 36}
LLAMA_3_TOKENS = 128_000
LLM_TOKENS = 256
CLIP_TOKENS = 77

LLM_REPOSITORY = "xtuner/llava-llama-3-8b-v1_1-transformers"
CLIP_REPOSITORY = "openai/clip-vit-large-patch14"
LLM_MARKERS = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
CLIP_MARKERS = ("<|startoftext|>", "<|endoftext|>")
# The first that a tokenizer knows pads; padded positions are masked, so that the choice has no influence.
PADDING = ("<pad>", "<|finetune_right_pad_id|>", "<|end_of_text|>", "<|endoftext|>")
# Tokenizers in the older form, two files, that diffusers' folders hold for CLIP.
VOCABULARY = "vocab.json"
ROUND_TRIP = "a cat walks on the grass"


class PromptTokenizer:
    """Turns prompts into token ids of one length, right padded.

    Args:
        path: a `tokenizer.json`, or the `vocab.json` of a CLIP tokenizer with `merges.txt` beside it.
        template: text around the prompt, with `{}` for the prompt.
        max_tokens: tokens kept after those that the template puts before the prompt.
        markers: special tokens by which the kind of tokenizer is known.

    Raises:
        UserError: unreadable, of another kind, or broken so that text would silently be corrupted.
    """

    def __init__(self, path: str | Path, template: str, max_tokens: int, markers: Sequence[str]) -> None:
        self.path = Path(path)
        self._tokenizer = _parsed(self.path)
        self.fingerprint = fingerprint(self.path, template)
        missing = [token for token in markers if self._tokenizer.token_to_id(token) is None]
        if missing:
            raise UserError(
                f"{self.path}: not the tokenizer of this text encoder: the token {missing[0]} is missing; give the "
                "right one with --tokenizer1 (LLM) or --tokenizer2 (CLIP)"
            )
        _check_round_trip(self.path, self._tokenizer)

        self._before, self._after = template.split("{}")
        self.prefix_length = len(self._tokenizer.encode(self._before).ids) if self._before else 0
        expected = LLAMA_3_PREFIX.get(template)
        if expected and self.size >= LLAMA_3_TOKENS and self.prefix_length != expected:
            raise UserError(
                f"{self.path}: the prompt template takes {self.prefix_length} tokens, {expected} with a sound Llama 3 "
                f"tokenizer; use the tokenizer.json of {LLM_REPOSITORY}"
            )
        self._fix_length(self.prefix_length + max_tokens)

    def _fix_length(self, length: int) -> None:
        pad = next(token for token in PADDING if self._tokenizer.token_to_id(token) is not None)
        self._tokenizer.enable_truncation(length)
        self._tokenizer.enable_padding(length=length, pad_id=self._tokenizer.token_to_id(pad), pad_token=pad)

    @property
    def size(self) -> int:
        """Number of token ids, special tokens included."""
        return self._tokenizer.get_vocab_size(with_added_tokens=True)

    def __call__(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Token ids and mask (1 = token, 0 = padding), both (B, L) int64."""
        encodings = self._encode(prompts)
        return torch.tensor([each.ids for each in encodings]), torch.tensor([each.attention_mask for each in encodings])

    def truncated(self, prompts: Sequence[str]) -> list[str]:
        """For each prompt the end that does not fit and is not seen by the model; empty where all of it fits."""
        return [
            self._cut_end(prompt, encoding) for prompt, encoding in zip(prompts, self._encode(prompts), strict=True)
        ]

    def _cut_end(self, prompt: str, encoding: Encoding) -> str:
        if not encoding.overflowing:
            return ""
        seen = max(end for _, end in encoding.offsets) - len(self._before)
        return prompt[seen:]

    def _encode(self, prompts: Sequence[str]) -> list[Encoding]:
        return self._tokenizer.encode_batch([self._before + prompt + self._after for prompt in prompts])


def llm_tokenizer(path: str | Path, template: str = VIDEO_TEMPLATE) -> PromptTokenizer:
    """The Llama 3 tokenizer of text encoder 1."""
    return PromptTokenizer(path, template, LLM_TOKENS, LLM_MARKERS)


def clip_tokenizer(path: str | Path) -> PromptTokenizer:
    """The CLIP tokenizer of text encoder 2."""
    return PromptTokenizer(path, "{}", CLIP_TOKENS, CLIP_MARKERS)


def fingerprint(path: str | Path, template: str) -> str:
    """Identifies a tokenizer and the template that it is used with, without loading it."""
    return hashlib.sha256((template + read_text(path, "tokenizer")).encode()).hexdigest()[:16]


def find_tokenizer(model: str | Path, given: str | Path | None, repository: str) -> Path:
    """The file of the tokenizer that belongs to a text encoder: `tokenizer.json`, or CLIP's `vocab.json`.

    Looked for in this order: what the user gave; the model's folder, or `tokenizer` beside a folder `text_encoder`;
    for a single file the folder of its name and its own; the Hugging Face cache, and huggingface.co.

    Args:
        model: folder or file of the text encoder.
        given: folder or file of the user's choice.
        repository: name on huggingface.co.

    Raises:
        UserError: none was found.
    """
    model = Path(model)
    if given is not None:
        path = _in_folder(Path(given)) if Path(given).is_dir() else Path(given)
        if path is None or not path.is_file():
            raise UserError(f"{given}: tokenizer not found; a folder with tokenizer.json or the file is expected")
        return path
    beside = model.with_name(model.name.replace("text_encoder", "tokenizer"))
    for folder in [model, beside] if model.is_dir() else [model.with_suffix(""), model.parent]:
        if path := _in_folder(folder):
            return path
    return _from_hub(model, repository)


def _in_folder(folder: Path) -> Path | None:
    return next((path for name in ("tokenizer.json", VOCABULARY) if (path := folder / name).is_file()), None)


def _from_hub(model: Path, repository: str) -> Path:
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(repository, "tokenizer.json"))
    except Exception as error:  # the hub's, its HTTP client's and the network's errors have no common ancestor
        raise UserError(
            f"{model}: no tokenizer.json beside it, and none from huggingface.co ({type(error).__name__}); download "
            f"tokenizer.json of {repository} and give it with --tokenizer1 (LLM) or --tokenizer2 (CLIP)"
        ) from None


def _parsed(path: Path) -> Tokenizer:
    text = read_text(path, "tokenizer")
    try:
        if path.name == VOCABULARY:
            return bpe_tokenizers.clip_tokenizer(json.loads(text), _merges(path.with_name("merges.txt")))
        return Tokenizer.from_str(text)
    except UserError:
        raise
    except Exception as error:  # the library raises plain Exception
        raise UserError(f"{path}: not a tokenizer: {one_line(repr(error))[:200]}") from None


def _merges(path: Path) -> list[tuple[str, ...]]:
    """The pairs of a merges.txt, whose first line is a version."""
    lines = read_text(path, "merges of the tokenizer").split("\n")
    return [tuple(line.split()) for line in lines if line.strip() and not line.startswith("#version")]


def _check_round_trip(path: Path, tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(ROUND_TRIP, add_special_tokens=False).ids
    text = tokenizer.decode(ids).replace("</w>", " ").strip()
    if text != ROUND_TRIP:
        raise UserError(
            f"{path}: broken tokenizer: '{ROUND_TRIP}' comes back as '{one_line(text)[:60]}' (transformers 5 saves "
            "Llama 3 tokenizers so); download the original tokenizer.json again"
        )
