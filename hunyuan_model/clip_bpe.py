"""CLIP's tokenizer, built from a vocabulary and its merges.

Everything but the vocabulary is as in the published `tokenizer.json`: lower-case byte-level BPE, where a word's last
token ends in `</w>`.
"""

from collections.abc import Mapping, Sequence

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE

# https://github.com/openai/CLIP, clip/simple_tokenizer.py
CLIP_PATTERN = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
CLIP_SPECIAL_TOKENS = ("<|startoftext|>", "<|endoftext|>")
END_OF_WORD = "</w>"

Merges = Sequence[tuple[str, str]]


def clip_pre_tokenizer() -> pre_tokenizers.PreTokenizer:
    """Splits text into words without the spaces between them, and words into bytes."""
    split = pre_tokenizers.Split(Regex(CLIP_PATTERN), behavior="removed", invert=True)
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False)])


def clip_bpe_tokenizer(ids: Mapping[str, int], merges: Merges) -> Tokenizer:
    """A CLIP tokenizer that puts every text between `<|startoftext|>` and `<|endoftext|>`.

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
