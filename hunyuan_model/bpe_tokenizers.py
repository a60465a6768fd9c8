"""The two kinds of tokenizer of HunyuanVideo's text encoders, built from a vocabulary and its merges.

Everything but the vocabulary is as in the published `tokenizer.json` files. Llama 3 is byte-level BPE with a pattern of
its own that splits text into words. CLIP is lower-case byte-level BPE; a word's last token ends in `</w>`.
"""

from collections.abc import Mapping, Sequence

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE

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

Merges = Sequence[tuple[str, str]]


def llama_pre_tokenizer() -> pre_tokenizers.PreTokenizer:
    """Splits text into words, spaces included, and words into bytes."""
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    split = pre_tokenizers.Split(Regex(LLAMA_PATTERN), behavior="isolated")
    return pre_tokenizers.Sequence([split, byte_level])


def llama_tokenizer(tokens: Sequence[str], merges: Merges) -> Tokenizer:
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


def clip_pre_tokenizer() -> pre_tokenizers.PreTokenizer:
    """Splits text into words without the spaces between them, and words into bytes."""
    split = pre_tokenizers.Split(Regex(CLIP_PATTERN), behavior="removed", invert=True)
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False)])


def clip_tokenizer(ids: Mapping[str, int], merges: Merges) -> Tokenizer:
    """A CLIP tokenizer, which puts every text between `<|startoftext|>` and `<|endoftext|>`.

    Args:
        ids: ids of the byte-level tokens and of the two special tokens.
        merges: pairs of tokens in the order in which they are merged.
    """
    start, end = CLIP_SPECIAL_TOKENS
    model = BPE(dict(ids), merges, unk_token=end, continuing_subword_prefix="", end_of_word_suffix=END_OF_WORD)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    tokenizer.pre_tokenizer = clip_pre_tokenizer()
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in CLIP_SPECIAL_TOKENS])
    tokenizer.post_processor = processors.RobertaProcessing(
        (end, ids[end]), (start, ids[start]), trim_offsets=False, add_prefix_space=False
    )
    return tokenizer
