"""The error that a user can correct, and helpers for its message."""

import difflib


class UserError(ValueError):
    """A mistake that the user can correct. The message is one line: what, where, what was expected, what to do.

    Scripts print it on stderr and exit with code 2 (`utils.cli.run_script`).
    """


def one_line(text: object) -> str:
    """Joins the lines of a text, for messages that quote an error of a library."""
    return " ".join(str(text).split())


def did_you_mean(word: str, known: list[str]) -> str:
    """The text " (did you mean 'x'?)" with the most similar known word; empty if none is similar."""
    nearest = difflib.get_close_matches(word, known, n=1)
    return f" (did you mean '{nearest[0]}'?)" if nearest else ""
