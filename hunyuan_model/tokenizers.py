"""Tokenizers of the two text encoders, read from their files and checked before they are used.

transformers 5 can replace the pre-tokenizer of a byte-level Llama 3 tokenizer, so that spaces vanish without an error
(its issue 45488). This module therefore uses the package tokenizers alone, and refuses a file saved in that state.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Encoding, Tokenizer
from torch import Tensor

from hunyuan_model.clip_bpe import clip_bpe_tokenizer
from utils.errors import UserError, one_line
from utils.files import parse_json, read_text

# The text around a video's prompt (hyvideo/constants.py of HunyuanVideo), and how many tokens stand before the prompt.
VIDEO_TEMPLATE = (
    "<|start_header_id|>system<|end_header_id|>\n\nDescribe the video by detailing the following aspects: "
    "1. The main content and theme of the video."
    "2. The color, shape, size, texture, quantity, text, and spatial relationships of the objects."
    "3. Actions, events, behaviors temporal relationships, physical movement changes of the objects."
    "4. background environment, light, style and atmosphere."
    "5. camera angles, movements, and transitions used in the video:<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\n{}<|eot_id|>"
)
VIDEO_PREFIX_TOKENS = 95
LLAMA_3_VOCABULARY_SIZE = 128_000
# Longer prompts are cut. The LLM's tokens are counted without those before the prompt.
LLM_MAX_TOKENS = 256
CLIP_MAX_TOKENS = 77

LLM_REPOSITORY = "xtuner/llava-llama-3-8b-v1_1-transformers"
CLIP_REPOSITORY = "openai/clip-vit-large-patch14"
# Special tokens that a tokenizer must have to be the one of this text encoder.
LLM_MARKERS = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
CLIP_MARKERS = ("<|startoftext|>", "<|endoftext|>")
# The first of these that a tokenizer has is its padding token. Padding is masked, so the choice does not matter.
PADDING = ("<pad>", "<|finetune_right_pad_id|>", "<|end_of_text|>", "<|endoftext|>")
# diffusers' folders hold CLIP's tokenizer in an older form: two files, vocab.json and merges.txt.
VOCABULARY_FILE, MERGES_FILE = "vocab.json", "merges.txt"
# This sentence is encoded and decoded to test a tokenizer.
ROUND_TRIP = "a cat walks on the grass"


class PromptTokenizer:
    """Turns prompts into token ids, padded on the right to one length.

    Args:
        path: a `tokenizer.json`, or the `vocab.json` of a CLIP tokenizer with `merges.txt` beside it.
        template: text around the prompt, with `{}` for the prompt.
        max_tokens: tokens to keep, not counting those that the template puts before the prompt.
        markers: special tokens that the tokenizer must have.

    Raises:
        UserError: unreadable, of another model, or broken in a way that would corrupt text without an error.
    """

    def __init__(self, path: str | Path, template: str, max_tokens: int, markers: Sequence[str]) -> None:
        self.path = Path(path)
        self._tokenizer = _load(self.path)
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
        is_llama_3 = template == VIDEO_TEMPLATE and self.size >= LLAMA_3_VOCABULARY_SIZE
        if is_llama_3 and self.prefix_length != VIDEO_PREFIX_TOKENS:
            raise UserError(
                f"{self.path}: the prompt template takes {self.prefix_length} tokens, {VIDEO_PREFIX_TOKENS} with the "
                f"original Llama 3 tokenizer; use the tokenizer.json of {LLM_REPOSITORY}"
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
        """For each prompt the end that is cut because it is too long; an empty string if nothing is cut."""
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


def llm_tokenizer(path: str | Path) -> PromptTokenizer:
    """The Llama 3 tokenizer of text encoder 1."""
    return PromptTokenizer(path, VIDEO_TEMPLATE, LLM_MAX_TOKENS, LLM_MARKERS)


def clip_tokenizer(path: str | Path) -> PromptTokenizer:
    """The CLIP tokenizer of text encoder 2."""
    return PromptTokenizer(path, "{}", CLIP_MAX_TOKENS, CLIP_MARKERS)


def fingerprint(path: str | Path, template: str) -> str:
    """Identifies a tokenizer file and its template, from the text of the file."""
    return hashlib.sha256((template + read_text(path, "tokenizer")).encode()).hexdigest()[:16]


def find_tokenizer(model: str | Path, given: str | Path | None, repository: str) -> Path:
    """The file of the tokenizer that belongs to a text encoder: `tokenizer.json`, or CLIP's `vocab.json`.

    If the user gave none, these places are searched in this order:
    1. model is a folder: that folder, then the one beside it with `tokenizer` for `text_encoder` in its name;
       model is a file: the folder of the same name without the suffix, then the file's own folder;
    2. the Hugging Face cache, then huggingface.co.

    Args:
        model: folder or file of the text encoder.
        given: folder or file that the user chose.
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


def tokenizer_files(path: Path) -> list[Path]:
    """Every file that the tokenizer `path` of `find_tokenizer` is read from."""
    return [path, path.with_name(MERGES_FILE)] if path.name == VOCABULARY_FILE else [path]


def _in_folder(folder: Path) -> Path | None:
    return next((path for name in ("tokenizer.json", VOCABULARY_FILE) if (path := folder / name).is_file()), None)


def _from_hub(model: Path, repository: str) -> Path:
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(repository, "tokenizer.json"))
    except Exception as error:  # errors of the hub, its HTTP client and the network have no common base class
        raise UserError(
            f"{model}: no tokenizer.json beside it, and none from huggingface.co ({type(error).__name__}); download "
            f"tokenizer.json of {repository} and give it with --tokenizer1 (LLM) or --tokenizer2 (CLIP)"
        ) from None


def _load(path: Path) -> Tokenizer:
    text = read_text(path, "tokenizer")
    try:
        if path.name == VOCABULARY_FILE:
            return clip_bpe_tokenizer(parse_json(text), _merges(path.with_name(MERGES_FILE)))
        return Tokenizer.from_str(text)
    except UserError:
        raise
    except Exception as error:  # the package tokenizers raises plain Exception
        raise UserError(f"{path}: not a tokenizer: {one_line(repr(error))[:200]}") from None


def _merges(path: Path) -> list[tuple[str, ...]]:
    """The pairs in a merges.txt. Its first line is a version."""
    lines = read_text(path, "merges of the tokenizer").split("\n")
    return [tuple(line.split()) for line in lines if line.strip() and not line.startswith("#version")]


def _check_round_trip(path: Path, tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(ROUND_TRIP, add_special_tokens=False).ids
    text = tokenizer.decode(ids).replace("</w>", " ").strip()
    if text != ROUND_TRIP:
        raise UserError(
            f"{path}: broken tokenizer: '{ROUND_TRIP}' becomes '{one_line(text)[:60]}' when it is encoded "
            "and decoded (transformers 5 saves Llama 3 tokenizers this way); download the original tokenizer.json again"
        )
