"""Small tokenizers of the two kinds that HunyuanVideo's text encoders use, trained in a moment on a few sentences.

Everything but the vocabulary is as in the published `tokenizer.json` files: Llama 3 is byte-level BPE over its own
pre-tokenizer pattern, CLIP is lower-case byte-level BPE whose words end in `</w>`.
"""

import json
from collections.abc import Sequence
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors, trainers
from tokenizers.models import BPE

from utils.files import write_text

# https://github.com/meta-llama/llama-models, llama3/tokenizer.py
LLAMA_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
# https://github.com/openai/CLIP, clip/simple_tokenizer.py
CLIP_PATTERN = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
LLAMA_SPECIAL_TOKENS = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<image>",
    "<pad>",
)
CLIP_SPECIAL_TOKENS = ("<|startoftext|>", "<|endoftext|>")
END_OF_WORD = "</w>"
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
    pre_tokenizer: pre_tokenizers.PreTokenizer, end_of_word: str = ""
) -> tuple[list[str], list[tuple[str, str]]]:
    """Byte-level BPE: the tokens in the order of their ids, every single byte first, and the merges."""
    learner = Tokenizer(BPE())
    learner.pre_tokenizer = pre_tokenizer
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=2 * len(alphabet) + MERGES,
        initial_alphabet=alphabet,
        end_of_word_suffix=end_of_word,
        show_progress=False,
    )
    learner.train_from_iterator([text.lower() if end_of_word else text for text in TRAINING_TEXT], trainer)
    merges = [tuple(pair) for pair in json.loads(learner.to_str())["model"]["merges"]]
    # A byte that ends a word is a token of its own, and the training text has not every byte in that place.
    endings = [byte + end_of_word for byte in alphabet] if end_of_word else []
    return [*alphabet, *endings, *map("".join, merges)], merges


def llama_tokenizer() -> Tokenizer:
    """A small Llama 3 tokenizer."""
    return llama_tokenizer_from(*_trained(_llama_pre_tokenizer()))


def _llama_pre_tokenizer() -> pre_tokenizers.PreTokenizer:
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    split = pre_tokenizers.Split(Regex(LLAMA_PATTERN), behavior="isolated")
    return pre_tokenizers.Sequence([split, byte_level])


def llama_tokenizer_from(tokens: Sequence[str], merges: Sequence[tuple[str, str]]) -> Tokenizer:
    """The Llama 3 tokenizer of a vocabulary, special tokens after the others, which puts `<|begin_of_text|>` first.

    Args:
        tokens: byte-level tokens in the order of their ids.
        merges: pairs of tokens, those merged first in front.
    """
    tokenizer = Tokenizer(BPE({token: index for index, token in enumerate(tokens)}, merges, ignore_merges=True))
    tokenizer.pre_tokenizer = _llama_pre_tokenizer()
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


def clip_tokenizer() -> Tokenizer:
    """A CLIP tokenizer, which puts the text between `<|startoftext|>` and `<|endoftext|>`."""
    pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(CLIP_PATTERN), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokens, merges = _trained(pre_tokenizer, END_OF_WORD)
    start, end = CLIP_SPECIAL_TOKENS
    # The end token has the highest id: models published before 2023 find it as the largest of a row.
    ids = {token: index for index, token in enumerate([*tokens, start, end])}
    tokenizer = Tokenizer(BPE(ids, merges, unk_token=end, continuing_subword_prefix="", end_of_word_suffix=END_OF_WORD))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in CLIP_SPECIAL_TOKENS])
    tokenizer.post_processor = processors.RobertaProcessing(
        (end, ids[end]), (start, ids[start]), trim_offsets=False, add_prefix_space=False
    )
    return tokenizer


def write_tokenizer(tokenizer: Tokenizer, folder: Path, **config: object) -> None:
    """Writes `tokenizer.json` and, from `config`, the `tokenizer_config.json` that transformers reads beside it."""
    write_text(folder / "tokenizer.json", tokenizer.to_str(pretty=True))
    write_text(folder / "tokenizer_config.json", json.dumps(config, indent=2) + "\n")
