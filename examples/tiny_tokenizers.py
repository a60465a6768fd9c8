"""Small tokenizers for the small text encoders, trained within a second on a few sentences."""

import json
from collections.abc import Sequence
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, pre_tokenizers, processors, trainers
from tokenizers.models import BPE

from hunyuan_model.clip_bpe import (
    CLIP_SPECIAL_TOKENS,
    END_OF_WORD,
    Merges,
    clip_bpe_tokenizer,
    clip_pre_tokenizer,
)
from utils.files import write_text

# https://github.com/meta-llama/llama-models, llama3/tokenizer.py
LLAMA_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
LLAMA_SPECIAL_TOKENS = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<image>",
    "<pad>",
)

TRAINING_TEXT = (
    "Describe the video by detailing the following aspects: 1. The main content and theme of the video.",
    "2. The color, shape, size, texture, quantity, text, and spatial relationships of the objects.",
    "3. Actions, events, behaviors temporal relationships, physical movement changes of the objects.",
    "4. background environment, light, style and atmosphere.",
    "5. camera angles, movements, and transitions used in the video:",
    "a cat walks on the grass, a red ball moves from the left to the right, a blue square turns on a white background",
    "the camera pans slowly over the sea at night, realistic, the style of a green circle and a yellow triangle",
)
MERGES = 300


def _trained(
    text: Sequence[str], merges: int, pre_tokenizer: pre_tokenizers.PreTokenizer, end_of_word: str = ""
) -> tuple[list[str], list[tuple[str, str]]]:
    """Trains byte-level BPE; returns the tokens in the order of their ids, single bytes first, and the merges."""
    learner = Tokenizer(BPE())
    learner.pre_tokenizer = pre_tokenizer
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=2 * len(alphabet) + merges,
        initial_alphabet=alphabet,
        end_of_word_suffix=end_of_word,
        show_progress=False,
    )
    learner.train_from_iterator([line.lower() if end_of_word else line for line in text], trainer)
    pairs = [tuple(pair) for pair in json.loads(learner.to_str())["model"]["merges"]]
    # A byte at the end of a word is another token. Not every byte ends a word of the training text, so all are added.
    endings = [byte + end_of_word for byte in alphabet] if end_of_word else []
    return [*alphabet, *endings, *map("".join, pairs)], pairs


def llama_pre_tokenizer() -> pre_tokenizers.PreTokenizer:
    """Splits text into words, spaces included, and words into bytes."""
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    split = pre_tokenizers.Split(Regex(LLAMA_PATTERN), behavior="isolated")
    return pre_tokenizers.Sequence([split, byte_level])


def llama_bpe_tokenizer(tokens: Sequence[str], merges: Merges) -> Tokenizer:
    """A Llama 3 tokenizer, which puts `<|begin_of_text|>` before every text. Special tokens have the highest ids.

    Args:
        tokens: byte-level tokens in the order of their ids.
        merges: pairs of tokens in the order in which they are merged.
    """
    tokenizer = Tokenizer(BPE({token: index for index, token in enumerate(tokens)}, merges, ignore_merges=True))
    tokenizer.pre_tokenizer = llama_pre_tokenizer()
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in LLAMA_SPECIAL_TOKENS])
    begin = LLAMA_SPECIAL_TOKENS[0]
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(
                single=f"{begin} $A",
                pair=f"{begin} $A {begin}:1 $B:1",
                special_tokens=[(begin, tokenizer.token_to_id(begin))],
            ),
        ]
    )
    return tokenizer


def llama_tokenizer(text: Sequence[str] = TRAINING_TEXT, merges: int = MERGES) -> Tokenizer:
    """A small Llama 3 tokenizer. With enough merges every word of `text` is one token."""
    return llama_bpe_tokenizer(*_trained(text, merges, llama_pre_tokenizer()))


def clip_tokenizer(text: Sequence[str] = TRAINING_TEXT, merges: int = MERGES) -> Tokenizer:
    """A small CLIP tokenizer. With enough merges every word of `text` is one token.

    The end token has the highest id: models published before 2023 look for it as the largest id of a row.
    """
    tokens, pairs = _trained(text, merges, clip_pre_tokenizer(), END_OF_WORD)
    ids = {token: index for index, token in enumerate([*tokens, *CLIP_SPECIAL_TOKENS])}
    return clip_bpe_tokenizer(ids, pairs)


def write_tokenizer(tokenizer: Tokenizer, folder: Path, **config: object) -> None:
    """Writes `tokenizer.json`, and `config` as the `tokenizer_config.json` that transformers reads."""
    write_text(folder / "tokenizer.json", tokenizer.to_str(pretty=True))
    write_text(folder / "tokenizer_config.json", json.dumps(config, indent=2) + "\n")
