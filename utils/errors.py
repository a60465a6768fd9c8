"""The error that a user can correct, and helpers for its message."""

import difflib
import unicodedata

_CONTROL = ("Cc", "Cs", "Zl", "Zp")  # control characters, halves of surrogate pairs, separators of lines
_DIRECTION = frozenset(map(chr, [*range(0x202A, 0x202F), *range(0x2066, 0x206A)]))


class UserError(ValueError):
    """A mistake that the user can correct. The message is one line: what, where, what was expected, what to do.

    Scripts print it on stderr and exit with code 2 (`utils.cli.run_script`).
    """


def one_line(text: object) -> str:
    """Joins the lines of a text, for messages that quote an error of a library or the text of a file."""
    return printable(" ".join(str(text).split()))


def printable(text: object) -> str:
    """The text with escape sequences instead of characters that control a terminal or reverse the text.

    Every text from a file, names of files included, goes through this before it is printed.
    """
    return "".join(repr(c)[1:-1] if unicodedata.category(c) in _CONTROL or c in _DIRECTION else c for c in str(text))


def did_you_mean(word: str, known: list[str]) -> str:
    """The text " (did you mean 'x'?)" with the most similar known word; empty if none is similar."""
    nearest = difflib.get_close_matches(word, known, n=1)
    return f" (did you mean '{nearest[0]}'?)" if nearest else ""
